"""The work of the tab Measure, without a page: sweeps of several visitors, and earlier runs."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from fake_task import FakeTask

pytest.importorskip("gradio")
pytest.importorskip("plotly")

from tokenreduce.bench.live import Progress
from tokenreduce.demo import trade
from tokenreduce.demo.store import Store
from tokenreduce.demo.trade import Sweeps, drawn, files_of, said_of, title_of

WHAT = "digits-vit on held-out digits"
ASKED = (WHAT, ["tome"], ["50 %"], 50)


class Held(FakeTask):
    """Measures nothing before it is let go."""

    go = threading.Event()

    def measure(self, reducers):
        assert self.go.wait(60)
        return super().measure(reducers)


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch) -> Sweeps:
    monkeypatch.setattr(trade, "task_of", lambda *_: Held())
    monkeypatch.setattr(Held, "go", threading.Event())
    return Sweeps(Store(), tmp_path)


def test_the_second_visitor_waits_and_is_told_so(sweeps) -> None:
    first = sweeps.run("a", *ASKED)
    next(p for p, _ in first if p.now == "unreduced")
    second = sweeps.run("b", *ASKED)
    waiting = next(p for p, _ in second if p.state == "waiting")
    assert said_of(waiting) == "In the queue: 1 sweep is before yours, it is number 2. Stop leaves the queue."
    Held.go.set()
    assert [p for p, _ in first][-1].state == "done"
    assert [p for p, _ in second][-1].state == "done"
    assert not sweeps.runs("a")
    assert not sweeps.runs("b")


def test_a_stop_leaves_the_queue_and_nobody_elses_sweep(sweeps) -> None:
    first = sweeps.run("a", *ASKED)
    next(p for p, _ in first if p.now == "unreduced")
    second = sweeps.run("b", *ASKED)
    next(p for p, _ in second if p.state == "waiting")
    assert sweeps.runs("b")
    sweeps.stop("b")
    last = [p for p, _ in second][-1]
    assert (last.state, said_of(last)) == ("stopped", "Stopped before the first row.")
    Held.go.set()
    assert [p for p, _ in first][-1].state == "done"


def test_a_visitor_who_leaves_takes_the_files_along(sweeps, tmp_path: Path) -> None:
    Held.go.set()
    progress, out = list(sweeps.run("a", *ASKED))[-1]
    assert out.parent == tmp_path / "a"
    made = files_of(progress.run, out)
    assert all(file.is_file() for file in made.values())
    assert drawn(progress.run, "clock").data  # it has no clock: drawn against its own axis
    sweeps.leave("a")
    assert not out.parent.exists()
    sweeps.leave("nobody")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ((WHAT, [], ["50 %"], 50), "at least one method"),
        ((WHAT, ["tome"], [], 50), "at least one budget"),
        (("<b>", ["tome"], ["50 %"], 50), "choose a benchmark: .*digits"),
    ],
)
def test_what_cannot_be_run_is_told_before_the_queue(sweeps, asked, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        next(sweeps.run("a", *asked))
    assert sweeps.line.waiting == 0


def test_the_queue_has_an_end(sweeps) -> None:
    places = [sweeps.line.join() for _ in range(trade.WAITING)]
    with pytest.raises(ValueError, match="try again later"):
        next(sweeps.run("a", *ASKED))
    for place in places:
        place.leave()


def test_progress_in_words() -> None:
    assert said_of(Progress(2, 6, "tome@0.5", None)) == "2 of 6 rows; now tome@0.5"
    assert said_of(Progress(0, 0, "loading", None)).startswith("0 of ? rows")
    assert "3 sweeps are before yours" in said_of(Progress(0, 0, "", None, "waiting", ahead=3))
    assert said_of(Progress(2, 6, "", None, "stopped")).startswith("Stopped: 2 of 6 rows")
    assert said_of(Progress(6, 6, "", None, "done")) == "Done: 6 rows"


def test_an_earlier_run_says_what_it_is(sweeps, tmp_path: Path) -> None:
    row = {"id": "unreduced", "method": "unreduced", "spec": "", "budget": 1.0, "top1": 0.9, "share": 1.0, "notes": []}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    run = sweeps.earlier("a", [tmp_path / "rows.jsonl"])
    assert run.folder == tmp_path / "a" / "earlier"
    assert title_of(run) == "an earlier run: 1 rows, 0 failed"
    with pytest.raises(ValueError, match=r"one rows\.jsonl"):
        sweeps.earlier("a", [])
