"""Plots to point at (plotly): tokens and FLOPs layer by layer, without and with a reduction."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenreduce.measure.image import ImageComparison

__all__ = ["CLEAR", "image_layers_plot", "visual_layers_plot"]

STOCK, COLOURS = "#8a8a8a", ("#0072b2", "#d55e00", "#009e73", "#cc79a7")

#: Layout of a figure that shows the page behind it, light or dark.
CLEAR = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
#: Layers that are numbered one by one; of more, every second, third ... is.
MOST_NUMBERS = 12


def _graph() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError("the plot needs plotly: pip install 'tokenreduce[demo]'") from error
    return go


def image_layers_plot(comparison: ImageComparison, *, height: int = 460) -> Any:
    """Tokens behind every layer and, below, FLOPs in it as a plotly figure, unreduced (grey) and reduced.

    One panel below the other: side by side, their titles run into each other on a narrow page. Raises ``ImportError``
    without plotly.
    """
    go = _graph()
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2, cols=1, vertical_spacing=0.24, subplot_titles=("tokens after each layer", "MFLOPs of each layer")
    )
    sides = ("unreduced", comparison.stock, STOCK), ("reduced", comparison.reduced, COLOURS[0])
    for name, side, colour in sides:
        layers = list(range(1, len(side.tokens) + 1))
        figure.add_trace(
            go.Bar(x=layers, y=list(side.tokens), name=name, marker_color=colour, legendgroup=name,
                   hovertemplate="layer %{x}: %{y} tokens"), 1, 1,
        )  # fmt: skip
        figure.add_trace(
            go.Bar(x=layers, y=[f / 1e6 for f in side.layer_flops], name=name, marker_color=colour, legendgroup=name,
                   showlegend=False, hovertemplate="layer %{x}: %{y:.2f} MFLOPs"), 2, 1,
        )  # fmt: skip
    return _dressed(figure, height, "layer", len(comparison.stock.tokens))


def visual_layers_plot(sides: Mapping[str, Sequence[int]], *, height: int = 300) -> Any:
    """Visual tokens in every layer of a language model as a plotly figure; ``sides`` are names with their counts, the
    first one grey, shown as they are. Raises ``ImportError`` without plotly."""
    go = _graph()
    figure = go.Figure()
    for i, (name, counts) in enumerate(sides.items()):
        figure.add_trace(
            go.Bar(x=list(range(1, len(counts) + 1)), y=list(counts), name=html.escape(name),
                   hovertemplate="layer %{x}: %{y}", marker_color=STOCK if i == 0 else COLOURS[(i - 1) % len(COLOURS)])
        )  # fmt: skip
    figure.update_yaxes(title_text="visual tokens")
    return _dressed(figure, height, "layer of the language model", max(map(len, sides.values()), default=0))


def _dressed(figure: Any, height: int, below: str, layers: int) -> Any:
    figure.update_xaxes(title_text=below, dtick=max(1, -(-layers // MOST_NUMBERS)), tick0=1)
    figure.update_layout(
        template="plotly_white", height=height, margin={"l": 45, "r": 10, "t": 80, "b": 45}, barmode="group",
        **CLEAR,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.12, "x": 0}, font={"size": 12},
        modebar={"remove": ["zoom", "pan", "select", "lasso2d", "zoomIn", "zoomOut", "autoScale", "resetScale"]},
    )  # fmt: skip
    return figure
