from __future__ import annotations

import pytest
import torch
from cache_cases import agrees, case, keeps_all, kept, layers, top

import tokenreduce as tr


def asking(s):
    behind = [i for i in range(s.n) if s.visual and i > s.visual[-1]]
    return behind or [s.n - 1]


def density(s, threshold=0.01):
    rows = asking(s)
    per_head = []
    for h in range(s.heads):
        for g in range(s.a.shape[1]):
            alive = sum(s.a[h, g, i, j] >= threshold * s.a[h, g, i].max() for i in rows for j in range(i + 1))
            per_head.append(1 - float(alive) / sum(i + 1 for i in rows))
    return 1 - sum(per_head) / len(per_head)


def scores_of(s, one=False):
    scores = s.a[:, :, asking(s)].sum((1, 2))
    return scores.sum(0).expand_as(scores) if one else scores


def port(alpha, what="all", window=0.1, low=0.009, one=False, layered=True, threshold=0.01):
    def reference(samples):
        dense = [density(s, threshold) for s in samples]
        out = []
        for s, d in zip(samples, dense, strict=True):
            share = d / sum(dense) * len(samples) if layered else 1.0
            scores = scores_of(s, one)
            if what == "visual":
                a = min(1.0, alpha / len(s.visual)) if isinstance(alpha, int) else alpha
                count = max(1, int(min(1.0, max(low, share * a)) * len(s.visual)))
                out.append([sorted(s.text + top(scores[h], s.visual, count)) for h in range(s.heads)])
                continue
            if window == "layer":
                k = max(1, int(min(1.0, max(low, share * alpha)) * s.n))
                w = int(0.1 * k)
                k -= w
            else:
                k = max(1, int(min(1.0, max(low, share * (1 - window) * alpha)) * s.n))
                w = max(1, int(window * alpha * s.n))
            last, rest = list(range(s.n - w, s.n)), list(range(s.n - w))
            out.append([top(scores[h], rest, k) + last for h in range(s.heads)])
        return out

    return reference


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("given", ["queries", "attention"])
def test_port(groups, given):
    evs = layers(3, groups=groups, given=given, seed=groups)
    agrees(tr.VLCache(keep=0.4, what="all", threshold=0.1), evs, port(0.4, threshold=0.1))


@pytest.mark.parametrize("keep", [0.3, 4])
def test_visual_keys(keep):
    agrees(tr.VLCache(keep=keep), layers(4), port(keep, what="visual"))


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (dict(window="layer"), dict(window="layer", low=0.01)),
        (dict(head_adaptive=False), dict(one=True)),
        (dict(layer_adaptive=False), dict(layered=False)),
        (dict(window=0.3, clip=(0.2, 1.0)), dict(window=0.3, low=0.2)),
    ],
)
def test_options(settings, more):
    agrees(tr.VLCache(keep=0.5, what="all", **settings), layers(3, heads=3), port(0.5, **more))


def test_an_image_at_the_end_is_judged_by_the_last_token():
    agrees(tr.VLCache(keep=0.5), layers(2, ("ttttvvvvvvvvv", "..ttvtvvvvvvv")), port(0.5, what="visual"))


def test_dense_layers_keep_more_and_padding_is_not_sparse():
    """A layer that attends to all alike against one that sees one key; the same with padding in front."""
    flat, peaked = torch.zeros(1, 1, 9, 9), torch.zeros(1, 1, 9, 9)
    for i in range(9):
        flat[0, 0, i, : i + 1] = 1 / (i + 1)
        peaked[0, 0, i, 0] = 1.0
    visual = torch.tensor([[False] + [True] * 6 + [False] * 2])
    keys = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))

    def plans(pad):
        evs = []
        for i, rows in enumerate((flat, peaked)):
            wide = torch.nn.functional.pad(rows, (pad, 0, pad, 0))
            full, seen = (torch.nn.functional.pad(x, (pad, 0)) for x in (torch.ones(1, 9).bool(), visual))
            many = torch.nn.functional.pad(keys, (0, 0, pad, 0))
            evs.append(
                tr.CacheEvidence(many, many, attention=wide, kv_heads=1, visual=seen, valid=full, layer=i, depth=2)
            )
        return [[s - pad for s in kept(plan)[0]] for plan in tr.VLCache(keep=0.5).plans(evs)]

    want = [[0, 1, 2, 3, 4, 5, 7, 8], [0, 1, 7, 8]]  # densities 1 and 1/8.5, ties to the lower slot
    assert plans(0) == want
    assert plans(5) == want


def test_identity_and_bad_settings():
    for settings in (dict(), dict(what="all"), dict(what="all", window="layer")):
        keeps_all(tr.VLCache(keep=1.0, **settings))
    keeps_all(tr.VLCache(keep=100))
    assert tr.VLCache().moment() == "prompt"
    for bad, says in (
        (dict(window="all"), "layer"), (dict(window=2.0), "from 0 to 1"), (dict(clip=(0.5, 0.1)), "lower"),
        (dict(threshold=-1.0), "from 0 to 1"), (dict(keep=0), "keep"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            tr.VLCache(**bad)


def test_a_summary_holds_no_rows():
    bare = tr.VLCache().summary(case()).evidence
    with pytest.raises(ValueError, match="attention"):
        bare.rows()


def test_the_rows_of_the_question_are_enough():
    """Given only these, as adapters and others' data may have them, plans are the same."""
    evs = layers(3, ("ttvvvvvvvvvvvtttt", ".tvvvvvvvvvvvtttt"), given="attention")
    few = []
    for ev in evs:
        marks = dict(visual=ev._visual, valid=ev._valid)
        rows = ev.rows(4)
        few.append(
            tr.CacheEvidence(ev.keys, ev.values, attention=rows, kv_heads=2, layer=ev.layer, depth=3, **marks)
        )  # fmt: skip
    for spec in ("vl-cache:keep=0.3", "tgv-kv:keep=0.3", "aircache:keep=0.3", "snapkv:window_size=4"):
        method = tr.get_method(spec)
        assert method.plans(few) == method.plans(evs)
