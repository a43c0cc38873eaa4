"""The sentence about a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenreduce.bench.finding import finding
from tokenreduce.bench.runs import Run

WHOLE = {"id": "unreduced", "method": "unreduced", "spec": "", "budget": 1.0, "share": 1.0, "top1": 0.98}


def _row(method: str, top1: float, budget: float = 0.35, **more):
    row = {"id": f"{method}@{budget}", "method": method, "spec": f"{method}:keep=0.4", "budget": budget}
    return {**row, "share": budget, "top1": top1, "top1_stderr": 0.01, **more}


def _run(*rows, metric: str = "top1") -> Run:
    return Run(Path("x"), {"metric": metric, "points": []}, [WHOLE, *rows])


def test_it_names_the_best_method_at_the_smallest_budget() -> None:
    rows = [
        _row("random@encoder", 0.61), _row("evit", 0.9),
        _row("tofu", 0.97, speedup=1.7, speedup_low=1.6, speedup_high=1.8),
        _row("tome", 0.99, 0.5), _row("ats", 0.975, share=0.6), _row("uniform", 0.99),
    ]  # fmt: skip
    assert finding(_run(*rows)) == (
        "35 % of the FLOPs: tofu keeps 97.0 of 98.0 % (top-1 accuracy), 1.70x faster; random 61.0 %"
    )


def test_it_says_what_is_not_sure() -> None:
    rows = [_row("tofu", 0.97, speedup=1.02, speedup_low=0.9, speedup_high=1.1), _row("evit", 0.965), _row("ats", 0.9)]
    assert finding(_run(*rows)) == (
        "35 % of the FLOPs: tofu keeps 97.0 of 98.0 % (top-1 accuracy), 1 more within its standard error, "
        "as fast within noise"
    )


@pytest.mark.parametrize(("ratio", "said"), [(1.5, "1.50x faster"), (0.8, "1.25x slower")])
def test_speed_is_told_in_its_direction(ratio: float, said: str) -> None:
    row = _row("tofu", 0.97, speedup=ratio, speedup_low=ratio - 0.01, speedup_high=ratio + 0.01)
    assert finding(_run(row)).endswith(said)


def test_without_rows_that_can_be_compared_there_is_none() -> None:
    assert finding(_run()) == ""
    assert finding(_run(_row("random", 0.6))) == ""
    assert finding(_run(_row("tofu", 0.9, share=0.9))) == ""


def test_it_is_about_the_budget_that_is_asked_for() -> None:
    run = _run(_row("tofu", 0.97), _row("evit", 0.9, 0.5), _row("random", 0.5, 0.5), _row("ats", 0.9, 0.25, share=0.6))
    assert finding(run, 0.5) == "50 % of the FLOPs: evit keeps 90.0 of 98.0 % (top-1 accuracy); random 50.0 %"
    assert finding(run, 0.35) == finding(run)
    assert finding(run, 0.25) == "", "its only row misses it"
    with pytest.raises(ValueError, match=r"no row at the budget 0\.4; there are: 0\.5, 0\.35, 0\.25"):
        finding(run, 0.4)
