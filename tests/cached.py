"""Evidence of the cache stage to try methods on, a decode loop as an adapter runs it, and plain loops beside them."""

from __future__ import annotations

import torch

from tokenreduce import CacheEvidence
from tokenreduce.core.evidence import Rotary

#: t text, v visual, . padding; odd and even lengths, images first, last and in between, none at all.
LAYOUTS = ("ttvvvvvvvvvvtttvvvttt", "......tvvvvvvvvvttttt", "...ttttttvvvtttttvvvv", "ttttttttttttttttttttt")
DIM = 8


def tables(positions, dim=DIM, paired=False):
    """cos and sin (...,dim) of positions (...), laid out as channels are."""
    angle = positions.unsqueeze(-1) * 0.3 ** torch.arange(dim // 2, dtype=torch.float64)
    angle = angle.repeat_interleave(2, -1) if paired else torch.cat([angle, angle], -1)
    return angle.cos().float(), angle.sin().float()


def marks(layouts, letters):
    return torch.tensor([[c in letters for c in row] for row in layouts])


def contents(row, number, kv_heads=2, groups=2, dim=DIM, seed=0):
    """Keys, values (Hkv,n,d) and queries (Hkv,G,n,d) of the real tokens of one sample; they know nothing of padding."""
    n = sum(c != "." for c in row)
    g = torch.Generator().manual_seed(1000 * seed + number)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    return draw(kv_heads, n, dim), draw(kv_heads, n, dim), 2 * draw(kv_heads, groups, n, dim)


def cached(
    layouts=LAYOUTS, kv_heads=2, groups=2, dim=DIM, seed=0, samples=None, pad=float("nan"), rows=None,
    paired=False, **more,
):  # fmt: skip
    """Evidence of a prompt, all queries known (or the last ``rows``). ``samples`` are the numbers of the samples, whose
    contents follow from them; padding holds ``pad``."""
    samples = range(len(layouts)) if samples is None else samples
    b, n = len(layouts), len(layouts[0])
    keys, values = torch.full((b, kv_heads, n, dim), pad), torch.full((b, kv_heads, n, dim), pad)
    queries = torch.full((b, kv_heads, groups, n, dim), pad)
    for i, (row, number) in enumerate(zip(layouts, samples, strict=True)):
        at = torch.tensor([c != "." for c in row])
        k, v, q = contents(row, number, kv_heads, groups, dim, seed)
        keys[i, :, at], values[i, :, at], queries[i, :, :, at] = k, v, q
    valid = marks(layouts, "tv")
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    after = valid.sum(1, keepdim=True)
    rotary = Rotary(
        *tables(positions, dim, paired), lambda f: tables(after + torch.arange(f), dim, paired), paired=paired
    )
    return CacheEvidence(
        keys.flatten(0, 1), values.flatten(0, 1), queries=queries.flatten(0, 1)[:, :, -(rows or n) :],
        kv_heads=kv_heads, visual=marks(layouts, "v"), valid=valid, rotary=rotary,
        **{"layer": 1, "depth": 4, **more},
    )  # fmt: skip


def tied(layouts=LAYOUTS, kv_heads=2, groups=2, rows=None, seed=0, **more):
    """Evidence with attention of few values, eighths, so that sums are exact and many are equal; and its rows
    (B*Hkv,G,R,N) in float64."""
    b, n = len(layouts), len(layouts[0])
    rows = rows or n
    g = torch.Generator().manual_seed(seed)
    attention = torch.randint(0, 3, (b * kv_heads, groups, rows, n), generator=g) / 8
    valid = marks(layouts, "tv")
    there = valid.repeat_interleave(kv_heads, 0)
    sees = (torch.arange(n) <= torch.arange(n - rows, n)[:, None]) & there[:, None] & there[:, n - rows :, None]
    attention = attention * sees[:, None]
    keys = torch.randn(b * kv_heads, n, DIM, generator=g)
    evidence = CacheEvidence(
        keys, keys.flip(-1), attention, kv_heads=kv_heads, visual=marks(layouts, "v"), valid=valid,
        **{"layer": 1, "depth": 4, **more},
    )  # fmt: skip
    return evidence, attention.double()


def kept(plan, n=None):
    """Slots that every row keeps, ascending."""
    if plan.is_identity:
        return [list(range(plan.n))] * plan.batch
    at, valid = plan.representatives(), plan.validity()
    out = []
    for i in range(plan.batch):
        row = at[i] if valid is None else at[i][valid[i]]
        assert row.tolist() == sorted(set(row.tolist()))
        out.append(row.tolist())
    return out


def real(evidence):
    """Slots of every row that are there."""
    return [row.nonzero().flatten().tolist() for row in evidence.there]


def image(evidence):
    """Visual slots of every row."""
    return [row.nonzero().flatten().tolist() for row in evidence.visual]


def plain_rows(evidence):
    """(B*Hkv,G,R,N) float64 softmax rows of the known queries, by a loop; rows of padding are 0."""
    keys, there = evidence.keys.double(), evidence.there
    queries = evidence.queries.double()
    out = torch.zeros(*queries.shape[:3], evidence.n, dtype=torch.float64)
    first = evidence.n - queries.shape[2]
    for i in range(keys.shape[0]):
        for r in range(queries.shape[2]):
            if not there[i, first + r]:
                continue
            sees = [j for j in range(first + r + 1) if there[i, j]]
            for g in range(queries.shape[1]):
                logits = torch.stack([queries[i, g, r] @ keys[i, j] for j in sees]) * evidence.scale
                out[i, g, r, sees] = logits.softmax(0)
    return out


def top(scores, among, count):
    """The ``count`` of the slots ``among`` with the largest scores, ties to the lower slot, ascending."""
    return sorted(sorted(among, key=lambda j: (-float(scores[j]), j))[:count])


def half_up(keep, n):
    return min(keep, n) if isinstance(keep, int) else min(n, max(1, int(keep * n + 0.5)))


class Decode:
    """A prompt and decode steps behind it, as an adapter hands them to a method; every row has slots of its own."""

    def __init__(self, method, layouts=LAYOUTS, seed=0, kv_heads=2, groups=2):
        self.method, self.kv_heads, self.groups = method, kv_heads, groups
        self.evidence = cached(layouts, kv_heads, groups, seed=seed, pad=0.0)
        self.columns = torch.arange(self.evidence.n).expand(self.evidence.keys.shape[0], -1)
        self.next, self.step = self.evidence.n, 0
        self.draw = torch.Generator().manual_seed(77 + seed)
        self.prompt_slots, self.given = None, self.evidence.counts
        self._judge(self.evidence)

    def _judge(self, evidence):
        method, self.scores = self.method, None
        if method.every():
            self.scores = method.score(evidence)
        self.keys, self.values = evidence.keys, evidence.values
        self.valid, self.visual = evidence.there, evidence.visual
        if self.step == 0 or self.step % method.every() == 0:
            plan = method.plan(evidence)
            kept(plan)
            take = (lambda x: x) if plan.is_identity else plan.gather
            there = plan.validity()
            self.keys, self.values, self.columns = take(self.keys), take(self.values), take(self.columns)
            self.valid = take(self.valid) if there is None else take(self.valid) & there
            self.visual = take(self.visual)
            self.scores = None if self.scores is None else take(self.scores)
        if self.step == 0:
            self.prompt_slots = self.valid.sum(1, keepdim=True)

    def go(self):
        """One step; returns its evidence."""
        self.step += 1
        rows = self.keys.shape[0]
        key, value = (torch.randn(rows, 1, DIM, generator=self.draw) for _ in range(2))
        query = 2 * torch.randn(rows, self.groups, 1, DIM, generator=self.draw)
        wide = lambda x, fill: torch.cat([x, torch.full((rows, 1), fill, dtype=x.dtype)], 1)
        self.columns = wide(self.columns, self.next)
        self.next += 1
        evidence = CacheEvidence(
            torch.cat([self.keys, key], 1), torch.cat([self.values, value], 1), queries=query, kv_heads=self.kv_heads,
            valid=wide(self.valid, True), visual=wide(self.visual, False), columns=self.columns, layer=1, depth=4,
            scores=None if self.scores is None else wide(self.scores, 0.0), step=self.step,
            prompt_slots=self.prompt_slots, seen=self.given + self.step,
        )  # fmt: skip
        self._judge(evidence)
        return evidence

    def held(self):
        """Columns that every row holds."""
        return [c[v].tolist() for c, v in zip(self.columns, self.valid, strict=True)]


def against(method, cut, update=None, steps=200, seed=0, interval=1, **more):
    """Run ``method`` for many steps beside a plain reference, which knows every key ever and masks those that left.

    ``update(scores, rows, columns, evidence, i)`` changes the dict of scores of row i by softmax rows (G,R,n) float64
    over its columns; ``cut(columns, scores, last, n)`` returns those that stay, ``last`` being what the last token
    gives them on average, n the length of the prompt.
    """
    run = Decode(method, seed=seed, **more)
    first = run.evidence
    rows, there = plain_rows(first), real(first)
    keys = [{c: first.keys[i, c].double() for c in there[i]} for i in range(len(there))]
    scores, alive = [], []
    for i, columns in enumerate(there):
        mine = {}
        prompt = rows[i][:, :, columns][:, columns]
        if update:
            update(mine, prompt, columns, first, i)
        last = dict(zip(columns, prompt[:, -1].mean(0).tolist(), strict=True))
        left = cut(columns, mine, last, len(columns))
        scores.append({c: mine.get(c, 0.0) for c in left})
        alive.append(left)
    assert run.held() == alive
    for step in range(1, steps + 1):
        before = run.next
        evidence = run.go()
        for i in range(len(alive)):
            keys[i][before] = evidence.keys[i, -1].double()
            columns = [*alive[i], before]
            stacked = torch.stack([keys[i][c] for c in columns])
            row = (evidence.queries[i].double() @ stacked.T * evidence.scale).softmax(-1)  # (G,1,n)
            if update:
                update(scores[i], row, columns, evidence, i)
            last = dict(zip(columns, row[:, 0].mean(0).tolist(), strict=True))
            alive[i] = columns if step % interval else cut(columns, scores[i], last, len(there[i]))
            scores[i] = {c: scores[i].get(c, 0.0) for c in alive[i]}
        assert run.held() == alive, step
    return run
