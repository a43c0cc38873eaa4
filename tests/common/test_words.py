from __future__ import annotations

import io

import pytest

from tokenreduce.common.words import are, ascii_for, counted, speak_everywhere, spoken


def test_numbers_agree_with_their_nouns() -> None:
    assert [counted(n, "round") for n in (0, 1, 2, 1234)] == ["0 rounds", "1 round", "2 rounds", "1,234 rounds"]
    assert counted(3, "class", "classes") == "3 classes"
    assert (are(1), are(2), are(0)) == ("is", "are", "are")


@pytest.mark.parametrize(("sign", "told"), [("±", "+-"), ("≈", "~"), ("→", "->"), ("é", "e"), ("字", "?"), ("a", "a")])
def test_every_sign_has_an_ascii_form(sign: str, told: str) -> None:
    assert ascii_for(sign) == told


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_a_stream_of_any_encoding_takes_any_text(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    speak_everywhere(stream, io.StringIO(), None)  # what has no encoding is left alone
    stream.write("98 ±2 % ≈1.0x ━ bad\udcff.png")
    stream.flush()
    text = raw.getvalue().decode(encoding)
    assert text.startswith("98 ±2" if encoding != "ascii" else "98 +-2 % ~1.0x - bad?.png")
    assert text.endswith("bad?.png")


def test_text_is_told_before_it_is_laid_out() -> None:
    assert spoken("1.7 ±0.1", "ascii") == "1.7 +-0.1"
    assert spoken("1.7 ±0.1", "utf-8") == "1.7 ±0.1"
