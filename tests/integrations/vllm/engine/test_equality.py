"""vLLM with the plug-in answers as transformers with a patched model: ``make test-vllm``.

vLLM has an environment of its own, whose Python ``TOKENREDUCE_VLLM_PYTHON`` names; without it these tests are skipped.
One engine at a time, each in a process of its own, for all cases of a row.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tokenreduce.integrations.vllm.names import NATIVE

PYTHON = os.environ.get("TOKENREDUCE_VLLM_PYTHON")
HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own: make test-vllm"),
]
#: Chunks that cut images, a cache of prefixes, and everything asked again from it.
CACHED = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True, "enable_prefix_caching": True, "block_size": 32}
PLAIN = {"enable_prefix_caching": False}
MROPE = {"video_pruning_rate": 1e-17}


@dataclass(frozen=True)
class Row:
    """An engine, and what it is asked."""

    model: str
    spec: str
    engine: dict[str, Any] = field(default_factory=dict)
    rounds: int = 1

    def __str__(self) -> str:
        return f"{self.model}-{self.spec}-{'cached' if self.rounds > 1 else 'plain'}"


ROWS = [
    Row("llava", "divprune:keep=49", PLAIN),
    Row("llava", "fastervlm:keep=49", CACHED, rounds=2),
    Row("llava", "visionzip:keep=49", PLAIN),
    Row("qwen", "divprune:keep=24", {**PLAIN, **MROPE}),
    Row("qwen", "visionzip:keep=24", {**CACHED, **MROPE}, rounds=2),
    Row("qwen3", "divprune:keep=24", {**PLAIN, **MROPE}),
    Row("qwen3", "aim-merge:keep=24", {**CACHED, **MROPE}, rounds=2),
    Row("qwen3", "vidcom2:keep=24", {**CACHED, **MROPE}, rounds=2),
    Row("qwen3", "visionzip:keep=24", {**PLAIN, **MROPE}),
    Row("onevision", "divprune:keep=49", PLAIN),
    Row("onevision", "fastervlm:keep=49", CACHED, rounds=2),
    Row("onevision", "visionzip:keep=49,newlines=drop", PLAIN),
    Row("onevision", "vidcom2:keep=20", PLAIN),
    Row("next", "divprune:keep=49,newlines=drop", PLAIN),
    Row("next", "visionzip:keep=49", CACHED, rounds=2),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    from integrations.vllm.engine.models import (
        questions,
        qwen3_cases,
        qwen_cases,
        save_next,
        save_onevision,
        save_qwen,
        save_qwen3,
        save_world,
        tiled_cases,
    )

    place = tmp_path_factory.mktemp("vllm")
    return {
        "llava": (save_world(place / "llava"), questions(place / "pictures")),
        "qwen": (save_qwen(place / "qwen"), qwen_cases(place / "films")),
        "qwen3": (save_qwen3(place / "qwen3"), qwen3_cases(place / "qwen3 films")),
        "onevision": (save_onevision(place / "onevision"), tiled_cases(place / "tiled", films=True)),
        "next": (save_next(place / "next"), tiled_cases(place / "tiled")),
    }


def asked(place: Path, model: Path, spec: str | None, engine: dict, cases: list, **more: Any) -> list[dict[str, Any]]:
    job = dict(model=str(model), spec=spec, engine=engine, cases=cases, out=str(place / "out.json"), new=8, **more)
    (place / "job.json").write_text(json.dumps(job))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [str(Path(str(PYTHON)).absolute()), str(HERE / "run_engine.py"), str(place / "job.json")], env=env,
        capture_output=True, text=True,
        check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"the engine ended:\n{done.stderr[-6000:]}"
    answers: list[dict[str, Any]] = json.loads((place / "out.json").read_text())
    return answers


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_engine_answers_as_a_patched_model(row, models, tmp_path):
    from integrations.vllm.engine.reference import answers

    folder, cases = models[row.model]
    more = {"architecture": NATIVE} if row.model == "qwen3" else {}
    got = asked(tmp_path, folder, row.spec, row.engine, cases, rounds=row.rounds, **more)
    positions = "original" if row.model.startswith("qwen") else "compact"
    want = list(answers(str(folder), row.spec, positions, cases, 8))
    for case, mine, theirs in zip(cases, got, want, strict=True):
        assert mine["prompt"] == theirs["prompt"], case
        assert mine["ids"] == theirs["ids"], case
        assert mine["best"] == pytest.approx(theirs["best"], abs=1e-3), case
    cached = sum(one["cached"] for one in got)
    assert (cached > 0) == (row.rounds > 1)


def test_a_bad_request_is_refused_and_the_engine_goes_on(models, tmp_path):
    folder, cases = models["llava"]
    bad = [{**cases[0], "keep": k} for k in (0, 1.5, True, "many", -3)] + [
        {**cases[0], "keep": 4, "key": "tokenreduce_kep"}
    ]
    got = asked(tmp_path, folder, "divprune:keep=49", PLAIN, [*bad, cases[0]], bad=True)
    for one in got[:5]:
        assert "tokenreduce_keep is a number of tokens (int >= 1) or a ratio" in one["error"]
    assert "unknown key 'tokenreduce_kep'" in got[5]["error"]
    assert len(got[6]["ids"]) == 8


def test_a_request_with_tiles_of_another_size_is_refused(models, tmp_path):
    folder, cases = models["onevision"]
    bad = {**cases[0], "key": "size", "keep": {"height": 32, "width": 32}}
    got = asked(tmp_path, folder, "divprune:keep=49", PLAIN, [bad, cases[0]], bad=True)
    assert "are 64 x 64 pixels, not (32, 32)" in got[0]["error"]
    assert len(got[1]["ids"]) == 8


@pytest.mark.parametrize(
    ("model", "spec", "engine", "said"),
    [
        ("llava", "cdpruner:keep=49", {}, "looks at the question"),
        ("onevision", "resize:keep=49", {}, "takes full grids"),
        ("qwen", "divprune:keep=24", {}, "needs the engine argument video_pruning_rate"),
        ("qwen3", "divprune:keep=24", MROPE, "is served by TokenReduceQwen3VLForConditionalGeneration"),
    ],
)
def test_an_engine_that_cannot_be_right_does_not_start(model, spec, engine, said, models, tmp_path):
    folder, _ = models[model]
    with pytest.raises(AssertionError, match=said):
        asked(tmp_path, folder, spec, engine, [])
