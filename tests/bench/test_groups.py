"""Simple and hard samples of a budget."""

from __future__ import annotations

import pytest

from tokenreduce.bench.groups import grouped, marks


def _row(method: str, right: str, budget: float | None = 0.5, **more):
    return {"id": f"{method}@{budget}", "method": method, "budget": budget, "right": right, **more}


def test_shares_are_of_what_the_smaller_input_answers_and_of_the_rest() -> None:
    small, mine = "1101-0", "10-110"
    rows = grouped([_row("resize@projector", small), _row("divprune", mine), _row("unreduced", "111111", None)])
    found = rows[1]
    # Samples 0, 1 and 3 are simple; of 2 and 5, which are hard, 2 was not used.
    assert (found["simple"], found["hard"], found["hard_samples"]) == (pytest.approx(2 / 3), 0.0, 1)
    assert found["simple_stderr"] == pytest.approx((2 / 3 * 1 / 3 / 3) ** 0.5)
    assert "hard" not in rows[0]
    assert "hard" not in rows[2]


def test_every_budget_has_groups_of_its_own() -> None:
    rows = grouped([_row("resize", "10"), _row("tome", "10"), _row("resize", "01", 0.25), _row("tome", "10", 0.25)])
    assert [(r["simple"], r["hard"]) for r in rows if r["method"] == "tome"] == [(1.0, 0.0), (0.0, 1.0)]


@pytest.mark.parametrize(
    "made",
    [
        [_row("resize", "10", error="ValueError: no")],
        [_row("random", "10")],
        [_row("resize", "101")],
        [_row("resize", "10", 0.25)],
        [_row("resize", "10", share=0.54)],
    ],
)
def test_without_a_baseline_of_the_same_samples_there_are_no_groups(made) -> None:
    assert "hard" not in grouped([*made, _row("tome", "10")])[-1]


def test_a_group_without_samples_has_no_share() -> None:
    row = grouped([_row("resize", "11"), _row("tome", "10")])[-1]
    assert (row["simple"], row["hard"], row["hard_samples"]) == (0.5, None, 0)


def test_marks_name_what_was_not_used() -> None:
    assert marks([3, 5, 9], {3: False, 9: True}) == "0-1"
