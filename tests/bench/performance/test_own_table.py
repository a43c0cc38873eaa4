"""Own work beside the stock prefill: every method has a row, and what is timed is what a method does."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tokenreduce.bench.performance import own_table
from tokenreduce.bench.performance.own_work import own_seconds
from tokenreduce.bench.performance.prefills import prefill
from tokenreduce.bench.performance.shapes import SHAPES, build, prompt
from tokenreduce.vision.projector.divprune import DivPrune

TINY = replace(SHAPES["tiny"], side=6)


@dataclass(frozen=True)
class Slow(DivPrune):
    def choose(self, evidence, keep):
        time.sleep(0.05)
        return super().choose(evidence, keep)


def test_what_a_method_does_itself_is_its_own_work() -> None:
    model, given = build(TINY), prompt(TINY)
    before = prefill(model, given).layers[0].keys
    assert own_seconds(model, Slow(keep=9), partial(prefill, model, given), "cpu") >= 0.05
    assert torch.equal(prefill(model, given).layers[0].keys, before)  # the model is stock again


def test_rows_come_by_stage_and_cost() -> None:
    heard: list[own_table.Row] = []
    rows = own_table.measure(TINY, TINY, 9, ["divprune", "zoo-prune", "fastv"], 1, heard.append)
    assert {r.method for r in heard} == {r.method for r in rows} == {"divprune", "zoo-prune", "fastv"}
    assert [bool(r.wide) for r in heard] == [False] * 3 + [True] * 2
    assert [r.method for r in rows] == ["zoo-prune", "divprune", "fastv"]  # 128 passes through the projector are dearer
    assert all(r.wide for r in rows[:2])
    assert rows[2].wide is None
    assert own_table.cells(rows[0])[3].endswith("% *")


def test_a_prefill_of_many_layers_follows_from_two(monkeypatch) -> None:
    def timed(calls, *_):
        seconds = {"1": 1.0, "2": 1.5}
        return {name: SimpleNamespace(median=seconds[name]) for name in calls}

    monkeypatch.setattr(own_table, "interleaved", timed)
    assert own_table.whole_prefill(replace(TINY, llm=(64, 12, 4, 128))) == 1.0 + 11 * 0.5


def test_a_method_that_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="no method nothing"):
        own_table.measure(TINY, None, 9, ["nothing"], 1)
