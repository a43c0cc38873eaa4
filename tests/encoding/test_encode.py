"""Features of folders: which vectors, the same whoever makes them, resumed, and bad input."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import TIMM, crop, encoded, hf_classifier, tiny_clip
from PIL import Image
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce.bench.models import load_model
from tokenreduce.cli import app
from tokenreduce.encoding import Encoding, encode

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven images in two folders, one of which no decoder reads, and a file that is none."""
    folder = tmp_path / "photos"
    for i in range(6):
        place = folder / ("a" if i % 2 else "b/c") / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        crop("coffee", i).save(place)
    (folder / "a" / "broken.jpg").write_bytes(b"no picture")
    (folder / "list.txt").write_text("x")
    return folder


def rows(folder: Path) -> tuple[list[int], list[str], np.ndarray]:
    tables = [parquet.read_table(f) for f in sorted(folder.glob("part-*.parquet"))]
    ids = [i for t in tables for i in t["id"].to_pylist()]
    places = [p for t in tables for p in t["path"].to_pylist()]
    return ids, places, np.concatenate([np.stack(t["embedding"].to_numpy()) for t in tables if len(t)])


@pytest.mark.parametrize("reduce", ["", "tome:r=2"])
def test_vectors_are_what_goes_into_the_head(photos: Path, tmp_path: Path, reduce: str) -> None:
    made = encode(Encoding(TIMM, str(photos), reduce, batch=2, rows=3), tmp_path / "out")
    ids, places, vectors = rows(made.folder)
    model = load_model(TIMM)
    with torch.inference_mode(), tr.patched(model.model, reduce or "tome:r=0"):
        x = torch.stack([model.transform(Image.open(p).convert("RGB")) for p in places])
        want = model.model.forward_head(model.model.forward_features(x), pre_logits=True)
    assert ids == [0, 1, 2, 4, 5, 6]
    assert places == sorted(places)
    np.testing.assert_allclose(vectors, want.numpy(), atol=1e-5)
    assert (made.images, made.encoded, made.width) == (6, 6, want.shape[1])
    assert [Path(p["path"]).name for p in made.problems] == ["broken.jpg"]
    assert made.notes == ["1 file that is no image is left out: list.txt"]
    assert (made.flops[1] < made.flops[0]) == bool(reduce)
    kept = parquet.read_table(made.folder / "part-00000.parquet").schema.metadata
    assert json.loads(kept[b"tokenreduce"])["reduce"] == reduce


def test_a_run_goes_on_where_it_stopped(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, plain, asked = Encoding(TIMM, str(photos), rows=2), Encoding.part, []
    whole = encode(task, tmp_path / "whole")

    def part(self, reducers, unit):  # type: ignore[no-untyped-def]
        asked.append(unit)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return plain(self, reducers, unit)

    monkeypatch.setattr(Encoding, "part", part)
    with pytest.raises(KeyboardInterrupt):
        encode(task, tmp_path / "out")
    (tmp_path / "out" / "part-00001.parquet").unlink()  # a line whose file is gone
    made = encode(task, tmp_path / "out")
    assert asked == [0, 1, 2, 1, 2, 3]
    assert (made.images, made.encoded, made.problems) == (6, whole.encoded - 2, whole.problems)
    for a, b in zip(rows(made.folder), rows(whole.folder), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"reduce: .*--fresh"):
        encode(Encoding(TIMM, str(photos), "tome:r=2", rows=2), tmp_path / "out")
    fresh = encode(Encoding(TIMM, str(photos), "tome:r=2", rows=4), tmp_path / "out", fresh=True)
    assert len(list(fresh.folder.glob("part-*.parquet"))) == 2


def test_images_that_came_since_make_another_run(photos: Path, tmp_path: Path) -> None:
    task = Encoding(TIMM, str(photos), rows=2)
    encode(task, tmp_path / "out")
    crop("coffee", 9).save(photos / "a" / "0.png")
    with pytest.raises(ValueError, match=r"images: 7 there, 8 now; listing: .*--fresh"):
        encode(Encoding(TIMM, str(photos), rows=2), tmp_path / "out")
    for old in (tmp_path / "out").glob("r*"):
        old.unlink()
    with pytest.raises(ValueError, match=r"files of another run \(part-00002.parquet\)"):
        encode(Encoding(TIMM, str(photos), limit=4, rows=2), tmp_path / "out")
    assert encode(Encoding(TIMM, str(photos), limit=4, rows=2), tmp_path / "out", fresh=True).images == 4


def test_photographs_are_turned_as_a_viewer_turns_them(tmp_path: Path) -> None:
    image = crop("coffee", 0)
    for name, stored, orientation in (("a", image, 1), ("b", image.transpose(Image.Transpose.ROTATE_90), 6)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / f"{name}.png", exif=exif)
    _, _, vectors = rows(encode(Encoding(TIMM, str(tmp_path)), tmp_path / "out").folder)
    np.testing.assert_array_equal(vectors[0], vectors[1])


@pytest.mark.slow
def test_workers_write_the_same_files(photos: Path, tmp_path: Path) -> None:
    task = Encoding(TIMM, str(photos), "tome:r=2", batch=2, rows=2)
    alone, shared = encode(task, tmp_path / "one"), encode(task, tmp_path / "two", workers=2)
    for a, b in zip(rows(alone.folder), rows(shared.folder), strict=True):
        np.testing.assert_array_equal(a, b)
    assert shared.problems == alone.problems


def test_kinds_of_models_and_data(photos: Path, tmp_path: Path) -> None:
    clip = f"open_clip:{tiny_clip(tmp_path / 'clip')}/"
    made = encode(Encoding(clip, str(photos), normalize=True, half=True), tmp_path / "clip_out")
    _, _, vectors = rows(made.folder)
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-2)
    made = encode(Encoding(f"hf:{hf_classifier(tmp_path / 'hf')}", str(photos), limit=2), tmp_path / "hf_out")
    assert made.images == 2
    assert encode(Encoding("digits-vit", "digits", limit=5), tmp_path / "digits").images == 5

    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:  # images without labels
        for i in range(3):
            data = encoded("coffee", i, "PNG")
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert encode(Encoding(TIMM, str(tmp_path / "shard-0.tar")), tmp_path / "tar_out").images == 3


def test_the_command(photos: Path, tmp_path: Path) -> None:
    words = ["encode", TIMM, str(photos), "--reduce", "tome:r=2", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "6 images in" in done.output
    assert "of the FLOPs of the stock model" in done.output
    assert "1 image could not be used" in done.output
    done = CliRunner().invoke(app, [*words, "--json"])
    told = json.loads(done.stdout)
    assert (told["images"], told["encoded"], told["reduce"]) == (6, 0, "tome:r=2")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reduce", "visionzip:keep=4"], "visionzip"),
        (["--amp", "int8"], "amp is bf16, fp16"),
        (["--engine", "spark"], "--engine is processes or ray"),
        (["--address", "auto"], "give --engine ray"),
        (["--engine", "ray"], "give 2 or more"),
    ],
)
def test_bad_settings(photos: Path, tmp_path: Path, words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["encode", TIMM, str(photos), "--out", str(tmp_path / "out"), *words])
    assert done.exit_code == 2
    assert said in done.output
    assert "bug" not in done.output


def test_nothing_to_encode(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        encode(Encoding(TIMM, str(tmp_path / "none")), tmp_path / "out")
    (tmp_path / "none" / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of the images .* can be read:\n  .*a.png"):
        encode(Encoding(TIMM, str(tmp_path / "none")), tmp_path / "out")
    with pytest.raises(ValueError, match="there is no such folder"):
        encode(Encoding(TIMM, str(tmp_path / "nowhere")), tmp_path / "out")
