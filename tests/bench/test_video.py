"""The video task: answers, columns, bad clips, resuming, the command and the script."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce.bench.asking import films as films_module
from tokenreduce.bench.clip_frames import Sampler
from tokenreduce.bench.clips import ClipItem, chosen, lettered
from tokenreduce.bench.columns import columns
from tokenreduce.bench.methods import is_baseline
from tokenreduce.bench.sweep import sweep
from tokenreduce.bench.task import Task
from tokenreduce.bench.tower_clock import tower_clock
from tokenreduce.bench.video import VideoTask
from tokenreduce.cli import app
from tokenreduce.core.undo import reducers_of
from tokenreduce.measure.frames import frames_question
from tokenreduce.zoo.video_inputs import video_inputs

pytest.importorskip("transformers")
pytest.importorskip("av")
from films import film
from vlm_folders import save_llava, save_onevision, save_qwen
from vlms import _text, _wide

DEPTH, FRAMES, EACH = 4, 8, 49


@pytest.fixture(autouse=True)
def no_frames_of_other_tests(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TOKENREDUCE_CACHE", str(tmp_path_factory.mktemp("frames")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random LLaVA with the words of the world: 196 patches a frame, 49 tokens, four layers."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    from tokenreduce.zoo.world_words import IMAGE, SIZE, image_processor, tokenizer

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=112, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_text(vocab_size=SIZE)), image_token_index=IMAGE,
        vision_feature_layer=-2, image_seq_length=196,
    )  # fmt: skip
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("tiny")
    _wide(LlavaForConditionalGeneration(config)).save_pretrained(out)
    LlavaProcessor(
        image_processor(), tokenizer(), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(out)  # fmt: skip
    return str(out)


@pytest.fixture(scope="module")
def task(folder):
    made = VideoTask(folder, "world", limit=12, batch=4, repeats=1)
    made.prepare()
    return made


def alone(task, item: ClipItem, spec: str) -> str:
    """The answer to one question about the world, asked as a user would."""
    model, processor = task.loaded.model, task.loaded.processor
    with tr.patched(model, spec) if spec else torch.no_grad():
        inputs = video_inputs(model, [item.image], [item.text], processor=processor)
        ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return processor.tokenizer.convert_ids_to_tokens(ids[0, -1:].tolist())[0] or f"<{int(ids[0, -1])}>"


# -- the world
def test_it_is_a_task(task):
    assert isinstance(task, Task)
    assert {k: task.settings()[k] for k in ("frames", "fps", "sampling", "layout")} == {
        "frames": 8, "fps": None, "sampling": "uniform", "layout": "auto",
    }  # fmt: skip
    methods = task.methods()
    assert {"holitom", "evs", "vidcom2", "framefusion", "uniform-frames", "pool-frames", "tome"} <= set(methods)
    assert set(task.baselines) <= set(methods)
    assert all(is_baseline(name) for name in task.baselines)
    known = [name for names in task.well_known.values() for name in names]
    assert set(known) <= set(methods)


def test_the_unreduced_row(task):
    row = task.measure(())
    assert (row["visual_tokens"], row["frames"], row["tokens_per_frame"]) == (FRAMES * EACH, FRAMES, EACH)
    assert row["layer_tokens"] == [FRAMES * EACH] * DEPTH
    assert (row["questions"], row["problems"], row["agreement"]) == (12, 0, 1.0)
    assert row["decode_s"] is None  # made, not read
    assert 0 < row["tower_s"] < row["first_token_s"]
    assert row["tower_speedup"] > 0
    assert {k for k in row if k.startswith("accuracy_video") and "stderr" not in k} == {
        "accuracy_video_colour_of", "accuracy_video_kind_of",
    }  # fmt: skip
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("spec", ["", "holitom:keep=0.2", "evs:keep=40", "framefusion:keep=0.4", "tome:r=12"])
def test_answers_of_batches_are_those_of_single_questions(task, spec):
    with tr.patched(task.loaded.model, spec) if spec else torch.no_grad():
        said = task.runner.answer().said
    want = {item.id: alone(task, item, spec) for item in task.runner.items}
    assert len(set(want.values())) > 1
    assert said == want


def test_methods_that_look_at_the_same_share_the_tower(folder, monkeypatch):
    made = VideoTask(folder, "world", limit=6, batch=3, repeats=0)
    made.prepare()
    specs = {
        "fastv:keep=0.3": 0, "evs:keep=0.3": 1, "vidcom2:keep=0.3": 0, "framefusion:keep=0.3": 0,
        "holitom:keep=0.3": 1, "fastvid:keep=0.3": 0, "tome:r=12": 1, "tome:r=6": 1,
    }  # fmt: skip
    calls, said = {}, {}
    for spec in specs:
        with tr.patched(made.loaded.model, spec), tower_clock(made.loaded.model.model, torch.device("cpu")) as spent:
            said[spec] = made.runner.answer().said
        calls[spec] = len(spent)
    batches = sum(len(list(made.runner.batches(unit))) for unit in range(len(made.runner.groups)))
    assert calls == {spec: batches * times for spec, times in specs.items()}
    monkeypatch.setattr(films_module, "SHARED", 0)
    other = VideoTask(folder, "world", limit=6, batch=3, repeats=0)
    other.prepare()
    for spec in specs:
        with tr.patched(other.loaded.model, spec):
            assert other.runner.answer().said == said[spec]


def test_a_budget_is_reached_in_visual_tokens(task):
    row = task.measure(tr.parse("evs:keep=0.25"))
    assert row["visual_share"] == pytest.approx(0.25)
    assert row["tokens_per_frame"] == pytest.approx(EACH / 4)
    assert not reducers_of(task.loaded.model)
    assert task.spent(tr.parse("evs:keep=0.25")) == pytest.approx(FRAMES * EACH / 4)
    # What the search for a budget shares is not what costs are counted on.
    assert task.flops(()) - task.flops(tr.parse("evs:keep=0.25")) > 0
    assert task.flops(tr.parse("tome:r=12")) < task.flops(())


def test_a_share_of_the_flops_counts_the_tower_of_every_clip(folder):
    assert VideoTask(folder).against == "tokens"
    made = VideoTask(folder, "world", limit=4, repeats=0, against="flops")
    for text in ("evs:keep=0.25", "evs:keep=1.0", "tome:r=12"):
        method = tr.parse(text)
        assert made.spent(method) == pytest.approx(made.flops(method), rel=0.01), text
    assert made.spent(()) == made.flops(())


def test_fewer_frames_of_the_world(folder):
    made = VideoTask(folder, "world", limit=6, frames=4, repeats=0)
    row = made.measure(())
    assert (row["frames"], row["visual_tokens"]) == (4, 4 * EACH)
    assert VideoTask(folder, "world", limit=6, fps=0.5, repeats=0).measure(())["frames"] == 4


def test_the_tower_clock_leaves_nothing_behind():
    class Inner(nn.Module):
        def get_image_features(self):
            return 1

        def get_video_features(self):
            return self.get_image_features() + 1

    inner = Inner()
    inner.get_image_features = own = lambda: 5
    before = dict(vars(inner))
    with tower_clock(inner, torch.device("cpu")) as spent:
        assert inner.get_video_features() == 6
        assert len(spent) == 1  # the call within counts with the one around it
        inner.get_image_features()
    assert len(spent) == 2
    assert vars(inner) == before
    assert inner.get_image_features is own


# -- clips of one's own
@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Ten questions; four of them cannot be asked."""
    out = tmp_path_factory.mktemp("clips")
    film(out / "long.mp4", 40, rate=8, shades=[i / 40 for i in range(40)])
    film(out / "dark.mp4", 24, rate=8, shades=[0.1] * 24)
    film(out / "short.mp4", 2, rate=8, shades=[0.9] * 2)
    (out / "text.mp4").write_text("no film")
    options = ["a cat", "a red cup", "two dogs"]
    lines = [
        {"video": "long.mp4", "question": "what is in this image", "answer": "cat", "type": "open"},
        {"video": "dark.mp4", "question": "what is there", "answer": "cat", "type": "open"},
        {"video": "short.mp4", "question": "what is there", "answer": "cat", "type": "open"},
        {"video": "long.mp4", "question": "what is small", "answer": "a cat", "options": options, "type": "choice"},
        {"video": "dark.mp4", "question": "what is large", "answer": "B", "options": options, "type": "choice"},
        {"video": "long.mp4", "question": "what is red", "answer": "cat", "start": 1, "end": 2, "type": "open"},
        {"video": "gone.mp4", "question": "what", "answer": "cat", "type": "open"},
        {"video": "text.mp4", "question": "what", "answer": "cat", "type": "open"},
        {"video": "long.mp4", "question": "what", "answer": "green", "options": options, "type": "choice"},
    ]
    (out / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{no json\n")
    return out


def lone(loaded, item: ClipItem, spec: str) -> str:
    shown = Sampler(4).read(item)
    prompt = lettered(item.text, item.options) if item.options else item.text
    question = frames_question(loaded, [Image.fromarray(f) for f in shown.frames], prompt, times=shown.times.tolist())
    with tr.patched(loaded.model, spec) if spec else torch.no_grad():
        ids = loaded.model.generate(**question.inputs, max_new_tokens=3, do_sample=False)
    new = ids[:, question.inputs["input_ids"].shape[1] :]
    said = loaded.processor.batch_decode(new, skip_special_tokens=True)[0]
    at = chosen(said, item.options)
    return said if at is None else "ABC"[at]


@pytest.mark.slow
@pytest.mark.parametrize("save", [save_onevision, save_qwen, save_llava])
def test_clips_from_a_file_with_broken_ones(save, clips, tmp_path):
    made = VideoTask(
        str(save(tmp_path / "model")), str(clips), limit=None, batch=4, frames=4, max_new_tokens=3, repeats=0
    )
    row = made.measure(())
    assert (row["questions"], row["problems"]) == (6, 4)
    assert [Path(p["path"]).name for p in made.problems] == [
        "gone.mp4", "text.mp4", "questions.jsonl line 9", "questions.jsonl line 10",
    ]  # fmt: skip
    assert made.problems[0]["reason"].startswith("there is no such file")
    assert row["decode_s"] > 0
    assert {"accuracy_open", "accuracy_choice"} < set(row)
    assert not made.runner.alone
    for spec in ("", "holitom:keep=0.4"):
        with tr.patched(made.loaded.model, spec) if spec else torch.no_grad():
            said = made.runner.answer().said
        want = {i.id: lone(made.loaded, i, spec) for i in made.runner.items if i.id in said}
        assert len(want) == 6
        assert said == want


def test_a_letter_or_a_text_is_right(clips, folder):
    task = VideoTask(folder, str(clips), repeats=0)
    item = ClipItem(0, "what", ("B",), None, Path("a.mp4"), ("a cat", "a red cup"))
    assert task.source().read(item, " (b)") == ("B", True)
    assert task.source().read(item, "A red cup.") == ("B", True)
    assert task.source().read(item, "A") == ("A", False)
    assert task.source().read(item, "a dog") == ("a dog", False)
    assert task.source().read(ClipItem(0, "what", ("cat",), None, Path("a.mp4")), "The cat.") == ("The cat.", True)


def test_no_clip_that_can_be_read_is_an_error(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.mp4").write_text("no film")
    lines = [{"video": f"{i}.mp4", "question": "what", "answer": "cat"} for i in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = str(save_llava(tmp_path / "model"))
    with pytest.raises(
        ValueError, match=r"(?s)none of the 3 questions .* can be used:\n.*2\.mp4: there is no such file"
    ):
        VideoTask(model, str(tmp_path / "q.jsonl")).prepare()


@pytest.mark.slow
def test_a_killed_sweep_goes_on(clips, tmp_path):
    model = str(save_onevision(tmp_path / "model"))

    def run():
        made = VideoTask(model, str(clips), frames=4, max_new_tokens=2, repeats=0)
        return sweep(made, tmp_path / "run", methods=("evs", "fastv"), budgets=(0.5,))

    first = run()
    assert first.errors == []
    assert len(first.info["problems"]) == 4
    assert [r["id"] for r in first.rows][:2] == ["unreduced", "uniform-frames@0.5"]
    file = tmp_path / "run/rows.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]) + lines[-2][:20])  # cut off in the middle of a row
    again = run()
    after = file.read_text().splitlines(keepends=True)
    assert after[:-2] == lines[:-2]

    def drop(row):
        return {k: v for k, v in row.items() if k not in ("wall_s", "decode_s")}

    assert [drop(r) for r in again.rows] == [drop(r) for r in first.rows]
    labels = [c.label for c in columns([again])]
    assert {"decode", "frames", "per frame", "open %", "choice %"} <= set(labels)


# -- bad input
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"frames": 0}, "frames is an int"), ({"frames": 4, "fps": 2.0}, "one of frames and fps"),
        ({"sampling": "aks"}, "sampling is one of"), ({"layout": "nextqa"}, "layout is one of"),
        ({"batch": 0}, "batch is an int"), ({"stages": ("cache",)}, "stages are among"),
    ],
)  # fmt: skip
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        VideoTask(**settings)


# -- the command and the script
def test_the_command(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "clips")
    model, out = str(save_onevision(tmp_path / "model")), tmp_path / "run"
    words = [
        "bench", "video", "--model", model, "--data", str(tmp_path / "clips"), "--frames", "4", "--methods",
        "holitom", "--budgets", "0.5", "--repeats", "1", "--max-new-tokens", "2", "--device", "cpu", "-o", str(out),
    ]  # fmt: skip
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, words)
    assert result.exit_code == 0, result.output
    for word in ("visual %", "accuracy %", "tower", "per frame", "holitom:keep=0.", "4 inputs could not be used"):
        assert word in result.stdout, word
    info = json.loads((out / "run.json").read_text())
    assert info["task"] == "video"
    assert "bench video" in info["command"]
    assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "some/folder"), "--data is needed for some/folder"),
        (("--frames", 3, "--fps", 2), "--frames or --fps"),
        (("--full", "--limit", 3), "--full or --limit"),
        (("--layout", "nextqa"), "layout is one of auto"),
        (("--data", "none.jsonl"), "there is no none.jsonl"),
    ],
)
def test_the_command_says_what_is_wrong(words, said, tmp_path):
    result = CliRunner().invoke(app, ["bench", "video", *map(str, words), "-o", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert said in result.stderr


def test_the_script(clips, tmp_path):
    from tokenreduce.video import benchmark

    model, out = str(save_onevision(tmp_path / "model")), tmp_path / "rows.jsonl"
    words = [
        "--model", model, "--data", str(clips), "--reduce", "holitom:keep=0.5", "--reduce", "fastv:layer=40",
        "--frames", "4", "--repeats", "0", "--max-new-tokens", "2", "--out", str(out),
    ]  # fmt: skip
    result = CliRunner(env={"COLUMNS": "300"}).invoke(benchmark.app, words)
    assert result.exit_code == 1, result.output  # one method does not fit
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["method"] for r in rows] == ["unreduced", "holitom:keep=0.5"]
    assert rows[1]["tokens_per_frame"] < rows[0]["tokens_per_frame"]
    assert "4 questions could not be used" in result.stdout
    assert "fastv:layer=40,keep=0.5 failed: ValueError" in result.stderr
