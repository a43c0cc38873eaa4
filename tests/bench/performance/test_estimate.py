from __future__ import annotations

import pytest
from typer.testing import CliRunner

from tokenreduce.bench.performance import estimate as bench
from tokenreduce.bench.performance.estimate import SETTINGS, Case, Row, cells, measure, summary
from tokenreduce.bench.performance.shapes import PACKED, SHAPES, Shape
from tokenreduce.estimation.measured import Curve, Measured
from tokenreduce.measure.timing import Speedup

pytest.importorskip("timm")
pytest.importorskip("transformers")

TINY = Case("timm:vit_tiny_patch16_224?img_size=32&depth=2", ("tome:r=1",), 2)


@pytest.fixture(scope="module")
def device():
    flat = Curve((1.0, 2.0), (1e9, 1e9))
    streams = {"plain": flat}
    return Measured("measured", "fp32", 1, "2", ((1.0, flat), (2.0, flat)), flat, 1e9, streams, 1e-5, 1e9)


def test_settings_are_those_that_the_page_promises():
    usual = [(c.name, c.batch, s) for c in SETTINGS if c.cost < 2 for s in c.reduce]
    assert len(usual) >= 20
    assert len({(c.name, c.batch, c.image, s) for c in SETTINGS for s in c.reduce}) == sum(
        len(c.reduce) for c in SETTINGS
    )
    assert {c.batch for c in SETTINGS} == {1, 8}


def test_a_row_has_both_sides(device, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"small": SHAPES["tiny"]})
    cases = [TINY, Case("llava", ("divprune:keep=0.5",), 2)]
    rows = list(measure(cases, device, 1))
    assert [(r.case, r.reduce) for r in rows] == [(c, c.reduce[0]) for c in cases]
    for row in rows:
        assert min(row.stock) > 0
        assert row.estimated > 0
        assert row.error == pytest.approx(row.estimated / row.measured.ratio - 1)
        assert len(cells(row)) == len(bench.HEAD)


def test_the_packed_shape_is_asked(device, monkeypatch):
    assert PACKED.tower[1] >= 4  # blocks that see the whole image are among them
    monkeypatch.setattr(bench, "PACKED", Shape((32, 4, 2, 64), (64, 4, 4, 128), vocabulary=512))
    (row,) = measure([Case("qwen2.5-vl", ("divprune:keep=0.5",), 1, (56, 56))], device, 1)
    assert row.measured.ratio > 0


def test_a_summary_names_the_worst():
    rows = [Row(TINY, s, (1.0, 1.0), e, Speedup(2.0, 1.9, 2.1, 3)) for s, e in (("a", 2.1), ("b", 1.5), ("c", 2.0))]
    assert summary(rows) == (
        "3 settings: the estimated speed-up is off by 5.0 % in the median, at worst by -25 % "
        "(vit_tiny_patch16_224?img_size=32&depth=2, batch 2, `b`)."
    )


def test_the_command_writes_its_section(tmp_path, monkeypatch, device):
    import typer

    monkeypatch.setattr(bench, "SETTINGS", (TINY,))
    monkeypatch.setattr(bench, "calibrate", lambda *_: device)
    app = typer.Typer()
    app.command()(bench.main)
    page = tmp_path / "page.md"
    made = CliRunner().invoke(app, ["--rounds", "1", "--seconds", "1", "--markdown", str(page)])
    assert made.exit_code == 0, made.output
    assert "1 setting: the estimated speed-up" in page.read_text()
    assert page.read_text().startswith("<!-- vlm-performance estimate: begin -->")
