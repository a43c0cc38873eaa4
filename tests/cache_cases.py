"""Evidence for cache methods, and the same as plain matrices of one sample without padding, for plain-loop references.

A layout is a string with a letter for every slot: t text, v visual, . padding.
"""

from __future__ import annotations

import torch

import tokenreduce as tr

LAYOUTS = ("ttvvvvvvvvvvvtttt", ".....tvvvvvvvtvtt", "tvvvvvvvvvtttt...")


def case(layouts=LAYOUTS, heads=2, groups=2, layer=0, depth=1, seed=0, dim=6, given="queries", **more):
    """Random evidence of one layer; ``given`` is what it has, all rows of "queries" or "attention"."""
    g = torch.Generator().manual_seed(1000 * seed + layer)
    b, n = len(layouts), len(layouts[0])
    keys, values = (torch.randn(b, heads, n, dim, generator=g) for _ in range(2))
    queries = 2 * torch.randn(b, heads, groups, n, dim, generator=g)
    marks = {name: torch.tensor([[c in kinds for c in row] for row in layouts]) for name, kinds in KINDS.items()}
    ev = tr.CacheEvidence(
        keys.flatten(0, 1), values.flatten(0, 1), queries=queries.flatten(0, 1), kv_heads=heads, layer=layer,
        depth=depth, **marks, **more,
    )  # fmt: skip
    drawn = ev.queries
    if given == "attention":
        rows = dense(ev, drawn)
        ev = tr.CacheEvidence(
            ev.keys, ev.values, attention=rows, kv_heads=heads, layer=layer, depth=depth, **marks, **more
        )  # fmt: skip
    ev.drawn = drawn
    return ev


KINDS = {"valid": "tv", "visual": "v"}


def layers(depth, layouts=LAYOUTS, **settings):
    return [case(layouts, layer=i, depth=depth, **settings) for i in range(depth)]


def dense(ev, queries):
    """(B*Hkv,G,N,N) causal softmax rows, by hand."""
    n, there = ev.n, ev.there
    logits = torch.einsum("bgid,bjd->bgij", queries.double(), ev.keys.double()) * ev.scale
    sees = torch.ones(n, n).tril().bool() & there[:, None, None] & there[:, None, :, None]
    return logits.masked_fill(~sees, float("-inf")).softmax(-1).nan_to_num(0.0).float()


class Plain:
    """One sample of evidence without padding: ``a`` (H,G,n,n) double attention, ``keys``, ``values`` (H,n,d),
    ``visual`` and ``text`` lists of slots; ``raw`` (H,G,n,n) logits without a mask."""

    def __init__(self, ev, b):
        rows = slice(b * ev.kv_heads, (b + 1) * ev.kv_heads)
        self.real = ev.there[rows][0].nonzero().flatten()
        self.n, self.heads = len(self.real), ev.kv_heads
        self.a = dense(ev, ev.drawn)[rows][:, :, self.real][:, :, :, self.real].double()
        self.keys, self.values = ev.keys[rows][:, self.real].double(), ev.values[rows][:, self.real].double()
        q = ev.drawn[rows][:, :, self.real].double()
        self.raw = torch.einsum("hgid,hjd->hgij", q, self.keys) * ev.scale
        marked = ev.visual[rows][0][self.real].tolist()
        self.visual = [i for i in range(self.n) if marked[i]]
        self.text = [i for i in range(self.n) if not marked[i]]
        self.layer, self.depth = ev.layer, ev.depth


def top(scores, among, count):
    """The ``count`` best slots ``among`` a list, ties to the lower one, ascending."""
    return sorted(sorted(among, key=lambda i: (-float(scores[i]), i))[: max(0, count)])


def half_up(share, n):
    return max(1, min(n, int(share * n + 0.5)))


def kept(plan):
    """For every row the slots that stay, as the plan orders them."""
    at, valid = plan.representatives(), plan.validity()
    valid = torch.ones_like(at, dtype=torch.bool) if valid is None else valid
    return [row[ok].tolist() for row, ok in zip(at, valid, strict=True)]


def agrees(method, evidences, reference):
    """Plans of all layers against ``reference(samples)``, which gets one sample's :class:`Plain` of every layer and
    returns for every layer and head the slots that stay."""
    plans = method.plans(evidences)
    for b in range(evidences[0].batch):
        samples = [Plain(ev, b) for ev in evidences]
        for plan, sample, want in zip(plans, samples, reference(samples), strict=True):
            if plan.is_identity:
                got = [list(range(sample.n))] * sample.heads
            else:
                place = {int(slot): i for i, slot in enumerate(sample.real)}
                rows = kept(plan)[b * sample.heads : (b + 1) * sample.heads]
                got = [[place[slot] for slot in row] for row in rows]
            assert got == want


def keeps_all(method, depth=3, **settings):
    assert all(plan.is_identity for plan in method.plans(layers(depth, **settings)))


class Cache:
    """What an adapter does in decode, for one layer: appends, asks, gathers. ``rows`` are B*Hkv."""

    def __init__(self, method, layouts, heads=2, groups=2, seed=0, dim=6, prompt=None):
        self.method, self.heads, self.groups, self.dim = method, heads, groups, dim
        self.g = torch.Generator().manual_seed(seed)
        b, n = len(layouts), len(layouts[0])
        self.batch = b
        self.valid, self.visual = (
            torch.tensor([[c in kinds for c in row] for row in layouts]).repeat_interleave(heads, 0)
            for kinds in ("tv", "v")
        )
        self.seen = self.valid.sum(1, keepdim=True)
        self.keys, self.values = self.draw(n, dim), self.draw(n, dim)
        self.queries = self.draw(groups, n, dim)
        self.columns = torch.arange(n).expand(b * heads, n)
        self.scores, self.step, self.left = None, 0, None
        if prompt is not None:
            self.take(prompt(self))
        self.left = self.valid.sum(1, keepdim=True)

    def draw(self, *shape):
        """The same numbers for all samples, from the right, so that padding changes none."""
        own = torch.randn(self.heads, *shape, generator=self.g)
        return own.repeat(self.batch, *[1] * len(shape))

    def take(self, plan):
        if plan.is_identity:
            return
        at, valid = plan.representatives(), plan.validity()
        self.valid = self.valid.gather(1, at) if valid is None else valid & self.valid.gather(1, at)
        self.visual, self.columns = self.visual.gather(1, at), self.columns.gather(1, at)
        self.keys, self.values = plan.gather(self.keys), plan.gather(self.values)
        if self.scores is not None:
            self.scores = plan.gather(self.scores)

    def evidence(self, layer=0):
        rows = max(1, min(self.method.recent_queries(), self.queries.shape[2]))
        return tr.CacheEvidence(
            self.keys, self.values, queries=self.queries[:, :, -rows:], kv_heads=self.heads, visual=self.visual,
            valid=self.valid, scores=self.scores, step=self.step, columns=self.columns, seen=self.seen,
            prompt_slots=self.left, layer=layer,
        )  # fmt: skip

    def grow(self):
        """One token more; returns the evidence of its step before anything is evicted."""
        self.step += 1
        self.seen = self.seen + 1
        self.keys = torch.cat([self.keys, self.draw(1, self.dim)], 1)
        self.values = torch.cat([self.values, self.draw(1, self.dim)], 1)
        self.queries = torch.cat([self.queries, 2 * self.draw(self.groups, 1, self.dim)], 2)
        one = torch.ones_like(self.valid[:, :1])
        self.valid, self.visual = torch.cat([self.valid, one], 1), torch.cat([self.visual, ~one], 1)
        self.columns = torch.cat([self.columns, self.columns.amax(1, keepdim=True) + 1], 1)
        if self.scores is not None:
            pad = torch.zeros_like(self.scores[:, :1])
            self.scores = torch.cat([self.scores, pad], 1)
        return self.evidence()

    def decide(self, ev):
        score = self.method.score(ev)
        plan = self.method.plan(ev) if self.step % self.method.every() == 0 else None
        self.scores = score
        if plan is not None:
            self.take(plan)

    def held(self):
        """For every row the columns that it holds."""
        return [c[v].tolist() for c, v in zip(self.columns, self.valid, strict=True)]
