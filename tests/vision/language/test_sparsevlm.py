"""SparseVLM against the steps of its card in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from mixed import LAYOUTS, RIGHT, kept_of, last_of, mixed, seen_by

from tokenreduce.core.evidence import Prompt
from tokenreduce.core.plan import Prune
from tokenreduce.vision.language.sparsevlm import SparseVLM


def places(layout, letter):
    return [i for i, c in enumerate(layout) if c == letter]


def raters_of(x, layout):
    """Places of the raters in the layout at the entry, from its embeddings (N,C)."""
    images = places(layout, "v")
    texts = [i for i in places(layout, "t") if images and i > max(images)]
    if not texts:
        return []
    votes = torch.stack([torch.stack([x[v].double() @ x[t].double() for t in texts]).softmax(0) for v in images])
    mean = votes.mean(0)
    return [t for t, m in zip(texts, mean, strict=True) if m > mean.mean()]


def scores_of(evidence, b, layout, entry=None):
    """Mean attention of the raters, and the rows themselves."""
    entry = layout if entry is None else entry
    back = last_of(layout) - last_of(entry)
    rows = [r + back for r in raters_of(evidence.prompt.x[b], entry)] or [last_of(layout)]
    seen = torch.stack([seen_by(evidence, b, r) for r in rows])
    return seen.mean(0), seen


def density_peaks(x, pool, k):
    """{centre: members}, from the card's steps; instead of by noise, equal densities (two tokens that are nearest to
    each other) are told apart by the place in ``pool``, which is in the order of scores."""
    d = {(i, j): float((x[i].double() - x[j].double()).norm()) / math.sqrt(x.shape[1]) for i in pool for j in pool}
    density = {}
    for i in pool:
        near = sorted(d[i, j] for j in pool)[:k]
        density[i] = math.exp(-sum(v * v for v in near) / k)
    product = {}
    for at, i in enumerate(pool):
        denser = [j for j in pool if density[j] > density[i] or (density[j] == density[i] and j in pool[:at])]
        product[i] = density[i] * (min(d[i, j] for j in denser) if denser else max(d.values()))
    centres = sorted(pool, key=lambda i: -product[i])[:k]
    groups = {c: [c] for c in centres}
    for i in pool:
        if i not in centres:
            groups[min(centres, key=lambda c: d[i, c])].append(i)
    return groups


def reference(evidence, b, layout, kept, entry=None, share=0.3, cluster=0.1, limit=None):
    """({place: members}, in order) of what is left of one sample."""
    images = places(layout, "v")
    score, _ = scores_of(evidence, b, layout, entry)
    ranked = sorted(images, key=lambda i: (-float(score[i]), i))
    out = {i: [i] for i in range(len(layout)) if layout[i] != "v" or i in ranked[:kept]}
    removed = ranked[kept:]
    if removed and share:
        pool = removed[: min(len(removed), int(share * len(removed)) + 1)]
        k = int(len(pool) * cluster) + 1
        k = k if limit is None else min(k, limit)
        if k:
            out.update(density_peaks(evidence.x[b], pool, k))
    return dict(sorted(out.items()))


def compare(plan, evidence, b, want):
    assert kept_of(plan, b) == list(want)
    valid = plan.validity()
    out = plan.reduce(evidence.x)[b]
    out = out if valid is None else out[valid[b]]
    mean = torch.stack([evidence.x[b, members].double().mean(0) for members in want.values()])
    torch.testing.assert_close(out.double(), mean, rtol=1e-5, atol=1e-5)
    goes = {i: place for place, members in want.items() for i in members}
    sources = plan.sources()[b].tolist()
    first = 0 if valid is None else int((~valid[b]).sum())
    number = {place: first + i for i, place in enumerate(want)}
    assert sources == [number[goes[i]] if i in goes else -1 for i in range(evidence.n)]


LONG = ("tt" + "v" * 60 + "t" * 12, "." * 10 + "t" + "v" * 40 + "t" * 3 + "v" * 9 + "t" * 11)


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT, LONG, ("vvvvvvvvtttt",), ("vvvvvvttt", "ttttttttt")], ids=str)
@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 3, 3), (0.5, 0.5, 0.5), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("cluster", [0.1, 0.4])
def test_worked_example(layouts, counts, cluster):
    evidence = mixed(layouts)
    plan = SparseVLM(counts=counts, cluster=cluster).plan(evidence)
    for b, layout in enumerate(layouts):
        n = layout.count("v")
        kept = min(n, counts[0]) if isinstance(counts[0], int) else int(counts[0] * n + 0.5)
        want = reference(evidence, b, layout, kept, cluster=cluster)
        if len(want) == len(layout):
            want = {i: [i] for i in range(len(layout))}
        compare(plan, evidence, b, want)


def test_raters_are_those_of_the_entry():
    """After earlier cuts the embeddings at the entry still decide, and rows are counted from the end."""
    entry = ("tt" + "v" * 30 + "t" * 8, ".." + "t" * 3 + "v" * 20 + "tt" + "v" * 4 + "t" * 9)
    now = ("tt" + "v" * 12 + "t" * 8, "." * 3 + "t" * 3 + "v" * 5 + "tt" + "t" * 9)  # the second image is gone
    evidence = mixed(now, prompt=entry, layer=3)
    assert any(raters_of(evidence.prompt.x[b], entry[b]) for b in range(2))
    plan = SparseVLM(counts=(9, 6, 3)).plan(evidence)
    for b in range(2):
        compare(plan, evidence, b, reference(evidence, b, now[b], 3, entry[b]))


@pytest.mark.parametrize("layouts", [LONG, RIGHT], ids=["long", "right"])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (2.5, 0.9), (0.01, 0.0)])
def test_counts_by_rank(layouts, scale, bias):
    evidence = mixed(layouts)
    plan = SparseVLM(scale=scale, bias=bias).plan(evidence)
    for b, layout in enumerate(layouts):
        _, seen = scores_of(evidence, b, layout)
        part = seen[:, places(layout, "v")].float()
        rank = int(torch.linalg.matrix_rank(part))
        assert 1 < rank < part.shape[1]
        kept = max(1, int(rank * scale + bias))
        compare(plan, evidence, b, reference(evidence, b, layout, kept))


def test_ranks_do_not_depend_on_the_padding():
    from tokenreduce.vision.language.sparsevlm import _rank

    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(r, k, generator=g) @ torch.randn(k, n, generator=g) for r, k, n in ((5, 2, 9), (3, 3, 20))]
    padded = torch.zeros(2, 8, 30)
    for i, part in enumerate(parts):
        padded[i, : len(part), 4 : 4 + part.shape[1]] = part
    assert _rank(padded, torch.tensor([5, 3]), torch.tensor([9, 20])).tolist() == [2, 3]


def test_full_rank_prunes_nothing():
    layout = "vvv" + "t" * 30
    evidence = mixed((layout,))
    _, seen = scores_of(evidence, 0, layout)
    assert torch.linalg.matrix_rank(seen[:, :3].float()) == 3
    assert SparseVLM(scale=0.5).plan(evidence).is_identity


@pytest.mark.parametrize("visual", [1, 2, 3, 10, 47, 100])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_keep_counts_the_clusters(visual, share):
    layout = "t" + "v" * visual + "ttttt"
    evidence = mixed((layout,), layer=3)
    for keep in (1, 2, 5, 0.5, 40, visual):
        reducer = SparseVLM(keep=keep, recycle=share)
        wanted = min(keep, visual) if isinstance(keep, int) else int(keep * visual + 0.5)
        assert reducer.plan(evidence).k == wanted + 6
    if share == 0.3 and visual == 100:
        # 10 of 100: 5 kept leave 95, of which 29 are recycled to 3; 7 + 28 // 10 + 1 = 10 is the best split.
        plan = SparseVLM(keep=10).plan(evidence)
        compare(plan, evidence, 0, reference(evidence, 0, layout, 7))


def test_keep_reaches_its_number_by_equal_ratios():
    layout = "t" + "v" * 64 + "ttttt"
    for layer, want in ((1, 32), (2, 16), (3, 8)):
        assert SparseVLM(keep=0.125).plan(mixed((layout,), layer=layer)).k == want + 6


def test_without_recycling_tokens_are_only_dropped():
    evidence = mixed(LONG)
    plan = SparseVLM(counts=(5, 5, 5), recycle=0.0).plan(evidence)
    assert isinstance(plan, Prune)
    for b, layout in enumerate(LONG):
        compare(plan, evidence, b, reference(evidence, b, layout, 5, share=0))


def test_a_count_at_or_just_below_what_is_there_is_no_plan():
    for count in (9, 10, 11):  # 9: the one removed token would replace itself
        assert SparseVLM(counts=(count,) * 3).plan(mixed(("t" + "v" * 10 + "ttt",))).is_identity


def test_sizes_of_an_uneven_batch():
    evidence = mixed(LONG)
    size = torch.rand(2, evidence.n, generator=torch.Generator().manual_seed(3)) + 1
    plan = SparseVLM(counts=(0.2,) * 3).plan(evidence)
    assert plan.validity() is not None
    want = torch.where(plan.sources() >= 0, size, 0.0).sum(1)
    torch.testing.assert_close(plan.reduce_size(size).sum(1), want)


@pytest.mark.parametrize("layout", ["tvvvvvv", "vvvvvvt", "tvvvvvvt"])
def test_no_rater_falls_back_to_the_last_token(layout):
    """No text behind the picture, or a single token, whose share is its mean."""
    evidence = mixed((layout,))
    assert raters_of(evidence.prompt.x[0], layout) == []
    plan = SparseVLM(counts=(3, 3, 3)).plan(evidence)
    compare(plan, evidence, 0, reference(evidence, 0, layout, 3))


def test_large_embeddings_do_not_overflow():
    evidence = mixed(LONG)
    prompt = evidence.prompt
    evidence.prompt = Prompt(prompt.visual, prompt.valid, prompt.x * 1e4)
    plan = SparseVLM(counts=(5, 5, 5)).plan(evidence)
    for b, layout in enumerate(LONG):
        compare(plan, evidence, b, reference(evidence, b, layout, 5))


def test_ties_go_to_the_lower_index():
    evidence = mixed(("tvvvvvtt",))
    evidence.keys.zero_()
    evidence.x.fill_(1.0)
    plan = SparseVLM(counts=(2, 2, 2), recycle=1.0, cluster=0.3).plan(evidence)
    # Tokens 3 to 5 are recycled to one cluster; all points are the same, the first is the centre.
    assert plan.representatives().tolist() == [[0, 1, 2, 3, 6, 7]]
    assert plan.sources().tolist() == [[0, 1, 2, 3, 3, 3, 4, 5]]


def test_the_prompt_is_needed():
    evidence = mixed()
    evidence.prompt = None
    with pytest.raises(ValueError, match="needs prompt"):
        SparseVLM(keep=2).plan(evidence)


def test_where_it_acts():
    assert [i for i in range(32) if SparseVLM().acts_at(i, 32)] == [3, 7, 16]
    assert [i for i in range(4) if SparseVLM().acts_at(i, 4)] == [1, 2, 3]
    for depth in range(4, 80):
        assert sum(SparseVLM().acts_at(i, depth) for i in range(depth)) == 3
    assert [i for i in range(12) if SparseVLM(pruning_loc=(2, 10)).acts_at(i, 12)] == [3, 11]
    with pytest.raises(ValueError, match="three pruning layers need a language model of 4 layers, not 3"):
        SparseVLM().acts_at(0, 3)
    with pytest.raises(ValueError, match=r"pruning_loc=\(2, 11\): .* layers 0 to 10"):
        SparseVLM(pruning_loc=(2, 11)).acts_at(0, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(pruning_loc=(3, 2)), "ascending"),
        (dict(counts=(3, 2)), "one number for each of 3 layers"),
        (dict(counts=(3, 2, 0)), "counts is a number of tokens"),
        (dict(counts=(3, 2, 1), keep=3), "counts or keep"),
        (dict(scale=-1.0), "scale is a number >= 0"),
        (dict(bias="x"), "bias is a number"),
        (dict(recycle=1.5), r"recycle is a number in \[0, 1\]"),
        (dict(cluster=float("nan")), "cluster is a number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseVLM(**settings)
