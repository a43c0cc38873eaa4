"""Pictures of every mode look as in a viewer, or are refused with a reason."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenreduce.common.images import PictureError, as_rgb, natural, open_picture

RAMP = np.floor(np.linspace(0, 65535, 64 * 64)).reshape(64, 64)
WANTED = (RAMP / 257 + 0.5).astype(np.uint8)


def check_ramp(image: Image.Image, off: int = 0) -> None:
    got = np.asarray(image)
    assert (image.mode, got.shape) == ("RGB", (64, 64, 3))
    assert np.abs(got.astype(int) - WANTED[..., None]).max() <= off


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled_by_their_range(tmp_path: Path, name: str) -> None:
    picture = Image.fromarray(RAMP.astype(np.int32 if name == "a.pgm" else np.uint16))
    picture.save(tmp_path / name)
    check_ramp(open_picture(tmp_path / name))


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I", "=i4")])
def test_pictures_in_memory_of_more_than_eight_bits(mode: str, kind: str) -> None:
    if mode == "I;16L":
        pytest.importorskip("PIL", minversion="11")
    check_ramp(as_rgb(Image.frombytes(mode, (64, 64), RAMP.astype(kind).tobytes())))


def test_a_big_endian_tiff_is_no_blank(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    check_ramp(open_picture(tmp_path / "a.tif"))


@pytest.mark.parametrize("span", [1.0, 255.0])
def test_floats_are_zero_to_one_or_to_255(tmp_path: Path, span: float) -> None:
    Image.fromarray((RAMP / 65535 * span).astype(np.float32)).save(tmp_path / "a.tif")
    check_ramp(open_picture(tmp_path / "a.tif"), 1)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (RAMP / 65535 * 1000, "go from 0 to 1000, and floats are read from 0 to 1 or 0 to 255"),
        (RAMP / 65535 - 0.5, "go from -0.5 to 0.5"),
        (RAMP / 65535 * 1.02, "go from 0 to 1.02"),  # overshot by a filter, or nearly black: nobody can tell
        (np.where(RAMP > 60000, np.nan, 0.5), "NaN or infinite"),
        (np.where(RAMP > 60000, np.inf, 0.5), "NaN or infinite"),
    ],
)
def test_floats_without_a_known_range_are_refused(tmp_path: Path, values: np.ndarray, reason: str) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(values.astype(np.float32)).save(path)
    with pytest.raises(PictureError, match=f"a.tif cannot be read as an image: .*{reason}") as error:
        open_picture(path)
    assert str(path) not in error.value.reason


@pytest.mark.parametrize("factor", [100, -1, 1 / 300])
def test_integers_of_32_bits_without_a_known_range_are_refused(tmp_path: Path, factor: float) -> None:
    Image.fromarray((RAMP * factor).astype(np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(PictureError, match="32-bit integers"):
        open_picture(tmp_path / "a.tif")


def shown(image: Image.Image, path: Path | None = None, **settings: object) -> list[tuple[int, ...]]:
    """The first and the last pixel, from a file where one is given."""
    if path is not None:
        image.save(path, **settings)
        image = open_picture(path)
    made = as_rgb(image)
    assert made.mode == "RGB"
    return [made.getpixel((0, 0)), made.getpixel((made.width - 1, made.height - 1))]


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    white, black = (255, 255, 255), (0, 0, 0)
    for mode, clear in (("RGBA", (9, 9, 9, 0)), ("LA", (9, 0))):
        picture = Image.new(mode, (4, 4), clear)
        picture.putpixel((3, 3), (0,) * (len(clear) - 1) + (255,))
        assert shown(picture, tmp_path / "a.png") == [white, black]
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([7, 7, 7, 255, 0, 0])
    palette.putpixel((3, 3), 1)
    for name in ("a.png", "a.gif"):
        assert shown(palette, tmp_path / name, transparency=0) == [white, (255, 0, 0)]
    for mode, clear in (("L", 7), ("RGB", (1, 2, 3)), ("1", 0), ("I;16", 7)):
        assert shown(Image.new(mode, (4, 4), clear), tmp_path / "b.png", transparency=clear)[0] == white
    assert shown(Image.new("RGBa", (2, 2)))[0] == shown(Image.new("La", (2, 2)))[0] == white


def test_other_modes_become_colours(tmp_path: Path) -> None:
    assert shown(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), tmp_path / "a.tif")[0] == (255, 0, 0)
    assert shown(Image.new("1", (2, 2), 1), tmp_path / "a.png")[0] == (255, 255, 255)
    assert shown(Image.new("L", (2, 2), 7), tmp_path / "a.png")[0] == (7, 7, 7)
    for mode in ("P", "HSV", "YCbCr", "RGBX"):
        shown(Image.new(mode, (2, 2)))
    plain = Image.new("RGB", (2, 2))
    assert as_rgb(plain) is plain


def test_pictures_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (30, 40)
    assert open_picture(tmp_path / "a.jpg", upright=False).size == (40, 30)


def test_large_pictures_work_or_have_a_sentence_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (60, 30)).save(tmp_path / "large.png")
    Image.new("L", (60, 60)).save(tmp_path / "huge.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_picture(tmp_path / "large.png").size == (60, 30)
        with pytest.raises(PictureError, match="it has 3,600 pixels, and at most 2,000 are read; make it smaller"):
            open_picture(tmp_path / "huge.png")


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no image"):
        open_picture(tmp_path / "gone.png")
    with pytest.raises(PictureError, match="it is a folder"):
        open_picture(tmp_path)
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(PictureError, match="its contents are no image"):
        open_picture(tmp_path / "a.png")
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PictureError, match=r"cut.png cannot be read as an image: .*(truncated|broken)"):
        open_picture(tmp_path / "cut.png")


def test_names_sort_by_their_numbers() -> None:
    names = ["b2.png", "b10.png", "a1_20.png", "a1_3.png", "007.png", "7.png", "B1.png", "10.png"]
    assert sorted(names, key=natural) == [
        "7.png", "007.png", "10.png", "a1_3.png", "a1_20.png", "B1.png", "b2.png", "b10.png",
    ]  # fmt: skip


def tiff(path: Path, data: bytes, bits: int, photometric: int = 1, kind: int = 1) -> Path:
    """64x64 values in a TIFF whose tags Pillow itself does not write."""
    tags = {256: 64, 257: 64, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 64, 279: len(data), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    path.write_bytes(head + entries + bytes(4))
    return path


def test_twelve_bits_go_to_white(tmp_path: Path) -> None:
    pairs = (RAMP / 16).astype(int).reshape(-1, 2)
    packed = [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255]
    check_ramp(open_picture(tiff(tmp_path / "a.tif", np.stack(packed, 1).astype(np.uint8).tobytes(), 12)), 1)


@pytest.mark.parametrize(
    ("values", "bits", "kind"), [(RAMP.astype("<u2"), 16, 1), ((RAMP / 65535).astype("<f4"), 32, 3)], ids=["16", "f"]
)
def test_zero_may_be_white(tmp_path: Path, values: np.ndarray, bits: int, kind: int) -> None:
    top = values.max()
    check_ramp(open_picture(tiff(tmp_path / "a.tif", (top - values).tobytes(), bits, 0, kind)), 1)


def test_integers_with_a_sign_are_refused(tmp_path: Path) -> None:
    for values, bits in ((RAMP / 2, 16), (RAMP - 32768, 16), (RAMP / 257 - 128, 8)):
        path = tiff(tmp_path / "a.tif", values.astype(f"<i{bits // 8}").tobytes(), bits, kind=2)
        with pytest.raises(PictureError, match="integers with a sign"):
            open_picture(path)
