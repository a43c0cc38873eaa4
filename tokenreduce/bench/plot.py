"""The trade as a plot to point at (plotly): what a method costs against what it keeps."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tokenreduce.bench.columns import cell, columns, label
from tokenreduce.bench.methods import UNREDUCED, is_baseline
from tokenreduce.bench.names import metric_label, percent
from tokenreduce.bench.picture import curves, error_of, need, style
from tokenreduce.bench.runs import Run
from tokenreduce.measure.plots import CLEAR

__all__ = ["front", "trade_axes", "trade_plot"]

SYMBOLS = {
    "o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "x": "x", "+": "cross",
    "1": "y-down-open",
}  # fmt: skip


class _Axis(NamedTuple):
    title: str
    value: Callable[[dict[str, Any]], float | None]
    cheaper_left: bool = True


def _scaled(key: str, scale: float) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: None if row.get(key) is None else scale * row[key]


def _clock(row: dict[str, Any]) -> float | None:
    return 100 / row["speedup"] if row.get("speedup") else None


def trade_axes(run: Run) -> dict[str, str]:
    """The names of the axes that :func:`trade_plot` has rows for, with their titles.

    ``cost`` is what the budgets of the run are shares of, ``flops`` a share of the unreduced FLOPs, ``tokens`` their
    mean over the layers, ``clock`` the measured time as a share of the stock model's in the same rounds, ``speedup``
    its inverse.
    """
    rows = [row for rows in curves(run).values() for row in rows]
    known = {name: axis for name, axis in _axes(run).items() if any(axis.value(row) is not None for row in rows)}
    return {name: axis.title for name, axis in known.items()}


def _axes(run: Run) -> dict[str, _Axis]:
    visual = "mean_visual_tokens" if any("mean_visual_tokens" in row for row in run.good) else "mean_tokens"
    what = "visual tokens, mean over the language model's layers" if "visual" in visual else "tokens, mean over layers"
    return {
        "cost": _Axis(run.axis.title, _scaled(run.axis.key, 100)),
        "flops": _Axis("FLOPs, % of the unreduced model", _scaled("share", 100)),
        "tokens": _Axis(what, _scaled(visual, 1)),
        "clock": _Axis("measured time, % of the stock model in the same rounds", _clock),
        "speedup": _Axis("speed-up by clock against the stock model", _scaled("speedup", 1), False),
    }


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of ``points`` (cost, gain) that no other beats in both, by cost: the Pareto front.

    >>> front([(1, 5), (2, 4), (3, 9), (3, 8)])
    [(1, 5), (3, 9)]
    """
    out: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda p: (p[0], -p[1])):
        if not out or gain > out[-1][1]:
            out.append((cost, gain))
    return out


def trade_plot(run: Run, against: str = "cost", *, height: int = 520, below: bool = False) -> Any:
    """A plotly figure of a run: a line per method against one of :func:`trade_axes`, settings and results on hover.

    Baselines are grey, the unreduced model is a star, and a thin line joins the points that no other one beats.
    ``below`` puts the legend there, for narrow pages. Raises ``ImportError`` without plotly and ``ValueError`` for
    another axis.
    """
    need("plotly", "the plot")
    import plotly.graph_objects as go

    axes = _axes(run)
    if against not in axes:
        raise ValueError(f"against is one of {', '.join(axes)}, not {against!r}")
    axis = axes[against]
    by = 100.0 if percent(run.metric) else 1.0
    lines = curves(run)
    styles = style(lines)
    shown = columns([run])
    figure = go.Figure()
    points: list[tuple[float, float]] = []
    for name in sorted(lines, key=lambda n: (n != UNREDUCED, is_baseline(n), n)):
        rows = [r for r in lines[name] if axis.value(r) is not None]
        rows.sort(key=axis.value)  # type: ignore[arg-type]
        colour, dash, marker = styles.get(name, ("#202020", "solid", "star"))
        hover = [
            "<br>".join([f"<b>{_e(label(r))}</b>", *(f"{c.label}: {_e(cell(r, c, run.axis))}" for c in shown)])
            for r in rows
        ]
        xs = [x for r in rows if (x := axis.value(r)) is not None]
        ys = [by * r[run.metric] for r in rows]
        points += zip(xs, ys, strict=True)
        figure.add_trace(
            go.Scatter(
                x=xs,
                y=ys,
                name=_e(name),
                mode="markers" if name == UNREDUCED else "lines+markers",
                line={"color": colour, "dash": dash, "width": 2},
                marker={"symbol": SYMBOLS.get(marker, "star"), "size": 14 if name == UNREDUCED else 8, "color": colour},
                error_y={
                    "array": [by * error_of(r, run.metric) for r in rows],
                    "color": colour,
                    "thickness": 1,
                    "width": 3,
                },
                hovertext=hover,
                customdata=[r["id"] for r in rows],  # which row a click means
                hoverinfo="text",
            )
        )
    if axis.cheaper_left and len(best := front(points)) > 1:
        figure.add_trace(
            go.Scatter(
                x=[x for x, _ in best], y=[y for _, y in best], name="Pareto front", mode="lines", hoverinfo="skip",
                line={"color": "rgba(0,0,0,0.35)", "width": 1, "shape": "hv"},
            )
        )  # fmt: skip
    if axis.cheaper_left and points:
        figure.add_annotation(
            text="better", showarrow=True, xref="paper", yref="paper", x=0.01, y=0.99, ax=46, ay=30, arrowhead=2,
            arrowcolor="#808080", font={"color": "#808080"},
        )  # fmt: skip
    figure.update_layout(
        template="plotly_white", height=height, margin={"l": 60, "r": 20, "t": 30, "b": 55}, xaxis_title=_e(axis.title),
        yaxis_title=_e(metric_label(run.metric)) + (", %" if by == 100 else ""), **CLEAR,
    )  # fmt: skip
    if below:
        figure.update_layout(legend={"orientation": "h", "yanchor": "top", "y": -0.18, "x": 0})
    return figure


def _e(value: Any) -> str:
    return html.escape(str(value))
