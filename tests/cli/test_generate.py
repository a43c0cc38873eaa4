from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result
from vlm_folders import save_all

from tokenreduce.cli import app

SPEC = "divprune:keep=0.3+fastv:layer=2,keep=0.5"


def call(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["generate", *(str(w) for w in words)])


def fails(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: "), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("vlms"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = []
    for i, size in enumerate([(80, 100, 3), (120, 60, 3)]):
        out.append(tmp_path_factory.mktemp("photos") / f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8)).save(out[-1])
    return out


QUICK = ("--prompt", "what is in this image?", "--max-new-tokens", 3, "--rounds", 1)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_tables(name: str, folders: dict[str, Path], photos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "kept.png"
    words = [folders[name], "--image", photos[0], "--image", photos[1], *QUICK, "--reduce", SPEC, "--show", out]
    result = call(*words)
    assert result.exit_code == 0, result.output
    for word in (
        "answer without reduction", f"answer with {SPEC.replace('layer=2,keep=0.5', '')[:-1]}", "token ids",
        "patches, vision encoder", "language model's entry (divprune:keep=0.3)", "from layer 2 on (fastv:keep=0.5)",
        "mean over 4 layers", "time to first token", "tokens/s", "KV cache after prefill", "on cpu in float32",
        f"wrote {out}",
    ):  # fmt: skip
        assert word in result.stdout, result.stdout
    with Image.open(out) as picture:
        assert picture.height > 4 * 448  # two images, two places each


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_json(name: str, folders: dict[str, Path], photos: list[Path]) -> None:
    result = call(folders[name], "--image", photos[0], *QUICK, "--reduce", SPEC, "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    stock, reduced = made["stock"], made["reduced"]
    assert (made["images"], made["rounds"], made["dtype"], made["device"]) == (1, 1, "float32", "cpu")
    assert made["prompt"] == "what is in this image?"
    assert len(stock["ids"]) == len(reduced["ids"]) == 3
    assert made["agree"] == (stock["ids"] == reduced["ids"])
    first, second = made["sites"]
    assert (first["stage"], first["layer"], first["before"]) == ("projector", None, stock["entry_tokens"])
    assert (second["stage"], second["layer"], second["before"]) == ("language", 2, first["after"])
    assert reduced["layer_tokens"] == [first["after"]] * 2 + [second["after"]] * 2
    assert made["ratio"]["cache_bytes"] == stock["cache_bytes"] / reduced["cache_bytes"]
    for side in (stock, reduced):
        assert side["first_token_s"] > 0
        assert side["tokens_per_s"] > 0


def test_language_stage_alone_and_one_token(folders: dict[str, Path], photos: list[Path]) -> None:
    words = ("--prompt", "what?", "--max-new-tokens", 1, "--rounds", 1, "--reduce", "fastv:layer=1,keep=1.0")
    result = call(folders["llava"], "--image", photos[0], *words)
    assert result.exit_code == 0, result.output
    assert "token ids agree: all 1" in result.stdout
    assert "decoding" not in result.stdout
    entry = next(x for x in result.stdout.splitlines() if "language model's entry" in x)
    assert entry.split()[-3:] == ["64", "64", "1.00x"]


def test_other_precision(folders: dict[str, Path], photos: list[Path]) -> None:
    result = call(folders["llava"], "--image", photos[0], *QUICK, "--reduce", SPEC, "--dtype", "bf16", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["dtype"] == "bfloat16"


def test_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are random here: the prompt, the resized picture and words that it does not know."""
    import functools

    import torch

    from tokenreduce import zoo
    from tokenreduce.zoo import world_llava

    monkeypatch.setattr(world_llava, "facts", lambda model: {"accuracy": 0.5})
    monkeypatch.setattr(zoo, "load", functools.partial(zoo.load, folder=tmp_path))
    picture = tmp_path / "large.png"
    Image.new("RGB", (300, 200), "navy").save(picture)
    words = ("world-llava", "--image", picture, "--reduce", "visionzip:keep=32", "--rounds", 1, "--max-new-tokens", 1)
    fails(call(*words, "--prompt", "what color is the star"), "no weights of world-llava", "tokenreduce train")
    torch.manual_seed(0)
    zoo.export(world_llava.build(), "world-llava", {}, folder=tmp_path)
    result = call(*words, "--prompt", "what color is the star", "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert (made["stock"]["entry_tokens"], made["reduced"]["entry_tokens"]) == (196, 32)
    assert made["text"] == "<image> what color is the star"
    strange = call(*words, "--prompt", "what colour is the cat")
    assert strange.exit_code == 0, strange.output
    assert "the model does not know: colour, cat" in strange.stderr


def test_a_video_is_shown_as_the_model_was_taught(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from films import film

    film(tmp_path / "a.mp4", 40, rate=8, shades=[i / 40 for i in range(40)])
    words = ("--video", tmp_path / "a.mp4", "--prompt", "is there a star", "--reduce", "divprune:keep=0.5")
    for model, more, tokens in (
        ("world-llava", (), 8 * 49), ("world-llava-2", (), 16 * 196), ("world-llava-2", ("--frames", 4), 4 * 196),
    ):  # fmt: skip
        result = call(model, *words, *more, "--rounds", 1, "--max-new-tokens", 1, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["stock"]["entry_tokens"] == tokens


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_bad_models(folders: dict[str, Path], photos: list[Path], tmp_path: Path) -> None:
    def model(place: object) -> Result:
        return call(place, "--image", photos[0], *QUICK, "--reduce", SPEC)

    fails(model(tmp_path / "nowhere"), "there is no folder", "nowhere", "save_pretrained")
    fails(model("./nowhere"), "there is no folder ./nowhere")
    fails(model(tmp_path), "no config.json")
    fails(model(photos[0]), "is a file")
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    fails(model(other), "is a bert model", "LLaVA")
    (other / "config.json").write_text("{")
    fails(model(other), "cannot load the configuration")


def test_incomplete_folders(folders: dict[str, Path], photos: list[Path], tmp_path: Path) -> None:
    def without(*names: str) -> Result:
        folder = tmp_path / names[0]
        shutil.copytree(folders["llava"], folder)
        for name in names:
            (folder / name).unlink()
        return call(folder, "--image", photos[0], *QUICK, "--reduce", SPEC)

    fails(without("processor_config.json"), "the processor of", "processor.save_pretrained")
    fails(
        without("tokenizer.json", "tokenizer_config.json", "processor_config.json"),
        "cannot load the processor", "processor.save_pretrained",
    )  # fmt: skip
    fails(without("model.safetensors"), "cannot load the model")


def test_missing_weights(folders: dict[str, Path], photos: list[Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "part"
    shutil.copytree(folders["llava"], folder)
    state = load_file(folder / "model.safetensors")
    gone = [name for name in state if "layers.1.self_attn" in name]
    assert gone
    save_file({k: v for k, v in state.items() if k not in gone}, folder / "model.safetensors", {"format": "pt"})
    result = call(folder, "--image", photos[0], *QUICK, "--reduce", SPEC)
    assert result.exit_code == 2
    assert f"{len(gone)} weights are missing" in result.stderr


def test_bad_images(folders: dict[str, Path], photos: list[Path], tmp_path: Path) -> None:
    def image(path: Path) -> Result:
        return call(folders["llava"], "--image", photos[0], "--image", path, *QUICK, "--reduce", SPEC)

    fails(image(tmp_path / "no.jpg"), "there is no image", "no.jpg")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not an image")
    fails(image(broken), "broken.jpg cannot be read as an image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(photos[0].read_bytes()[:2000])
    fails(image(cut), "cut.png cannot be read as an image")
    none = call(folders["llava"], *QUICK, "--reduce", SPEC)
    assert none.exit_code == 2
    assert "--image" in none.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "<image> <image> what?"], "the prompt has 2 <image> for 1 image;"),
        (["--reduce", "fastvv:layer=2"], "unknown method 'fastvv'; did you mean fastv"),
        (["--reduce", "fastv:depth=2"], "fastv has no setting 'depth'"),
        (["--reduce", ""], "--reduce names no method"),
        (["--reduce", "fastv:layer=7"], "layer=7: the language model has layers 0 to 3"),
        (["--device", "gpu7"], "device 'gpu7' is not available; available: auto, cpu"),
        (["--dtype", "fp8"], "dtype is one of auto, fp32"),
        (["--show", "kept.xyz"], "end --show in .png or .jpg"),
    ],
)
def test_bad_settings(words: list[str], said: str, folders: dict[str, Path], photos: list[Path]) -> None:
    fails(call(folders["llava"], "--image", photos[0], *QUICK, "--reduce", SPEC, *words), said)


def test_a_picture_that_cannot_be_written(folders: dict[str, Path], photos: list[Path]) -> None:
    where = photos[0] / "x.png"
    fails(
        call(folders["llava"], "--image", photos[0], *QUICK, "--reduce", SPEC, "--show", where),
        "cannot write",
        "--show",
    )


def test_the_hub_is_named_when_it_does_not_answer(photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def offline(name: str, **kwargs: object) -> None:
        assert kwargs["local_files_only"] is False
        raise OSError(f"We couldn't connect to the Hub to load {name}.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    result = call("nobody/nothing", "--image", photos[0], *QUICK, "--reduce", SPEC)
    fails(result, "cannot load the configuration of nobody/nothing", "give a folder", "network")
