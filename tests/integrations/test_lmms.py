"""The lmms-eval plug-in without the engine: specs, errors that are raised, results that are read, the sweep's rows."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce.cli import app
from tokenreduce.integrations.lmms_eval import MODELS
from tokenreduce.integrations.lmms_eval.command import Evaluation, FailedError, metrics_of
from tokenreduce.integrations.lmms_eval.models import Watched, reduced, reducers_from
from tokenreduce.integrations.lmms_eval.sweep import baselines, metrics_in, sweep

pytest.importorskip("transformers")
from vlms import batch, llava

ROOT = Path(__file__).parents[2]


def test_specs_come_as_text_and_as_json() -> None:
    right = tr.parse("divprune:keep=49", "fastv:layer=2,keep=0.5")
    text, made = "divprune:keep=49+fastv:layer=2,keep=0.5", [json.loads(r.to_json()) for r in right]
    for value in (text, f"'{text}'", json.dumps(made), made):
        assert reducers_from(value) == right
    assert reducers_from(json.loads(right[0].to_json())) == right[:1]
    assert reducers_from("random:keep=9")[0].stage == "projector"
    assert reducers_from(None) == reducers_from("") == ()
    with pytest.raises(ValueError, match="divprune"):
        reducers_from("divprun:keep=3")


def test_the_entry_point_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'tokenreduce = "tokenreduce.integrations.lmms_eval:manifests"' in text
    assert set(MODELS) == {"llava_hf", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl_hf"}


class Base:
    """What the plug-in needs of a class of lmms-eval, with its worst habit: an error is an empty answer."""

    rank = 0

    def __init__(self, model: Any) -> None:
        self.model = model

    def generate_until(self, requests: Any) -> list[str]:
        out = []
        for request in requests:
            try:
                if request is None:
                    raise OSError("no such picture")
                out.append(str(self.model.generate(**request, max_new_tokens=2, do_sample=False).tolist()))
            except Exception:
                out.append("")
        return out


def test_costs_are_reported_and_errors_raised(tmp_path: Path) -> None:
    prompt = batch(rows=((9, 1),))
    made = reduced(Base, "chat_x")(llava(), tokenreduce="divprune:keep=4", tokenreduce_report=str(tmp_path / "r.json"))
    made.generate_until([prompt, prompt])
    told = json.loads((tmp_path / "r.json").read_text())
    visual = int(told["visual_tokens"])
    assert (told["prompts"], told["probes"], told["entry_tokens"], told["spec"]) == (2, 2, 4, "divprune:keep=4")
    assert visual > 4
    assert told["mean_visual_tokens"] == 4
    plain = reduced(Base, "chat_x")(llava(), tokenreduce_report=str(tmp_path / "plain.json"))
    plain.generate_until([prompt])
    assert json.loads((tmp_path / "plain.json").read_text())["prefill_flops"] > told["prefill_flops"]
    with pytest.raises(RuntimeError, match="1 of 2 requests never reached the model"):
        made.generate_until([prompt, None])
    made._watched.prompts = 0
    with pytest.raises(RuntimeError, match="generations failed, the first with"):
        made.generate_until([{**prompt, "pixel_values": torch.zeros(1)}])
    with pytest.raises(NotImplementedError, match="log-likelihoods"):
        made.loglikelihood([])


def test_a_watched_generate_hands_everything_on() -> None:
    said: list[Any] = []
    model = SimpleNamespace(generate=lambda *args, **kwargs: said.append((args, kwargs)) or torch.zeros(3, 2))
    watched = Watched(model, SimpleNamespace(see=lambda *args: None))
    assert watched(1, a=2).shape == (3, 2)
    assert said == [((1,), {"a": 2})]
    watched.check(3)


METRICS = {
    "alias": "t", "accuracy,none": 0.75, "accuracy_stderr,none": 0.1, "accuracy_stderr_clt,none": 0.1,
    "mme,strict": 1200.0,
}  # fmt: skip
RESULTS = {"results": {"t": METRICS}, "n-samples": {"t": {"original": 20, "effective": 20}}}


def test_metrics_and_counts_of_a_results_file() -> None:
    assert metrics_of(RESULTS) == {
        "t/accuracy": 0.75, "t/accuracy_stderr": 0.1, "t/mme,strict": 1200.0, "questions": 20,
    }  # fmt: skip
    few = {**RESULTS, "n-samples": {"t": {"original": 20, "effective": 7}}}
    assert metrics_of(few, limit=7)["questions"] == 7
    with pytest.raises(FailedError, match="7 of 20 questions"):
        metrics_of(few)
    with pytest.raises(FailedError, match="no metric"):
        metrics_of({"results": {"t": {"alias": "t"}}, "n-samples": {}})


#: A stand-in for ``python -m lmms_eval``: writes what lmms-eval and the plug-in write, for what stands in its words.
ENGINE = """#!{python}
import json, pathlib, sys
words = sys.argv[1:]
if words[0] == "-c":
    sys.exit(0)
value = lambda flag: words[words.index(flag) + 1]
args, out = value("--model_args"), pathlib.Path(value("--output_path"))
spec = args.partition("tokenreduce='")[2].rstrip("'")
print("Error: it went wrong")
if "evit" in spec or "fastv" in spec and "BROKEN" in args:
    sys.exit(0)
keep = {{"": 100, "divprune:keep=49": 49}}.get(spec, 49)
told = dict(spec=spec, prompts=4, probes=4, prompt_tokens=120, visual_tokens=100, entry_tokens=keep,
            mean_visual_tokens=keep, prefill_flops=1e9 * (20 + keep))
(out / "tokenreduce.json").write_text(json.dumps(told))
(out / "m").mkdir(exist_ok=True)
results = {{"results": {{"t": {{"accuracy,none": keep / 100, "accuracy_stderr,none": 0.01}}}},
           "n-samples": {{"t": {{"original": 4, "effective": 4}}}}}}
(out / "m" / "x_results.json").write_text(json.dumps(results))
with open(out.parent / "calls", "a") as calls:
    calls.write(spec + "\\n")
"""


@pytest.fixture
def engine(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(ENGINE.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_sweep_has_baselines_and_resumes(tmp_path: Path, engine: str) -> None:
    specs = ["divprune:keep=49", "evit:keep=0.5"]
    evaluation = Evaluation("llava_hf", "m", "t", python=engine)
    run = sweep(evaluation, specs, tmp_path / "run")
    assert [r["id"] for r in run.rows] == [
        "unreduced", "divprune:keep=49", "evit:keep=0.5", "random@projector:keep=0.49", "resize@projector:keep=0.49",
    ]  # fmt: skip
    row = run.rows[1]
    assert (row["visual_share"], row["t/accuracy"], row["questions"]) == (0.49, 0.49, 4)
    assert row["share"] == pytest.approx(69 / 120)
    assert "exit status 0" in run.errors[0]["error"]  # no result, whatever the status
    assert "Error: it went wrong" in run.errors[0]["error"]
    assert metrics_in(run) == ["t/accuracy"]
    calls = (tmp_path / "run" / "calls").read_text().splitlines()
    again = sweep(evaluation, specs, tmp_path / "run")
    assert (tmp_path / "run" / "calls").read_text().splitlines() == calls
    assert len(again.good) == 4
    with pytest.raises(ValueError, match="other settings"):
        sweep(Evaluation("llava_hf", "m", "t,u", python=engine), specs, tmp_path / "run")


def test_the_command(tmp_path: Path, engine: str) -> None:
    words = ["eval", "--model", "m", "--tasks", "t", "--python", engine, "--out", str(tmp_path / "run")]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--reduce", "divprune:keep=49"])
    assert result.exit_code == 0, result.output
    assert "random@projector:keep=0.49°" in result.output
    assert (tmp_path / "run" / "rows.csv").exists()
    for more, said in {
        ("--class", "gpt"): "--class is one of llava_hf",
        ("--python", sys.executable): "tokenreduce[lmms]",
        ("--reduce", "nothing:keep=1"): "nothing",
    }.items():
        bad = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, *more])
        assert (bad.exit_code, said in bad.output) == (2, True), bad.output


def test_words_of_many_processes(tmp_path: Path) -> None:
    words = Evaluation("qwen3_vl", "m", "t", limit=3, workers=2, include_path=tmp_path).words("a:keep=1,b=2", tmp_path)
    assert words[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert words[words.index("--model") + 1] == "tokenreduce_qwen3_vl"
    assert words[words.index("--model_args") + 1].endswith("tokenreduce='a:keep=1,b=2'")


def test_baselines_stand_once_for_equal_shares() -> None:
    rows = [{"id": f"x{s}", "method": "x", "visual_share": s} for s in (0.25, 0.252, 0.5, 1.0)]
    assert baselines(rows) == [f"{b}:keep={s}" for s in (0.25, 0.5) for b in ("random@projector", "resize@projector")]
