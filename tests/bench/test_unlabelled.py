"""Sweeps on pictures without labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("timm")

from tokenreduce.bench.columns import cell, columns
from tokenreduce.bench.models import load_model
from tokenreduce.bench.sweep import sweep
from tokenreduce.bench.unlabelled import AskedPicturesTask, Named, PicturesTask, data_of
from tokenreduce.bench.vlms import load_vlm
from tokenreduce.core.registry import parse
from tokenreduce.patching import patched
from tokenreduce.zoo.examples import digit_examples, scene_examples


def pictures(n: int, side: int = 48) -> list[Named]:
    rows = torch.randint(0, 255, (n, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [Named(f"noise {i}", Image.fromarray(row.numpy())) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def digits() -> PicturesTask:
    named = [Named(e.truth, e.image) for e in digit_examples(10)]
    return PicturesTask(model="digits-vit", given=load_model("digits-vit"), pictures=named, batch=8, repeats=1)


def test_agreement_is_that_of_the_best_class(digits) -> None:
    row = digits.measure(parse("random:keep=0.1"))
    loaded = digits.given
    x = torch.stack([loaded.transform(p.image) for p in digits.pictures])
    with torch.no_grad():
        whole = loaded.predict(x).argmax(-1)
        with patched(loaded.model, "random:keep=0.1"):
            # In the batches of the task: what random drops depends on them.
            reduced = torch.cat([loaded.predict(part).argmax(-1) for part in x.split(8)])
    share = (whole == reduced).double().mean().item()
    assert 0 < share < 1
    assert row["agreement"] == pytest.approx(share)
    assert row["agreement_stderr"] == pytest.approx((share * (1 - share) / 10) ** 0.5)
    assert not {"top1", "top5", "accuracy", "right"} & {*row}


def test_a_sweep_is_ranked_by_agreement(digits, tmp_path: Path) -> None:
    run = sweep(digits, tmp_path, methods=["tome"], budgets=[0.5])
    assert run.metric == "agreement"
    assert run.info["settings"]["data"] == data_of(digits.pictures)
    assert {r["method"] for r in run.good} == {"unreduced", "random", "uniform", "resize", "tome"}
    whole = next(r for r in run.good if r["id"] == "unreduced")
    assert whole["agreement"] == 1
    assert any("10 pictures with the unreduced model's best class" in note for note in whole["notes"])
    column = next(c for c in columns([run]) if c.key == "agreement")
    assert "±" in cell(next(r for r in run.good if r["method"] == "tome"), column)


def test_a_model_without_classes_agrees_on_the_nearest_picture() -> None:
    loaded = load_model("timm:vit_tiny_patch16_224?pretrained=false&img_size=48&depth=2&num_classes=0")
    assert loaded.kind == "features"
    task = PicturesTask(model=loaded.name, given=loaded, pictures=pictures(6), batch=8, repeats=0)
    whole, row = task.measure(()), task.measure(parse("random:keep=0.2"))
    assert whole["agreement"] == 1
    assert any("nearest other picture" in note for note in whole["notes"])
    x = torch.stack([loaded.transform(p.image) for p in task.pictures])

    def nearest() -> torch.Tensor:
        with torch.no_grad():
            unit = torch.nn.functional.normalize(loaded.predict(x), dim=-1)
        return (unit @ unit.T).fill_diagonal_(-2).argmax(-1)

    before = nearest()
    with patched(loaded.model, "random:keep=0.2"):
        share = (nearest() == before).double().mean().item()
    assert row["agreement"] == pytest.approx(share)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        replace(task, pictures=pictures(1)).prepare()


def test_one_question_about_every_picture() -> None:
    pytest.importorskip("transformers")
    named = [Named(e.truth, e.image) for e in scene_examples(4)]
    asked = AskedPicturesTask(
        model="world-llava", given=load_vlm("world-llava"), pictures=named, question=" how many  things are there ",
        batch=4, repeats=0,
    )  # fmt: skip
    whole, row = asked.measure(()), asked.measure(parse("random@projector:keep=0.02"))
    assert whole["agreement"] == 1
    assert 0 <= row["agreement"] < 1
    assert row["visual_tokens"] < whole["visual_tokens"]
    assert not {"accuracy", "accuracy_stderr", "right"} & {*whole, *row}
    assert asked.settings()["question"] == " how many  things are there "
    assert asked.runner.items[0].text == "how many things are there"
    assert any("4 pictures with the unreduced model's answer" in note for note in whole["notes"])


def test_what_cannot_be_asked_is_refused() -> None:
    loaded = load_model("digits-vit")
    with pytest.raises(ValueError, match="at least one picture"):
        PicturesTask(given=loaded).prepare()
    with pytest.raises(ValueError, match="at least one picture"):
        AskedPicturesTask().prepare()
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="question is empty"):
        AskedPicturesTask(given=load_vlm("world-llava"), pictures=pictures(1), question=" ").prepare()


def test_other_pictures_are_another_run() -> None:
    some = pictures(3)
    assert data_of(some) == data_of([Named("renamed", p.image) for p in some])
    assert data_of(some) != data_of(some[:2])
    assert data_of(some) != data_of([*some[:2], Named("c", some[2].image.rotate(90))])
