"""The Pareto picture: what a method costs (a share of FLOPs or visual tokens) against what it keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenreduce.bench.methods import UNREDUCED, is_baseline
from tokenreduce.bench.names import label
from tokenreduce.bench.runs import OTHER_OUT, Run
from tokenreduce.common.files import writing

__all__ = ["COLOURS", "curves", "metric_label", "pareto", "percent", "style"]

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
METRICS = {"top1": "top-1 accuracy", "top5": "top-5 accuracy"}


def metric_label(key: str) -> str:
    """How pictures and tables call a metric."""
    return METRICS.get(key, key.replace("_", " "))


def percent(key: str) -> bool:
    """Whether a metric is a fraction that is printed in percent (all of ours but raw scores named so)."""
    return not key.endswith("_score")


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
    figure = Figure(figsize=(8.6 * len(panels), 5.6), dpi=150, layout="constrained")
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
        axes.plot(xs, ys, color=colour, linestyle=dashes[dash], linewidth=1.4 if grey else 1.6, zorder=2 if grey else 3,
                  marker=marker, markersize=4.5, markevery=list(range(len(swept))))  # fmt: skip
        single = [r for r in rows if r["id"] == r["spec"]]
        axes.plot([100 * r[cost] for r in single], [by * r[run.metric] for r in single], color=colour, marker="P",
                  linestyle="none", markersize=7, zorder=4)  # fmt: skip
        for row in single:
            axes.annotate(label(row), (100 * row[cost], by * row[run.metric]), xytext=(6, -9),
                          textcoords="offset points", fontsize=7, color=colour, zorder=6,
                          path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip
        if swept:
            ends.append((name, xs[0], ys[0], colour))
    if top is not None:
        value = by * top[run.metric]
        axes.axhline(value, color="#202020", linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
        axes.plot([100 * top[cost]], [value], marker="*", markersize=13, color="#202020", linestyle="none", zorder=5)
        axes.annotate(f"unreduced {value:.1f}{' %' if by == 100 else ''}", (100 * top[cost], value), xytext=(2, 8),
                      textcoords="offset points", ha="right", fontsize=8, color="#202020")  # fmt: skip
    values = [by * r[run.metric] for rows in lines.values() for r in rows]
    compressed = _scale(axes, values, None if top is None else by * top[run.metric])
    _label(axes, ends)
    settings = run.info.get("settings", {})
    axes.set_title(" · ".join(str(settings[k]) for k in ("model", "data") if settings.get(k)) or run.folder.name,
                   fontsize=10, loc="left")  # fmt: skip
    axes.set_xlabel(f"{run.axis.title} (cheaper to the left)", fontsize=9)
    unit = ", %" if by == 100 else ""
    axes.set_ylabel(metric_label(run.metric) + unit + (" (log scale of the drop)" if compressed else ""), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _scale(axes: Any, values: Sequence[float], top: float | None) -> bool:
    """Set the limits. Where one bad method would flatten all others, the axis becomes log(1 + drop); True then."""
    low, high = min(values), max(values)
    if top is None or high - low <= 30:
        room = max(high - low, 1e-6)
        axes.set_ylim(low - 0.06 * room, high + 0.1 * room)
        return False

    def forward(y: Any) -> Any:
        return np.sign(y - top) * np.log1p(np.abs(y - top))

    def inverse(z: Any) -> Any:
        return top + np.sign(z) * np.expm1(np.abs(z))

    axes.set_yscale("function", functions=(forward, inverse))
    ends = forward(np.array([low, high]))
    room = ends[1] - ends[0]
    bottom, ceiling = (float(v) for v in inverse(ends + room * np.array([-0.05, 0.1])))
    axes.set_ylim(bottom, ceiling)
    ticks: list[int] = []
    for step in (20, 10, 5, 2, 1):
        for tick in range(-(-int(low) // step) * step, int(high) + 1, step):
            if all(abs(forward(tick) - forward(t)) > 0.055 * room for t in ticks):
                ticks.append(tick)
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.set_yticks([], minor=True)
    return True


def _label(axes: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Names at the left, each joined to the cheapest point of its line; in axes fractions, so that any scale works."""
    if not ends:
        return
    left = min(x for _, x, _, _ in ends)
    room = 0.17 * (100 - left + 1)
    names = max(0.8, 0.062 * max(len(name) for name, *_ in ends))  # full names need more than short ones
    axes.set_xlim(left - (0.45 + names) * room, 100 + 0.15 * room)
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((x, y))[1]) for _, x, y, _ in ends]
    for (name, x, y, colour), place in zip(ends, spread(heights, 0.037, 0.02, 0.98), strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(left - 0.45 * room, place),
            textcoords=axes.get_xaxis_transform(),
            ha="right",
            va="center",
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3},
        )
