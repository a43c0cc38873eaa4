"""The plug-in inside lmms-eval, by its own command: ``make test-lmms``. Skipped where lmms-eval is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from lmms_task import NAME, save_model, save_task

import tokenreduce as tr
from tokenreduce import zoo
from tokenreduce.bench.questions import load_questions
from tokenreduce.integrations.lmms_eval.command import Evaluation, FailedError
from tokenreduce.measure.question import ask

pytest.importorskip("lmms_eval")
QUESTIONS, SPEC = 12, "divprune:keep=49"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("lmms")
    model, tasks = save_model(folder / "model"), save_task(folder / "task", QUESTIONS)
    return Evaluation("llava_hf", str(model), NAME, "device=cpu,device_map=cpu", None, tasks)


def test_answers_are_those_of_the_same_method_in_transformers(evaluation: Evaluation, tmp_path: Path) -> None:
    made = zoo.load("world-llava")
    right = 0
    with tr.patched(made.model, SPEC):
        for item in load_questions("world", limit=QUESTIONS):
            question = ask(made.processor, [item.open()], f"{made.processor.image_token} {item.text}")
            ids = made.model.generate(**question.inputs, max_new_tokens=1, do_sample=False)
            right += made.processor.tokenizer.decode(ids[0, -1]).strip() in item.answers
    row = evaluation.run(SPEC, tmp_path)
    assert row["questions"] == row["prompts"] == QUESTIONS
    assert row[f"{NAME}/accuracy"] == pytest.approx(right / QUESTIONS)
    assert (row["visual_tokens"], row["entry_tokens"], row["spec"]) == (196, 49, SPEC)


def test_an_error_is_no_result(evaluation: Evaluation, tmp_path: Path) -> None:
    with pytest.raises(FailedError, match=r"lmms-eval gave no result.*divprun"):
        evaluation.run("divprun:keep=49", tmp_path)
