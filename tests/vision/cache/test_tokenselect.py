"""TokenSelect against the steps of its card in plain loops, and 200 decode steps against a plain reference."""

from __future__ import annotations

import math

import pytest
import torch
from kv_cases import DIM, EQUAL, GROUPS, LEFT, RIGHT, best_of, cache, counted, kept_of, present, visual_slots

import tokenreduce as tr
from tokenreduce.vision.cache.tokenselect import TokenSelect


def votes(evidence, b, slots, scale):
    """Steps 3 and 4 of the card: {slot: sum over all query heads of a softmax over the candidates}."""
    total = dict.fromkeys(slots, 0.0)
    for h in range(evidence.kv_heads):
        row = b * evidence.kv_heads + h
        for g in range(evidence.groups):
            query = evidence.queries[row, g, -1].double()
            logits = {j: scale * float(query @ evidence.keys[row, j].double()) for j in slots}
            top = max(logits.values())
            powers = {j: math.exp(v - top) for j, v in logits.items()}
            for j in slots:
                total[j] += powers[j] / sum(powers.values())
    return total


def reference(evidence, b, method):
    row = b * evidence.kv_heads
    there, visual = present(evidence, row), visual_slots(evidence, row)
    if method.what == "visual":
        slots, fixed = visual, [j for j in there if j not in visual]
        wanted = counted(method.top_k if method.keep is None else method.keep, len(slots))
    else:
        fixed = there[: method.n_init] + there[max(method.n_init, len(there) - method.n_local) :]
        slots = [j for j in there if j not in fixed]
        wanted = method.top_k if method.keep is None else counted(method.keep, len(there)) - len(fixed)
    if len(slots) <= wanted:
        return there
    scale = DIM**-0.5 if method.scale is None else method.scale
    score = votes(evidence, b, slots, scale)
    if method.kernel_size > 1:
        half = method.kernel_size // 2
        score = {j: max(score.get(i, 0.0) for i in range(j - half, j + half + 1)) for j in slots}
    return sorted(fixed + best_of(score, wanted))


@pytest.mark.parametrize("layouts", [LEFT, RIGHT, EQUAL], ids=str)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    "method",
    [
        TokenSelect(keep=3), TokenSelect(keep=0.5), TokenSelect(top_k=5, kernel_size=3),
        TokenSelect(what="all", n_init=2, n_local=3, top_k=4), TokenSelect(what="all", n_init=0, n_local=1, keep=0.4),
        TokenSelect(what="all", n_init=3, n_local=4, top_k=3, scale=None, kernel_size=5),
    ],
    ids=str,
)  # fmt: skip
def test_plan(layouts, groups, method):
    if layouts == RIGHT and method.what == "all":
        pytest.skip("the new token is the last slot")
    evidence = cache(layouts, groups=groups, rows=1, step=3)
    plan = method.plan(evidence)
    for b in range(2):
        for h in range(2):
            assert kept_of(plan, 2 * b + h) == reference(evidence, b, method)


def test_given_attention_is_as_good_as_queries():
    """What softmax took from the products is the same for all keys of a row."""
    evidence = cache(EQUAL, groups=2, rows=1, step=1)
    given = cache(EQUAL, attention=evidence.rows(), queries=None, step=1)
    for scale in (1.0, None):
        method = TokenSelect(keep=4, scale=scale)
        assert kept_of(method.plan(evidence), 0) == kept_of(method.plan(given), 0)


def test_all_heads_of_a_sample_share_a_choice_and_samples_do_not():
    plan = TokenSelect(keep=4).plan(cache(EQUAL, rows=1, step=1))
    keep = [kept_of(plan, r) for r in range(4)]
    assert keep[0] == keep[1] != keep[2] == keep[3]


def test_ties_go_to_the_lower_slot():
    evidence = cache(EQUAL, rows=1, step=1)
    evidence.keys.fill_(0.5)
    got = TokenSelect(keep=3).plan(evidence)
    assert [i for i in kept_of(got, 0) if EQUAL[0][i] == "v"] == visual_slots(evidence, 0)[:3]


def test_budgets_that_cover_everything_are_the_identity():
    evidence = cache(LEFT, rows=1, step=1)
    for method in (
        TokenSelect(), TokenSelect(keep=1.0), TokenSelect(keep=100), TokenSelect(what="all"),
        TokenSelect(what="all", keep=1.0), TokenSelect(what="all", n_init=4, n_local=10, top_k=8),
    ):  # fmt: skip
        assert method.plan(evidence).is_identity
    assert TokenSelect(keep=1).plan(cache(LEFT, rows=1)).is_identity, "the prompt runs on everything"


@pytest.mark.parametrize("groups", GROUPS)
def test_200_steps_with_a_choice_that_holds(groups):
    """With a threshold, the last choice holds while the query is like the one that made it."""
    method = TokenSelect(what="all", n_init=2, n_local=3, top_k=4, threshold=0.9)
    b, h, start, steps = 2, 2, 12, 200
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(b * h, start + steps, DIM, generator=g)
    drift = torch.randn(b * h, groups, steps + 1, DIM, generator=g)
    base = torch.randn(b * h, groups, 1, DIM, generator=g)
    # Queries stay alike for a while, then jump.
    jumps = (torch.arange(steps + 1) // 7)[None, None, :, None]
    queries = base * torch.where(jumps % 2 == 0, 1.0, -1.0) + 0.1 * drift + 0.3 * jumps * drift[:, :, :1]
    scores = memory = None
    held, asked = {}, {}
    fresh = 0
    for step in range(steps + 1):
        n = start + step
        evidence = tr.CacheEvidence(
            keys[:, :n], keys[:, :n], queries=queries[:, :, step : step + 1] if step else None, kv_heads=h, step=step,
            scores=None if scores is None else torch.cat([scores, scores.new_zeros(b * h, 1)], 1), memory=memory,
        )  # fmt: skip
        plan, score, remembered = method.plan(evidence), method.score(evidence), method.remember(evidence)
        scores, memory = score, remembered
        if step == 0:
            assert plan.is_identity
            continue
        for s in range(b):
            rows = slice(s * h, s * h + h)
            query = queries[rows, :, step].flatten().double()
            slots = list(range(2, n - 3))
            if len(slots) > 4:
                like = s in asked and float(query @ asked[s] / query.norm() / asked[s].norm()) >= 0.9
                if not like:
                    held[s], asked[s] = best_of(votes(evidence, s, slots, 1.0), 4), query
                    fresh += 1
                want = sorted({0, 1, *held[s], *range(n - 3, n)})
            else:
                want = list(range(n))
            assert kept_of(plan, s * h) == want
    assert 20 < fresh < 300, "both cases occur"


def test_bad_input():
    for settings in (
        {"keep": 0}, {"what": "text"}, {"n_init": -1}, {"n_local": 0}, {"top_k": 0}, {"kernel_size": 4}, {"scale": 0.0},
        {"threshold": 0.0}, {"threshold": 1.5},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(settings))):
            TokenSelect(**settings)
    with pytest.raises(ValueError, match="n_init=4"):
        TokenSelect(what="all", n_init=4, n_local=4, keep=6).plan(cache(EQUAL, rows=1, step=1))
    broken = cache(EQUAL, rows=1, step=1)
    broken.keys[1, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        TokenSelect(keep=3).plan(broken)
    valid = torch.ones(4, len(EQUAL[0]), dtype=torch.bool)
    valid[1, 5] = False
    with pytest.raises(ValueError, match="different tokens"):
        TokenSelect(keep=3).plan(cache(EQUAL, rows=1, step=1, valid=valid))
    with pytest.raises(ValueError, match="memory"):
        TokenSelect(keep=3, threshold=0.9).plan(cache(EQUAL, rows=1, step=2))
    with pytest.raises(ValueError, match="attention"):
        TokenSelect(keep=3).plan(cache(EQUAL, queries=None, step=1))
