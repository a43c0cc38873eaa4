"""An estimate as text of 80 columns."""

from __future__ import annotations

import textwrap
from typing import Any

from tokenreduce.common.words import counted
from tokenreduce.estimation.ops import DECODE, PREFILL, TOWER
from tokenreduce.estimation.roofline import Part

__all__ = ["amount", "text", "took"]

WIDTH = 80
HEAD = ("part", "", "tokens", "FLOPs", "bytes", "KV", "time", "bound by")
WIDTHS = (16, 7, 7, 8, 8, 8, 9, 8)
#: Methods to try where a stage is what holds the others back.
HINTS = {"encoder": "tome, or fewer pixels", "projector": "visionzip, divprune", "language": "fastv, pyramiddrop"}
#: Notes that are shown; all are in the JSON.
NOTES = 4
#: A limit that is no limit.
FAR = 20.0


def amount(value: float, unit: str) -> str:
    """
    >>> amount(9.93e12, "B"), amount(0, "B"), amount(512, "B")
    ('9.93 TB', '0 B', '512 B')
    """
    for factor, sign in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            number = f"{value / factor:.3g}" if value < 999.5 * factor else f"{value / factor:.0f}"
            return f"{number} {sign}{unit}"
    return f"{value:.3g} {unit}".strip()


def took(seconds: float) -> str:
    """
    >>> took(1.5), took(0.0213), took(2.5e-5)
    ('1.50 s', '21.3 ms', '0.025 ms')
    """
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def text(found: Any) -> str:
    """The table of an :class:`~tokenreduce.estimation.result.Estimate`, and what it means."""
    out = [*_title(found), "", _line(HEAD)]
    if found.reduced is None:
        out += [_row(p, "stock", found.stock) for p in found.stock.parts]
    else:
        others = {p.name: p for p in found.reduced.parts}
        for p in found.stock.parts:
            other = others[p.name]
            if other == p:
                out.append(_row(p, "both", found.stock))
            else:
                out += [_row(p, "stock", found.stock), _row(other, "reduced", found.reduced, "")]
    said = "\n".join(textwrap.fill(s, WIDTH, subsequent_indent="  ", break_on_hyphens=False) for s in sentences(found))
    return "\n".join([*out, "", said])


def _title(found: Any) -> list[str]:
    asked = found.shown
    if found.answers:
        asked += f" ({counted(found.visual, 'visual token')}), {found.prompt} text tokens, answer of {found.answer}"
    size = amount(found.parameters, "parameters").replace(" Gp", " billion p").replace(" Mp", " million p")
    lines = [f"{found.model} ({size}) on {found.device}, {found.dtype}, batch {found.batch}", asked]
    return textwrap.wrap(lines[0], WIDTH) + textwrap.wrap(lines[1], WIDTH) + (
        textwrap.wrap(f"reduce {found.reduce}", WIDTH, break_on_hyphens=False) if found.reduce else []
    )  # fmt: skip


def _line(cells: tuple[str, ...]) -> str:
    put = [c.ljust(w) if i in (0, 1, 7) else c.rjust(w) for i, (c, w) in enumerate(zip(cells, WIDTHS, strict=True))]
    return " ".join(put).rstrip()


def _row(p: Part, which: str, side: Any, name: str | None = None) -> str:
    cache = amount(side.cache_bytes, "B") if p.name in (PREFILL, DECODE) else ""
    tokens = f"{p.tokens:,.0f}" if p.tokens else ""
    head = p.name if name is None else name
    return _line((head, which, tokens, amount(p.flops, ""), amount(p.bytes, "B"), cache, took(p.seconds), p.bound))


def sentences(found: Any) -> list[str]:
    """What the table means, one thought each."""
    stock, made = found.stock, found.reduced
    what = "time to the first token" if found.answers else "forward"
    first = [p for p in stock.parts if p.name != DECODE]
    longest = max(first, key=lambda p: p.seconds)
    share = longest.seconds / stock.first_token
    out = []
    if made is None:
        out.append(f"The {what} takes {took(stock.first_token)}.")
    else:
        out.append(
            f"The {what}: {took(stock.first_token)} to {took(made.first_token)}, {found.speedup:.2f}x"
            + (f"; per decoded token {took(stock.token)} to {took(made.token)}, {found.token_speedup:.2f}x; to the end "
               f"of the answer {took(found.total(stock))} to {took(found.total(made))}, "
               f"{found.total(stock) / found.total(made):.2f}x" if found.answers else "") + "."
        )  # fmt: skip
        own = sum(p.own for p in made.parts if p.name != DECODE)
        out.append(f"The method's own work is {took(own)} of that, {100 * own / made.first_token:.1f} %.")
    out.append(f"The {longest.name} is {100 * share:.0f} % of the unreduced {what}, bound by {longest.bound}.")
    out += [_limited(found, stage, bound) for stage, bound in found.limits.items() if bound < FAR]
    out += _worth(found)
    batches = f"{stock.largest_batch:,} unreduced" + (f", {made.largest_batch:,} reduced" if made is not None else "")
    if not stock.largest_batch and not (made and made.largest_batch):
        out.append(f"One sample does not fit into the memory of {found.device} beside the weights.")
    else:
        out.append(f"Largest batch that fits into the memory of {found.device}: {batches}.")
    more = len(found.notes) - NOTES
    return [
        *out,
        *(f"Note: {n}" for n in found.notes[:NOTES]),
        *([f"{counted(more, 'more note')}."] if more > 0 else []),
    ]


def _limited(found: Any, stage: str, bound: float) -> str:
    acts_in = {"encoder": TOWER, "cache": DECODE}.get(stage, PREFILL)
    bounds = {p.name: p.bound for p in found.stock.parts}
    goal = "in a decode step" if stage == "cache" else "to the first token" if found.answers else "here"
    said = f"No method of the {stage} stage can exceed {bound:.2f}x {goal}"
    if bounds.get(acts_in) == "launch":
        return (
            f"{said}: the {acts_in} is bound by starting operators, which fewer tokens do not change (try a larger "
            "batch, or compile the model)."
        )
    if stage == "cache" or not found.answers:
        return f"{said}."
    tower = next((p for p in found.stock.parts if p.name == TOWER), None)
    share = 0.0 if tower is None else tower.seconds / found.stock.first_token
    if stage != "encoder" and share > 0.25:
        return f"{said}: the vision tower in front of it is {100 * share:.0f} % of it (try {HINTS['encoder']} there)."
    if stage == "encoder" and share < 0.5:
        return f"{said}: the tower is {100 * share:.0f} % of it (try {HINTS['projector']} behind it)."
    return f"{said}."


def _worth(found: Any) -> list[str]:
    worth = found.worth
    if worth is None:
        return []
    if worth.tokens is None:
        return ["No budget of it gains 5 % here: its part of the time is too small, or its own work too much."]
    share = 100 * worth.tokens / worth.all
    return [
        f"It gains 5 % from {worth.tokens:,.0f} of {worth.all:,.0f} tokens on down ({share:.0f} %, mean over the "
        f"layers of the {worth.part}{', text included' if worth.part == PREFILL else ''})."
    ]
