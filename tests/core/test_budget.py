from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenreduce.core import budget


def test_examples_in_the_docstrings():
    assert doctest.testmod(budget).failed == 0


@pytest.mark.parametrize("bad", [0, -1, 0.0, 1.5, -0.1, True, "half", float("nan")])
def test_bad_keep_names_the_valid_values(bad):
    with pytest.raises(ValueError, match=r"keep is a number of tokens \(int >= 1\) or a ratio"):
        budget.check_keep(bad)


@given(st.one_of(st.integers(1, 2000), st.floats(1e-6, 1.0)), st.integers(1, 2000))
def test_count_is_between_one_and_all(keep, n):
    assert 1 <= budget.count(keep, n) <= n
    assert budget.count(1.0, n) == n


@given(st.one_of(st.integers(1, 300), st.floats(0.01, 1.0)), st.integers(1, 300), st.integers(1, 32))
def test_schedules_fall_to_the_target(keep, n, depth):
    for law in (budget.linear, budget.geometric):
        left = [law(keep, n, i, depth) for i in range(depth)]
        assert left[-1] == budget.count(keep, n)
        assert all(a >= b for a, b in zip([n, *left], left, strict=False))


def test_tome_schedules_of_the_card():
    assert budget.layer_schedule(13, 12) == (13,) * 12
    assert budget.layer_schedule(13, 12, -1.0) == (26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0)
    assert sum(budget.layer_schedule(13, 12, -1.0)) == 151
    assert budget.layer_schedule([4, 2], 4) == (4, 2, 0, 0)
    with pytest.raises(ValueError, match="lists 3 layers but the model has 2"):
        budget.layer_schedule([1, 2, 3], 2)
    with pytest.raises(ValueError, match="r is an int >= 0"):
        budget.layer_schedule(-1, 2)
    with pytest.raises(ValueError, match="inflect"):
        budget.layer_schedule(3, 2, 1.5)


def test_reports_print_a_budget_one_way():
    assert budget.describe_keep(64) == "64 tokens"
    assert budget.describe_keep(0.25) == "25 %"
