"""StreamMem against the steps of its card in plain loops, over several clips."""

from __future__ import annotations

import pytest
import torch
from kv_cases import DIM, GROUPS, best_of, counted, kept_of, softmax_row, visual_slots

import tokenreduce as tr
from tokenreduce.video.cache.streammem import StreamMem


def clip(frames=(4, 3), *, kv_heads=2, groups=2, proxy=3, pad=0, old=0, seed=0, p=4):
    """Text, ``old`` slots of memory, frames, proxy tokens; two samples, with frames of ``p`` slots."""
    g = torch.Generator().manual_seed(seed)
    n = 2 + old + max(frames) * p + proxy
    b = len(frames)
    keys, values = (torch.randn(b * kv_heads, n, DIM, generator=g) for _ in range(2))
    queries = torch.randn(b * kv_heads, groups, proxy, DIM, generator=g)
    visual, valid = torch.zeros(b, n, dtype=torch.bool), torch.ones(b, n, dtype=torch.bool)
    frame_of, scores = torch.full((b, n), -1), torch.zeros(b, n)
    for s, count in enumerate(frames):
        first = n - proxy - count * p
        visual[s, first - old : n - proxy] = True
        frame_of[s, first - old : first] = 3
        frame_of[s, first : n - proxy] = 100 + torch.arange(count).repeat_interleave(p)
        scores[s, :first] = 1
        valid[s, : first - old - 2 + pad] = False
    return tr.CacheEvidence(
        keys, values, queries=queries, kv_heads=kv_heads, visual=visual, valid=None if valid.all() else valid,
        frame_of=frame_of, scores=scores.repeat_interleave(kv_heads, 0) if old else None,
    )  # fmt: skip


def importance(evidence, row, method):
    """Steps 3 of the card: {slot: mean share over proxy rows and query heads}."""
    slots, rows = visual_slots(evidence, row), range(max(0, evidence.rows_given - method.proxy), evidence.rows_given)
    total = dict.fromkeys(slots, 0.0)
    for r in rows:
        for g in range(evidence.groups):
            for j, share in softmax_row(evidence, row, g, r, slots).items():
                total[j] += share / len(rows) / evidence.groups
    return total


def reference(evidence, row, method):
    """{slot of an output: {source: weight}}."""
    b = row // evidence.kv_heads
    worth = importance(evidence, row, method)
    if method.heads == "all":
        every = [importance(evidence, b * evidence.kv_heads + h, method) for h in range(evidence.kv_heads)]
        worth = {j: sum(w[j] for w in every) / len(every) for j in worth}
    slots = list(worth)
    text = [i for i in range(evidence.n) if bool(evidence.there[row, i]) and i not in worth]
    cap = counted(method.M if method.keep is None else method.keep, len(slots))
    if cap >= len(slots):
        return {i: {i: 1.0} for i in text + slots}
    new = {}
    for j in slots:
        if evidence.scores is None or evidence.scores[row, j] == 0:
            new.setdefault(int(evidence.frame_of[row, j]), []).append(j)
    if method.merge == "none":
        new = {}
    prototypes = len(new)
    while True:
        kept = best_of(worth, cap - prototypes)
        needed = sum(any(j not in kept for j in members) for members in new.values())
        if needed == prototypes:
            break
        prototypes = needed
    out = {i: {i: 1.0} for i in text + kept}
    for members in new.values():
        dropped = [j for j in members if j not in kept]
        if dropped:
            host = min(dropped, key=lambda j: (-worth[j], j))
            weight = worth if method.merge == "weighted" else dict.fromkeys(members, 1.0)
            total = sum(weight[j] for j in members)
            out[host] = {j: weight[j] / total for j in members}
    return out


def check(evidence, method):
    plan = method.plan(evidence)
    keys, values = plan.reduce(evidence.keys), plan.reduce(evidence.values)
    valid = plan.validity()
    for row in range(evidence.keys.shape[0]):
        want = reference(evidence, row, method)
        kept = [i for i in kept_of(plan, row) if bool(evidence.there[row, i])]
        assert kept == sorted(want)
        places = [i for i in range(plan.k) if valid is None or bool(valid[row, i])]
        for place, host in zip(places, kept_of(plan, row), strict=True):
            if host in want:
                for got, x in ((keys, evidence.keys), (values, evidence.values)):
                    mean = sum(w * x[row, j].double() for j, w in want[host].items())
                    torch.testing.assert_close(got[row, place].double(), mean, rtol=1e-5, atol=1e-6)
                if want[host] == {host: 1.0}:
                    assert torch.equal(keys[row, place], evidence.keys[row, host])
    return plan


METHODS = [
    StreamMem(M=8), StreamMem(keep=0.5), StreamMem(keep=7, heads="all"), StreamMem(M=9, merge="average"),
    StreamMem(M=6, merge="none"), StreamMem(keep=14, proxy=2),
]  # fmt: skip


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_first_clip(method, groups):
    check(clip(groups=groups), method)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_memory_and_clip_compete_and_new_frames_alone_get_prototypes(method):
    check(clip((4, 3), old=5, seed=4), method)
    check(clip((3, 3), old=5, seed=5), method)


def test_a_frame_that_lost_nothing_leaves_its_place():
    evidence = clip((3, 3), proxy=2)
    evidence.keys.zero_()
    for row in range(4):
        at = visual_slots(evidence, row)
        evidence.keys[row, at[4:8]] = 3 * evidence.queries[row].mean((0, 1))
    plan = check(evidence, StreamMem(M=9))
    assert len(kept_of(plan, 0)) == 2 + 2 + 9, "text, proxy, seven kept and two prototypes"


def test_ties_go_to_the_lower_slot():
    evidence = clip((3, 3), proxy=2)
    evidence.keys.fill_(0.5)
    at = visual_slots(evidence, 0)
    kept = [j for j in kept_of(StreamMem(M=8).plan(evidence), 0) if j in at]
    assert kept == [*at[:6], at[6], at[8]], "six kept; the first dropped ones carry the others"


def test_several_clips_hold_the_cap():
    method, state, scores, frames = StreamMem(M=10), None, None, None
    for turn in range(6):
        new = clip((3, 3), seed=turn, kv_heads=1)
        if state is None:
            keys, values, number = new.keys, new.values, new.frame_of
        else:
            keys, values = (torch.cat([a, b], 1) for a, b in zip(state, (new.keys, new.values), strict=True))
            number = torch.cat([frames, new.frame_of + torch.where(new.frame_of < 0, 0, 10 * turn)], 1)
        evidence = tr.CacheEvidence(
            keys, values, queries=new.queries, kv_heads=1, visual=number >= 0, frame_of=number,
            scores=None if scores is None else torch.cat([scores, torch.zeros_like(new.frame_of).float()], 1),
        )  # fmt: skip
        plan = check(evidence, method)
        assert ((plan.gather(number) >= 0).sum(1) == 10).all()
        state = (plan.reduce(keys), plan.reduce(values))
        scores, frames = plan.gather(method.score(evidence)), plan.gather(number)


def test_keys_of_a_prototype():
    evidence = clip()
    assert StreamMem().merges_keys(evidence)
    assert not StreamMem(merge_keys=False).merges_keys(evidence)


def test_given_attention_is_as_good_as_queries():
    evidence = clip()
    given = tr.CacheEvidence(
        evidence.keys, evidence.values, evidence.rows(), kv_heads=2, visual=evidence.unfold(evidence.visual)[:, 0],
        valid=evidence.unfold(evidence.there)[:, 0], frame_of=evidence.unfold(evidence.frame_of)[:, 0],
    )  # fmt: skip
    torch.testing.assert_close(StreamMem().importance(given), StreamMem().importance(evidence))


def test_nothing_to_do_is_the_identity():
    for method in (StreamMem(), StreamMem(keep=1.0), StreamMem(M=16), StreamMem(keep=99, merge="none")):
        assert method.plan(clip()).is_identity


def test_bad_input():
    for settings in ({"keep": 0}, {"M": 0}, {"proxy": 0}, {"heads": "q"}, {"merge": "sum"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            StreamMem(**settings)
    with pytest.raises(ValueError, match="4 new frames"):
        StreamMem(M=4).plan(clip())
    for name, message in (("_queries", "attention"), ("_frame_of", "frame_of")):
        evidence = clip()
        setattr(evidence, name, None)
        with pytest.raises(ValueError, match=message):
            StreamMem(M=8).plan(evidence)
    broken = clip()
    broken.keys[1, 9] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        StreamMem(M=8).plan(broken)
