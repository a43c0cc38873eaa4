from __future__ import annotations

from thinned import left_out


def test_every_value_stays_and_most_pairs_go():
    crossed = [("crossed", (f"m{i}", f"f{j}")) for i in range(20) for j in range(10)]
    plain = [("plain", (f"m{i}",)) for i in range(20)]
    gone = left_out([*crossed, *plain, ("bare", ())])
    left = [case for case in crossed if case not in gone]
    assert not gone & {*plain, ("bare", ())}
    assert 20 <= len(left) <= 30
    for axis, many in ((0, 20), (1, 10)):
        assert len({axes[axis] for _, axes in left}) == many


def test_the_fast_tests_are_the_same_in_every_process():
    cases = [("t", (str(i % 7), str(i % 5), str(i % 3))) for i in range(105)]
    assert left_out(cases) == left_out(reversed(cases))
