from __future__ import annotations

import threading
from pathlib import Path

import pytest
from fake_task import FakeTask

from tokenreduce.bench.live import follow_sweep
from tokenreduce.bench.sweep import sweep
from tokenreduce.bench.turns import Turns

SETTINGS = {"methods": ["tome"], "budgets": (0.75, 0.5)}


def test_progress_counts_up_to_the_whole_sweep(tmp_path: Path) -> None:
    seen = list(follow_sweep(FakeTask(), tmp_path / "a", threading.Event(), **SETTINGS))
    assert seen[0].run is None
    assert seen[-1].state == "done"
    assert seen[-1].done == seen[-1].total == len(seen[-1].run.rows)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert all(len(p.run.rows) >= p.done for p in seen if p.run is not None)
    whole = sweep(FakeTask(), tmp_path / "b", **SETTINGS)
    assert [r["id"] for r in seen[-1].run.rows] == [r["id"] for r in whole.rows]


class Waiting(FakeTask):
    """Measures three rows and waits for the stop in the fourth, so that it cannot come too late."""

    stop: threading.Event

    def measure(self, reducers):
        if len(self.measured) >= 3:
            assert self.stop.wait(60)
        return super().measure(reducers)


def test_a_stop_leaves_whole_rows_and_the_same_call_continues(tmp_path: Path) -> None:
    stop = threading.Event()
    last = None
    task = Waiting()
    task.stop = stop
    for progress in follow_sweep(task, tmp_path, stop, **SETTINGS):
        last = progress
        if progress.done >= 2:
            stop.set()
    assert last.state == "stopped"
    assert 2 <= last.done < last.total
    rest = list(follow_sweep(FakeTask(), tmp_path, threading.Event(), **SETTINGS))
    first = next(p for p in rest if p.total)
    assert first.done == last.done
    assert rest[-1].state == "done"
    assert rest[-1].run.rows[: last.done] == last.run.rows


def test_others_get_the_machine_between_rows(tmp_path: Path) -> None:
    turn = threading.Lock()
    took = 0
    for progress in follow_sweep(FakeTask(), tmp_path, threading.Event(), turn=turn, **SETTINGS):
        if progress.state == "running":
            took += turn.acquire(timeout=30)
            turn.release()
    assert took > 3
    assert not turn.locked()


def test_what_the_sweep_raises_comes_out(tmp_path: Path) -> None:
    turn = threading.Lock()
    with pytest.raises(ValueError, match="unknown method"):
        list(follow_sweep(FakeTask(), tmp_path, threading.Event(), turn=turn, methods=["nonsense"]))
    assert not turn.locked()


def test_closing_the_iterator_ends_the_thread(tmp_path: Path) -> None:
    steps = follow_sweep(FakeTask(), tmp_path, threading.Event(), **SETTINGS)
    next(steps)
    steps.close()
    for thread in threading.enumerate():
        if thread.name == "sweep":
            thread.join(60)
            assert not thread.is_alive()


def test_the_second_sweep_is_told_its_place_and_then_runs(tmp_path: Path) -> None:
    line, called = Turns(), []
    with line:
        second = follow_sweep(
            FakeTask(), tmp_path / "b", threading.Event(), line=line, before=lambda: called.append(1), **SETTINGS
        )
        progress = next(p for p in second if p.state == "waiting")
        assert (progress.ahead, progress.done, progress.run) == (1, 0, None)
        assert not called
    rest = list(second)
    assert called == [1]
    assert rest[-1].state == "done"
    assert line.waiting == 0


def test_a_stop_leaves_the_line_without_a_row(tmp_path: Path) -> None:
    line, stop, states = Turns(), threading.Event(), []
    with line:
        for progress in follow_sweep(FakeTask(), tmp_path / "b", stop, line=line, **SETTINGS):
            states.append(progress.state)
            if progress.state == "waiting":
                stop.set()
        assert states[-1] == "stopped"
        assert not (tmp_path / "b").exists()
    assert line.waiting == 0


def test_closing_the_iterator_leaves_the_line(tmp_path: Path) -> None:
    line = Turns()
    with line:
        steps = follow_sweep(FakeTask(), tmp_path / "b", threading.Event(), line=line, **SETTINGS)
        next(p for p in steps if p.state == "waiting")
        steps.close()
        for thread in threading.enumerate():
            if thread.name == "sweep":
                thread.join(60)
        assert line.waiting == 1


def test_an_error_before_the_sweep_comes_out_and_lets_the_next_one_in(tmp_path: Path) -> None:
    line = Turns()

    def fail() -> None:
        raise OSError("no such data")

    with pytest.raises(OSError, match="no such data"):
        list(follow_sweep(FakeTask(), tmp_path, threading.Event(), line=line, before=fail, **SETTINGS))
    assert list(follow_sweep(FakeTask(), tmp_path, threading.Event(), line=line, **SETTINGS))[-1].state == "done"
