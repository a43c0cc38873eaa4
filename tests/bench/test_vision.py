from __future__ import annotations

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from pictures import PHOTOS, TIMM, hf_backbone, image_folder, tiny_clip
from torch import nn

import tokenreduce as tr
from tokenreduce.bench import vision, vision_clock
from tokenreduce.bench.hits import Answers, agreement, scores
from tokenreduce.bench.task import Task
from tokenreduce.bench.vision import VisionTask, neighbours
from tokenreduce.bench.vision_parts import inference
from tokenreduce.core.undo import reducers_of

CLOCK = ("seconds_per_image", "images_per_s", "speedup", "peak_mb", "reduction_share")


@pytest.fixture(scope="module")
def digits():
    """The default task on 120 digits."""
    task = VisionTask(limit=120, batch=50, repeats=1)
    task.prepare()
    return task


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return str(image_folder(tmp_path_factory.mktemp("photos"), 5))


def accuracy(model, task, labels_in_order=None):
    """By a loop over the images, one at a time."""
    hits = answers = 0
    total = 0
    with torch.no_grad():
        for _, x, y in task.images:
            got = int(task.loaded.predict(x[None], model).argmax())
            stock = int(task.loaded.predict(x[None]).argmax())
            hits, answers, total = hits + (got == y), answers + (got == stock), total + 1
    return hits / total, answers / total, total


# -- rows --------------------------------------------------------------------------------------------------------------
def test_it_is_a_task_of_the_sweep(digits):
    assert isinstance(digits, Task)
    assert {"tome", "random", "uniform", "resize"} <= set(digits.methods())
    assert json.loads(json.dumps(digits.settings()))["limit"] == 120


def test_the_unreduced_row(digits):
    row = digits.measure(())
    top1, _, n = accuracy(None, digits)
    assert (row["top1"], row["images"], row["agreement"]) == (top1, n, 1.0)
    assert row["top1"] > 0.9
    assert row["tokens"] == [50] * 6
    assert (row["entry_tokens"], row["final_tokens"], row["mean_tokens"]) == (50, 50, 50)
    assert row["reduction_share"] == 0
    assert row["top1_stderr"] == pytest.approx(math.sqrt(top1 * (1 - top1) / n))
    assert json.loads(json.dumps(row)) == row


def test_flops_of_the_unreduced_model_are_those_of_its_matrix_products(digits):
    n, c, layers = 50, 96, 6
    block = 12 * n * c * c + 2 * n * n * c  # multiply-adds of qkv, proj, two MLP layers, and q·k and attention·v
    want = layers * block + 49 * 16 * c + c * 10
    assert digits.flops(()) == 2 * want
    assert digits.measure(())["gmacs"] == pytest.approx(want / 1e9)


def test_a_reduced_row_is_what_a_patched_copy_does(digits):
    row = digits.measure(tr.parse("tome:r=6"))
    copied = tr.patch(copy.deepcopy(digits.loaded.model), "tome:r=6")
    top1, agreement, n = accuracy(copied, digits)
    assert (row["top1"], row["agreement"], row["images"]) == (top1, agreement, n)
    assert row["tokens"] == [44, 38, 32, 26, 20, 14]
    assert (row["entry_tokens"], row["final_tokens"]) == (50, 14)
    assert row["mean_tokens"] == pytest.approx(sum(row["tokens"]) / 6)
    with torch.no_grad(), tr.record(copied) as trace:
        copied(digits.sample())
    assert row["flops"] == trace.flops < digits.flops(())
    assert all(isinstance(row[k], float) and row[k] > 0 for k in CLOCK)
    assert row["reduction_share"] < 1


def test_entry_tokens_count_what_enters_the_first_layer(digits):
    resized = digits.measure(tr.parse("resize:keep=0.5"))
    assert resized["entry_tokens"] == resized["tokens"][0] < 50


def test_the_model_is_clean_and_bit_identical_after_every_row_also_after_an_error(digits, monkeypatch):
    model, x = digits.loaded.model, digits.sample(4)
    with torch.no_grad():
        want = model(x)
    digits.measure(tr.parse("tome:r=4"))

    def fails(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr(vision_clock, "interleaved", fails)
    with pytest.raises(RuntimeError, match="boom"):
        digits.measure(tr.parse("tome:r=4"))
    assert reducers_of(model) == ()
    with torch.no_grad():
        assert torch.equal(model(x), want)
    with pytest.raises(ValueError, match="stage"):
        digits.measure(tr.parse("tome:r=4") + (_language(),))
    assert reducers_of(model) == ()


def _language():
    from dataclasses import dataclass

    from tokenreduce.core.reducer import Reducer

    @dataclass(frozen=True)
    class Elsewhere(Reducer, stage="language"):
        keep: float = 0.5

    return Elsewhere()


def test_the_stock_model_is_another_object_with_the_same_weights_and_is_never_patched(digits, monkeypatch):
    seen = {}

    def spy(functions, repeats, **kwargs):
        for name, function in functions.items():
            with (
                tr.record(digits._ready.stock, flops=False) as stock,
                tr.record(digits.loaded.model, flops=False) as this,
            ):
                function()
            seen[name] = (len(stock.steps), len(this.steps))
        return real(functions, repeats, **kwargs)

    real = vision_clock.interleaved
    monkeypatch.setattr(vision_clock, "interleaved", spy)
    digits.measure(tr.parse("tome:r=4"))
    assert seen == {"stock": (0, 0), "this": (0, 6)}
    stock, model = digits._ready.stock, digits.loaded.model
    assert stock is not model
    assert stock.blocks[0] is not model.blocks[0]
    assert stock.head.weight.data_ptr() == model.head.weight.data_ptr()


def test_clamping_is_noted_once_per_row(digits, recwarn):
    row = digits.measure(tr.parse("tome:r=40"))
    assert len(row["notes"]) == len(set(row["notes"])) >= 1
    assert any("r" in note for note in row["notes"])
    assert not [w for w in recwarn if "tokenreduce" in str(w.message).lower() or "r=40" in str(w.message)]


def test_what_depends_on_the_image_is_a_mean_over_images(digits):
    row = digits.measure(tr.parse("ats:keep=0.5"))
    reducers = tr.parse("ats:keep=0.5")
    flops = []
    with tr.patched(digits.loaded.model, *reducers), torch.no_grad():
        for image in digits.sample(8).split(1):
            with tr.record(digits.loaded.model) as trace:
                digits.loaded.model(image)
            flops.append(trace.flops)
    assert len(set(flops)) > 1
    assert row["flops"] == round(sum(flops) / 8) == digits.flops(reducers)
    assert any("depends on the image" in note for note in row["notes"])


def test_repeats_0_measures_no_time(digits):
    task = VisionTask(limit=20, repeats=0)
    assert not set(CLOCK) & set(task.measure(tr.parse("tome:r=4")))


def test_outputs_that_are_not_finite_count_as_wrong_and_are_noted():
    task = VisionTask(limit=20, repeats=0)
    task.prepare()
    with torch.no_grad():
        task.loaded.model.head.bias[3] = float("nan")
    row = task.measure(tr.parse("tome:r=1"))
    assert (row["top1"], row["agreement"]) == (0, 0)
    assert any("20 images gave NaN" in note for note in row["notes"])


def test_threads_are_set_while_measuring_and_restored(monkeypatch):
    before = torch.get_num_threads()
    seen = []
    task = VisionTask(limit=10, threads=before + 1, repeats=0)
    real = VisionTask._answer
    monkeypatch.setattr(VisionTask, "_answer", lambda *a: (seen.append(torch.get_num_threads()), real(*a))[1])
    task.measure(tr.parse("tome:r=1"))
    assert seen == [before + 1] * 2
    assert torch.get_num_threads() == before


# -- several labels ----------------------------------------------------------------------------------------------------
def test_a_scene_is_right_when_all_its_kinds_are_on_top():
    task = VisionTask("world-vit", "world", limit=40, batch=16, repeats=0, few=True)
    assert task.metric == "accuracy"
    assert set(task.methods()) == {"tome", "pitome", "evit", "tofu"}
    rows = [task.measure(tr.parse(spec) if spec else ()) for spec in ("", "uniform:keep=0.4")]
    assert rows[0]["accuracy"] > 0.9
    assert rows[0]["agreement"] == 1
    assert any("as many as it has" in note for note in rows[0]["notes"])
    model = task.loaded.model
    with tr.patched(model, "uniform:keep=0.4"), torch.no_grad():
        right, found = [], []
        for _, x, label in task.images:
            true = {k for k in label if k >= 0}
            best = set(model(x[None])[0].topk(len(true)).indices.tolist())
            right.append(best == true)
            found.append(len(best & true) / len(true))
    assert 0.05 < rows[1]["accuracy"] < 0.95
    assert rows[1]["accuracy"] == sum(right) / 40
    assert rows[1]["found"] == pytest.approx(sum(found) / 40)
    assert rows[1]["accuracy_stderr"] == pytest.approx(math.sqrt(sum(right) / 40 * (1 - sum(right) / 40) / 40))


def test_agreement_of_sets_knows_no_order_and_no_missing_images():
    y = torch.tensor([[3, 5, -1], [1, -1, -1], [2, 4, 6]])
    stock = Answers(torch.tensor([7, 8, 9]), y, torch.tensor([[3, 5, 1], [1, 2, 3], [2, 4, 6]]), 0)
    mine = Answers(torch.tensor([7, 9]), y[[0, 2]], torch.tensor([[5, 3, 6], [2, 4, 5]]), 0)
    assert agreement(mine, stock) == 0.5
    got = scores(mine, 9)
    assert (got["accuracy"], got["found"]) == (0.5, pytest.approx((1 + 2 / 3) / 2))
    broken = mine._replace(top=torch.full((2, 3), -1))
    assert (scores(broken, 9)["accuracy"], scores(broken, 9)["found"]) == (0, 0)


def test_scenes_need_a_classifier(tmp_path):
    with pytest.raises(ValueError, match=r"has no head.*world-vit"):
        VisionTask(f"hf:{hf_backbone(tmp_path)}", "world", repeats=0).prepare()


# -- data --------------------------------------------------------------------------------------------------------------
def test_images_are_decoded_once_when_they_fit_and_streamed_when_not(photos, monkeypatch):
    rows = []
    for cache, times in ((1 << 30, 1), (0, 2)):
        monkeypatch.setattr(vision, "CACHE", cache)
        task = VisionTask(TIMM + "&num_classes=4", photos, repeats=0, batch=8)
        task.prepare()
        reads = []
        real = type(task.images).read
        monkeypatch.setattr(
            type(task.images), "read", lambda s, i, real=real, reads=reads: (reads.append(i), real(s, i))[1]
        )
        rows.append(task.measure(tr.parse("tome:keep=0.5")))
        assert len(reads) == 20 * (times - 1)
    assert rows[0] == rows[1]


def test_problems_are_counted_and_listed(tmp_path):
    root = image_folder(tmp_path, 2)
    (root / "coffee" / "broken.jpg").write_bytes(b"x")
    task = VisionTask(TIMM + "&num_classes=4", str(root), repeats=1)
    assert task.problems == []
    row = task.measure(())
    assert (row["images"], row["problems"], row["top5"]) == (8, 1, None)
    assert [p["path"] for p in task.problems] == [str(root / "coffee" / "broken.jpg")]
    assert any("time and memory are of 8 images" in n for n in row["notes"])
    assert "random weights (seed 0)" in row["notes"]
    assert "random weights (seed 0)" not in task.measure(tr.parse("tome:r=1"))["notes"]


def test_a_data_set_without_any_readable_image_is_an_error(tmp_path):
    for name in PHOTOS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of the 4 images .* can be read:\n  .*a.jpg: UnidentifiedImageError"):
        VisionTask(TIMM + "&num_classes=4", str(tmp_path)).prepare()


def test_models_without_an_adapter_fail_before_the_data_is_read():
    with pytest.raises(TypeError, match="ResNet is not supported"):
        VisionTask("timm:resnet10t?pretrained=false", "nowhere").prepare()


# -- other kinds of models ---------------------------------------------------------------------------------------------
def test_zero_shot_rows_patch_the_vision_part_alone(photos, tmp_path):
    task = VisionTask(f"open_clip:{tiny_clip(tmp_path)}/", photos, repeats=1)
    row = task.measure(tr.parse("tome:r=4"))
    assert row["tokens"] == [13, 9]
    copied = tr.patch(copy.deepcopy(task.loaded.model), "tome:r=4")
    top1, agreement, _ = accuracy(copied, task)
    assert (row["top1"], row["agreement"]) == (top1, agreement)
    # flops are the image tower's: patches, two blocks of 17 tokens, projection of the class token
    blocks = 2 * (12 * 17 * 64 * 64 + 2 * 17 * 17 * 64)
    assert task.flops(()) == 2 * (blocks + 16 * 192 * 64 + 64 * 32)


def test_backbones_are_evaluated_by_their_neighbours(photos, tmp_path):
    task = VisionTask(f"hf:{hf_backbone(tmp_path)}", photos, repeats=0)
    row = task.measure(())
    with torch.no_grad():
        features = torch.stack([task.loaded.predict(x[None])[0] for _, x, _ in task.images])
    want = neighbours(features, torch.tensor(task.images.labels), 4)[:, 0]
    assert row["top1"] == pytest.approx((want == torch.tensor(task.images.labels)).float().mean().item())
    assert any("19 nearest neighbours" in n for n in row["notes"])
    reduced = task.measure(tr.parse("tome:r=2"))
    assert 0 <= reduced["agreement"] <= 1
    assert reduced["tokens"] == [15, 13]


def test_neighbours_vote_as_the_plain_formula_does():
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 5, generator=g), torch.randint(0, 7, (60,), generator=g)
    got = neighbours(features, labels, 9)
    for i in range(60):
        similar = [
            (float(nn.functional.cosine_similarity(features[i], features[j], 0)), j) for j in range(60) if j != i
        ]
        votes: dict[int, float] = {}
        for s, j in sorted(similar, reverse=True)[:20]:
            votes[int(labels[j])] = votes.get(int(labels[j]), 0.0) + math.exp(s / 0.07)
        order = sorted(votes, key=lambda c: -votes[c])[:5]
        assert got[i].tolist() == order + [-1] * (5 - len(order))
    with pytest.raises(ValueError, match="at least two images"):
        neighbours(features[:1], labels[:1], 9)


# -- settings ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"batch": 0}, "batch is an int >= 1"),
        ({"workers": -1}, "workers is an int >= 0"),
        ({"repeats": 1.5}, "repeats is an int >= 0"),
        ({"threads": 0}, "threads is an int >= 1"),
        ({"amp": "int8"}, "amp is bf16, fp16 or None"),
        ({"device": "tpu9"}, "device is cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device is cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "there is no device 'cuda:99'"),
    ],
)
def test_bad_settings_name_the_valid_ones(settings, word):
    with pytest.raises(ValueError, match=word):
        VisionTask(**settings)


def test_autocast_is_used(digits):
    task = VisionTask(limit=30, amp="bf16", repeats=1)
    row = task.measure(tr.parse("tome:r=2"))
    assert row["top1"] > 0.8
    with inference("cpu", "bf16"):
        assert task.loaded.model(task.sample()).dtype == torch.bfloat16
    assert task.settings()["amp"] == "bf16"


# -- the script --------------------------------------------------------------------------------------------------------
def script(*args):
    return subprocess.run(
        [sys.executable, "-m", "tokenreduce.vision.imagenet", *args], capture_output=True, text=True, timeout=300
    )


def test_the_imagenet_script_prints_a_table_and_writes_rows(photos, tmp_path):
    names = ("n01440764", "n02123045", "n07930864", "n04266014")
    root = image_folder(tmp_path / "val", 3, names).parent
    (root / "val" / names[0] / "bad.JPEG").write_bytes(b"x")
    got = script(
        "--model", TIMM, "--data", str(root), "--reduce", "tome:r=2", "--reduce", "tome:r=1+resize:keep=0.5",
        "--workers", "1", "--repeats", "1", "-o", str(tmp_path / "out" / "rows.jsonl"),
    )  # fmt: skip
    assert got.returncode == 0, got.stderr
    assert "unreduced" in got.stdout
    assert "tome:r=2" in got.stdout
    assert "bad.JPEG: UnidentifiedImageError" in got.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [r["method"] for r in rows] == ["unreduced", "tome:r=2", "tome:r=1+resize:keep=0.5"]
    assert [r["images"] for r in rows] == [12] * 3
    assert rows[0]["share"] == 1 > rows[1]["share"]


def test_the_imagenet_script_turns_bad_input_into_one_message():
    got = script("--model", "digits-vit", "--data", "digits", "--reduce", "tomee")
    assert got.returncode == 2
    assert "unknown method 'tomee'" in got.stderr
    assert "Traceback" not in got.stderr


@pytest.mark.slow
def test_processes_give_the_rows_of_one(tmp_path):
    """With a broken image among them."""
    photos = image_folder(tmp_path, 5)
    (photos / "coffee" / "broken.jpg").write_bytes(b"x")
    rows, problems = [], []
    for processes in (1, 2):
        task = VisionTask(TIMM + "&num_classes=4", str(photos), repeats=0, batch=3, processes=processes)
        rows.append([task.measure(tr.parse(spec)) if spec else task.measure(()) for spec in ("", "tome:r=2")])
        problems.append(task.problems)
        task.close()
    assert rows[0] == rows[1]
    assert problems[0] == problems[1]
    assert len(problems[0]) == 1
