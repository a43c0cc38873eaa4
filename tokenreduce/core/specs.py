"""A method and its settings as text, ``tome:r=13,prop_attn=false``, written and read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenreduce.core.settings import fit, fits, hints

__all__ = ["format_spec", "parse_spec", "split_specs"]


def format_spec(name: str, settings: Mapping[str, Any]) -> str:
    """``name:setting=value,...``, which :func:`parse_spec` reads back."""

    def text(value: Any) -> str:
        if isinstance(value, bool) or value is None:
            return str(value).lower()
        if isinstance(value, tuple | list):
            return "[" + ",".join(text(v) for v in value) + "]"
        return _quoted(value) if isinstance(value, str) else str(value)

    return name + (":" + ",".join(f"{k}={text(v)}" for k, v in settings.items()) if settings else "")


def _quoted(value: str) -> str:
    """``value``, in quotes where it would be read as something else."""
    if value and value == value.strip() and _value(value) == value and not set(value) & set("[]+,\"'"):
        return value
    quote = '"' if "'" in value else "'"
    return quote + value + quote


def _split(text: str, at: str) -> list[str]:
    """Split outside square brackets and outside values in quotes."""
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        c = text[i]
        if c in "'\"" and text[:i].rstrip()[-1:] in ("", *"=,[") and (end := text.find(c, i + 1)) > 0:
            i = end
        depth += (c == "[") - (c == "]")
        if c == at and depth == 0:
            parts.append(text[start:i])
            start = i + 1
        i += 1
    return [p.strip() for p in [*parts, text[start:]]]


def _value(text: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        return tuple(_value(v) for v in _split(text[1:-1], ",") if v)
    plain = {"true": True, "false": False, "none": None}
    if text.lower() in plain:
        return plain[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return _unquoted(text)


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text.strip("'\"")


def _read(raw: str, hint: Any) -> Any:
    """The value that ``raw`` is for a setting that takes ``hint``; of another kind where it is none of that."""
    value = _value(raw)
    for got in (fit(value, hint, words=True), fit(_unquoted(raw), hint)):
        if fits(got):
            return got
    return value


def parse_spec(text: str, kind: type | None = None) -> tuple[str, dict[str, Any]]:
    """``"tome:r=13,prop_attn=false"`` to its name and settings, as ``kind`` takes them: what is "no" for a setting
    that is text is false for one that is a bool. Raises ``ValueError`` for malformed text."""
    name, _, rest = text.strip().partition(":")
    known = {} if kind is None else hints(kind)
    settings: dict[str, Any] = {}
    for item in _split(rest, ",") if rest.strip() else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"cannot read {item!r} in {text!r}: write method:setting=value,setting=value")
        if key in settings:
            raise ValueError(f"{text!r} gives {key} twice")
        settings[key] = _read(value, known[key]) if key in known else _value(value)
    if not name:
        raise ValueError(f"cannot read {text!r}: it names no method; write method:setting=value")
    return name, settings


def split_specs(text: str) -> list[str]:
    """``"visionzip:keep=64+fastv:layer=2"`` to its parts."""
    return [part for part in _split(text, "+") if part]
