"""PACT against the steps of its card in plain loops; sizes in later layers are in tests/adapters/language."""

from __future__ import annotations

import math

import pytest
import torch
from mixed import DIM, HEADS, KEY_HEADS, LAYOUTS, RIGHT, kept_of, mixed
from vlms import VLMS, prompts

import tokenreduce as tr


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def evidence_of(layouts, **more):
    """Rotated keys that are others than the bare ones, some of them close to each other."""
    n = len(layouts[0])
    rotated = noise(len(layouts), KEY_HEADS, 4, DIM, seed=9).repeat(1, 1, n, 1)[:, :, :n]
    rotated = rotated + 0.35 * noise(len(layouts), KEY_HEADS, n, DIM, seed=10)
    queries = noise(len(layouts), HEADS, n, DIM, seed=11)
    return mixed(layouts, rotated=(queries, rotated), **more)


def reference(e, layouts, b, *, cutoff=0.21, share=0.55, coef=1.5, wanted=None):
    """{place: members} of a sample's visual tokens that are left."""
    row = layouts[b]
    v = [i for i, c in enumerate(row) if c == "v"]
    if not v:
        return {}
    span = [i for i in range(v[-1] + 1) if row[i] != "."]
    weight = dict.fromkeys(v, 0.0)
    for h in range(HEADS):
        q = torch.stack([e.queries[b, h, i].double() for i in span]).mean(0)
        logits = [float(q @ e.keys[b, h // (HEADS // KEY_HEADS), i].double()) / math.sqrt(DIM) for i in span]
        p = torch.tensor(logits, dtype=torch.double).softmax(0)
        for i, w in zip(span, p.tolist(), strict=True):
            if i in weight:
                weight[i] += w / HEADS
    score = {i: weight[i] * float(e.x[b, i].double().norm()) for i in v}
    many = max(1, int(len(v) * share))
    if wanted is not None:
        many = max(many, wanted)
    kept = sorted(sorted(v, key=lambda i: (-score[i], i))[:many])
    key = {i: e.attention.used[1][b, :, i].double().flatten() for i in v}

    def d(i, j):
        return 0.0 if i == j else max(0.0, 1 - float(key[i] @ key[j] / (key[i].norm() * key[j].norm())))

    density = {i: sum(math.exp(-((d(i, j) / 2) ** 2)) for j in kept) for i in kept}
    order = sorted(kept, key=lambda i: (-density[i], i))
    centres = []
    for i in order:
        if all(d(i, c) > cutoff for c in centres):
            centres.append(i)
    if wanted is not None:
        centres = centres[:wanted]
    out = {c: [c] for c in centres}
    for i in v:
        if i in centres:
            continue
        near = min(sorted(centres), key=lambda c: (d(i, c), c))
        if i in kept or d(i, near) <= coef * cutoff:
            out[near].append(i)
    return out


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT, ("vtvvtvvt", "tvvvvvvv"), ("v" * 30, "t" * 30)], ids=str)
@pytest.mark.parametrize("cutoff", [0.0, 0.05, 0.21, 0.7])
@pytest.mark.parametrize("share", [0.3, 0.55, 1.0])
def test_is_the_plan_of_the_card(layouts, cutoff, share):
    e = evidence_of(layouts)
    plan = tr.PACT(layer=2, cutoff=cutoff, keep=share).plan(e)
    got = plan.reduce(e.x)
    size = plan.reduce_size(None)
    for b, row in enumerate(layouts):
        want = reference(e, layouts, b, cutoff=cutoff, share=share)
        kept = kept_of(plan, b)
        assert [i for i in kept if row[i] == "v"] == sorted(want)
        assert [i for i in kept if row[i] != "v"] == [i for i, c in enumerate(row) if c != "v"]
        for slot, i in enumerate(kept, plan.k - len(kept)):
            members = want.get(i, [i])
            torch.testing.assert_close(got[b, slot], e.x[b, members].mean(0), rtol=1e-4, atol=1e-5)
            if size is not None:
                assert float(size[b, slot]) == pytest.approx(len(members))


def test_defaults_are_the_published_ones():
    e = evidence_of(LAYOUTS)
    assert tr.PACT(layer=2).plan(e) == tr.PACT(layer=2, cutoff=0.21, keep=0.55).plan(e)
    assert [i for i in range(32) if tr.PACT().acts_at(i, 32)] == [4]
    assert [i for i in range(4) if tr.PACT().acts_at(i, 4)] == [2]


@pytest.mark.parametrize("keep", [1, 3, 5, 0.5, 8])
def test_keep_alone_is_exact(keep):
    e = evidence_of(LAYOUTS)
    plan = tr.PACT(layer=2, keep=keep).plan(e)
    for b, row in enumerate(LAYOUTS):
        n = row.count("v")
        want = min(keep, n) if isinstance(keep, int) else int(keep * n + 0.5)
        assert len([i for i in kept_of(plan, b) if row[i] == "v"]) == want


def test_means_may_be_left_out():
    e = evidence_of(LAYOUTS)
    plan = tr.PACT(layer=2, take_mean=False).plan(e)
    assert torch.equal(plan.reduce(e.x), plan.gather(e.x))
    assert torch.equal(plan.representatives(), tr.PACT(layer=2).plan(e).representatives())


def test_equal_tokens_become_one_and_the_first_is_the_centre():
    e = evidence_of(("tvvvvt",))
    for t in (e.x, e.keys, e.queries, *e.attention.rotated):
        t[:] = t[..., :1, :].clone()
    plan = tr.PACT(layer=2, cutoff=0.1, keep=1.0).plan(e)
    assert kept_of(plan, 0) == [0, 1, 5]
    assert plan.reduce_size(None).tolist() == [[1.0, 4.0, 1.0]]


@pytest.mark.parametrize(
    "bad", [{"cutoff": -0.1}, {"coef_pruned": -1.0}, {"size_bias": "square"}, {"size_bias": 1.5}, {"layer": -1}]
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        tr.PACT(**bad)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_queries_and_keys_before_and_behind_the_rotation(family):
    model = VLMS[family].model
    inputs = prompts(VLMS[family], ((9, "i"), (5, "i")))
    layer = model.model.get_submodule(VLMS[family].text).layers[2]
    seen, bare = [], []

    class Look(tr.PACT):
        def plan(self, evidence):
            seen.append(evidence.attention)
            return super().plan(evidence)

    hook = layer.self_attn.k_proj.register_forward_hook(lambda m, a, out: bare.append(out))
    with torch.no_grad(), tr.patched(model, Look(layer=2, keep=1.0, cutoff=0.0)):
        model(**inputs)
    hook.remove()
    k = seen[0].keys
    if not hasattr(layer.self_attn, "k_norm"):
        want = bare[0].unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
        torch.testing.assert_close(k, want)
    torch.testing.assert_close(seen[0].used[1].norm(dim=-1), k.norm(dim=-1))
    assert not torch.allclose(seen[0].used[1], k)


def test_what_does_not_go_with_sizes_is_refused(monkeypatch):
    model = VLMS["llava"].model
    inputs = prompts(VLMS["llava"], ((9, "i"), (5, "i")))
    with torch.no_grad(), tr.patched(model, "pact:keep=4"):
        from tokenreduce.adapters.language.steps import gather

        monkeypatch.setattr(gather, "check_implementation", lambda *a: "flash_attention_2")
        with pytest.raises(ValueError, match="flash_attention_2 takes no bias"):
            model(**inputs)
    with pytest.raises(ValueError, match="size_bias='none'"):
        tr.patch(model, "pact:layer=1", "dycoke-cache:layer=2")
    with tr.patched(model, "pact:layer=1,size_bias=none", "dycoke-cache:layer=2"):
        pass
