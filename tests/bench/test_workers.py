"""Processes that share a task: every part once, deaths, errors; and the rows are those of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from split_task import Squares

import tokenreduce as tr
from tokenreduce.bench import runs as runs_module
from tokenreduce.bench.asking.log import AnswerLog, Part
from tokenreduce.bench.sweep import sweep
from tokenreduce.bench.vlm import VlmTask
from tokenreduce.bench.workers import WorkerError, Workers

REDUCERS = tr.parse("divprune:keep=9")


def test_every_part_comes_once_whoever_dies_or_fails(tmp_path: Path) -> None:
    pool = Workers([Squares(tmp_path, kills=5, fails=30)] * 2)
    try:
        found = list(pool.run(REDUCERS, range(12)))
        assert sorted(found) == [(i, (i * i, ["divprune:keep=9"])) for i in range(12)]
        assert pool.died == 1
        with pytest.raises(ValueError, match="30 does not fit"):
            list(pool.run((), range(28, 33)))
        assert sorted(pool.run((), [3, 4])) == [(3, (9, [])), (4, (16, []))]  # nothing of the failed call comes late
        for _ in pool.run((), range(20)):
            break  # the caller stops listening
        assert list(pool.run((), [])) == []
    finally:
        pool.close()


@pytest.mark.slow
def test_what_kills_every_worker_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"3 workers died at part 1 \(exit status -9, out of memory\?\)"):
        list(Workers([Squares(tmp_path, kills=1, times=9)]).run((), [1]))
    with pytest.raises(OSError, match="there are no weights"):
        list(Workers([Squares(tmp_path, broken=True)]).run((), [1]))


def test_answers_are_kept_by_spec_and_part(tmp_path: Path) -> None:
    part = Part({3: "red", 4: ""}, {3: True, 4: False}, 1, {5: {"path": "x", "reason": "gone"}}, ["noted"])
    AnswerLog(tmp_path).add("a", 0, part)
    AnswerLog(tmp_path).add("b", 2, part)
    file = tmp_path / runs_module.ANSWERS
    file.write_bytes(file.read_bytes() + b'{"id": 1, "sp')  # killed
    log = AnswerLog(tmp_path)
    assert (log.of("a"), log.of("b"), log.of("c")) == ({0: part}, {2: part}, {})
    log.add("a", 1, part)
    assert set(AnswerLog(tmp_path).of("a")) == {0, 1}
    file.write_text('{"id": 0, "point": "another file"}\n')
    with pytest.raises(ValueError, match="--fresh"):
        AnswerLog(tmp_path)


def task(**changes: object) -> VlmTask:
    return VlmTask(limit=12, batch=4, repeats=0, **changes)


def rows(run: object) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k != "wall_s"} for row in run.rows]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_an_interrupted_run_asks_no_batch_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    specs = ["divprune:keep=16"]
    whole = sweep(task(), tmp_path / "whole", reduce=specs, methods=[])
    asked: list[int] = []
    plain = VlmTask.part

    def part(self, reducers, unit):
        asked.append(unit)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return plain(self, reducers, unit)

    monkeypatch.setattr(VlmTask, "part", part)
    with pytest.raises(KeyboardInterrupt):
        sweep(task(), tmp_path / "run", reduce=specs, methods=[])
    done = len((tmp_path / "run" / runs_module.ANSWERS).read_text().splitlines())
    assert done == 5
    asked.clear()
    asked.extend([-1] * 100)
    again = sweep(task(), tmp_path / "run", reduce=specs, methods=[])
    parts = len((tmp_path / "whole" / runs_module.ANSWERS).read_text().splitlines())
    assert len(asked) - 100 == parts - done
    assert rows(again) == rows(whole)
    (tmp_path / "run" / "rows.jsonl").write_text("")  # nothing but answers of other settings
    with pytest.raises(ValueError, match="other settings"):
        sweep(VlmTask(limit=13, batch=4, repeats=0), tmp_path / "run", reduce=specs, methods=[])


@pytest.mark.slow
def test_rows_of_two_workers_are_those_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    specs = ["divprune:keep=16", "fastv:layer=2,keep=0.3"]
    one = sweep(task(), tmp_path / "one", reduce=specs, methods=[])
    two = task(workers=2)
    try:
        many = sweep(two, tmp_path / "two", reduce=specs, methods=[])
    finally:
        two.close()
    assert rows(many) == rows(one)
    lines = [json.loads(x) for x in (tmp_path / "two" / runs_module.ANSWERS).read_text().splitlines()]
    assert len({(x["spec"], x["id"]) for x in lines}) == len(lines)
