from __future__ import annotations

import pytest
import torch
from cache_cases import Cache, case, kept, top

import tokenreduce as tr

PROMPTS = ("ttvvvvvvvvvvvtttt", "...tvvvvvvvvvtttt")


def softmax(logits):
    weights = torch.tensor(logits, dtype=torch.double).softmax(0)
    return weights.tolist()


class Row:
    """One KV head by loops: slots as dictionaries, the queries of the last tokens."""

    def __init__(self, cache, r):
        self.slots = [
            dict(column=int(c), k=k.double(), v=v.double(), visual=bool(m))
            for c, k, v, m, ok in zip(
                cache.columns[r], cache.keys[r], cache.values[r], cache.visual[r], cache.valid[r], strict=True
            )
            if ok
        ]

    def add(self, cache, r):
        self.slots.append(
            dict(column=int(cache.columns[r, -1]), k=cache.keys[r, -1].double(), v=cache.values[r, -1].double(),
                 visual=False)
        )  # fmt: skip

    def free(self, m, what):
        period = m.residual_length
        return [i for i in range(len(self.slots) - period) if what == "all" or self.slots[i]["visual"]]

    def attnv(self, m, free, room, budget, queries):
        reserved = budget // 4 if m.n_large is None else m.n_large
        sinks = [i for i in free if i < m.n_sink]
        reserved = min(max(reserved, len(sinks)), room)

        def size(i):
            v = self.slots[i]["v"]
            return float(v.norm() if m.magnitude == "norm" else max(v) - min(v))

        large = top({i: 1e9 if i in sinks else size(i) for i in free}, free, reserved)
        groups = []
        for per_group in queries:
            mean = [0.0] * len(free)
            for q in per_group:
                row = softmax([float(q.double() @ self.slots[i]["k"]) / len(q) ** 0.5 / m.temperature for i in free])
                mean = [a + b / len(per_group) for a, b in zip(mean, row, strict=True)]
            if m.smooth:
                mean = [sum(mean[max(0, i - 2) : i + 3]) / 5 for i in range(len(mean))]
            groups.append(mean)
        weight = {i: sum(g[at] for g in groups) / len(groups) for at, i in enumerate(free)}
        return large + top(weight, [i for i in free if i not in large], room - reserved)

    def dkv(self, m, free, room, g):
        score = {}
        for i in free:
            s = self.slots[i]
            score[i] = 1e9 if i < m.n_sink else float(((s["k"] @ g) ** 2).sum() * ((s["v"] @ g) ** 2).sum())
        return top(score, free, room)


def run(method, what, budget_of, steps=200):
    cache = Cache(method, PROMPTS)
    rows = [Row(cache, r) for r in range(4)]
    whole = [sum(s["visual"] for s in row.slots) for row in rows]
    cuts, period = 0, method.residual_length
    for _ in range(steps):
        ev = cache.grow()
        for r, row in enumerate(rows):
            row.add(cache, r)
        cache.decide(ev)
        for r, row in enumerate(rows):
            n, budget = len(row.slots), budget_of(whole[r], int(ev.seen[r]))
            counted = n if what == "all" else sum(s["visual"] for s in row.slots)
            if n % period or counted <= budget:
                continue
            cuts += 1
            free = row.free(method, what)
            held = sum(what == "all" or s["visual"] for s in row.slots[n - period :])
            room = max(0, budget - held)
            if method.mode == "attnv":
                chosen = row.attnv(method, free, room, budget, cache.queries[r, :, -period:])
            else:
                g = torch.randn(cache.dim, 20, generator=method._generator(ev)).double() / 20**0.5
                chosen = row.dkv(method, free, room, g)
            row.slots = [s for i, s in enumerate(row.slots) if i in chosen or i not in free]
        assert cache.held() == [[s["column"] for s in row.slots] for row in rows]
    return cache, cuts


@pytest.mark.parametrize(
    "settings",
    [
        dict(n_large=2, n_sink=1), dict(), dict(smooth=True, magnitude="norm"), dict(temperature=2.0, n_sink=0),
        dict(mode="dkv", n_sink=2),
    ],
)  # fmt: skip
def test_all_keys_200_steps(settings):
    method = tr.VaSE(what="all", token_budget=12, residual_length=4, draw=False, **settings)
    cache, cuts = run(method, "all", lambda visual, seen: 12)
    assert cuts > 100
    assert max(map(len, cache.held())) < 12 + 4


def test_a_share_of_all_tokens_200_steps():
    method = tr.VaSE(what="all", keep=0.4, residual_length=4, draw=False, n_sink=2)
    _, cuts = run(method, "all", lambda visual, seen: max(6, int(0.4 * seen + 0.5)))
    assert cuts > 20


@pytest.mark.parametrize("keep", [0.4, 3])
def test_visual_keys_are_thinned_once(keep):
    method = tr.VaSE(keep=keep, residual_length=4, draw=False)
    cache, cuts = run(method, "visual", lambda v, seen: keep if isinstance(keep, int) else int(keep * v + 0.5), 60)
    assert cuts == 4
    assert [len(c) for c in cache.held()] == [
        60 + text + (keep if isinstance(keep, int) else int(keep * v + 0.5))
        for text, v in ((6, 11), (5, 9))
        for _ in "hh"
    ]


def evidence(weights, values, heads, step=8, **more):
    """``heads`` equal KV heads whose last two queries give every slot its weight."""
    rows = torch.tensor(weights).expand(heads, 1, 2, -1)
    keys = torch.ones(heads, len(weights), 2)
    v = torch.tensor(values)[None, :, None] * torch.tensor([1.0, -1.0])
    return tr.CacheEvidence(keys, v.expand(heads, -1, -1), attention=rows, kv_heads=heads, step=step, **more)


def test_draws_follow_the_weights():
    """Of slots 1 to 4 one is drawn; 0 has the largest value; 5 and 6 are the last, with 7 of 8 weights."""
    weights = [0.2, 0.05, 0.03, 0.015, 0.005, 0.3, 0.4, 0.0]
    method = tr.VaSE(what="all", token_budget=4, residual_length=2, n_large=1, n_sink=0)
    ev = evidence(weights, [9.0, 1, 1, 1, 1, 1, 1, 1], heads=4000)
    rows = kept(method.plan(ev))
    assert all(r[0] == 0 and r[2:] == [6, 7] for r in rows)
    share = torch.bincount(torch.tensor([r[1] for r in rows]), minlength=6)[1:6] / 4000
    want = torch.tensor(weights[1:6]) / sum(weights[1:6])
    assert (share - want).abs().max() < 0.03
    assert rows == kept(method.plan(ev))
    other = tr.VaSE(what="all", token_budget=4, residual_length=2, n_large=1, n_sink=0, seed=1)
    assert rows != kept(other.plan(ev))
    assert rows != kept(method.plan(evidence(weights, [9.0, 1, 1, 1, 1, 1, 1, 1], heads=4000, step=10)))
    assert rows != kept(method.plan(evidence(weights, [9.0, 1, 1, 1, 1, 1, 1, 1], heads=4000, layer=1)))


@pytest.mark.parametrize("mode", ["attnv", "dkv"])
@pytest.mark.parametrize("smooth", [False, True])
def test_alone_in_a_batch_and_padded_alike(mode, smooth):
    method = tr.VaSE(what="all", token_budget=8, residual_length=4, mode=mode, n_sink=1, smooth=smooth)
    one = case(("ttvvvvvvvvtttttt",), step=5)
    pad = torch.nn.functional.pad

    def padded(left, hole):
        def wide(x):
            parts = pad(x[:, :9], (0, 0, left, hole)), x[:, 9:]
            return torch.cat(parts, 1)

        marks = {name: wide(m[..., None])[..., 0] for name, m in (("visual", one._visual), ("valid", one._valid))}
        return tr.CacheEvidence(
            wide(one.keys), wide(one.values), queries=one.queries[:, :, -4:], kv_heads=2, step=5, **marks
        )  # fmt: skip

    alone = kept(method.plan(one))
    assert {len(r) for r in alone} == {8}
    for left, hole in ((0, 0), (7, 0), (2, 5)):
        rows = kept(method.plan(padded(left, hole)))
        assert [[s - left - hole * (s >= left + 9) for s in r] for r in rows] == alone
    other = case(("vvvvvvvvvtttttttttt",), step=5, seed=8)
    two = tr.CacheEvidence(
        torch.cat([pad(one.keys, (0, 0, 3, 0)), other.keys]), torch.cat([pad(one.values, (0, 0, 3, 0)), other.values]),
        queries=torch.cat([one.queries[:, :, -4:], other.queries[:, :, -4:]]), kv_heads=2, step=5,
        visual=torch.cat([pad(one._visual, (3, 0)), other._visual]),
        valid=torch.cat([pad(one._valid, (3, 0)), other._valid]),
    )  # fmt: skip
    rows = kept(method.plan(two))
    assert [[s - 3 for s in r] for r in rows[:2]] == alone
    assert rows[2:] == [list(range(19))] * 2  # 19 is no multiple of 4


def test_the_prompt_stays_and_bad_settings():
    method = tr.VaSE(what="all", token_budget=8, residual_length=4)
    assert method.moment() == "never"
    assert method.plan(case(("t" * 16,))).is_identity
    assert tr.VaSE(mode="dkv").required() == ()
    assert tr.VaSE(keep=1.0, residual_length=1).plan(case(step=3)).is_identity
    for bad, says in (
        (dict(what="all", token_budget=9, residual_length=4), "multiple"), (dict(token_budget=128), "what=all"),
        (dict(what="all", token_budget=64), "multiple"), (dict(what="all", keep=64), "larger than"),
        (dict(n_large=-1), "n_large"), (dict(mode="knorm"), "dkv"), (dict(temperature=0.0), "above 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            tr.VaSE(**bad)
    with pytest.raises(ValueError, match="nothing to draw"):
        tr.VaSE(what="all", token_budget=8, residual_length=4, n_large=4).plan(case(("t" * 16,), step=1))
