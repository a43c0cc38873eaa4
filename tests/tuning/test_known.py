"""The table that ``auto:`` chooses from: what the stored page says, and what tune recommended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenreduce.estimation.known import FILE
from tokenreduce.tuning.known import main, table

ROOT = Path(__file__).parents[2]
PAGE = "docs/results.md"


def test_the_stored_table_is_that_of_the_results_page():
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    made = table((ROOT / PAGE).read_text(encoding="utf-8"), PAGE)
    for name, group in made["groups"].items():
        singles = [c for c in kept["groups"][name]["candidates"] if c["source"] == PAGE]
        assert singles == group["candidates"], f"the results page changed; make the table again: {kept['made']}"
        assert kept["groups"][name]["unreduced"] == group["unreduced"]


def test_of_each_stage_the_best_are_taken_and_one_that_asks_nothing():
    heads = "| method | GMACs | accuracy % |\n|---|---|---|\n| `unreduced` | 1 | 99.0 ±0.1 |\n"
    rows = [
        ("visionzip:keep=0.5", 98), ("vispruner:keep=0.5", 97), ("fastervlm:keep=0.5", 96), ("divprune:keep=0.5", 90),
        ("apet:keep=0.5", 80), ("random@projector:keep=0.5` (baseline", 99), ("visionzip:keep=64", 99),
        ("tome:r=8", 99),
    ]  # fmt: skip
    body = "".join(f"| `{spec}` | 1 | {score}.0 ±1.0 |\n" for spec, score in rows).replace(
        "` (baseline`", "` (baseline)"
    )
    page = "".join(
        f"## {h}\n### 50 %\n{heads}{body}\n" for h in ("world-vit on world", "world-llava on world: pictures")
    )
    page += f"## world-llava on world: cache\n### 50 %\n{heads.replace('accuracy', 'long agree')}"
    made = table(page, "a page")["groups"]
    assert [c["methods"] for c in made["language"]["candidates"]] == [
        ["divprune@projector"], ["visionzip@projector"], ["vispruner@projector"],
    ]  # fmt: skip
    assert made["language"]["candidates"][1]["points"] == [{"keep": [0.5], "score": 0.98, "stderr": 0.01}]
    assert made["language"]["unreduced"] == pytest.approx(0.99)
    assert made["cache"]["candidates"] == []


def test_a_combination_has_the_score_that_was_held_out():
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    some = [c for g in kept["groups"].values() for c in g["candidates"] if c["source"].startswith("tokenreduce tune ")]
    assert some
    raw = {
        "model": "world-llava", "reduce": "tome@encoder:keep=0.4+visionzip@projector:keep=0.3",
        "facts": {"target": "flops=0.4", "score": [0.9, 0.02, 120], "pareto": [{"score": 0.99}]},
    }  # fmt: skip
    heads = "### x\n| method | GMACs | accuracy % | long agree % |\n|---|---|---|---|\n| `unreduced` | 1 | 99 | 99 |\n"
    page = "".join(
        f"## {h}\n{heads}"
        for h in ("world-vit on world", "world-llava on world: pictures", "world-llava on world: cache")
    )
    (made,) = table(page, PAGE, [("a search", raw)])["groups"]["language"]["candidates"]
    assert made == {
        "methods": ["tome@encoder", "visionzip@projector"], "source": "a search",
        "points": [{"keep": [0.4, 0.3], "score": 0.9, "stderr": 0.02}],
    }  # fmt: skip


def test_without_files_of_a_search_the_combinations_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "known.json"
    file.write_text(FILE.read_text(encoding="utf-8"), encoding="utf-8")
    main(Path(PAGE), None, file)
    made, kept = (json.loads(f.read_text(encoding="utf-8"))["groups"] for f in (file, FILE))
    assert made == kept
    assert any(len(c["methods"]) > 1 for c in made["language"]["candidates"])
