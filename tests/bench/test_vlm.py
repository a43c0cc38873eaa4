from __future__ import annotations

import csv
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from pictures import PHOTOS, encoded, image_folder
from PIL import Image
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce import zoo
from tokenreduce.bench.asking import pictures as pictures_module
from tokenreduce.bench.asking import task as task_module
from tokenreduce.bench.columns import columns, ordered
from tokenreduce.bench.methods import check_methods
from tokenreduce.bench.picture import style
from tokenreduce.bench.questions import Item, load_questions, matches, normalised
from tokenreduce.bench.report import rebuild
from tokenreduce.bench.sweep import Solver, points, sweep
from tokenreduce.bench.task import FLOPS, Task
from tokenreduce.bench.vlm import VlmTask
from tokenreduce.cli import app
from tokenreduce.core.undo import reducers_of
from tokenreduce.measure.question import ask
from tokenreduce.zoo.evaluation import KINDS_OF_TYPES

pytest.importorskip("transformers")
from vlm_folders import save_llava, save_qwen
from vlms import _text, _wide

VISUAL, DEPTH = 49, 4
TYPES = (*KINDS_OF_TYPES["image"], *KINDS_OF_TYPES["two_hop"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random LLaVA with the words of the world: 49 visual tokens, four layers."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    from tokenreduce.zoo.world_words import IMAGE, SIZE, image_processor, tokenizer

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=112, patch_size=16
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_text(vocab_size=SIZE)), image_token_index=IMAGE,
        vision_feature_layer=-2, image_seq_length=VISUAL,
    )  # fmt: skip
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("tiny")
    _wide(LlavaForConditionalGeneration(config)).save_pretrained(out)
    LlavaProcessor(
        image_processor(), tokenizer(), patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(out)  # fmt: skip
    return str(out)


@pytest.fixture(scope="module")
def task(folder):
    made = VlmTask(folder, "world", limit=26, batch=7, repeats=1, against="tokens")
    made.prepare()
    return made


def alone(task, item: Item, *reducers) -> str:
    """The answer to one question, asked as a user would."""
    model, processor = task.loaded.model, task.loaded.processor
    inputs = processor(images=item.image, text=f"<image> {item.text}", return_tensors="pt")
    with torch.no_grad():
        if reducers:
            with tr.patched(model, *reducers):
                ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        else:
            ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return processor.tokenizer.convert_ids_to_tokens(ids[0, -1:].tolist())[0] or f"<{int(ids[0, -1])}>"


def cache(lengths) -> int:
    """Bytes of keys and values in float32: two heads of 8 numbers each per layer."""
    return sum(2 * 2 * 8 * 4 * n for n in lengths)


# -- rows
def test_it_is_a_task_whose_budgets_are_flops_or_visual_tokens(task):
    assert isinstance(task, Task)
    assert task.axis.key == "visual_share"
    assert VlmTask("some/folder").axis == FLOPS
    assert json.loads(json.dumps(task.settings()))["limit"] == 26
    methods = task.methods()
    assert {"divprune", "random@projector", "fastv", "random@language", "tome", "random@encoder"} <= set(methods)
    assert methods.index("divprune") < methods.index("fastv") < methods.index("tome")
    assert "resize@encoder" not in methods  # inside the encoder it would take placeholders away
    with pytest.raises(ValueError, match="resize gives the t"):
        task.measure((tr.get_method("resize:keep=0.5", "encoder"),))


def test_the_unreduced_row(task):
    row = task.measure(())
    assert (row["encoder_tokens"], row["visual_tokens"], row["mean_visual_tokens"]) == (VISUAL, VISUAL, VISUAL)
    assert row["layer_tokens"] == [VISUAL] * DEPTH
    assert (row["visual_share"], row["agreement"], row["questions"], row["problems"]) == (1.0, 1.0, 26, 0)
    assert row["first_token_s"] > 0
    assert row["reduction_share"] == 0
    words = [len(task.runner.items[i].text.split()) for i in range(task.probed)]
    assert row["cache_bytes"] == pytest.approx(sum(cache([VISUAL + 1 + w] * DEPTH) for w in words) / len(words))
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("spec", ["", "random@projector:keep=12", "fastv:layer=2,keep=0.3", "tome:r=6"])
def test_answers_of_padded_batches_are_those_of_single_questions(task, spec):
    reducers = tr.parse(spec) if spec else ()
    with tr.patched(task.loaded.model, *reducers) if reducers else torch.no_grad():
        said = task.runner.answer().said
    if spec.startswith("random"):  # draws of a batch are not those of its rows
        assert len(set(said.values())) > 1
        return
    want = {item.id: alone(task, item, *reducers) for item in task.runner.items}
    assert len(set(want.values())) > 3
    assert said == want


def test_accuracy_by_type_is_plain_arithmetic(folder, monkeypatch):
    first = VlmTask(folder, "world", limit=30, repeats=0)
    said = first.runner.answer().said
    right = {i: i % 3 > 0 for i in said}  # two of three questions get the model's own answer as theirs
    items = [
        Item(i.id, i.text, (said[i.id] if right[i.id] else "nothing",), i.type, i.image) for i in first.runner.items
    ]
    monkeypatch.setattr(pictures_module, "load_questions", lambda *_: items)
    row = VlmTask(folder, "world", repeats=0).measure(())
    assert row["accuracy"] == pytest.approx(20 / 30)
    assert row["accuracy_stderr"] == pytest.approx(math.sqrt(2 / 9 / 30))
    assert {k.removeprefix("accuracy_") for k in row if k.startswith("accuracy_") and "stderr" not in k} == set(TYPES)
    for kind in TYPES:
        mine = [right[item.id] for item in items if item.type == kind]
        share = sum(mine) / len(mine)
        assert row[f"accuracy_{kind}"] == pytest.approx(share)
        assert row[f"accuracy_{kind}_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / len(mine)))
    assert "first_token_s" not in row


def test_a_combination_reports_every_stage(task):
    row = task.measure(tr.parse("tome:r=4+divprune:keep=20+fastv:layer=2,keep=0.5"))
    assert row["encoder_tokens"] == VISUAL - 2 * 4  # the tower is read before its last of three layers
    assert row["layer_tokens"] == [20, 20, 10, 10]
    assert (row["visual_tokens"], row["mean_visual_tokens"]) == (20, 15)
    assert row["visual_share"] == pytest.approx(15 / VISUAL)
    text = [1 + len(task.runner.items[i].text.split()) for i in range(task.probed)]
    want = sum(cache([20 + n, 20 + n, 10 + n, 10 + n]) for n in text) / len(text)
    assert row["cache_bytes"] == pytest.approx(want)
    assert row["flops"] < task.flops(())
    assert 0 < row["reduction_share"] < 1
    assert not reducers_of(task.loaded.model)


def test_agreement_counts_equal_answers(task):
    row = task.measure(tr.parse("divprune:keep=3"))
    mine = [alone(task, item, "divprune:keep=3") == alone(task, item) for item in task.runner.items]
    assert row["agreement"] == pytest.approx(sum(mine) / len(mine))
    assert row["agreement"] < 1


def test_a_failing_method_leaves_the_model_alone(task):
    with pytest.raises(ValueError, match="layer"):
        task.measure(tr.parse("fastv:layer=40"))
    assert not reducers_of(task.loaded.model)


# -- the sweep
def test_methods_of_all_stages_reach_the_same_number_of_visual_tokens(task):
    solver = Solver(task)
    assert solver.base == VISUAL
    for name in ("divprune", "pool", "random@language", "tome"):
        reducer, share = solver.solve(name, 0.55)
        assert share == pytest.approx(0.55, abs=0.011)
        row = task.meter.cost((reducer,))
        assert sum(row.layers) / len(row.layers) == pytest.approx(share * VISUAL)
    assert solver.solve("divprune", 0.5)[0].keep == 0.5  # keep is the share itself, not a neighbour that rounds to it


def test_names_of_several_stages():
    stages = ("projector", "language", "encoder")
    assert check_methods(["random"], stages) == ["random@projector", "random@language", "random@encoder"]
    assert check_methods(["random@language:seed=3"], stages) == ["random@language:seed=3"]
    assert check_methods(["vis*"], stages) == ["visionzip", "vispruner"]
    assert check_methods(["tom*"], ("encoder",)) == ["tome", "tome_kth"]
    assert check_methods(["resize"], stages, ["resize@projector"]) == ["resize@projector"]
    with pytest.raises(ValueError, match="fastv acts at stage language, this benchmark sweeps stages projector, enc"):
        check_methods(["fastv"], ("projector", "encoder"))
    with pytest.raises(ValueError, match="no projector or encoder method matches 'fast\\*x'"):
        check_methods(["fast*x"], ("projector", "encoder"))
    with pytest.raises(ValueError, match="unknown method"):
        check_methods(["nosuch"], stages)


def test_points_hold_the_projector_baselines_whatever_the_stage(folder, task):
    inside = VlmTask(folder, "world", limit=4, repeats=0, stages=("language",), few=True)
    ids = [p.id for p in points(inside, Solver(inside), budgets=(0.5,))]
    assert ids == [
        "unreduced", "random@projector@0.5", "uniform@projector@0.5", "pool@0.5", "resize@projector@0.5",
        "fastv@0.5", "pyramiddrop@0.5",
    ]  # fmt: skip
    towers = VlmTask(folder, "world", limit=4, repeats=0, stages=("encoder",))
    assert "random@encoder@0.5" in [p.id for p in points(towers, Solver(towers), ["rand*"], (0.5,))]
    combined = points(task, Solver(task), reduce=["random:keep=0.5+fastv:layer=2,keep=0.5"])
    assert combined[-1].spec == "random@projector:keep=0.5+fastv:keep=0.5"  # a short name is of the first stage
    assert len(points(task, Solver(task), reduce=["random@encoder:keep=0.4"])) == 6
    inner = points(task, Solver(task), reduce=["random@encoder:keep=0.4"])[-1]
    assert inner.spec == "random@encoder:keep=0.4"
    assert [s.stage for s in tr.parse(inner.spec, stage="projector")] == ["encoder"]
    assert combined[-1].budget == pytest.approx(0.38, abs=0.011)


def test_a_budget_is_a_share_of_the_flops_of_tower_and_prefill(folder, tmp_path):
    made = VlmTask(folder, "world", limit=12, repeats=0, stages=("projector", "language"))
    run = sweep(made, tmp_path, methods=["divprune", "fastv"], budgets=(0.85,))
    rows = {r["id"]: r for r in run.rows}
    assert run.errors == []
    base = rows["unreduced"]["flops"]
    assert made.spent(()) == made.flops(()) == base
    for name in ("divprune@0.85", "resize@projector@0.85", "random@projector@0.85"):
        assert rows[name]["share"] == rows[name]["flops"] / base == pytest.approx(0.85, abs=0.02), name
    # What a search asks of two questions is what all of them cost.
    keep = tr.parse(rows["divprune@0.85"]["spec"], stage="projector")
    assert made.flops(keep) == rows["divprune@0.85"]["flops"]
    assert made.spent(keep) == pytest.approx(made.flops(keep), rel=0.01)
    # Which questions are hard is what the smaller input says at the same cost.
    small, mine = (rows[name]["right"] for name in ("resize@projector@0.85", "divprune@0.85"))
    assert len(small) == 12
    hard = [b == "1" for a, b in zip(small, mine, strict=True) if a == "0"]
    assert rows["divprune@0.85"]["hard"] == pytest.approx(sum(hard) / len(hard))
    assert "hard" not in rows["resize@projector@0.85"]
    assert "hard %" in {c.label for c in columns([run])}
    with rebuild([tmp_path])[1]["csv"].open() as file:
        assert "right" not in next(csv.reader(file))


def test_sweep_resume_and_report(folder, tmp_path):
    def run(methods=("divprune", "fastv")):
        made = VlmTask(folder, "world", limit=14, repeats=0, against="tokens")
        return sweep(made, tmp_path, methods=methods, budgets=(0.5, 0.1), reduce=["tome:r=4+divprune:keep=10"])

    first = run()
    assert first.errors == []
    rows = {r["id"]: r for r in first.rows}
    low = rows["fastv@0.1"]
    assert low["visual_share"] == pytest.approx((2 * VISUAL + 2) / 4 / VISUAL, abs=0.01)
    assert low["notes"][0].startswith("cannot reach 10 % of the visual tokens; 51.")
    assert rows["divprune@0.5"]["visual_share"] == pytest.approx(0.5, abs=0.011)
    assert rows["divprune@0.5"]["share"] == rows["divprune@0.5"]["flops"] / rows["unreduced"]["flops"]
    assert rows["tome:r=4+divprune:keep=10"]["layer_tokens"] == [10] * 4
    assert first.axis.label == "visual tokens"
    group = [r["id"] for r in ordered(first) if r["budget"] == 0.1]
    assert group[-1] == "fastv@0.1"  # it misses the budget
    # A killed run: the last two rows are gone, and only those are measured again.
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:-2]))
    again = run()
    after = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    assert after[:-2] == lines[:-2]
    assert len(after) == len(lines)

    def drop(row):
        return {k: v for k, v in row.items() if k != "wall_s"}

    assert [drop(r) for r in again.rows] == [drop(r) for r in first.rows]
    _, files = rebuild([tmp_path])
    page = files["html"].read_text()
    assert "visual tokens, mean over the language model" in page
    with files["csv"].open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(first.rows)
    assert float(table[0]["accuracy_exist_stderr"]) >= 0
    labels = [c.label for c in columns([again])]
    assert {"visual %", "accuracy %", "KV", "exist %", "other_kind %"} <= set(labels)


def test_baselines_of_several_stages_look_different():
    looks = style(["random@encoder", "random@projector", "random@language", "divprune", "pool"])
    assert len({looks[n] for n in looks if "random" in n}) == 3
    assert looks["divprune"][1] == "solid"
    assert all(looks[n][1] != "solid" for n in looks if n != "divprune")


# -- questions of one's own
def write(folder: Path, lines) -> str:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def photos(folder: Path) -> list[dict]:
    """Seven questions, two of them about files that are no images."""
    image_folder(folder, 2)
    (folder / "camera" / "broken.jpg").write_bytes(encoded("camera", 0)[:300])
    asked = ["what is in this image", "a man or a woman", "is there a red cup on the table near the dog"]
    lines = [
        {"image": f"{name}/{i}.jpg", "question": asked[(n + i) % 3], "answer": "cat", "type": "odd" if i else "even"}
        for n, name in enumerate(PHOTOS[:3]) for i in range(2)
    ]  # fmt: skip
    lines[3]["image"] = "camera/nowhere.jpg"
    return [*lines, {"image": "camera/broken.jpg", "question": "what", "answer": "cat", "type": "odd"}]


def lone(model, processor, line: dict, folder: Path, spec: str) -> str:
    question = ask(processor, [Image.open(folder / line["image"])], line["question"])
    with tr.patched(model, spec) if spec else torch.no_grad():
        ids = model.generate(**question.inputs, max_new_tokens=4, do_sample=False)
    return processor.batch_decode(ids[:, question.inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


@pytest.mark.slow
@pytest.mark.parametrize("save", [save_llava, save_qwen])
def test_questions_from_a_file_with_broken_images(save, tmp_path):
    model, lines = str(save(tmp_path / "model")), photos(tmp_path)
    task = VlmTask(model, write(tmp_path, lines), batch=4, max_new_tokens=4, repeats=0)
    loaded = task.loaded
    good = [line for i, line in enumerate(lines) if i not in (3, 6)]
    for spec in ("", "divprune:keep=5"):
        reducers = tr.parse(spec) if spec else ()
        want = [lone(loaded.model, loaded.processor, line, tmp_path, spec) for line in good]
        with tr.patched(loaded.model, spec) if spec else torch.no_grad():
            said = task.runner.answer().said
        assert list(said.values()) == want
        assert task.measure(reducers)["questions"] == 5
    assert not task.runner.alone
    assert [Path(p["path"]).name for p in task.problems] == ["nowhere.jpg", "broken.jpg"]
    assert task.problems[0]["reason"] == "there is no such file"
    assert task.measure(())["problems"] == 2
    # Three of five questions get what the model says, in other words, as one of their answers.
    for line in good[:3]:
        line["answer"] = ["something else", lone(loaded.model, loaded.processor, line, tmp_path, "").upper() + "."]
    row = VlmTask(model, write(tmp_path, lines), batch=2, max_new_tokens=4, repeats=0).measure(())
    assert row["accuracy"] == pytest.approx(3 / 5)
    assert row["accuracy_even"] == pytest.approx(2 / 3)
    assert row["accuracy_odd"] == pytest.approx(1 / 2)


def test_a_processor_without_batches_asks_one_by_one(tmp_path, monkeypatch):
    model, lines = str(save_llava(tmp_path / "model")), photos(tmp_path)
    task = VlmTask(model, write(tmp_path, lines), batch=4, max_new_tokens=2, repeats=0)
    made = task_module.load_vlm
    refused = []

    def load(*args):
        loaded = made(*args)

        class Alone(type(loaded.processor)):
            def __call__(self, images=None, text=None, **kwargs):
                if len(text) > 1:
                    refused.append(len(text))
                    raise ValueError("one at a time")
                return super().__call__(images=images, text=text, **kwargs)

        loaded.processor.__class__ = Alone
        return loaded

    monkeypatch.setattr(task_module, "load_vlm", load)
    row = task.measure(())
    assert row["questions"] == 5
    assert refused == [3, 2] or refused == [3]
    assert any("one at a time: the processor makes no batches of them (one at a time)" in n for n in row["notes"])


def test_lines_that_are_no_questions(tmp_path):
    line = {"image": "a.jpg", "question": "what", "answer": "cat"}
    for bad, said in (
        ({"image": "a.jpg"}, "line 2 .* is no question .KeyError"),
        (["a.jpg"], "line 2 .* is no question .TypeError"),
        ({**line, "question": " "}, "line 2 .* empty question"),
        ({**line, "answer": []}, "line 2 .* empty answer"),
    ):
        with pytest.raises(ValueError, match=said):
            load_questions(write(tmp_path, [line, bad]))
    with pytest.raises(ValueError, match="holds no question"):
        load_questions(write(tmp_path, []))
    path = write(tmp_path, [{**line, "question": f"q{i}"} for i in range(20)])
    some = load_questions(path, limit=5, seed=1)
    assert [i.id for i in some] == sorted(i.id for i in some)
    assert some == load_questions(path, limit=5, seed=1) != load_questions(path, limit=5, seed=2)
    assert [i.text for i in load_questions(path)] == [f"q{i}" for i in range(20)]


def test_no_usable_question_is_an_error(tmp_path):
    path = write(tmp_path, [{"image": f"{i}.jpg", "question": "what", "answer": "cat"} for i in range(9)])
    model = str(save_llava(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"none of the 9 questions .* can be used:\n.*0.jpg: there is no such file"):
        VlmTask(model, path, limit=None).prepare()


def test_answers_are_compared_without_case_punctuation_and_articles():
    assert normalised(" The  red cup. ") == "red cup"
    assert matches("A cat.", ("dog", "cat"))
    assert not matches("cats", ("cat",))
    assert matches("A.", ("a",))
    assert not matches("", ("a",))
    assert not matches("?", ("!",))


# -- bad input
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch": 0}, "batch is an int >= 1"), ({"limit": 0}, "limit"), ({"repeats": -1}, "repeats"),
        ({"max_new_tokens": True}, "max_new_tokens"), ({"stages": ()}, "stages are among projector"),
        ({"stages": ("cache",)}, "not cache"), ({"dtype": "int8"}, "dtype is one of"), ({"device": "tpu7"}, "device"),
    ],
)  # fmt: skip
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        VlmTask(**settings)


def test_bad_models_and_data(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="digits-vit classifies images"):
        VlmTask("digits-vit", limit=2).prepare()
    with pytest.raises(ValueError, match="unknown split"):
        VlmTask(split="exam", limit=2).prepare()
    with pytest.raises(ValueError, match="world, world2, world2-all or a JSONL file"):
        load_questions("questions.txt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_questions(str(tmp_path / "no.jsonl"))
    monkeypatch.setattr(zoo, "load", functools.partial(zoo.load, folder=tmp_path))
    with pytest.raises(OSError, match="of world-llava"):
        VlmTask(limit=2).prepare()


# -- the command
def call(*words: object):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["bench", "vlm", *map(str, words)])


@pytest.mark.slow
def test_the_command_measures_and_reports(folder, tmp_path):
    out = tmp_path / "run"
    given = ("--model", folder, "--data", "world", "--limit", 12, "--budgets", "0.5", "--repeats", 1, "--device", "cpu")
    result = call(*given, "--stage", "projector,language", "--methods", "divprune,fast*", "--out", out)
    assert result.exit_code == 0, result.output
    for word in ("visual %", "accuracy %", "KV", "first token", "speed-up", "divprune:keep=0.5", "fastv:keep=0.", "°"):
        assert word in result.stdout, word
    assert (out / "report.html").exists()
    info = json.loads((out / "run.json").read_text())
    assert "--methods 'divprune,fast*'" in info["command"]
    assert info["axis"]["key"] == "share"
    # The same sweep on another number of questions is another run.
    other = call(*given[:5], 13, *given[6:], "--methods", "divprune", "--out", out)
    assert other.exit_code == 2
    assert "limit: 12 there, 13 now" in other.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "some/folder"), "--data is needed for some/folder"),
        (("--full", "--limit", 3), "--full or --limit"),
        (("--stage", "cache"), "stages are among projector, language, encoder"),
        (("--budgets", "1.5"), "a share of the unreduced FLOPs in (0, 1]"),
        (("--methods", "fastv", "--stage", "projector"), "fastv acts at stage language"),
    ],
)
def test_the_command_says_what_is_wrong(words, said, tmp_path):
    result = call(*words, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert said in result.stderr
