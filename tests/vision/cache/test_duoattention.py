"""DuoAttention against its card in plain loops, and 200 decode steps against a plain reference."""

from __future__ import annotations

import math

import pytest
import torch
from kv_cases import EQUAL, LEFT, RIGHT, cache, counted, kept_of, marks, present, visual_slots

import tokenreduce as tr
from tokenreduce.algorithms.head_table import HeadTable
from tokenreduce.vision.cache.duoattention import DuoAttention

STREAM = ((1, 0),)


def reference(evidence, row, method):
    there = present(evidence, row)
    if (evidence.layer, row % evidence.kv_heads) in method.heads:
        return there
    among = visual_slots(evidence, row) if method.what == "visual" else there
    if method.keep is None:
        inside = there[: method.sink_size] + there[max(0, len(there) - method.recent_size) :]
    else:
        total = counted(method.keep, len(among))
        inside = among[: total // 5] + among[len(among) - (total - total // 5) :]
    return [j for j in there if j not in among or j in inside]


@pytest.mark.parametrize("layouts", [LEFT, RIGHT, EQUAL], ids=str)
@pytest.mark.parametrize(
    "method",
    [
        DuoAttention(heads=STREAM, sink_size=2, recent_size=7), DuoAttention(heads=(), sink_size=0, recent_size=1),
        DuoAttention(heads=STREAM, what="all", sink_size=3, recent_size=5), DuoAttention(heads=(), keep=6),
        DuoAttention(heads=STREAM, keep=0.5, what="all"), DuoAttention(heads=(), keep=3),
    ],
    ids=str,
)  # fmt: skip
def test_plan(layouts, method):
    evidence = cache(layouts, layer=1, queries=None)
    plan = method.plan(evidence)
    for row in range(4):
        assert [j for j in kept_of(plan, row) if bool(evidence.there[row, j])] == reference(evidence, row, method)


@pytest.mark.parametrize("what", ["visual", "all"])
@pytest.mark.parametrize("interval", [1, 7])
def test_200_steps(what, interval):
    """A streaming head holds its sinks and the recent tokens of every step where it evicts; the other everything."""
    method = DuoAttention(heads=STREAM, what=what, sink_size=3, recent_size=9, interval=interval)
    assert method.every() == interval
    b, h, start = 2, 2, len(LEFT[0])
    there = marks(LEFT, "tv").repeat_interleave(h, 0)
    visual = marks(LEFT, "v").repeat_interleave(h, 0)
    columns = torch.arange(start).expand(b * h, -1)
    want = [[j for j in range(start) if bool(there[row, j])] for row in range(b * h)]
    for step in range(201):
        if step:
            columns = torch.cat([columns, torch.full((b * h, 1), start + step - 1)], 1)
            there = torch.cat([there, torch.ones(b * h, 1, dtype=torch.bool)], 1)
            visual = torch.cat([visual, torch.zeros(b * h, 1, dtype=torch.bool)], 1)
            want = [[*row, start + step - 1] for row in want]
        if step % interval == 0:
            keys = torch.zeros(*columns.shape, 2)
            evidence = tr.CacheEvidence(keys, keys, kv_heads=h, visual=visual, valid=there, layer=1, depth=4, step=step)
            plan = method.plan(evidence)
            valid = plan.validity()
            mine = there.gather(1, plan.representatives())
            columns, visual, there = plan.gather(columns), plan.gather(visual), mine if valid is None else mine & valid
            for row in (1, 3):
                seen = want[row]
                inside = {*seen[:3], *seen[-9:]}
                first = LEFT[row // h]
                want[row] = [
                    j for j in seen if j in inside or (what == "visual" and (j >= start or first[j] != "v"))
                ]  # fmt: skip
        for row in range(b * h):
            assert columns[row, there[row]].tolist() == want[row], (step, row)
    if what == "all":
        assert len(want[1]) == 12 + 200 % interval


def numbers(layers=5, heads=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(tuple(round(float(v), 1) for v in torch.rand(heads, generator=g)) for _ in range(layers))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
def test_heads_by_the_quantile_of_the_code(tmp_path, sparsity):
    """Threshold = quantile of all scores, with ties broken by an offset too small to matter otherwise."""
    table = HeadTable("Toy", 5, 4, {"gate": numbers(), "on_the_fly": numbers(seed=3)})
    path = str(table.save(tmp_path / "heads.json"))
    flat = [v - 1e-7 * i for i, v in enumerate(v for row in numbers() for v in row)]
    threshold = 2.0 if sparsity == 1 else float(torch.tensor(flat, dtype=torch.float64).quantile(sparsity))
    want = {divmod(i, 4) for i, v in enumerate(flat) if v >= threshold - 1e-12}
    assert DuoAttention(table=path, sparsity=sparsity).whole_heads() == want
    assert len(want) == (0 if sparsity == 1 else 20 - math.ceil(19 * sparsity - 1e-9))


def test_which_scores(tmp_path):
    def whole(scores, **settings):
        path = HeadTable("Toy", 5, 4, scores).save(tmp_path / f"{len(scores)}.json")
        return DuoAttention(table=str(path), **settings).whole_heads()

    gate, fly = numbers(), numbers(seed=3)
    both = {"gate": gate, "on_the_fly": fly}
    assert whole(both) == whole({"gate": gate}) != whole(both, score_name="on_the_fly")
    assert whole({"on_the_fly": fly}) == whole(both, score_name="on_the_fly")
    assert whole(both, threshold=0.5) == {(i, h) for i in range(5) for h in range(4) if gate[i][h] >= 0.5}
    with pytest.raises(ValueError, match="no scores 'on_the_fly'"):
        whole({"echo": gate})


def test_a_layer_that_was_not_measured_is_left_alone(tmp_path):
    rows = (((0.1, 0.2)), None, (0.3, 0.4), (0.5, 0.6))
    path = str(HeadTable("Toy", 4, 2, {"on_the_fly": rows}).save(tmp_path / "heads.json"))
    method = DuoAttention(table=path, sparsity=1.0, sink_size=1, recent_size=2)
    assert method.plan(cache(LEFT, layer=1, queries=None)).is_identity
    assert not method.plan(cache(LEFT, layer=2, queries=None)).is_identity


def test_nothing_to_do_is_the_identity():
    evidence = cache(LEFT, queries=None)
    for method in (
        DuoAttention(heads=()), DuoAttention(heads=(), what="all"), DuoAttention(heads=(), keep=1.0),
        DuoAttention(heads=((0, 0), (0, 1)), keep=3), DuoAttention(heads=(), keep=99),
    ):  # fmt: skip
        assert method.plan(evidence).is_identity


def test_bad_input():
    for settings in (
        {"keep": 0}, {"what": "text"}, {"sink_size": -1}, {"recent_size": 0}, {"sparsity": 1.5}, {"interval": 0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(settings))):
            DuoAttention(**settings)
    with pytest.raises(ValueError, match="tokenreduce heads"):
        DuoAttention().acts_at(0, 4)
    with pytest.raises(ValueError, match="tokenreduce heads"):
        DuoAttention().plan(cache(LEFT, queries=None))


def test_when():
    assert DuoAttention().moment() == "layer"
    assert DuoAttention().every() == 1
    assert DuoAttention(interval=None).every() == 0
    assert DuoAttention(keep=8).every() == 0
