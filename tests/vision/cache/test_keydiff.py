"""KeyDiff against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from cached import Decode, cached, half_up, image, kept, real, top

import tokenreduce as tr


def scores(keys, among):
    """{slot: minus the cosine to the mean of the unit keys}, number by number."""
    unit = {j: [x / math.sqrt(sum(y * y for y in keys[j])) for x in keys[j]] for j in among}
    mean = [sum(unit[j][c] for j in among) / len(among) for c in range(len(keys[0]))]
    size = math.sqrt(sum(m * m for m in mean))
    return {j: -sum(u * m for u, m in zip(unit[j], mean, strict=True)) / size for j in among}


@pytest.mark.parametrize("what", ["visual", "all"])
@pytest.mark.parametrize("keep", [4, 0.5])
def test_keys_unlike_the_mean_stay(what, keep):
    evidence = cached()
    got = kept(tr.KeyDiff(keep=keep, what=what).plan(evidence))
    for i, (there, visual) in enumerate(zip(real(evidence), image(evidence), strict=True)):
        among = visual if what == "visual" else there
        mine = scores(evidence.keys[i].double().tolist(), there)
        assert got[i] == sorted({*(set(there) - set(among)), *top(mine, among, half_up(keep, len(among)))})


@pytest.mark.parametrize("what", ["visual", "all"])
@pytest.mark.parametrize("block", [1, 4, 5, 100])
def test_block_by_block(what, block):
    evidence = cached()
    got = kept(tr.KeyDiff(keep=0.4, what=what, block=block).plan(evidence))
    for i, (there, visual) in enumerate(zip(real(evidence), image(evidence), strict=True)):
        among, keys, cache = visual if what == "visual" else there, evidence.keys[i].double().tolist(), []
        for start in range(0, len(there), block):
            cache = cache + there[start : start + block]
            best = top(scores(keys, cache), [j for j in cache if j in among], half_up(0.4, len(among)))
            cache = [j for j in cache if j not in among or j in best]
        assert got[i] == cache
    if block == 100:
        assert got == kept(tr.KeyDiff(keep=0.4, what=what).plan(evidence))


def test_equal_keys_tie():
    x = torch.randn(2, 1, 8).expand(-1, 9, -1).contiguous()
    evidence = tr.CacheEvidence(x, x, kv_heads=1, visual=torch.ones(2, 9))
    assert kept(tr.KeyDiff(keep=4).plan(evidence)) == [[0, 1, 2, 3]] * 2


def test_decode():
    method = tr.KeyDiff(keep=8, what="all", interval=1)
    assert tr.KeyDiff(what="all").every() == 0
    run = Decode(method)
    for _ in range(200):
        evidence = run.go()
        columns = evidence.columns
        for i, there in enumerate(real(evidence)):
            mine = scores(evidence.keys[i].double().tolist(), there)
            assert run.held()[i] == [int(columns[i, j]) for j in top(mine, there, 8)]


def test_bad_settings():
    with pytest.raises(ValueError, match="block is an int >= 1"):
        tr.KeyDiff(block=0)
    with pytest.raises(ValueError, match="interval is an int >= 1"):
        tr.KeyDiff(interval=0)
