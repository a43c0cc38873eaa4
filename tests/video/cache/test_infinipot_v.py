"""InfiniPot-V against the steps of its card in plain loops, over two rounds."""

from __future__ import annotations

import math

import pytest
import torch
from kv_cases import kept_of, visual_slots

import tokenreduce as tr
from tokenreduce.video.cache.infinipot_v import InfiniPotV


def film(frames=8, p=6, *, kv_heads=2, batch=2, text=2, seed=0, pad=0, layer=0, depth=4, dim=8):
    """Text, frames of p slots each, text; the second sample is padded and has its frames elsewhere."""
    g = torch.Generator().manual_seed(seed)
    n = pad + text + frames * p + text
    keys, values = (torch.randn(batch * kv_heads, n, dim, generator=g) for _ in range(2))
    visual = torch.zeros(batch, n, dtype=torch.bool)
    frame_of = torch.full((batch, n), -1)
    valid = torch.ones(batch, n, dtype=torch.bool)
    for b in range(batch):
        start = pad + text - (b > 0)
        visual[b, start : start + frames * p] = True
        frame_of[b, start : start + frames * p] = torch.arange(frames).repeat_interleave(p)
        valid[b, : pad if b == 0 else 0] = False
    return tr.CacheEvidence(
        keys, values, kv_heads=kv_heads, visual=visual, frame_of=frame_of, valid=None if valid.all() else valid,
        layer=layer, depth=depth,
    )  # fmt: skip


def half_even(x):
    low = math.floor(x)
    return low + (x - low > 0.5 or (x - low == 0.5 and low % 2 == 1))


def pooled_norms(norms, width, rows, f, p):
    """Step 4 of the card by hand: {(frame, place): mean over the window}, zeros beyond the ends counted."""
    if width == 3:  # over all slots, whatever frame they are of
        flat = [0.0, *(norms[t, j] for t in range(f) for j in range(p)), 0.0]
        return {(t, j): sum(flat[t * p + j : t * p + j + 3]) / 3 for t in range(f) for j in range(p)}
    columns = p // rows
    k = min(width, f, rows, columns)
    k -= 1 - k % 2
    if k < 2:
        return norms
    half, out = k // 2, {}
    for t in range(f):
        for j in range(p):
            r, c = divmod(j, columns)
            total = 0.0
            for dt in range(-half, half + 1) if width == 7 else (0,):
                for dr in range(-half, half + 1):
                    for dc in range(-half, half + 1):
                        if 0 <= t + dt < f and 0 <= r + dr < rows and 0 <= c + dc < columns:
                            total += norms[t + dt, (r + dr) * columns + c + dc]
            out[t, j] = total / k ** (3 if width == 7 else 2)
    return out


def reference(evidence, row, method, p, total):
    """Slots of a head that stay, by the card."""
    at = visual_slots(evidence, row)
    f = len(at) // p
    if total >= len(at):
        return list(range(evidence.n))
    keys = {(t, j): evidence.keys[row, at[t * p + j]].double() for t in range(f) for j in range(p)}
    taken = []
    if method.tar_ratio:
        of = (total,) if method.keep is not None else (method.compress_frame_num, p)  # in the code's order
        share = total - half_even(math.prod(of, start=1 - method.tar_ratio))
        q = max(1, math.floor(f * method.query_ratio))
        score = {}
        for t in range(f - q):
            for j in range(p):
                a = keys[t, j]
                cosines = [float(a @ keys[r, j] / a.norm() / keys[r, j].norm()) for r in range(f - q, f)]
                score[t, j] = -sum(cosines) / q
        taken = sorted(score, key=lambda place: (-score[place], place))[: share - q * p]
        taken += [(r, j) for r in range(f - q, f) for j in range(p)]
    norms = {place: float(evidence.values[row, at[place[0] * p + place[1]]].double().norm()) for place in keys}
    width = (7, 5, 3, 1)[min(3, evidence.layer // max(1, evidence.depth // 4))]
    if method.adaptive_pooling and width > 1:
        norms = pooled_norms(norms, width, method.grid_rows, f, p)
    rest = sorted((place for place in keys if place not in taken), key=lambda place: (-norms[place], place))
    chosen = [at[t * p + j] for t, j in taken + rest[: total - len(taken)]]
    there = [i for i in range(evidence.n) if bool(evidence.there[row, i]) and i not in at]
    return sorted(there + chosen)


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"tar_ratio": 0.0}, {"tar_ratio": 1.0}, {"tar_ratio": 0.7, "query_ratio": 0.1}, {"query_ratio": 0.0},
        {"tar_ratio": 0.55, "query_ratio": 0.3},
    ],
    ids=str,
)  # fmt: skip
def test_plan(settings, pad):
    method = InfiniPotV(compress_frame_num=5, **settings)
    evidence = film(pad=pad)
    plan = method.plan(evidence)
    for row in range(4):
        assert kept_of(plan, row) == reference(evidence, row, method, 6, 30)


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 7, 11])
@pytest.mark.parametrize(("p", "rows"), [(6, 2), (12, 3), (25, 5), (5, 1)])
def test_adaptive_pooling(layer, p, rows):
    method = InfiniPotV(compress_frame_num=4, tar_ratio=0.6, adaptive_pooling=True, grid_rows=rows)
    evidence = film(frames=7, p=p, layer=layer, depth=11 if layer > 3 else 4)
    plan = method.plan(evidence)
    for row in range(4):
        assert kept_of(plan, row) == reference(evidence, row, method, p, 4 * p)


@pytest.mark.parametrize("keep", [7, 0.5, 41])
def test_keep(keep):
    method = InfiniPotV(keep=keep, tar_ratio=0.0)
    evidence = film(frames=7, p=6)
    total = keep if isinstance(keep, int) else int(42 * keep + 0.5)
    for row in range(4):
        assert kept_of(method.plan(evidence), row) == reference(evidence, row, method, 6, total)


def test_a_second_round_cuts_what_is_left_into_frames():
    """What the first round left and a new block of frames, p slots at a time."""
    method, p = InfiniPotV(compress_frame_num=4), 6
    first = film(frames=6, p=p, text=0, batch=1)
    plan = method.plan(first)
    new = film(frames=2, p=p, text=0, batch=1, seed=9)
    numbers = torch.cat([plan.gather(first.frame_of), new.frame_of + 6], 1)
    second = tr.CacheEvidence(
        torch.cat([plan.reduce(first.keys), new.keys], 1), torch.cat([plan.reduce(first.values), new.values], 1),
        kv_heads=2, frame_of=numbers, visual=torch.ones(1, 36, dtype=torch.bool),
    )  # fmt: skip
    again = method.plan(second)
    assert again.k == 24
    for row in range(2):
        assert kept_of(again, row) == reference(second, row, method, p, 24)


def test_ties_go_to_the_lower_slot():
    evidence = film(frames=4, p=3, text=0, batch=1)
    evidence.keys.fill_(0.5)
    evidence.values.fill_(0.5)
    kept = kept_of(InfiniPotV(compress_frame_num=2, tar_ratio=0.5, query_ratio=0.25).plan(evidence), 0)
    assert kept == [0, 1, 2, 9, 10, 11], "TaR takes the last frame alone, VaN the first slots"


def test_nothing_to_do_is_the_identity():
    evidence = film(frames=4)
    for method in (InfiniPotV(), InfiniPotV(compress_frame_num=4), InfiniPotV(keep=1.0), InfiniPotV(keep=24)):
        assert method.plan(evidence).is_identity
    assert InfiniPotV(compress_frame_num=2, block_size=5, tar_ratio=0.6).plan(evidence).is_identity
    assert not InfiniPotV(compress_frame_num=2, block_size=4, tar_ratio=0.6).plan(evidence).is_identity
    text = tr.CacheEvidence(
        torch.randn(2, 5, 4), torch.randn(2, 5, 4), kv_heads=2, visual=torch.zeros(1, 5, dtype=torch.bool)
    )
    assert InfiniPotV(compress_frame_num=1).plan(text).is_identity


def test_bad_input():
    for settings in (
        {"keep": 0}, {"compress_frame_num": 0}, {"tar_ratio": 1.5}, {"query_ratio": -0.1}, {"grid_rows": 0},
        {"token_per_frame": 0}, {"block_size": 0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(settings))):
            InfiniPotV(**settings)
    with pytest.raises(ValueError, match="grid_rows"):
        InfiniPotV(adaptive_pooling=True)
    with pytest.raises(ValueError, match="rows"):
        InfiniPotV(compress_frame_num=4, adaptive_pooling=True, grid_rows=4).plan(film())
    with pytest.raises(ValueError, match="larger tar_ratio"):
        InfiniPotV(compress_frame_num=2, tar_ratio=0.5, query_ratio=0.5).plan(film())
    with pytest.raises(ValueError, match="no frames of 5"):
        InfiniPotV(compress_frame_num=2, token_per_frame=5).plan(film())
    evidence = film()
    evidence._frame_of = None
    with pytest.raises(ValueError, match="token_per_frame"):
        InfiniPotV(compress_frame_num=2).plan(evidence)
    assert InfiniPotV(compress_frame_num=5, token_per_frame=6).plan(evidence) == InfiniPotV(compress_frame_num=5).plan(
        film()
    )
    for name in ("keys", "values"):
        broken = film()
        getattr(broken, name)[1, 9] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            InfiniPotV(compress_frame_num=5).plan(broken)
