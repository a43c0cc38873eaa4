"""Words for people: numbers with their nouns, and text for streams that cannot write every character; and for JSON."""

from __future__ import annotations

import codecs
import math
import sys
import unicodedata
from typing import Any

__all__ = ["are", "ascii_for", "counted", "plain", "speak_everywhere", "spoken", "whole"]

#: Signs that have no letters inside which ``unicodedata`` could find.
SIGNS = {
    "±": "+-", "≈": "~", "≥": ">=", "≤": "<=", "≠": "!=", "→": "->", "←": "<-", "∞": "inf", "µ": "u", "μ": "u",
    "×": "x", "–": "-", "—": "-", "−": "-", "‘": "'", "’": "'", "“": '"', "”": '"',  # noqa: RUF001
    "…": "...", "·": "-", "•": "-", "°": "^", "✓": "ok", "✗": "x",
    "█": "#", "━": "-", "─": "-", "╸": "-", "╺": "-", "│": "|", "┃": "|",
}  # fmt: skip
_HANDLER = "tokenreduce.readable"


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """
    >>> counted(1, "row"), counted(2_000, "row"), counted(0, "class", "classes")
    ('1 row', '2,000 rows', '0 classes')
    """
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def are(n: int) -> str:
    """The verb behind :func:`counted`."""
    return "is" if n == 1 else "are"


def whole(value: float) -> float:
    """``value`` as an int where it is one, else with one decimal: counts and their means.

    >>> whole(3.0), whole(3.14)
    (3, 3.1)
    """
    return int(value) if value == int(value) else round(value, 1)


def ascii_for(character: str) -> str:
    """What stands for a character in ASCII: a sign in words, a letter without its accent, "?" for anything else.

    >>> "".join(map(ascii_for, "±é字"))
    '+-e?'
    """
    if character.isascii():
        return character
    letters = "".join(c for c in unicodedata.normalize("NFKD", character) if c.isascii() and c.isprintable())
    return SIGNS.get(character) or letters or "?"


def spoken(text: str, encoding: str) -> str:
    """``text`` as a stream of ``encoding`` shows it; for what is laid out in columns before it is written."""
    return text.encode(encoding, _HANDLER).decode(encoding)


def _readable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(ascii_for, error.object[error.start : error.end])), error.end


codecs.register_error(_HANDLER, _readable)


def speak_everywhere(*streams: Any) -> None:
    """Let ``streams`` (standard output and error by default) write what their encoding lacks in ASCII, so that no
    command dies of a sign because of ``LANG=C``, ``PYTHONIOENCODING=ascii`` or an old code page."""
    for stream in streams or (sys.stdout, sys.stderr):
        change = getattr(stream, "reconfigure", None)  # notebooks and tests put objects there that have no encoding
        if change is not None:
            change(errors=_HANDLER)


def plain(value: Any) -> Any:
    """``value`` as JSON can carry it: numpy and torch scalars become numbers, tuples lists, nan and inf None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)
