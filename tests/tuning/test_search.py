"""The search on a model that is arithmetic: methods whose score and cost are known."""

from __future__ import annotations

import json

import pytest

from tokenreduce.core.registry import parse
from tokenreduce.tuning.part import parts
from tokenreduce.tuning.scored import Score
from tokenreduce.tuning.search import Tried, best_of, pareto, read, search
from tokenreduce.tuning.space import Draft, combinations, drafts_of, fitted
from tokenreduce.tuning.target import target_of

NAMES = {"projector": ["visionzip", "divprune", "vispruner"], "encoder": ["tome", "pitome"]}
#: What a method loses where it keeps nothing.
LOSS = {"visionzip": 0.2, "divprune": 0.6, "vispruner": 0.4, "tome": 0.1, "pitome": 0.9}


class Fake:
    known = ("visionzip", "tome")

    def __init__(self, broken: str = "") -> None:
        self.asked: list[tuple[str, str]] = []
        self.broken = broken

    def names(self):
        return NAMES

    def score(self, reducers, part):
        if any(r.name == self.broken for r in reducers):
            raise ValueError("they do not go together\nmore")
        self.asked.append((part, "+".join(r.name for r in reducers)))
        lost = sum(LOSS[r.name] * (1 - r.keep) ** 2 for r in reducers)
        return Score(max(0.0, 1 - lost), 0.01, 400)


def cost(reducers) -> float:
    """Projector methods act on three quarters of the cost, encoder methods on half of it."""
    out = 1000.0
    for r in reducers:
        out *= 0.25 + 0.75 * r.keep if r.stage == "projector" else 0.5 + 0.5 * r.keep
    return out


def run(path, trials=24, scored=None, **more):
    scored = scored or Fake()
    return search(scored, cost, 0.5, trials, 0, path / "trials.jsonl", {"model": "fake"}, **more), scored


@pytest.fixture(autouse=True)
def optuna():
    return pytest.importorskip("optuna")


def test_a_search_finds_what_is_best_at_the_target(tmp_path):
    heard = []
    seen, _ = run(tmp_path, done=lambda tried, number, best: heard.append((number, best)))
    assert [n for n, _ in heard] == list(range(1, 25))
    best = best_of(seen, 0.5)
    assert heard[-1][1] == best
    assert best.share <= 0.51
    alone = best_of([t for t in seen if "+" not in t.reduce], 0.5)
    assert "visionzip@projector" in best.reduce
    assert "tome@encoder" in best.reduce, "each of them alone loses more"
    assert best.score > alone.score
    assert {r.name for r in parse(best.reduce)} == {"visionzip", "tome"}
    around = [t.share for t in seen if t.counts]
    assert min(around) < 0.4
    assert max(around) > 0.6


def test_bad_settings_are_thrown_out_on_few_samples(tmp_path):
    seen, scored = run(tmp_path)
    thrown = [t for t in seen if t.thrown and t.n]
    assert thrown
    names = {"+".join(r.name for r in parse(t.reduce)) for t in thrown}
    assert all(best_of(seen, t.share).score > t.score for t in thrown)
    assert any(part == "first" for part, _ in scored.asked)
    assert not any(part == "held" for part, _ in scored.asked)
    assert names


def test_a_search_goes_on_where_it_was_killed(tmp_path):
    first, _ = run(tmp_path, 7)
    with (tmp_path / "trials.jsonl").open("a") as log:
        log.write('{"params": {"stages": "enc')
    again, scored = run(tmp_path, 12)
    assert again[:7] == first
    assert len(again) == 12
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert len(lines) == 13
    assert [Tried(**json.loads(line)) for line in lines[1:]] == again
    done, scored = run(tmp_path, 12)
    assert done == again
    assert scored.asked == []
    with pytest.raises(ValueError, match="is of another search"):
        search(Fake(), cost, 0.4, 12, 0, tmp_path / "trials.jsonl", {"model": "fake"})


def test_methods_that_fail_are_passed_over(tmp_path):
    seen, _ = run(tmp_path, scored=Fake("tome"))
    errors = {t.error for t in seen if t.error}
    assert errors == {"they do not go together"}
    assert "tome" not in best_of(seen, 0.5).reduce


def test_a_budget_that_cannot_be_reached_is_not_scored(tmp_path):
    scored = Fake()
    seen = search(scored, cost, 0.1, 6, 0, tmp_path / "log", {})
    assert best_of(seen, 0.1) is None
    assert all(t.thrown and not t.n and t.share > 0.1 for t in seen)
    assert scored.asked == []


def test_a_draft_is_brought_to_the_budget():
    draft = Draft(("visionzip", "tome"), (0.5, 0.9))
    made = fitted(draft, cost, 500.0)
    assert cost(made) == pytest.approx(500.0, rel=0.02)
    assert cost(made) <= 500.0
    zip_, tome = made
    assert zip_.keep < tome.keep
    assert fitted(draft, cost, 10.0) == draft.at(80.0)
    assert draft.at(0.0)[0].keep == 1.0


def test_what_a_search_begins_with():
    starts = drafts_of(NAMES, ("visionzip", "tome"))
    assert [s["stages"] for s in starts] == ["projector", "encoder", "projector+encoder"]
    alone = drafts_of({"projector": ["divprune", "vispruner", "visionzip"]}, ("visionzip",))
    assert [s["method_projector"] for s in alone] == ["visionzip", "divprune", "vispruner"]
    none_known = drafts_of({"projector": ["divprune", "vispruner", "x"], "encoder": ["tome"]}, ())
    assert [s.get("method_projector") for s in none_known] == ["divprune", "vispruner", None, "divprune"]
    assert combinations(["a", "b", "c"]) == ["a", "b", "c", "a+b", "a+c", "b+c", "a+b+c"]


def test_the_pareto_set_and_the_best():
    rows = [Tried({}, str(i), share, score, 0.0, 10) for i, (share, score) in enumerate(
        [(0.5, 0.9), (0.3, 0.8), (0.4, 0.7), (0.5, 0.95), (0.2, 0.8)]
    )]  # fmt: skip
    rows.append(Tried({}, "thrown", 0.1, 1.0, 0.0, 10, thrown=True))
    assert [t.reduce for t in pareto(rows)] == ["4", "3"]
    assert best_of(rows, 0.5).reduce == "3"
    assert best_of(rows, 0.35).reduce == "4", "of equal ones the cheaper"
    assert best_of(rows, 0.15) is None


def test_parts_share_nothing_with_what_is_held_out():
    found = parts(200, 3)
    assert set(found.first) < set(found.chosen)
    assert sorted([*found.chosen, *found.held]) == list(range(200))
    assert (len(found.first), len(found.chosen)) == (25, 100)
    assert parts(200, 4) != found
    with pytest.raises(ValueError, match=r"90 samples are too few .* give 96 or more"):
        parts(90, 0)
    parts(96, 0)


@pytest.mark.parametrize("text", ["flops", "flops=2", "flops=0", "speed=0.5", "flops=x", "ttft=1"])
def test_bad_targets(text):
    with pytest.raises(ValueError, match=r"target is flops=SHARE, kv=SHARE, ttft=SHARE with a share in \(0, 1\)"):
        target_of(text)


def test_a_new_log_has_its_settings(tmp_path):
    assert read(tmp_path / "log", {"a": 1}) == []
    assert (tmp_path / "log").read_text() == '{"a": 1}\n'
