"""Recycled Attention against its algorithm in plain loops, over 200 decode steps."""

from __future__ import annotations

import pytest
import torch
from kv_cases import DIM, EQUAL, GROUPS, LEFT, RIGHT, best_of, cache, counted, kept_of, marks, softmax_row

import tokenreduce as tr
from tokenreduce.vision.cache.recycled import Recycled


class Reference:
    """One KV head of one sample: what every step sees."""

    def __init__(self, method, visual):
        self.method, self.visual, self.prompt = method, visual, None

    def full(self, evidence, row, there):
        """Rank the slots by a full step."""
        heads = [softmax_row(evidence, row, g, evidence.rows_given - 1) for g in range(evidence.groups)]
        pick = max if self.method.group == "max" else lambda values: sum(values) / len(values)
        one = {j: pick([head[j] for head in heads]) for j in there}
        half = self.method.kernel_size // 2
        self.worth = {j: max(one.get(i, 0.0) for i in range(j - half, j + half + 1)) for j in there}
        self.partial = []
        if self.prompt is None:
            self.prompt = len(there)

    def step(self, own):
        """What a partial step sees, its own slot among it."""
        method = self.method
        if method.what == "visual":
            visual = {j: w for j, w in self.worth.items() if j in self.visual}
            self.partial.append(own)
            text = [j for j in self.worth if j not in self.visual]
            return sorted(text + best_of(visual, counted(method.keep, len(visual))) + self.partial)
        if method.keep == 1.0:
            self.partial.append(own)
            return sorted([*self.worth, *self.partial])
        if not self.partial:
            total = method.keep if isinstance(method.keep, int) else max(1, int(method.keep * self.prompt + 0.5))
            self.held = sorted(self.worth, key=lambda j: (-self.worth[j], j))[:total][::-1]  # the worst first
            self.total = total
        seen = sorted([*self.held, own])
        self.held = [*self.held, own]
        if len(self.held) > self.total:
            self.held = self.held[1:]
        self.partial.append(own)
        return seen


def run(method, layouts, groups, steps=200, h=2, queries=None, check=None):
    """Play ``steps`` decode steps and compare every plan with the reference; how many steps saw everything."""
    b, start = len(layouts), len(layouts[0])
    g = torch.Generator().manual_seed(1)
    keys = torch.randn(b * h, start + steps, DIM, generator=g)
    if queries is None:
        queries = torch.randn(b * h, groups, steps + 1, DIM, generator=g) * 2
    there, visual = (torch.cat([marks(layouts, kind), torch.full((b, steps), kind == "tv")], 1) for kind in ("tv", "v"))
    references = [Reference(method, {j for j, c in enumerate(layouts[r // h]) if c == "v"}) for r in range(b * h)]
    scores = memory = None
    full_steps, last = 0, {}
    for step in range(steps + 1):
        n = start + step
        evidence = tr.CacheEvidence(
            keys[:, :n], keys[:, :n], queries=queries[:, :, step : step + 1], kv_heads=h, step=step,
            visual=visual[:, :n], valid=there[:, :n], memory=memory,
            prompt_slots=there[:, :start].sum(1, True).repeat_interleave(h, 0),
            scores=None if scores is None else torch.cat([scores, scores.new_zeros(b * h, 1, 2)], 1),
        )  # fmt: skip
        plan, score, remembered = method.plan(evidence), method.score(evidence), method.remember(evidence)
        scores, memory = score, remembered
        for s in range(b):
            mean = queries[s * h : s * h + h, :, step].double().mean((0, 1))
            everything = step % method.stride == 0
            if everything and step and method.threshold is not None:
                cosine = float(mean @ last[s] / mean.norm() / last[s].norm())
                everything = not cosine > method.threshold
            if everything:
                last[s] = mean
                full_steps += s == 0
            for row in range(s * h, s * h + h):
                slots = [j for j in range(n) if bool(there[s, j])]
                if everything:
                    references[row].full(evidence, row, slots)
                want = slots if everything else references[row].step(n - 1)
                got = [j for j in kept_of(plan, row) if bool(there[s, j])]  # the identity names padding, too
                assert got == want, (step, row)
    return full_steps


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    "method",
    [
        Recycled(keep=3), Recycled(keep=0.4, stride=3, group="mean"), Recycled(keep=5, stride=1),
        Recycled(what="all", keep=6, stride=9, kernel_size=3), Recycled(what="all", keep=0.3, stride=5),
        Recycled(what="all", keep=2, stride=7, kernel_size=1), Recycled(what="all", keep=1.0, stride=4),
    ],
    ids=str,
)  # fmt: skip
def test_200_steps(method, groups):
    steps = 200 if groups == 2 and method.stride > 5 else 40
    assert run(method, LEFT, groups, steps) == steps // method.stride + 1


def test_queries_that_stay_alike_put_off_the_full_step():
    g = torch.Generator().manual_seed(3)
    base = torch.randn(1, 1, 1, DIM, generator=g).expand(4, 2, 201, DIM)
    turned = torch.where((torch.arange(201) // 31)[:, None] % 2 == 0, base, -base)
    queries = turned + 0.3 * torch.randn(4, 2, 201, DIM, generator=g)
    seen = run(Recycled(keep=3, stride=5, threshold=0.8), EQUAL, 2, queries=queries)
    assert 5 < seen < 15, "of 41 that a fixed stride would have"
    assert run(Recycled(keep=3, stride=5, threshold=1.0), EQUAL, 2, queries=queries, steps=40) == 9


def test_the_prompt_is_ranked_by_its_last_token():
    """Of the rows that are known, the last; padding has no rank."""
    method = Recycled(keep=2, kernel_size=1)
    evidence = cache(LEFT, rows=6)
    worth = method.score(evidence)
    for row in range(4):
        for j in range(evidence.n):
            rows = [softmax_row(evidence, row, g, 5) for g in range(2)]
            assert float(worth[row, j, 0]) == pytest.approx(max(r.get(j, 0.0) for r in rows), abs=1e-6)
            assert bool(worth[row, j, 1]) == bool(evidence.there[row, j])


def test_ties_go_to_the_lower_slot():
    method = Recycled(keep=3)
    first = cache(EQUAL, rows=1)
    first.keys.fill_(0.5)
    scores = torch.cat([method.score(first), torch.zeros(4, 1, 2)], 1)
    then = cache(tuple(row + "t" for row in EQUAL), rows=1, step=1, scores=scores)
    kept = kept_of(method.plan(then), 0)
    assert [j for j in kept if j < 23 and EQUAL[0][j] == "v"] == [1, 2, 3]


def test_budgets_that_cover_everything_are_the_identity():
    scores = torch.rand(4, 23, 2)
    scores[:, -1] = 0
    evidence = cache(EQUAL, rows=1, step=1, scores=scores)
    for method in (
        Recycled(keep=1.0),
        Recycled(keep=100),
        Recycled(what="all", keep=1.0),
        Recycled(what="all", keep=99),
    ):
        assert method.plan(evidence).is_identity
    assert Recycled(keep=1).plan(cache(EQUAL, rows=1)).is_identity, "the prompt"
    assert Recycled(keep=1, stride=4).plan(cache(EQUAL, rows=1, step=8)).is_identity, "a full step"
    assert not Recycled(keep=1, stride=4).plan(evidence).is_identity


def test_bad_input():
    for settings in (
        {"keep": 0}, {"what": "text"}, {"stride": 0}, {"kernel_size": 2}, {"threshold": 1.5}, {"group": "min"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(settings))):
            Recycled(**settings)
    with pytest.raises(ValueError, match="scores"):
        Recycled().plan(cache(LEFT, rows=1, step=1))
    with pytest.raises(ValueError, match="scores"):
        Recycled().score(cache(LEFT, rows=1, step=1))
    with pytest.raises(ValueError, match="memory"):
        Recycled(threshold=0.9).plan(cache(LEFT, rows=1, step=10))
    broken = cache(LEFT, rows=1)
    broken.keys[0, 8] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        Recycled().score(broken)
    with pytest.raises(ValueError, match="right-padded"):
        Recycled().score(cache(RIGHT, rows=1))
    assert torch.isfinite(Recycled().score(cache(RIGHT, rows=5))).all()
