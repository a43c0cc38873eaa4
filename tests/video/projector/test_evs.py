"""EVS against the steps of its card in plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from visual import ORIGINS, visual
from vlms import VLMS, prompts

import tokenreduce as tr
from tokenreduce.algorithms.temporal import change
from tokenreduce.video.projector.evs import EVS


def cosine(a, b):
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else 0.0


def reference(x, t, keep):
    """Card, steps 1 to 4, on one video (T*n,C); a stable sort by falling score."""
    x = x.double()
    n = len(x) // t
    score = [255.0 if i < n else 1 - cosine(x[i], x[i - n]) for i in range(t * n)]
    return sorted(sorted(range(t * n), key=lambda i: (-score[i], i))[:keep])


@pytest.mark.parametrize("t", [2, 3, 5, 8, 9])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 3), (2, 4)])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.95])
def test_is_the_card(t, shape, part):
    n = shape[0] * shape[1]
    keep = max(n, int(t * n * part))
    x = torch.randn(2, t * n, 7)
    plan = EVS(keep=keep).plan(tr.Evidence(x, grid=(t, *shape)))
    for b in range(2):
        assert plan.representatives()[b].tolist() == reference(x[b], t, keep)
        alone = EVS(keep=keep).plan(tr.Evidence(x[b : b + 1], grid=(t, *shape)))
        assert torch.equal(alone.representatives()[0], plan.representatives()[b])
    assert plan.untouched().all()


def test_worked_example():
    """Three frames of two tokens: one token turns by 90 degrees in frame 1, the other by 45 degrees in frame 2."""
    frames = [[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, 3.0]], [[0.0, 5.0], [1.0, 1.0]]]
    x = torch.tensor(frames).reshape(1, 6, 2)
    kept = [EVS(keep=k).plan(tr.Evidence(x, grid=(3, 1, 2))).keep[0].tolist() for k in (2, 3, 4, 5)]
    assert kept == [[0, 1], [0, 1, 2], [0, 1, 2, 5], [0, 1, 2, 3, 5]], "equal directions tie: the earlier one stays"


def test_a_still_frame_loses_all_and_the_frame_before_is_the_original_one():
    """Frame 2 equals frame 1, of which nothing may be left: it is compared with the whole frame 1 all the same."""
    a, b = torch.randn(2, 4, 6)
    near = a + 0.01 * torch.randn(4, 6)
    x = torch.cat([a, near, near, b])[None]
    keep = EVS(keep=8).plan(tr.Evidence(x, grid=(4, 2, 2))).keep[0].tolist()
    assert keep == [0, 1, 2, 3, 12, 13, 14, 15]


def test_still_videos_tie_exactly():
    """Equal tokens have distance 0 whatever rounding does to their cosine, and leave in reverse order."""
    x = (torch.randn(1, 9, 33) * 100).repeat(1, 5, 1)
    assert EVS(keep=20).plan(tr.Evidence(x, grid=(5, 3, 3))).keep[0].tolist() == list(range(20))


def test_less_than_a_frame_is_spread_over_the_first():
    x = torch.randn(2, 48, 4)
    plan = EVS(keep=4).plan(tr.Evidence(x, grid=(3, 4, 4)))
    assert plan.keep.tolist() == [[5, 7, 13, 15]] * 2
    assert EVS(keep=2).plan(tr.Evidence(x[:, :5], grid=(1, 1, 5))).keep.tolist() == [[1, 3]] * 2
    assert EVS(keep=16).plan(tr.Evidence(x, grid=(3, 4, 4))).keep[0].tolist() == list(range(16))


def test_change_is_the_cosine_distance():
    x = torch.randn(2, 4, 3, 5)
    x[0, 1, 0] = 0
    x[0, 2, 0] = 0
    got = change(x, [0, 0, 1, 0])
    for b in range(2):
        for t, r in enumerate([0, 0, 1, 0]):
            for i in range(3):
                want = 1 - cosine(x[b, t, i].double(), x[b, r, i].double())
                assert got[b, t, i] == pytest.approx(want, abs=1e-6)
    assert got[0, 2, 0] == 1, "two all-zero tokens"
    assert (got[:, 0] == 0).all()


def test_nearly_still_tokens_keep_their_order_in_half_precision_and_behind_a_prefix():
    x = torch.randn(1, 10, 16)
    e = tr.Evidence(torch.cat([torch.randn(1, 2, 16), x], 1).bfloat16(), protected=2, grid=(2, 1, 5))
    keep = EVS(keep=7).plan(e).keep[0].tolist()
    assert keep == [0, 1] + [2 + i for i in reference(x[0].bfloat16(), 2, 7)]


def test_frames_of_a_model_and_nan():
    e = visual(ORIGINS["frames"])
    assert EVS().plan(e).keep[0].tolist() == [i for i in range(16) if i % 4 != 1], "12 of 16: three columns"
    for b in range(2):
        assert EVS(keep=0.5).plan(e).keep[b].tolist() == reference(e.x[b], 3, 24)
    e.x[1, 40, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        EVS(keep=0.5).plan(e)


# Pixels.


def by_pixels(frames, keep):
    """The same on lists (T) of pixels (n,P): L1 distances to the frame before."""
    n = len(frames[0])
    score = [float("inf")] * n
    for a, b in itertools.pairwise(frames):
        score += [sum(abs(float(v)) for v in b[i].double() - a[i].double()) for i in range(n)]
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:keep])


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("keep", [6, 11, 20])
def test_pixels(keep, prefix):
    x, pixels = torch.randn(2, 24 + prefix, 5), torch.randn(2, 24, 12)
    evidence = tr.Evidence(x, protected=prefix, grid=(4, 2, 3), pixels=pixels)
    got = EVS(keep=keep, score="pixels").plan(evidence)
    for b in range(2):
        want = by_pixels(pixels[b].split(6), keep)
        assert got.representatives()[b].tolist() == [*range(prefix), *(prefix + i for i in want)]
    assert EVS(keep=keep, score="pixels").plan(evidence.samples(torch.tensor([1]))) == got.rows_at(torch.tensor([1]))


def test_pixels_that_stand_still_go_whatever_the_embeddings_do():
    pixels = torch.randn(1, 4, 3).repeat(1, 3, 1)
    pixels[0, 9] += 1
    keep = EVS(keep=6, score="pixels").plan(tr.Evidence(torch.randn(1, 12, 5), grid=(3, 2, 2), pixels=pixels)).keep
    assert keep[0].tolist() == [0, 1, 2, 3, 4, 9], "what stands still ties: the earlier one stays"


def patches_of_tokens(family, given):
    """The pixels (n,P) of the tokens of every frame, cut out in plain loops, of every video of a batch."""
    if family == "qwen2_5_vl":  # (2,4,8) patches, each of two frames, four in a row a token
        return [video.view(2, 8, 4 * 96).unbind(0) for video in given.view(2, 64, 96)]
    side = {"llava_onevision": 32, "video_llava": 16}[family]  # 2x2 patches are pooled to one token, and 3x3 patches
    out = []
    for video in given:
        cuts = range(0, video.shape[-1], side)
        out.append([
            torch.stack([f[:, r : r + side, c : c + side].flatten() for r in cuts for c in cuts]) for f in video
        ])  # fmt: skip
    return out


@pytest.mark.parametrize("family", ["llava_onevision", "video_llava", "qwen2_5_vl"])
def test_pixels_of_a_model(family):
    model = VLMS[family].model
    inputs = prompts(VLMS[family], ((9, "v"), (5, "v")))
    with torch.no_grad(), tr.patched(model, EVS(keep=0.6, score="pixels")), tr.record(model) as trace:
        model(**inputs)
    ((_, _, plan),) = trace.steps[0].parts
    for b, frames in enumerate(patches_of_tokens(family, inputs["pixel_values_videos"])):
        assert plan.keep[b].tolist() == by_pixels(frames, plan.k)


def test_pixels_are_needed():
    with pytest.raises(ValueError, match="needs pixels"):
        EVS(keep=6, score="pixels").plan(tr.Evidence(torch.randn(1, 12, 5), grid=(3, 2, 2)))


def test_settings():
    assert EVS().keep == 0.25
    with pytest.raises(ValueError, match="keep"):
        EVS(keep=1.5)
    with pytest.raises(ValueError, match="newlines"):
        EVS(newlines="rank")
    with pytest.raises(ValueError, match="score is"):
        EVS(score="l1")
