"""The baselines: random and uniform pruning, and a smaller input image."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import evidence, images, tiny_vit

import tokenreduce as tr


# -- random ----------------------------------------------------------------------------------------------------------
def kept(reducer, **settings):
    return reducer.plan(evidence(**settings)).keep


def test_random_draws_differ_by_seed_layer_and_sample_only():
    m = tr.Random(r=20)
    first = kept(m, n=41, batch=4)
    assert torch.equal(first, kept(m, n=41, batch=4))
    assert len({tuple(row) for row in first.tolist()}) == 4
    assert not torch.equal(first, kept(tr.Random(r=20, seed=1), n=41, batch=4))
    assert not torch.equal(first, kept(m, n=41, batch=4, layer=1))
    for i in range(4):
        assert torch.equal(kept(m, n=41, batch=4, rows=slice(i, i + 1))[0], first[i])
    assert torch.equal(kept(m, n=41, batch=4, rows=[2, 0, 3, 1]), first[[2, 0, 3, 1]])


def test_random_ignores_the_last_bits():
    e = evidence(n=41, batch=8)
    want = tr.Random(r=20).plan(e).keep
    for scale in (1 + 1e-6, 1.0, 3.0):  # noise and the unit of the features
        x = e.x * scale + 1e-6 * torch.randn_like(e.x)
        assert torch.equal(tr.Random(r=20).plan(tr.Evidence(x, protected=1, depth=6)).keep, want)


def test_random_is_uniform_over_places_and_pairs():
    n, samples = 12, 6000
    x = torch.randn(samples, n, 8)
    keep = tr.Random(r=6).plan(tr.Evidence(x)).keep
    assert (keep.diff(dim=1) > 0).all()
    stays = torch.zeros(samples, n).scatter(1, keep, 1.0)
    # Each place stays with probability 1/2, two places together with 6/12 * 5/11; five standard errors of slack.
    assert (stays.mean(0) - 0.5).abs().max() < 5 * math.sqrt(0.25 / samples)
    together = (stays.T @ stays / samples)[~torch.eye(n, dtype=torch.bool)]
    assert (together - 5 / 22).abs().max() < 5 * math.sqrt(5 / 22 * 17 / 22 / samples)


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**63])
def test_random_numbers_follow_their_definition(seed):
    """The hash in Python's integers, without a 64-bit limit."""
    e = evidence(n=9, layer=3)

    def scramble(h):
        for _ in range(2):
            h = ((h ^ (h >> 16)) * 0x45D9F3B) % 2**32
        return h ^ (h >> 16)

    start = scramble(scramble((seed ^ (seed >> 32)) % 2**32 ^ 0x9E3779B9) ^ 4)
    for b in range(2):
        x = e.x[b].double()
        rms = float(x.square().mean().sqrt())
        state = start
        for c in range(4):
            state = scramble(state ^ (round(float(x[:, c].mean()) / rms * 16) % 2**32))
        want = [scramble(state ^ scramble(i + 1)) >> 8 for i in range(9)]
        assert tr.Random(seed=seed).draw(e)[b].tolist() == want


@pytest.mark.filterwarnings("ignore:random")
def test_random_follows_the_schedule_and_keeps_a_token():
    left, n = [], 37
    for layer in range(6):
        n = tr.Random(keep=6).plan(evidence(n=n, layer=layer, entry=37)).k
        left.append(n - 1)
    assert left == [31, 26, 21, 16, 11, 6]
    assert tr.Random(r=(4, -1.0)).plan(evidence(n=37, layer=0)).k == 37 - 8
    with pytest.warns(UserWarning, match="random: r is more"):
        assert tr.Random(r=9).plan(evidence(n=6, prefix=2)).k == 3
    for n in (1, 2, 3):
        for prefix in (0, 1):
            if n > prefix:
                assert tr.Random(keep=1).plan(evidence(n=n, prefix=prefix, depth=1)).k == prefix + 1
    assert tr.Random(r=1).plan(evidence(n=1, prefix=1, depth=1)).is_identity


def test_random_leaves_empty_slots_out():
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, 12:] = False
    e = evidence(n=20, prefix=0, valid=valid)
    spoilt = evidence(n=20, prefix=0, valid=valid)
    spoilt.x[1, 12:] = 1e6
    keep = tr.Random(r=8).plan(e).keep
    assert torch.equal(keep, tr.Random(r=8).plan(spoilt).keep)
    assert keep[1].tolist() == list(range(12))
    shorter = tr.Evidence(e.x[1:, :12], depth=6)
    assert torch.equal(tr.Random().draw(shorter)[0], tr.Random().draw(e)[1, :12])


@pytest.mark.parametrize(
    ("settings", "word"), [({"seed": -1}, "seed"), ({"seed": 0.5}, "seed"), ({"r": -2}, "r is"), ({"keep": 0}, "keep")]
)
def test_random_bad_settings(settings, word):
    with pytest.raises(ValueError, match=word):
        tr.Random(**settings)


# -- uniform ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "k"), [(7, 3), (17, 5), (8, 4), (2, 1), (3, 2), (13, 12), (11, 1), (197, 64)])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_uniform_keeps_equal_distances(n, k, prefix):
    e = tr.Evidence(torch.randn(2, n + prefix, 3), protected=prefix)
    want = [*range(prefix), *(prefix + math.floor((i + 0.5) * n / k) for i in range(k))]
    assert tr.Uniform(keep=k).plan(e).keep.tolist() == [want] * 2


def test_uniform_every():
    e = tr.Evidence(torch.randn(1, 12, 3))
    assert tr.Uniform().plan(e).keep.tolist() == [[1, 3, 5, 7, 9, 11]]
    assert tr.Uniform(every=4).plan(e).keep.tolist() == [[2, 6, 10]]
    assert tr.Uniform(every=1).plan(e).is_identity


def on_grid(grid, k, prefix=0):
    n = math.prod(grid)
    keep = tr.Uniform(keep=k).plan(tr.Evidence(torch.randn(1, n + prefix, 3), protected=prefix, grid=grid)).keep[0]
    return [(int(i) // grid[-1], int(i) % grid[-1]) for i in keep[prefix:] - prefix]


def test_uniform_takes_the_sub_grid():
    assert on_grid((4, 4), 4) == [(1, 1), (1, 3), (3, 1), (3, 3)]
    assert on_grid((4, 4), 4, prefix=2) == on_grid((4, 4), 4) == on_grid((1, 4, 4), 4)
    assert on_grid((5, 5), 9) == [(r, c) for r in (0, 2, 4) for c in (0, 2, 4)]
    # 8 = 4 x 2 or 2 x 4: strides 1 and 2 either way, rows win; 6 of 6 x 4 is 3 x 2.
    assert on_grid((4, 4), 8) == [(r, c) for r in range(4) for c in (1, 3)]
    assert on_grid((6, 4), 6) == [(r, c) for r in (1, 3, 5) for c in (1, 3)]
    # Of 9 x 9, 7 x 1 and 1 x 7 thin one direction only; of 6 x 2, one column of three rows has strides 2 and 2.
    assert on_grid((9, 9), 7) == [(i // 9, i % 9) for i in (5, 17, 28, 40, 52, 63, 75)]
    assert on_grid((6, 2), 3) == [(1, 1), (3, 1), (5, 1)]
    # 5 has no even sub-grid of 4 x 4: the flat stride, floor((i+1/2) 16/5).
    assert on_grid((4, 4), 5) == [(i // 4, i % 4) for i in (1, 4, 8, 11, 14)]
    # A grid that does not match, and one of several frames, are not used.
    flat = [1, 4, 7, 10]
    for grid in ((3, 3), (3, 2, 2)):
        e = tr.Evidence(torch.randn(1, 12, 3), grid=grid)
        assert tr.Uniform(keep=4).plan(e).keep.tolist() == [flat]


def test_uniform_with_masks_counts_only_what_may_go():
    x = torch.randn(2, 12, 3)
    protected = torch.zeros(2, 12, dtype=torch.bool)
    protected[0, [0, 5]] = True
    protected[1, [10, 11]] = True
    keep = tr.Uniform(keep=5).plan(tr.Evidence(x, protected=protected)).keep
    for b in range(2):
        free = [i for i in range(12) if not protected[b, i]]
        want = [free[i] for i in (1, 3, 5, 7, 9)] + [i for i in range(12) if protected[b, i]]
        assert keep[b].tolist() == sorted(want)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 8:] = False
    keep = tr.Uniform(keep=4).plan(tr.Evidence(x, valid=valid)).keep
    assert keep.tolist() == [[1, 4, 7, 10], [1, 3, 5, 7]]


def test_uniform_acts_once():
    assert [i for i in range(6) if tr.Uniform(keep=0.5, layer=3).acts_at(i, 6)] == [3]
    model = tiny_vit()
    with torch.no_grad(), tr.patched(model, tr.Uniform(keep=9)), tr.record(model, flops=False) as trace:
        model(images())
    assert trace.tokens == [10] * 6
    assert trace.plans[0].keep[0].tolist() == [0, *(1 + 6 * r + c for r in (1, 3, 5) for c in (1, 3, 5))]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"every": 0}, "every"),
        ({"layer": -1}, "layer"),
        ({"keep": 1.5}, "keep"),
        ({"keep": 3, "every": 3}, "not both"),
    ],
)
def test_uniform_bad_settings(settings, word):
    with pytest.raises(ValueError, match=word):
        tr.Uniform(**settings)
    with pytest.raises(ValueError, match="layers 0 to 5"):
        tr.Uniform(layer=6).acts_at(0, 6)


# -- resize ----------------------------------------------------------------------------------------------------------
def test_resize_chooses_the_nearest_grid():
    def of(keep, *grid):
        return tr.Resize(keep=keep).grid(grid)

    assert of(1.0, 14, 14) == (14, 14)
    assert of(0.5, 14, 14) == (10, 10)
    assert of(110, 14, 14) == (10, 11)  # one patch off square is nearer than 100 or 121
    assert of(9999, 14, 14) == (14, 14)
    assert of(1, 14, 14) == (1, 1)
    assert of(0.25, 12, 24) == (6, 12)
    assert of(0.25, 24, 12) == (12, 6)
    assert of(0.5, 1, 10) == (1, 5)
    assert of(0.5, 1, 1) == (1, 1)
    assert tr.Resize(scale=0.5).grid((14, 14)) == (7, 7)


@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (3, 11), (1, 9), (16, 16)])
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.77, 0.9])
def test_resize_against_trying_every_grid(grid, keep):
    """No admissible grid is nearer, and the aspect ratio holds to within a patch."""
    rows, cols = grid
    target = max(1, math.floor(keep * rows * cols + 0.5))
    got = tr.Resize(keep=keep).grid(grid)

    def admissible(r, c):  # the shorter side is off by at most one patch
        return abs(r - c * rows / cols) <= 1 + 1e-9 if rows <= cols else abs(c - r * cols / rows) <= 1 + 1e-9

    options = [(r, c) for r in range(1, rows + 1) for c in range(1, cols + 1) if admissible(r, c)]
    assert got in options
    assert abs(math.prod(got) - target) == min(abs(r * c - target) for r, c in options)


@pytest.mark.parametrize(("rows", "cols", "prefix"), [(6, 6, 1), (4, 7, 0), (5, 9, 2), (1, 8, 0)])
def test_resize_plan_is_antialiased_bilinear_resampling(rows, cols, prefix):
    x = torch.randn(2, prefix + rows * cols, 3)
    m = tr.Resize(keep=0.4)
    plan = m.plan(tr.Evidence(x, protected=prefix, grid=(rows, cols)))
    small = m.grid((rows, cols))
    maps = x[:, prefix:].transpose(1, 2).reshape(2, 3, rows, cols)
    want = F.interpolate(maps, size=small, mode="bilinear", antialias=True, align_corners=False).flatten(2)
    got = plan.reduce(x)
    assert torch.equal(got[:, :prefix], x[:, :prefix])
    torch.testing.assert_close(got[:, prefix:], want.transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert plan.representatives()[:, :prefix].tolist() == [list(range(prefix))] * 2
    assert plan.reduce_size(None).sum(1).tolist() == pytest.approx([x.shape[1]] * 2, rel=1e-5)


def test_resize_plan_layouts():
    m = tr.Resize(keep=0.25)
    assert m.plan(evidence(n=17)).k == 1 + 4  # a square without a grid
    assert m.plan(tr.Evidence(torch.randn(1, 12, 2), grid=(3, 3))).k == 3  # no grid that fits: one row
    x = torch.randn(1, 32, 2)
    video = m.plan(tr.Evidence(x, grid=(2, 4, 4))).reduce(x)
    frames = [m.plan(tr.Evidence(f, grid=(4, 4))).reduce(f) for f in x.split(16, 1)]
    torch.testing.assert_close(video, torch.cat(frames, 1))
    assert m.plan(tr.Evidence(torch.randn(1, 1, 2), protected=1)).is_identity
    with pytest.raises(ValueError, match="prefix"):
        m.plan(tr.Evidence(x, protected=torch.ones(32, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"keep": 0}, "keep"),
        ({"scale": 1.2}, "scale"),
        ({"scale": True}, "scale"),
        ({"scale": 0.5, "keep": 3}, "not both"),
    ],
)
def test_resize_bad_settings(settings, word):
    with pytest.raises(ValueError, match=word):
        tr.Resize(**settings)


def tiny_eva(**changes):
    """EVA02's parts (rotary embedding, SwiGLU, class token) at 36 patches."""
    from timm.models.eva import Eva

    torch.manual_seed(0)
    model = Eva(
        img_size=24, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=7, mlp_ratio=2.0, swiglu_mlp=True,
        use_rot_pos_emb=True, ref_feat_shape=(6, 6), qkv_fused=False, head_init_scale=1.0, **changes,
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
    return model.eval()


@pytest.mark.parametrize("build", [tiny_vit, tiny_eva])
def test_resize_in_a_model_is_the_stock_model_at_that_image_size(build):
    model, stock = build(), build(dynamic_img_size=True)
    stock.load_state_dict(model.state_dict())
    x = images()
    small = F.interpolate(x, size=(16, 16), mode="bicubic", antialias=True, align_corners=False)
    with torch.no_grad():
        full = model(x)
        before = [(k, v) for m in model.modules() for k, v in vars(m).items() if isinstance(v, bool | int | str | type)]
        hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
        with tr.record(model) as unreduced:
            model(x)
        with tr.record(stock) as want_cost:
            want = stock(small)
        with tr.patched(model, tr.Resize(keep=16)), tr.record(model) as trace:
            got = model(x)
        back = model(x)
    assert trace.tokens == [17] * len(model.blocks)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, full, atol=1e-2)
    assert trace.flops == want_cost.flops
    assert trace.flops / unreduced.flops == pytest.approx(16 / 36, abs=0.05)  # attention itself shrinks faster
    assert torch.equal(back, full)
    after = [(k, v) for m in model.modules() for k, v in vars(m).items() if isinstance(v, bool | int | str | type)]
    assert before == after
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def test_resize_in_a_model_keeps_the_aspect_of_other_image_sizes():
    model = tiny_vit(dynamic_img_size=True)
    x = torch.randn(1, 3, 24, 48)
    with torch.no_grad(), tr.patched(model, tr.Resize(keep=0.25)), tr.record(model, flops=False) as trace:
        model(x)
        model(x[..., :24])
    assert trace.tokens == [1 + 3 * 6] * 6 + [1 + 3 * 3] * 6


def test_resize_combines_with_another_method():
    model = tiny_vit()
    both = tr.Resize(keep=16), tr.Uniform(keep=4)
    with torch.no_grad(), tr.patched(model, *both), tr.record(model, flops=False) as trace:
        model(images())
    assert trace.tokens == [5] * 6


def test_resize_of_half_precision_images():
    model, x = tiny_vit(), images()
    with torch.no_grad(), tr.patched(model, tr.Resize(keep=16)):
        want = model(x)
        got = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.2, atol=0.2 * float(want.abs().max()))
