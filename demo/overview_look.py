"""What the first tab computes of one picture and one row: what is kept, the answers, FLOPs, time and KV bytes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tokenreduce.bench.columns import in_bytes, label, seconds
from tokenreduce.common.words import counted
from tokenreduce.core.registry import parse
from tokenreduce.demo.answers import put
from tokenreduce.demo.image import in_flops, probabilities
from tokenreduce.demo.overview_pictures import Picture
from tokenreduce.measure.generation import Comparison, compare
from tokenreduce.measure.image import clock_image, compare_image
from tokenreduce.measure.kept import kept_views, sheet
from tokenreduce.measure.timing import Timing

__all__ = ["Seen", "asked_of", "clocked", "looked_at", "table_of"]

SIDE, LONGEST, ROUNDS = 320, 24, 3
#: Name, unreduced, reduced.
Line = tuple[str, str, str]


@dataclass(frozen=True)
class Seen:
    """The picture with what is left of it, a sentence, and lines of a table."""

    after: Image.Image = field(repr=False)
    about: str
    lines: tuple[Line, ...]
    reducers: tuple[Any, ...] = ()


def looked_at(loaded: Any, row: dict[str, Any], picture: Picture) -> Seen:
    """``picture`` through a classifier without and with the method of ``row``; the time comes with :func:`clocked`.

    Raises what :func:`~tokenreduce.measure.image.compare_image` raises.
    """
    made = compare_image(loaded, picture.image, parse(label(row)))
    a, b = made.stock, made.reduced
    lines: list[Line] = [
        ("answer", _named(loaded, a.outputs, picture), _named(loaded, b.outputs, picture)),
        ("tokens at the end", str(a.tokens[-1]), _of(str(b.tokens[-1]), b.tokens[-1] / a.tokens[-1])),
        ("FLOPs", in_flops(a.flops), _of(in_flops(b.flops), b.flops / a.flops)),
    ]
    depth = made.look.depth
    about = f"{made.look.caption(depth - 1)}. In the picture: {picture.truth}."
    return Seen(made.look.overlay(depth - 1, side=SIDE), about, tuple(lines), made.reducers)


def clocked(loaded: Any, seen: Seen, picture: Picture) -> Line:
    """The line about the time of one image, without and with the method."""
    times = clock_image(loaded, picture.image, seen.reducers, batch=1, rounds=ROUNDS)
    return ("time of one image", *_times(*times))


def asked_of(loaded: Any, row: dict[str, Any], picture: Picture, question: int) -> Seen:
    """A question about ``picture`` to a language model, a copy that may be patched, without and with the method of
    ``row``. Raises what :func:`~tokenreduce.measure.generation.compare` raises."""
    text, truth = picture.questions[question]
    asked, where = put(loaded, [picture.image], False, text)
    reducers = parse(label(row))
    made = compare(loaded.model, loaded.processor, asked, reducers, max_new_tokens=LONGEST, rounds=ROUNDS)
    after = sheet([view for view, _ in kept_views(made, where)])
    return Seen(after, f"Asked: {text}. Right: {truth}.", _answered(made, row), reducers)


def _answered(made: Comparison, row: dict[str, Any]) -> tuple[Line, ...]:
    a, b = made.stock, made.reduced
    share = row.get("share")
    lines: list[Line] = [
        ("answer", a.answer or "(nothing)", b.answer or "(nothing)"),
        ("tokens, mean layer", f"{a.mean_tokens:,.0f}", _of(f"{b.mean_tokens:,.0f}", b.mean_tokens / a.mean_tokens)),
        ("FLOPs of all questions", "100 %", "-" if share is None else f"{100 * share:.0f} %"),
        ("first token after", *_times(a.first, b.first)),
        ("KV cache", in_bytes(a.cache), _of(in_bytes(b.cache), b.cache / a.cache)),
    ]
    return tuple(lines)


def _of(value: str, share: float) -> str:
    return f"{value} ({100 * share:.0f} %)"


def _times(stock: Timing, reduced: Timing) -> tuple[str, str]:
    ratio = stock.ratio(reduced)
    said = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
    return seconds(stock.median), f"{seconds(reduced.median)} ({said})"


def _named(loaded: Any, outputs: Any, picture: Picture) -> str:
    """As many of the best labels as there are things, each with whether it is there."""
    shares = probabilities(loaded, outputs, len(picture.labels)) or {}
    marked = [f"{'✓' if name in picture.labels else '✗'}\N{NO-BREAK SPACE}{name}" for name in shares]
    right = sum(name in picture.labels for name in shares)
    return ", ".join(marked) + f" ({right} of {counted(len(picture.labels), 'label')})"


def table_of(lines: Sequence[Line], spec: str) -> str:
    """Lines as an HTML table, letter by letter."""
    heads = ("", "unreduced", spec)
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in lines)
    return f'<table class="pair"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
