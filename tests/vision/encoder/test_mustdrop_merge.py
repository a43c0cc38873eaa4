"""MustDrop's merging of windows against the steps of its card in plain loops."""

from __future__ import annotations

import pytest
import torch
from support import evidence, images, tiny_vit

import tokenreduce as tr
from tokenreduce.core.plan import Merge
from tokenreduce.vision.encoder.mustdrop_merge import MustDropMerge


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def windows(rows, cols, prefix, side=3):
    """Tokens of each window, row by row, windows from the top left."""
    return [
        [prefix + (r * side + i) * cols + c * side + j for i in range(side) for j in range(side)]
        for r in range(rows // side)
        for c in range(cols // side)
    ]


def cosine(a, b):
    return float(a @ b) / max(float(a.norm() * b.norm()), 1e-12)


def similarity(x, window):
    """Step 1 of the card: the mean of the off-diagonal cosines."""
    values = [cosine(x[i].double(), x[j].double()) for i in window for j in window if i != j]
    return sum(values) / len(values)


def scene(rows, cols, prefix, batch=2, seed=0):
    """Tokens of patches in which some windows are alike: each has a noise level of its own."""
    x = noise(batch, prefix + rows * cols, 8, seed=seed)
    for b in range(batch):
        for w, window in enumerate(windows(rows, cols, prefix)):
            level = float(noise(1, seed=100 * seed + 10 * b + w).abs())
            x[b, window] = noise(8, seed=w + 1) + level * x[b, window]
    return x


def kept(plan, b):
    valid, row = plan.validity(), plan.representatives()[b]
    return (row if valid is None else row[valid[b]]).tolist()


@pytest.mark.parametrize(("rows", "cols"), [(6, 6), (3, 3), (9, 6), (7, 8), (4, 5), (11, 3)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("threshold", [0.8, 0.3, 0.97, -1])
def test_windows_above_the_threshold_become_their_last_token(rows, cols, prefix, threshold):
    x = scene(rows, cols, prefix, batch=3)
    plan = MustDropMerge(threshold=threshold).plan(tr.Evidence(x, protected=prefix, grid=(rows, cols)))
    out = plan.reduce(x)
    sizes = plan.reduce_size(None)
    counts = []
    for b in range(3):
        merged = [w for w in windows(rows, cols, prefix) if similarity(x[b], w) >= threshold]
        gone = {i for w in merged for i in w[:-1]}
        want = [i for i in range(x.shape[1]) if i not in gone]
        counts.append(len(want))
        assert kept(plan, b) == want
        for slot, i in enumerate(want):
            mine = next((w for w in merged if w[-1] == i), [i])
            torch.testing.assert_close(out[b, slot], x[b, mine].sum(0) / len(mine), rtol=1e-5, atol=1e-5)
            assert (plan.sources()[b] == slot).nonzero().flatten().tolist() == mine
            assert plan.is_identity or sizes[b, slot] == len(mine)
    assert plan.k == max(counts)
    assert (plan.validity() is None) == (len(set(counts)) == 1)


def test_the_cases_are_mixed():
    """Windows on both sides of the threshold, and samples that differ: else the test above says little."""
    x = scene(9, 6, 1, batch=3)
    plan = MustDropMerge().plan(tr.Evidence(x, protected=1, grid=(9, 6)))
    assert len({len(kept(plan, b)) for b in range(3)}) > 1
    assert all(len(kept(plan, b)) > 55 - 8 * 6 for b in range(3))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("keep", [53, 50, 46, 45, 30, 10, 6, 0.5, 0.2])
def test_keep_is_exact(keep, prefix):
    """Whole windows in the order of their similarity, and of the last one the tokens nearest to the others."""
    x = scene(9, 6, prefix)
    plan = MustDropMerge(keep=keep).plan(tr.Evidence(x, protected=prefix, grid=(9, 6)))
    left = keep if isinstance(keep, int) else int(keep * 54 + 0.5)
    assert plan.k == left + prefix
    assert plan.validity() is None
    for b in range(2):
        ranked = sorted(windows(9, 6, prefix), key=lambda w: -similarity(x[b], w))
        order = []
        for w in ranked:
            near = {i: sum(cosine(x[b, i].double(), x[b, j].double()) for j in w if j != i) for i in w}
            order += sorted(w[:-1], key=lambda i: -near[i])
        gone = order[: 54 - left]
        assert kept(plan, b) == [i for i in range(54 + prefix) if i not in gone]
        for w in ranked:
            members = [i for i in w if i in gone] + [w[-1]]
            slot = kept(plan, b).index(w[-1])
            torch.testing.assert_close(plan.reduce(x)[b, slot], x[b, members].mean(0), rtol=1e-5, atol=1e-5)


def test_fewer_than_windows_allow_is_clamped_and_said():
    x = scene(6, 7, 1)
    with pytest.warns(UserWarning, match="keep=3 is less than merging every window leaves"):
        plan = MustDropMerge(keep=3).plan(tr.Evidence(x, protected=1, grid=(6, 7)))
    assert plan.k == 1 + 4 + 6


def test_a_sample_does_not_depend_on_its_batch():
    """The official code would merge as many windows in all images as the one with fewest allows."""
    x = scene(6, 6, 1, batch=2)
    x[1] = noise(37, 8, seed=3)
    together = MustDropMerge().plan(tr.Evidence(x, protected=1, grid=(6, 6)))
    alone = MustDropMerge().plan(tr.Evidence(x[:1], protected=1, grid=(6, 6)))
    assert len(kept(together, 1)) == 37
    assert kept(together, 0) == kept(alone, 0)
    assert len(kept(alone, 0)) < 37
    assert torch.equal(together.reduce(x)[1], x[1]), "a sample that merges nothing is untouched"
    torch.testing.assert_close(together.reduce(x)[0, : alone.k], alone.reduce(x[:1])[0])
    assert torch.equal(together.reduce_size(None)[1], torch.ones(37))


def test_nothing_alike_and_no_window():
    assert MustDropMerge().plan(tr.Evidence(noise(2, 36, 16), grid=(6, 6))).is_identity
    for n, grid in ((1, (1, 1)), (4, (2, 2)), (8, (2, 4)), (20, (2, 10))):
        assert MustDropMerge(keep=1).plan(tr.Evidence(torch.ones(1, n, 4), grid=grid)).is_identity


def test_flat_images_ties_and_zero_vectors():
    for x in (torch.ones(1, 36, 4), torch.ones(1, 36, 4) * 1e-3):
        assert kept(MustDropMerge().plan(tr.Evidence(x)), 0) == [14, 17, 32, 35]
        assert kept(MustDropMerge(keep=27).plan(tr.Evidence(x)), 0) == [
            i for i in range(36) if i not in (0, 1, 2, 6, 7, 8, 12, 13, 3)
        ], "the upper left window, then its neighbour"
    assert MustDropMerge().plan(tr.Evidence(torch.zeros(1, 36, 4))).is_identity, "black tokens resemble nothing"
    assert MustDropMerge(keep=20).plan(tr.Evidence(torch.zeros(1, 36, 4))).k == 20


def test_grids():
    x = scene(6, 6, 0, batch=1)
    known = MustDropMerge(keep=20).plan(tr.Evidence(x, grid=(6, 6)))
    assert MustDropMerge(keep=20).plan(tr.Evidence(x)) == known, "a square is taken for granted"
    frames = MustDropMerge(keep=4).plan(tr.Evidence(torch.ones(1, 36, 4), grid=(2, 3, 6)))
    assert kept(frames, 0) == [14, 17, 32, 35]
    runs = MustDropMerge().plan(tr.Evidence(torch.ones(1, 23, 4)))
    assert kept(runs, 0) == [8, 17, 18, 19, 20, 21, 22]
    small = MustDropMerge(window=2, keep=9).plan(tr.Evidence(torch.ones(1, 36, 4)))
    assert kept(small, 0) == [7, 9, 11, 19, 21, 23, 31, 33, 35]


def test_slots_without_a_token():
    """Large numbers in empty slots change nothing, also where the receiving slot is one; their size is 0."""
    x = scene(3, 9, 0, batch=1).repeat(2, 1, 1)
    there = torch.ones(2, 27, dtype=torch.bool)
    there[1, 20:] = False
    x[1, 20:] = 50.0
    x[1, 19] = 2 * x[1, 18]
    e = tr.Evidence(x, valid=there, size=there.float())
    plan = MustDropMerge(keep=12).plan(e)
    # Of three runs the last has two tokens in the second sample, which point the same way: it goes first.
    runs = [list(range(i, i + 9)) for i in (0, 9, 18)]
    assert plan.sources()[1, 18:].tolist() == [11] * 9
    assert plan.representatives()[1, 11] == 26
    torch.testing.assert_close(plan.reduce(x, e.size)[1, 11], x[1, 18] * 1.5)
    following = max(runs[:2], key=lambda w: similarity(x[1], w))
    gone = [i for w in runs[:2] for i in w if i not in kept(plan, 1)]
    assert len(gone) == 7
    assert set(gone) < set(following[:-1])
    torch.testing.assert_close(plan.reduce_size(e.size).sum(1), torch.tensor([27.0, 20.0]))
    alone = MustDropMerge(keep=12).plan(tr.Evidence(x[1:], valid=there[1:], size=there[1:].float()))
    assert torch.equal(alone.sources()[0], plan.sources()[1])


def test_sizes_weigh():
    x = noise(1, 9, 4)
    size = torch.arange(1.0, 10.0)[None]
    plan = MustDropMerge(threshold=-1).plan(tr.Evidence(x, size=size))
    torch.testing.assert_close(plan.reduce(x, size)[0, 0], (x[0] * size.T).sum(0) / 45)


def test_protection_by_a_mask_is_refused():
    mask = torch.zeros(1, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="give protected as a count"):
        MustDropMerge().plan(tr.Evidence(noise(1, 9, 4), protected=mask))


def test_in_a_model_it_acts_behind_the_first_block():
    model, x = tiny_vit(), images(3)
    with torch.no_grad():
        stock = model.blocks[0](model.norm_pre(model._pos_embed(model.patch_embed(x))))
        middle = sorted(similarity(stock[b], w) for b in range(3) for w in windows(6, 6, 1))[6]
        with tr.patched(model, MustDropMerge(threshold=middle)), tr.record(model, flops=False) as trace:
            together = model(x)
        plan = trace.plans[0] if not isinstance(trace.plans, dict) else next(iter(trace.plans.values()))
        want = MustDropMerge(threshold=middle).plan(tr.Evidence(stock, protected=1, grid=(6, 6)))
        assert isinstance(plan, Merge)
        assert plan == want
        assert trace.tokens[0] == plan.k < 37
        assert plan.validity() is not None
        with tr.patched(model, MustDropMerge(threshold=middle)):
            for b in range(3):
                torch.testing.assert_close(model(x[b : b + 1])[0], together[b], rtol=1e-4, atol=1e-4)
            torch.compiler.reset()
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), together, rtol=1e-4, atol=1e-4)


def test_where_it_acts():
    assert [i for i in range(6) if MustDropMerge().acts_at(i, 6)] == [0]
    assert [i for i in range(6) if MustDropMerge(layer=3).acts_at(i, 6)] == [3]
    with pytest.raises(ValueError, match="layer=6: the model has layers 0 to 5"):
        MustDropMerge(layer=6).acts_at(0, 6)
    assert MustDropMerge().acting_position() == "after"
    assert not MustDropMerge().proportional
    assert MustDropMerge(keep=18).plan(evidence(n=37)).k == 19


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(threshold=1.1), r"threshold is a cosine in \[-1, 1\]"),
        (dict(threshold=0.5, keep=3), "threshold or keep, not both"),
        (dict(window=1), "window is an int >= 2"),
        (dict(layer=-1), "layer is an int >= 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MustDropMerge(**settings)
