"""What methods keep of the gallery's pictures: stored as text, read again, and drawn."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenreduce.bench.gallery.kept import (
    Kept,
    Without,
    as_text,
    read_kept,
    region_from,
    region_text,
    write_kept,
)
from tokenreduce.bench.gallery.looking import WITHOUT
from tokenreduce.bench.gallery.pictures import clip, scenes
from tokenreduce.bench.gallery.sheets import FILES, SIDES, original, sheet, webp
from tokenreduce.core.registry import load_all

STORED = Path(__file__).parents[3] / "docs" / "kept.json"
#: What the pictures of a page may weigh.
MOST_BYTES = 30_000


def whole(rows: int = 14, cols: int = 14) -> np.ndarray:
    return np.arange(rows * cols).reshape(rows, cols)


def scenes_kept(*maps: np.ndarray, heads: int = 0) -> Kept:
    return Kept("tome:keep=0.25", "world-vit", "scenes", maps, heads)


def test_maps_come_back_as_they_were(tmp_path):
    region = whole()
    region[0, :3], region[5] = 7, -1
    layers = np.stack([np.full((14, 14), 4), np.zeros((14, 14), dtype=int)])
    known = {
        "a": scenes_kept(region, whole(), whole()),
        "b": scenes_kept(layers, layers, layers, heads=4),
        "c": Without("It cannot."),
    }
    write_kept(tmp_path / "kept.json", known)
    got = read_kept(tmp_path / "kept.json")
    assert as_text(got) == as_text(known) == (tmp_path / "kept.json").read_text()
    assert got["c"] == known["c"]
    assert (got["b"].maps[0] == layers).all()
    assert got["b"].left() == [(98.0, 196)] * 3
    # Tokens are counted in the order in which they appear: what is together stays so.
    first = got["a"].maps[0]
    assert first[0, 0] == 0
    assert ((first < 0) == (region < 0)).all()
    assert ((first[:, :, None, None] == first) == (region[:, :, None, None] == region)).all()
    assert got["a"].left() == [(196 - 14 - 3, 196), (196, 196), (196, 196)]  # tokens 0 to 2 went into 7


@pytest.mark.parametrize("text", ["", "00 0", "000", "0!", "00 0000"])
def test_text_that_is_no_map_is_refused(text):
    with pytest.raises(ValueError, match=r"no map of tokens|invalid literal"):
        region_from(text)
    with pytest.raises(ValueError, match="can be written"):
        region_text(np.array([[36 * 36]]))


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "kept.json").write_text('{"tome": {"spec": "tome"}}')
    with pytest.raises(ValueError, match=r"kept\.json is not what .* writes"):
        read_kept(tmp_path / "kept.json")


def test_dropped_patches_are_dark_and_others_as_they_are():
    region = whole()
    region[:7] = -1
    drawn = np.asarray(sheet(scenes_kept(region, whole(), whole()))).astype(int)
    plain = np.asarray(original("scenes")).astype(int)
    assert drawn.shape == plain.shape
    assert drawn[:112, :224].mean() < 0.6 * plain[:112, :224].mean() + 40
    # Patches that stay differ by their thin border alone.
    assert np.median(abs(drawn[115:, :224] - plain[115:, :224])) <= 1


def test_layers_are_the_paler_the_fewer_heads_hold_a_key():
    layers = np.stack([np.full((14, 14), n) for n in (4, 2, 0)])
    drawn = np.asarray(sheet(scenes_kept(layers, layers, layers, heads=4))).astype(float)
    side = SIDES["scenes"][1]
    plain = np.asarray(scenes()[2].resize((side, side), Image.Resampling.LANCZOS)).astype(float)
    away = [abs(drawn[-side:, i * (side + 8) : i * (side + 8) + side] - plain).mean() for i in range(3)]
    assert away[0] == 0 < away[1] < away[2]
    assert (drawn[-side:, -side:] == 255).all()
    assert drawn.shape[1] == 3 * side + 2 * 8


def test_tokens_that_span_frames_have_one_colour():
    region = np.tile(np.arange(49).reshape(7, 7), (1, 8))  # every frame merged into the first
    kept = Kept("frame-merge", "world-llava", "clip", (region,))
    assert kept.left() == [(49, 392)]
    side = SIDES["clip"][0]
    drawn = np.asarray(sheet(kept)).astype(int)
    rows = [drawn[i * (side + 8) :][:side] for i in range(2)]
    frames = [row[:, i * (side + 8) : i * (side + 8) + side] for row in rows for i in range(4)]
    assert all((f[4:-4, 8:-8] == frames[0][4:-4, 8:-8]).all() for f in frames[1:])


def test_another_number_of_pictures_is_refused():
    with pytest.raises(ValueError, match="1 maps of 3 scenes"):
        sheet(scenes_kept(whole()))
    with pytest.raises(ValueError, match="pictures are scenes or clip"):
        sheet(Kept("tome", "world-vit", "moons", (whole(),)))


def test_every_method_is_stored_with_a_picture_or_a_reason():
    stored = read_kept(STORED)
    assert set(stored) == set(load_all()), "run python -m tokenreduce.bench.gallery docs/kept.json"
    pictures = {name: one for name, one in stored.items() if isinstance(one, Kept)}
    assert {name for name in stored if name not in pictures} <= set(WITHOUT), "each with its reason"
    for name, one in pictures.items():
        patches = {m.shape[-2:] for m in one.maps}
        assert patches == ({(14, 14)} if one.pictures == "scenes" else {(7, 56)}), name
        assert all((left > 0) == (name != "vtw") and left < of for left, of in one.left()), name
    assert len(STORED.read_bytes()) < 500_000


@pytest.mark.parametrize("name", ["soft-slim", "tome", "visionzip", "evs", "sttm", "mustdrop-cache", "streammem", None])
def test_pictures_are_small(name):
    drawn = [original(p) for p in FILES] if name is None else [sheet(read_kept(STORED)[name])]
    for image in drawn:
        data = webp(image)
        assert len(data) < MOST_BYTES
        assert Image.open(io.BytesIO(data)).size == image.size


def test_the_pictures_are_what_the_models_see():
    assert {image.size for image in (*scenes(), *clip())} == {(112, 112)}
    assert (len(scenes()), len(clip())) == (3, 8)
