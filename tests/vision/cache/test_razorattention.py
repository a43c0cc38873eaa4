"""RazorAttention against its card in plain loops: the choice of heads, and attention with a compensation token."""

from __future__ import annotations

import math

import pytest
import torch
from kv_cases import DIM, EQUAL, LEFT, RIGHT, cache, counted, kept_of, present, visual_slots

import tokenreduce as tr
from tokenreduce.algorithms.head_table import HeadTable
from tokenreduce.vision.cache.razorattention import RazorAttention


def reference(evidence, row, method):
    """(slots that stay, slots that become one)."""
    there = present(evidence, row)
    among = visual_slots(evidence, row) if method.what == "visual" else there
    n = len(among)
    last = counted(method.keep, n) - method.N0 if method.keep is not None else max(method.S0, int(n / method.C))
    gone = among[method.N0 : max(method.N0, n - last)]
    if (evidence.layer, row % evidence.kv_heads) in method.heads:
        gone = []
    return [j for j in there if j not in gone], gone


METHODS = [
    RazorAttention(heads=((1, 0),), S0=3, N0=2), RazorAttention(heads=(), S0=1, C=3.0, N0=0),
    RazorAttention(heads=((1, 1),), what="all", S0=4), RazorAttention(heads=(), what="all", S0=2, C=2.5, N0=1),
    RazorAttention(heads=((0, 0), (1, 1)), keep=7), RazorAttention(heads=(), keep=0.4, what="all", N0=3),
]  # fmt: skip


@pytest.mark.parametrize("layouts", [LEFT, RIGHT, EQUAL], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_plan(layouts, method):
    evidence = cache(layouts, layer=1, queries=None)
    plan = method.plan(evidence)
    keys, values, sizes = plan.reduce(evidence.keys), plan.reduce(evidence.values), plan.reduce_size(None)
    valid = plan.validity()
    for row in range(4):
        stay, gone = reference(evidence, row, method)
        assert [j for j in kept_of(plan, row) if bool(evidence.there[row, j])] == sorted(stay + gone[:1])
        for place in range(plan.k):
            if valid is not None and not bool(valid[row, place]):
                continue
            slot = int(plan.representatives()[row, place])
            if slot in gone:
                for got, x in ((keys, evidence.keys), (values, evidence.values)):
                    torch.testing.assert_close(got[row, place], x[row, gone].mean(0), rtol=1e-5, atol=1e-6)
                assert float(sizes[row, place]) == len(gone)
            else:
                assert torch.equal(keys[row, place], evidence.keys[row, slot])
                assert torch.equal(values[row, place], evidence.values[row, slot])
                assert sizes is None or float(sizes[row, place]) == 1
        sources = plan.sources()[row]
        assert len({int(sources[j]) for j in gone}) == bool(gone)


def test_attention_is_the_equation_of_the_card():
    """With log of the sizes as bias, a query gets what the paper writes down."""
    method = RazorAttention(heads=(), what="all", S0=5, N0=2)
    evidence = cache(EQUAL, queries=None, layer=1)
    plan = method.plan(evidence)
    query = torch.randn(4, 1, DIM, generator=torch.Generator().manual_seed(2))
    logits = query @ plan.reduce(evidence.keys).transpose(1, 2) / DIM**0.5 + plan.reduce_size(None).log().unsqueeze(1)
    got = logits.softmax(-1) @ plan.reduce(evidence.values)
    for row in range(4):
        stay, gone = reference(evidence, row, method)

        def weight(key, row=row):
            return math.exp(float(query[row, 0] @ key) / DIM**0.5)

        k, v = (x[row, gone].mean(0) for x in (evidence.keys, evidence.values))
        top, below = len(gone) * weight(k) * v, len(gone) * weight(k)
        for j in stay:
            top, below = (
                top + weight(evidence.keys[row, j]) * evidence.values[row, j],
                below + weight(evidence.keys[row, j]),
            )
        torch.testing.assert_close(got[row, 0], top / below, rtol=1e-5, atol=1e-6)


def test_one_compensated_key_keeps_its_value():
    evidence = cache(("tttttttt",) * 2, queries=None)
    plan = RazorAttention(heads=((0, 0),), what="all", S0=6, N0=1).plan(evidence)
    assert kept_of(plan, 1) == list(range(8))
    assert torch.equal(plan.reduce(evidence.keys), evidence.keys)
    assert float(plan.reduce_size(None).max()) == 1


def numbers(layers=5, heads=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(tuple(round(float(v), 1) for v in torch.rand(heads, generator=g)) for _ in range(layers))


@pytest.mark.parametrize(("induction", "echo"), [(0.14, 0.01), (0.3, 0.2), (0.0, 0.1), (1.0, 0.0)])
def test_heads_of_a_table(tmp_path, induction, echo):
    table = HeadTable("Toy", 5, 4, {"induction": numbers(), "echo": numbers(seed=1)})
    path = table.save(tmp_path / "heads.json")
    method = RazorAttention(table=str(path), induction=induction, echo=echo)
    want = set()
    for name, share in (("induction", induction), ("echo", echo)):
        flat = sorted((v for row in table.scores[name] for v in row), reverse=True)
        count = round(share * 20)
        want |= {(i, h) for i in range(5) for h in range(4) if count and table.scores[name][i][h] >= flat[count - 1]}
    assert method.whole_heads() == want
    method.check_model("Toy", 5, 4)
    assert method.acts_at(3, 5)
    evidence = cache(("tttttttt",) * 2, queries=None, kv_heads=4, layer=2, depth=5)
    marks = method.whole(evidence).flatten().tolist()
    assert marks == [(2, h) in want for h in range(4)] * 2


def test_nothing_to_do_is_the_identity():
    evidence = cache(LEFT, queries=None)
    for method in (
        RazorAttention(heads=()), RazorAttention(heads=(), what="all"), RazorAttention(heads=(), keep=1.0),
        RazorAttention(heads=((0, 0), (0, 1)), keep=5), RazorAttention(heads=(), keep=100),
    ):  # fmt: skip
        assert method.plan(evidence).is_identity
    assert RazorAttention(count_bias=False).counts_merged() is False
    assert RazorAttention().counts_merged()
    assert RazorAttention().merges_keys(evidence)


def test_bad_input(tmp_path):
    for settings in (
        {"keep": 0}, {"what": "text"}, {"S0": 0}, {"C": 0.5}, {"N0": -1}, {"induction": 2.0}, {"echo": -0.1},
        {"heads": ((0, -1),)}, {"heads": (1, 2)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(settings))):
            RazorAttention(**settings)
    with pytest.raises(ValueError, match="table or heads"):
        RazorAttention(table="x", heads=())
    evidence = cache(LEFT, queries=None)
    with pytest.raises(ValueError, match="tokenreduce heads"):
        RazorAttention(keep=5).plan(evidence)
    with pytest.raises(ValueError, match="below N0=4"):
        RazorAttention(heads=(), keep=3).plan(evidence)
    with pytest.raises(ValueError, match="layers 0 to 3"):
        RazorAttention(heads=((4, 0),)).acts_at(0, 4)
    with pytest.raises(ValueError, match="KV heads 0 to 1"):
        RazorAttention(heads=((0, 2),), keep=5).plan(evidence)
    with pytest.raises(ValueError, match="KV heads 0 to 1"):
        RazorAttention(heads=((0, 2),)).check_model("Toy", 4, 2)
    path = HeadTable("Toy", 5, 4, {"induction": numbers()}).save(tmp_path / "heads.json")
    method = RazorAttention(table=str(path), keep=5)
    for call in (
        lambda: method.plan(evidence), lambda: method.acts_at(0, 4), lambda: method.check_model("Llava", 5, 4),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the head table is of"):
            call()
    with pytest.raises(ValueError, match="no scores 'echo'"):
        method.whole_heads()


def test_spec():
    method = RazorAttention(heads=((0, 1), (3, 2)), S0=64)
    assert tr.get_method(method.spec()) == method
    assert tr.Reducer.from_json(method.to_json()) == method
