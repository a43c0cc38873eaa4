"""The page of a run, made of its rows alone: a killed run has one as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenreduce.measure.timing import Speedup

__all__ = ["page"]

Row = dict[str, Any]
_HEADS = {
    "encoders": (
        "model, batch, form, method, sizes", "tokens left", "FLOPs", "stock", "speed-up", "interval", "possible",
        "share of it", "peak", "waits for the device", "attention, stock", "patched",
    ),
    "languages": (
        "shape, form, method, budget", "visual tokens at entry", "mean over layers", "prefill, stock", "speed-up",
        "interval", "possible", "step, stock", "speed-up", "interval", "KV cache", "peak", "waits, stock", "patched",
    ),
    "compiled": ("what", "stock", "speed-up", "interval", "possible", "share of it", "first call, stock", "patched"),
}  # fmt: skip
_TITLES = {
    "tests": "Tests", "encoders": "Encoders", "languages": "Image language models", "compiled": "Compiled",
}  # fmt: skip
ABOUT = """\
bfloat16, random weights, shared by all models of a row; stock and patched (and *possible*) in the same rounds, medians
of per-round ratios (≈: within noise); the device is waited for before and after what is timed. *Speed-up*, *FLOPs*,
*KV cache* and *peak* (the allocator's, above the weights) are stock over patched. *Possible* is the stock model on as
many tokens: the same blocks on merely sliced tokens, or a prompt as short. *Share of it* is how much of that is
reached. *Sizes* go into attention as a mask, or folded into a channel of the keys, or do not count. *Waits* are
operations of a patched forward that make the host wait for the device. Graphs are CUDA graphs: of a forward, or of one
decode step."""


def page(rows: Sequence[Row], command: str, conditions: str, tiny: bool = False) -> str:
    """Markdown of all sections, of what failed, and of what was not measured and why."""
    head = ["# Performance on CUDA", "", f"`{command}`", "", conditions, ""]
    if tiny:
        head += [
            "**A dry run with tiny shapes: it shows that everything runs, and no figure in it means anything.**",
            "",
        ]
    head += [ABOUT, ""]
    for section in _TITLES:
        here = [row for row in rows if row["section"] == section]
        if here:
            head += [f"## {_TITLES[section]}", "", *_section(section, here), ""]
    return "\n".join([*head, *_left_out(rows)])


def _section(section: str, rows: Sequence[Row]) -> list[str]:
    good = [row for row in rows if row["status"] == "ok"]
    if section == "tests":
        (passed, *_) = [row["passed"] for row in good if "passed" in row] or [sum("::" in row["key"] for row in good)]
        return [f"{passed} tests passed."] if passed is not None else ["Tests were found, and not run."]
    if not good:
        return ["No row was finished."]
    cells = {"encoders": _encoder, "languages": _language, "compiled": _compiled}[section]
    return table(_HEADS[section], [cells(row) for row in good])


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown."""
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return out + ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _left_out(rows: Sequence[Row]) -> list[str]:
    """What failed and what was skipped, each with its reason."""
    out: list[str] = []
    kinds: Mapping[str, tuple[str, Callable[[Row], str]]] = {
        "error": ("Failed", lambda row: row["error"]),
        "skipped": ("Not measured", lambda row: row["why"]),
        "begun": ("Cut off", lambda row: "the run ended while it was measured"),
    }
    for status, (title, why) in kinds.items():
        those = [row for row in rows if row["status"] == status]
        if those:
            lines = [(row["section"], row["key"], why(row)) for row in those]
            out += [f"## {title}", "", *table(("section", "row", "why"), lines), ""]
    return out


def _times(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"


def _speedup(told: Sequence[float]) -> tuple[str, str]:
    ratio, low, high, rounds = told
    made = Speedup(ratio, low, high, int(rounds))
    return made.cell, made.interval


def _over(pair: Sequence[float]) -> str:
    return f"{pair[0] / pair[1]:.2f}x" if pair[1] else ""


def _said(value: Any) -> str:
    return "" if value is None else str(value)


def _encoder(row: Row) -> tuple[str, ...]:
    kernels = row.get("kernels", ["", ""])
    return (
        row["key"], str(row["left"]), f"{row['flops']:.2f}x", _times(row["times"]["stock"]), *_speedup(row["speedup"]),
        f"{row['possible'][0]:.2f}x", f"{row['share'][0]:.2f}", _over(row["peak"]) if "peak" in row else "",
        _said(row.get("syncs")), *kernels,
    )  # fmt: skip


def _language(row: Row) -> tuple[str, ...]:
    prefill, step = row["times"].get("prefill"), row["times"].get("step")
    waits = row.get("syncs", [None, None])
    return (
        row["key"], *(str(n) for n in row.get("visual", ("", ""))), _times(prefill[0]) if prefill else "",
        *(_speedup(row["speedup"]) if "speedup" in row else ("", "")),
        f"{row['possible'][0]:.2f}x" if "possible" in row else "", _times(step[0]) if step else "",
        *(_speedup(row["step"]) if "step" in row else ("", "")), _over(row["kv"]) if "kv" in row else "",
        _over(row["peak"]) if "peak" in row else "", *map(_said, waits),
    )  # fmt: skip


def _compiled(row: Row) -> tuple[str, ...]:
    times, spent = row["times"], row.get("compiling", {})
    stock = times["stock"] if "stock" in times else times["prefill"][0]
    return (
        row["key"], _times(stock), *_speedup(row["speedup"]), *(
            (f"{row['possible'][0]:.2f}x", f"{row['share'][0]:.2f}") if "share" in row else ("", "")
        ), *(f"{spent[name]:.0f} s" if name in spent else "" for name in ("stock", "patched")),
    )  # fmt: skip
