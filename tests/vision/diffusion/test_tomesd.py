"""tomesd against its card, by a plain loop."""

from __future__ import annotations

import pytest
import torch

import tokenreduce as tr
from tokenreduce.algorithms import destinations


def loop(x, h, w, sx, sy, r):
    """The card on one sample (N,C) with the top-left destinations: places left, sources, and outputs that they join."""
    target = [i * sy * w + j * sx for i in range(h // sy) for j in range(w // sx)]
    source = [i for i in range(h * w) if i not in target]
    unit = torch.nn.functional.normalize(x, dim=-1)
    best = []
    for s in source:
        similar = [float(unit[s] @ unit[t]) for t in target]
        best.append((max(similar), similar.index(max(similar))))
    order = sorted(range(len(source)), key=lambda i: -best[i][0])  # stable: ties to the lower place
    merged, rest = order[:r], order[r:]
    keep = [source[i] for i in rest] + target
    return keep, [source[i] for i in merged], [len(rest) + best[i][1] for i in merged]


def points(batch, n, seed=0):
    return torch.randn(batch, n, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("grid", "cell", "ratio"),
    [((4, 4), (2, 2), 0.5), ((5, 7), (2, 2), 0.3), ((6, 4), (3, 2), 0.75), ((3, 9), (1, 2), 0.29),
     ((2, 2), (2, 2), 0.75)],
)  # fmt: skip
def test_the_card_by_a_loop(grid, cell, ratio, batch):
    (h, w), (sy, sx) = grid, cell
    x = points(batch, h * w)
    r = min(int(h * w * ratio), h * w - (h // sy) * (w // sx))
    plan = tr.ToMeSD(ratio=ratio, sx=sx, sy=sy, use_rand=False).plan(tr.Evidence(x, grid=grid))
    reduced, back = plan.reduce(x), plan.expand(plan.reduce(x))
    assert plan.k == h * w - r
    for b in range(batch):
        keep, src, dst = loop(x[b], h, w, sx, sy, r)
        assert plan.keep[b].tolist() == keep
        assert dict(zip(plan.src[b].tolist(), plan.dst[b].tolist(), strict=True)) == dict(zip(src, dst, strict=True))
        for k, place in enumerate(keep):
            members = [place, *(s for s, d in zip(src, dst, strict=True) if d == k)]
            torch.testing.assert_close(reduced[b, k], x[b, members].mean(0))
            assert all(torch.equal(back[b, m], reduced[b, k]) for m in members)


def test_equal_tokens_go_to_the_lowest_place():
    x = torch.ones(1, 16, 3)
    plan = tr.ToMeSD(ratio=0.25, use_rand=False).plan(tr.Evidence(x, grid=(4, 4)))
    assert plan.keep[0].tolist() == [6, 7, 9, 11, 12, 13, 14, 15, 0, 2, 8, 10]
    assert plan.src[0].tolist() == [1, 3, 4, 5]
    assert plan.dst[0].tolist() == [8] * 4, "the first destination"


def places(plan, cells):
    """(cells,) sorted destinations of every sample: the last outputs."""
    return plan.keep[:, -cells:]


def test_a_draw_has_one_of_every_cell_for_the_whole_batch():
    h, w, sy, sx = 7, 9, 2, 3
    evidence = tr.Evidence(points(4, h * w), grid=(h, w), timestep=torch.tensor(981), layer=3, depth=8)
    made = places(tr.ToMeSD(sx=sx, sy=sy).plan(evidence), 9)
    assert bool((made == made[0]).all()), "shared by conditional and unconditional rows"
    cells = sorted((p // w // sy, p % w // sx) for p in made[0].tolist())
    assert cells == [(i, j) for i in range(3) for j in range(3)]
    assert {(p // w % sy) * sx + p % w % sx for p in made[0].tolist()} != {0}


def test_a_draw_follows_from_seed_block_and_timestep_alone():
    x = points(2, 256)

    def at(seed=0, timestep=981, layer=0, x=x):
        evidence = tr.Evidence(x, grid=(16, 16), timestep=timestep, layer=layer, depth=8)
        return places(tr.ToMeSD(seed=seed).plan(evidence), 64)

    for same in (at(timestep=981.0), at(timestep=torch.tensor([981, 981])), at(x=points(2, 256, seed=5))):
        assert torch.equal(at(), same)
    different = [at(), at(seed=1), at(timestep=961), at(timestep=None), at(layer=1)]
    assert len({tuple(d[0].tolist()) for d in different}) == len(different)
    offsets = torch.stack([at(seed=s)[0] for s in range(40)]).flatten()
    counts = torch.bincount((offsets // 16 % 2) * 2 + offsets % 2, minlength=4) / len(offsets)
    assert bool((counts - 0.25).abs().max() < 0.03), "all four places of a cell alike"


def test_an_odd_batch_draws_nothing():
    x = points(3, 36)
    plain = tr.ToMeSD(use_rand=False)
    assert tr.ToMeSD(seed=4).plan(tr.Evidence(x, grid=(6, 6))) == plain.plan(tr.Evidence(x, grid=(6, 6)))
    even = tr.Evidence(x[:2], grid=(6, 6))
    assert tr.ToMeSD(seed=4).plan(even) != plain.plan(even)


def test_protected_tokens_stay_in_front():
    x = points(2, 19)
    plan = tr.ToMeSD(ratio=0.5, use_rand=False).plan(tr.Evidence(x, grid=(4, 4), protected=3))
    alone = tr.ToMeSD(ratio=0.5, use_rand=False).plan(tr.Evidence(x[:, 3:], grid=(4, 4)))
    assert plan.keep[:, :3].tolist() == [[0, 1, 2]] * 2
    assert torch.equal(plan.keep[:, 3:], alone.keep + 3)
    assert torch.equal(plan.src, alone.src + 3)
    assert torch.equal(plan.dst, alone.dst + 3)


def test_more_than_there_are_sources_is_cut_and_said():
    with pytest.warns(UserWarning, match="fewer sources"):
        plan = tr.ToMeSD(ratio=0.9).plan(tr.Evidence(points(2, 16), grid=(4, 4)))
    assert plan.k == 4
    with pytest.warns(UserWarning, match="fewer sources"):
        assert tr.ToMeSD().plan(tr.Evidence(points(2, 8), grid=(1, 8))).is_identity, "a map without a whole cell"


@pytest.mark.parametrize(("settings", "left"), [({"keep": 10}, 10), ({"keep": 0.75}, 12), ({"ratio": 0.3}, 12)])
def test_what_a_module_sees(settings, left):
    assert tr.ToMeSD(**settings).plan(tr.Evidence(points(2, 16), grid=(4, 4))).k == left


@pytest.mark.parametrize("settings", [{"ratio": 0}, {"keep": 1.0}, {"keep": 99}, {"ratio": 0.06}])
def test_keep_all_is_the_identity(settings):
    assert tr.ToMeSD(**settings).plan(tr.Evidence(points(2, 16), grid=(4, 4))).is_identity


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratio": 1.0}, "ratio"), ({"ratio": -0.1}, "ratio"), ({"ratio": float("nan")}, "ratio"),
        ({"sx": 1, "sy": 1}, "cell"), ({"sx": 0}, "sx"), ({"seed": -1}, "seed"), ({"max_downsample": 0}, "max_down"),
        ({"keep": 0}, "keep"), ({"keep": 0.5, "ratio": 0.3}, "not both"),
        ({"use_rand": "maybe"}, "use_rand"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        tr.ToMeSD(**settings)


@pytest.mark.parametrize(
    "more", [{}, {"grid": (3, 4)}, {"grid": (1, 4, 4)}, {"grid": (4, 4), "valid": torch.ones(2, 16, dtype=torch.bool)},
             {"grid": (4, 4), "protected": torch.zeros(2, 16, dtype=torch.bool)}],
)  # fmt: skip
def test_evidence_without_a_whole_map_is_refused(more):
    with pytest.raises(ValueError, match=r"grid|whole feature maps"):
        tr.ToMeSD().plan(tr.Evidence(points(2, 16), **more))


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        tr.ToMeSD().plan(tr.Evidence(points(2, 16) * float("nan"), grid=(4, 4)))


def test_similarities_in_parts_are_the_same(monkeypatch):
    evidence = tr.Evidence(points(2, 120), grid=(10, 12))
    whole = tr.ToMeSD().plan(evidence)
    monkeypatch.setattr(destinations, "_HELD", 2 * 30 * 7)
    assert tr.ToMeSD().plan(evidence) == whole


def test_text_reads_back():
    method = tr.get_method("tomesd:ratio=0.4,sx=4,use_rand=false,max_downsample=2,merge_mlp=true")
    assert method == tr.ToMeSD(ratio=0.4, sx=4, use_rand=False, max_downsample=2, merge_mlp=True)
    assert tr.get_method(method.spec()) == method
    assert method.modules() == ("attn", "mlp")
