"""The Pareto picture: what a method costs (a share of FLOPs or visual tokens) against what it keeps."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenreduce.bench.finding import finding
from tokenreduce.bench.methods import UNREDUCED, is_baseline
from tokenreduce.bench.names import label, metric_label, percent
from tokenreduce.bench.runs import OTHER_OUT, Run
from tokenreduce.common.files import writing

__all__ = ["COLOURS", "curves", "error_of", "pareto", "style"]

#: Points of a text: legible when the picture is shown 400 pixels wide.
FONT = 11
#: Distinct at small size on white; more methods than colours start again with another marker.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e6ab02", "#56b4e9", "#7b3fb0", "#a6362c",
    "#5aa02c", "#1b3a6b", "#e7298a", "#8c6d31",
)  # fmt: skip
MARKERS = "osD^v"
GREYS = {
    "random": ("#707070", "dash"),
    "uniform": ("#909090", "dot"),
    "resize": ("#505050", "dashdot"),
    "pool": ("#808080", "dashdot"),
    "pool-frames": ("#606060", "dot"),
    "uniform-frames": ("#a0a0a0", "dash"),
}
#: By the stage in a full name, where several stages have the baseline.
BASELINE_MARKERS = {"projector": "+", "language": "1"}


def need(library: str, what: str) -> Any:
    """Import a library of the bench extra. Raises ``ImportError`` that names the extra."""
    import importlib

    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(f"{what} needs {library.partition('.')[0]}: pip install 'tokenreduce[bench]'") from error


def curves(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Rows with both axes per line of the picture: one line per swept method, explicit specs by their method."""
    out: dict[str, list[dict[str, Any]]] = {}
    for row in run.good:
        if row.get(run.metric) is not None and row.get(run.axis.key) is not None:
            out.setdefault(row["method"], []).append(row)
    return {name: sorted(rows, key=lambda r: r[run.axis.key]) for name, rows in out.items()}


def style(names: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, dash ("solid", "dash", "dot", "dashdot") and marker of each line; baselines are grey."""
    out: dict[str, tuple[str, str, str]] = {}
    place = 0
    for name in sorted(set(names) - {UNREDUCED}):
        if is_baseline(name):
            base, _, stage = name.partition("@")
            out[name] = (*GREYS[base], BASELINE_MARKERS.get(stage, "x"))
        else:
            out[name] = (COLOURS[place % len(COLOURS)], "solid", MARKERS[place // len(COLOURS) % len(MARKERS)])
            place += 1
    return out


def error_of(row: dict[str, Any], metric: str) -> float:
    """The standard error of a row's metric, 0 where none is known."""
    return float(row.get(f"{metric}_stderr") or 0.0)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near ``wanted`` (any order) that lie at least ``gap`` apart inside [low, high], for labels.

    Where they do not all fit, the gap shrinks.
    """
    if not wanted:
        return []
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    blocks: list[list[float]] = []  # [sum of wanted minus offsets, members]
    for i in order:
        blocks.append([wanted[i], 1])
        # Labels that collide move together around the mean of where they want to be.
        while len(blocks) > 1 and _centre(blocks[-2], gap, low, high)[1] + gap > _centre(blocks[-1], gap, low, high)[0]:
            total, members = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += members
    out = [0.0] * len(wanted)
    place = iter(order)
    for block in blocks:
        first, _ = _centre(block, gap, low, high)
        for j in range(int(block[1])):
            out[next(place)] = first + j * gap
    return out


def _centre(block: list[float], gap: float, low: float, high: float) -> tuple[float, float]:
    total, members = block
    span = (members - 1) * gap
    first = min(max(total / members - span / 2, low), high - span)
    return first, first + span


def pareto(runs: Sequence[Run], path: str | Path) -> Path:
    """Draw one panel per run to a PNG. Raises ``ImportError`` without matplotlib, ``ValueError`` without rows."""
    need("matplotlib", "the Pareto picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(run, curves(run)) for run in runs]
    panels = [(run, lines) for run, lines in panels if lines]
    if not panels:
        raise ValueError("there is no measured row to draw yet; run `tokenreduce bench` first")
    figure = Figure(figsize=(7.4 * len(panels), 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    styles = style(name for _, lines in panels for name in lines)
    for i, (run, lines) in enumerate(panels):
        _panel(figure.add_subplot(1, len(panels), i + 1), run, lines, styles)
    with writing(path, OTHER_OUT) as partial:
        figure.savefig(partial)
    return Path(path)


def _panel(axes: Any, run: Run, lines: dict[str, list[dict[str, Any]]], styles: dict[str, Any]) -> None:
    from matplotlib.patheffects import withStroke

    cost = run.axis.key
    dashes = {"solid": "-", "dash": (0, (5, 3)), "dot": (0, (1, 1.6)), "dashdot": (0, (5, 2, 1, 2))}
    by = 100.0 if percent(run.metric) else 1.0
    top = lines[UNREDUCED][0] if UNREDUCED in lines else None
    ends: list[tuple[str, float, float, str]] = []
    for name, rows in lines.items():
        if name == UNREDUCED:
            continue
        colour, dash, marker = styles[name]
        swept = [r for r in rows if r["id"] != r["spec"]]
        xs, ys = [100 * r[cost] for r in swept], [by * r[run.metric] for r in swept]
        if top is not None and swept:
            xs, ys = [*xs, 100.0], [*ys, by * top[run.metric]]
        grey = is_baseline(name)
        axes.plot(xs, ys, color=colour, linestyle=dashes[dash], linewidth=1.4 if grey else 1.8, zorder=2 if grey else 3,
                  marker=marker, markersize=5.5, markevery=list(range(len(swept))))  # fmt: skip
        axes.errorbar(xs[: len(swept)], ys[: len(swept)], [by * error_of(r, run.metric) for r in swept], fmt="none",
                      ecolor=colour, elinewidth=1, capsize=2, alpha=0.7, zorder=2)  # fmt: skip
        single = [r for r in rows if r["id"] == r["spec"]]
        axes.plot([100 * r[cost] for r in single], [by * r[run.metric] for r in single], color=colour, marker="P",
                  linestyle="none", markersize=7, zorder=4)  # fmt: skip
        for row in single:
            axes.annotate(label(row), (100 * row[cost], by * row[run.metric]), xytext=(6, -9),
                          textcoords="offset points", fontsize=FONT - 2, color=colour, zorder=6,
                          path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip
        if swept:
            ends.append((name, xs[0], ys[0], colour))
    if top is not None:
        value = by * top[run.metric]
        axes.axhline(value, color="#202020", linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
        axes.plot([100 * top[cost]], [value], marker="*", markersize=13, color="#202020", linestyle="none", zorder=5)
        axes.annotate(f"unreduced {value:.1f}{' %' if by == 100 else ''}", (100 * top[cost], value), xytext=(2, 8),
                      textcoords="offset points", ha="right", fontsize=FONT - 1, color="#202020")  # fmt: skip
    values = [by * r[run.metric] for rows in lines.values() for r in rows]
    _scale(axes, values, 100.0 if by == 100 else max(values))
    _label(axes, ends)
    settings = run.info.get("settings", {})
    what = " on ".join(str(settings[k]) for k in ("model", "data") if settings.get(k)) or run.folder.name
    axes.set_title("\n".join([*textwrap.wrap(finding(run), 66), what]), fontsize=FONT, loc="left")
    axes.set_xlabel(run.axis.title, fontsize=FONT)
    axes.set_ylabel(metric_label(run.metric) + (", %" if by == 100 else ""), fontsize=FONT)
    axes.annotate("better", (0.84, 0.2), (0.93, 0.09), xycoords="axes fraction", textcoords="axes fraction",
                  fontsize=FONT, color="#404040", ha="center", va="center",
                  arrowprops={"arrowstyle": "->", "color": "#404040"})  # fmt: skip
    axes.tick_params(labelsize=FONT - 1)
    axes.grid(True, color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _scale(axes: Any, values: Sequence[float], top: float) -> None:
    """A linear axis from the lowest value to ``top``."""
    low, top = min(values), max(top, max(values))
    room = max(top - low, 1e-6)
    axes.set_ylim(low - 0.05 * room, top + 0.07 * room)


def _label(axes: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Names at the left, each joined to the cheapest point of its line; in axes fractions, so that any scale works."""
    if not ends:
        return
    left = min(x for _, x, _, _ in ends)
    room = 0.22 * (100 - left + 1)
    names = max(0.8, 0.085 * max(len(name) for name, *_ in ends))  # full names need more than short ones
    axes.set_xlim(left - (0.45 + names) * room, 100 + 0.15 * room)
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((x, y))[1]) for _, x, y, _ in ends]
    for (name, x, y, colour), place in zip(ends, spread(heights, 0.046, 0.02, 0.98), strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(left - 0.45 * room, place),
            textcoords=axes.get_xaxis_transform(),
            ha="right",
            va="center",
            fontsize=FONT - 1,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3},
        )
