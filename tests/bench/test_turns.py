from __future__ import annotations

import threading
import time

import pytest

from tokenreduce.bench.turns import Turns


def line_up(turns: Turns, n: int) -> None:
    """Wait until ``n`` threads hold the lock or wait for it."""
    while turns.waiting < n:
        time.sleep(0.001)


def test_turns_go_by_the_order_of_arrival() -> None:
    turns, order, threads = Turns(), [], []

    def visit(name: int) -> None:
        with turns:
            order.append(name)

    with turns:
        for name in range(8):
            threads.append(threading.Thread(target=visit, args=(name,)))
            threads[-1].start()
            line_up(turns, name + 2)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == list(range(8))
    assert turns.waiting == 0


def test_one_who_comes_again_at_once_waits_for_the_others() -> None:
    """A plain lock would let the first thread take all its turns."""
    turns, order = Turns(), []

    def greedy() -> None:
        for _ in range(5):
            with turns:
                order.append("greedy")
                line_up(turns, 2 if "other" not in order else 1)

    def other() -> None:
        line_up(turns, 1)
        with turns:
            order.append("other")

    threads = [threading.Thread(target=t) for t in (greedy, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[:2] == ["greedy", "other"]


def test_only_one_is_inside_and_errors_let_go() -> None:
    turns, inside, most = Turns(), [0], [0]

    def work() -> None:
        for _ in range(50):
            try:
                with turns:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
                    raise KeyError
            except KeyError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert turns.waiting == 0


def test_a_place_knows_how_many_are_ahead_and_may_be_left() -> None:
    turns = Turns()
    first, second, third = turns.join(), turns.join(), turns.join()
    assert [first.ahead, second.ahead, third.ahead] == [0, 1, 2]
    assert first.wait(0)
    assert not third.wait(0)
    second.leave()
    assert [first.ahead, third.ahead, turns.waiting] == [0, 1, 2]
    with first:
        pass
    assert third.wait(0)
    third.leave()
    third.leave()  # nothing, and nobody else's place
    assert turns.waiting == 0
    with pytest.raises(RuntimeError, match="join again"):
        third.wait(0)


def test_a_place_and_a_plain_turn_stand_in_one_line() -> None:
    turns, order = Turns(), []
    place = turns.join()

    def other() -> None:
        with turns:
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    line_up(turns, 2)
    with place:
        order.append("place")
    thread.join()
    assert order == ["place", "other"]
