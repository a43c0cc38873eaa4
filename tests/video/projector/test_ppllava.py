"""PPLLaVA against the steps of its card, window by window in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from visual import ORIGINS, visual

import tokenreduce as tr
from tokenreduce.algorithms.baseline import windows
from tokenreduce.core.registry import get_class

PPLLaVA = get_class("ppllava")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def video(t=4, h=6, w=6, c=8, batch=2, seed=0, words=3):
    e = tr.Evidence(noise(batch, t * h * w, c, seed=seed), grid=(t, h, w), text=noise(batch, words, c, seed=seed + 1))
    return e


def with_clip(e, segments=1, seed=7):
    e._clip = (noise(e.batch, e.n, 5, seed=seed), noise(e.batch, segments, 5, seed=seed + 1))
    return e


def cosines(tokens, words):
    """Mean cosine of every token (N,C) to the words (M,C), float64, token by token."""
    tokens, words = tokens.double(), words.double()
    return torch.stack([
        torch.stack([(a @ b) / (a.norm() * b.norm()) for b in words if b.any()]).mean() for a in tokens
    ])  # fmt: skip


def pooled(x, cosine, grid, kernel, pooling="window", scale=100.0, temp=0.01):
    """Published windows of one video (N,C), kernel = stride: softmax in the window, weighted sum; time, row, column."""
    (t, h, w), (kt, kh, kw) = grid, kernel
    logits = scale * cosine.double()
    if pooling == "double":
        total = logits.exp().sum()
        logits = torch.stack([v.exp() / total for v in logits]) / temp
    logits, x = logits.view(t, h, w), x.double().view(t, h, w, -1)
    out = []
    for i in range(t // kt):
        for j in range(h // kh):
            for k in range(w // kw):
                box = (slice(i * kt, i * kt + kt), slice(j * kh, j * kh + kh), slice(k * kw, k * kw + kw))
                share = logits[box].flatten().softmax(0)
                out.append(share @ x[box].flatten(0, 2))
    return torch.stack(out).float()


@pytest.mark.parametrize("pooling", ["window", "double"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(
    ("grid", "kernel"),
    [((4, 6, 6), (2, 3, 3)), ((2, 6, 6), (2, 2, 2)), ((3, 6, 4), (1, 3, 2)), ((1, 6, 6), (1, 3, 3)),
     ((6, 4, 8), (3, 2, 2)), ((5, 3, 3), (5, 1, 1))],
)  # fmt: skip
def test_are_the_published_windows_where_the_kernel_tiles(grid, kernel, joint, pooling):
    e = video(*grid)
    settings = {"clip": "some/clip"} if joint else {}
    e = with_clip(e) if joint else e
    keep = math.prod(grid) // math.prod(kernel)
    method = PPLLaVA(keep=keep, kernel=kernel, pooling=pooling, **settings)
    plan = method.plan(e)
    got = plan.reduce(e.x)
    for b in range(2):
        cosine = cosines(e._clip[0][b], e._clip[1][b]) if joint else cosines(e.x[b], e.text[b])
        torch.testing.assert_close(got[b], pooled(e.x[b], cosine, grid, kernel, pooling), rtol=1e-4, atol=1e-4)


def test_published_budget_has_the_published_windows():
    assert PPLLaVA().bands(32, 576, 1024) == 16
    e = tr.Evidence(torch.zeros(1, 32 * 576, 2), grid=(32, 24, 24))
    window = windows(e, 1024, 16)
    at = torch.arange(32 * 576)
    want = at // 576 // 2 * 64 + at % 576 // 24 // 3 * 8 + at % 24 // 3
    assert torch.equal(window, want)
    assert PPLLaVA(kernel=(1, 3, 3)).bands(1, 576, 64) == 1
    # 12.7 bands would have the shape of the kernel; 16 divide 32 frames and 512 windows evenly.
    assert PPLLaVA().bands(32, 576, 512) == 16
    assert PPLLaVA().bands(1, 576, 5) == 1
    assert PPLLaVA().bands(31, 16, 31 * 16 - 1) == 31, "as many bands as needed for that many windows"


@pytest.mark.parametrize("t", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("side", [(1, 1), (3, 5), (4, 4)])
@pytest.mark.parametrize("keep", [1, 2, 7, 0.1, 0.5, 0.93])
def test_any_budget_is_exact_and_every_token_is_in_a_window(t, side, keep):
    e = video(t, *side)
    method = PPLLaVA(keep=keep)
    want = method.total(e.n)
    plan = method.plan(e)
    if want == e.n:
        assert plan.is_identity
        return
    source = plan.sources()
    for b in range(2):
        assert sorted(set(source[b].tolist())) == list(range(want)), "no window is empty, no token is left out"
        first = [source[b].tolist().index(k) for k in range(want)]
        assert plan.keep[b].tolist() == first == sorted(first)
        for k in range(want):
            at = (source[b] == k).nonzero().flatten()
            rows = [(int(i) // (side[0] * side[1]), int(i) // side[1] % side[0], int(i) % side[1]) for i in at]
            spans = [{r[axis] for r in rows} for axis in range(3)]
            assert len(rows) == math.prod(len(s) for s in spans), "a box"
            assert all(max(s) - min(s) + 1 == len(s) for s in spans), "without gaps"
        alone = method.plan(tr.Evidence(e.x[b : b + 1], grid=e.grid, text=e.text[b : b + 1]))
        torch.testing.assert_close(alone.reduce(e.x[b : b + 1])[0], plan.reduce(e.x)[b])


def test_the_question_decides_and_each_sample_has_its_own():
    """Text row i belongs to video i: in every window the token along the question wins."""
    x = torch.zeros(2, 18, 3)
    x[:, :, 2] = 1.0
    x[0, 4, :2] = torch.tensor([5.0, 0.0])
    x[1, 13, :2] = torch.tensor([0.0, 5.0])
    text = torch.eye(3)[:2, None]
    plan = PPLLaVA(keep=1).plan(tr.Evidence(x, grid=(2, 3, 3), text=text))
    torch.testing.assert_close(plan.reduce(x)[:, 0], torch.tensor([[5.0, 0.0, 1.0], [0.0, 5.0, 1.0]]))
    against = PPLLaVA(keep=1, sign=-1).plan(tr.Evidence(x, grid=(2, 3, 3), text=text))
    torch.testing.assert_close(against.reduce(x)[:, 0, :2], torch.zeros(2, 2), atol=1e-5, rtol=0)


def test_double_softmax_is_close_to_the_plain_mean_on_a_large_video_and_window_is_not():
    """Pitfall of the card: weights that sum to one over thousands of tokens say little after the second softmax."""
    e = video(8, 12, 12, batch=1)
    e = with_clip(e)
    cosine = 0.01 * e._clip[0][..., :1] / e._clip[0][..., :1].abs().amax()
    e._clip = (torch.cat([cosine, (1 - cosine.square()).sqrt()], -1), torch.tensor([[[1.0, 0.0]]]))
    mean = e.x.view(4, 2, 4, 3, 4, 3, -1).mean((1, 3, 5)).view(1, 64, -1)

    def off(pooling):
        plan = PPLLaVA(keep=64, clip="some/clip", pooling=pooling).plan(e)
        return float((plan.reduce(e.x) - mean).abs().max())

    assert off("double") < 0.05, "close to the plain mean"
    assert off("window") > 5 * off("double")


def test_double_depends_on_the_number_of_frames_and_window_does_not():
    long = with_clip(video(4, 3, 3, batch=1))
    short = tr.Evidence(long.x[:, :18], grid=(2, 3, 3))
    short._clip = (long._clip[0][:, :18], long._clip[1])
    for pooling, same in (("window", True), ("double", False)):
        method = PPLLaVA(keep=2, clip="some/clip", pooling=pooling, logit_scale=3.0)
        a = method.plan(long).reduce(long.x)[:, :1]
        b = method.at(1).plan(short).reduce(short.x)
        assert torch.allclose(a, b, atol=1e-6) == same


def test_without_words_windows_are_plain_means():
    x = noise(2, 36, 4)
    mean = x.view(2, 2, 18, 4).mean(2)
    for text in (None, torch.zeros(2, 1, 4)):
        e = tr.Evidence(x, grid=(4, 3, 3), text=text)
        torch.testing.assert_close(PPLLaVA(keep=2).plan(e).reduce(x), mean)
    e = tr.Evidence(x, grid=(4, 3, 3), text=noise(2, 2, 4))
    e.text_valid = torch.tensor([[True, True], [False, False]])
    out = PPLLaVA(keep=2).plan(e).reduce(x)
    torch.testing.assert_close(out[1], mean[1])
    assert not torch.allclose(out[0], mean[0], atol=1e-2)
    e._clip = (noise(2, 36, 5), torch.zeros(2, 1, 5))
    torch.testing.assert_close(PPLLaVA(keep=2, clip="some/clip").plan(e).reduce(x), mean)


def test_segments_of_a_long_question_count_alike_and_empty_ones_do_not():
    e = with_clip(video(2, 3, 3), segments=3)
    e._clip[1][0, 2] = 0
    got = PPLLaVA(keep=1, clip="some/clip").plan(e).reduce(e.x)
    for b in range(2):
        want = pooled(e.x[b], cosines(e._clip[0][b], e._clip[1][b]), (2, 3, 3), (2, 3, 3))
        torch.testing.assert_close(got[b], want, rtol=1e-4, atol=1e-4)


def test_a_single_token_in_a_window_is_untouched_and_a_prefix_stays():
    e = video(3, 3, 3)
    plan = PPLLaVA(keep=26).plan(e)
    assert plan.untouched().sum(1).tolist() == [25, 25]
    out = plan.reduce(e.x)
    assert torch.equal(out[plan.untouched()], plan.gather(e.x)[plan.untouched()])
    long = torch.cat([noise(2, 2, 8, seed=5), e.x], 1)
    front = tr.Evidence(long, protected=2, grid=(3, 3, 3), text=e.text)
    got = PPLLaVA(keep=3).plan(front)
    assert torch.equal(got.reduce(long)[:, :2], long[:, :2])
    torch.testing.assert_close(got.reduce(long)[:, 2:], PPLLaVA(keep=3).plan(e).reduce(e.x))


def test_scores_far_apart_zero_vectors_and_nan():
    e = video(2, 3, 3)
    out = PPLLaVA(keep=2, logit_scale=1e6).plan(e).reduce(e.x)
    assert torch.isfinite(out).all()
    e.x[0, 3] = 0
    assert torch.isfinite(PPLLaVA(keep=2).plan(e).reduce(e.x)).all()
    e.x[0, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        PPLLaVA(keep=2).plan(e)


def test_on_what_the_adapter_gives():
    e = visual(ORIGINS["frames"])
    for settings in ({}, {"clip": "some/clip"}):
        plan = PPLLaVA(keep=12, kernel=(1, 2, 2), **settings).plan(e)
        assert plan.sources()[0].tolist() == [
            t * 4 + r // 2 * 2 + c // 2 for t in range(3) for r in range(4) for c in range(4)
        ]
    bare = tr.Evidence(e.x, grid=(3, 4, 4))
    with pytest.raises(ValueError, match="name a CLIP model"):
        PPLLaVA(keep=12, clip="some/clip").plan(bare)


def test_settings():
    assert PPLLaVA().required() == ("text",)
    assert PPLLaVA(clip="a/b").required() == ("clip",)
    method = tr.get_method("ppllava:keep=64,kernel=[1,3,3],pooling=double,clip=a/b,pooling_temp=0.1")
    assert method == PPLLaVA(keep=64, kernel=(1, 3, 3), pooling="double", clip="a/b", pooling_temp=0.1)
    assert tr.get_method(method.spec()) == method
    assert tr.Reducer.from_json(method.to_json()) == method
    for bad, message in [
        ({"keep": None}, "keep is a number of tokens"),
        ({"kernel": (2, 3)}, "kernel is three numbers"),
        ({"kernel": 3}, "kernel is three numbers"),
        ({"kernel": (2, 0, 3)}, "kernel is an int >= 1"),
        ({"pooling": "single"}, r"pooling is one of \('window', 'double'\)"),
        ({"logit_scale": 0}, "logit_scale is a finite number above 0"),
        ({"pooling_temp": float("nan")}, "pooling_temp is a finite number above 0"),
        ({"clip": 3}, "clip is the Hub id"),
        ({"sign": 0}, "sign is -1, 1 or None"),
        ({"newlines": "rank"}, "newlines='rank'"),
    ]:
        with pytest.raises(ValueError, match=message):
            PPLLaVA(**bad)


def test_frames_that_are_no_grid_are_refused():
    with pytest.raises(ValueError, match="2 frames"):
        PPLLaVA(keep=2).plan(tr.Evidence(noise(1, 9, 4), grid=(2, 2, 2)))
    with pytest.raises(ValueError, match="one token in a place"):
        PPLLaVA(keep=2).plan(tr.Evidence(noise(1, 8, 4), grid=(1, 2, 2)))
