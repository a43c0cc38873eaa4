"""Plots of a page: they follow its background, and show names as they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("plotly")

from tokenreduce.measure.plots import image_layers_plot, visual_layers_plot


def comparison(layers: int):
    side = SimpleNamespace(tokens=tuple(range(layers, 0, -1)), layer_flops=tuple([2_000_000] * layers))
    return SimpleNamespace(stock=side, reduced=side)


def figures(layers: int = 6):
    return image_layers_plot(comparison(layers)), visual_layers_plot({"unreduced": [4] * layers, "A": [2] * layers})


def test_plots_show_the_page_behind_them() -> None:
    for figure in figures():
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"


def test_panels_stand_below_each_other() -> None:
    figure, _ = figures()
    assert figure.layout.xaxis.domain == figure.layout.xaxis2.domain == (0.0, 1.0)
    above, below = figure.layout.yaxis.domain, figure.layout.yaxis2.domain
    assert below[1] < above[0]
    assert [list(trace.x) for trace in figure.data] == [[1, 2, 3, 4, 5, 6]] * 4


def test_names_are_literal() -> None:
    figure = visual_layers_plot({"unreduced": [4, 4], "A: <b>x</b>": [4, 2]})
    assert figure.data[1].name == "A: &lt;b&gt;x&lt;/b&gt;"


@pytest.mark.parametrize(("layers", "every"), [(6, 1), (12, 1), (24, 2), (40, 4)])
def test_many_layers_are_not_all_numbered(layers: int, every: int) -> None:
    for figure in figures(layers):
        assert figure.layout.xaxis.dtick == every
