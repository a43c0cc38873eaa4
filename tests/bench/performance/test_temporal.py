"""What temporal methods cost: the measurement on small sizes."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce.bench.performance import temporal as cost
from tokenreduce.core.registry import get_class


def test_every_temporal_method_before_the_language_model_is_measured():
    names = cost.methods()
    temporal = {n for n in tr.list_methods(stage="projector") if get_class(n, "projector").temporal}
    assert {"evs", "holitom", "fastvid", "dycoke"} <= set(names) <= temporal
    assert cost.methods(["holitom", "evs"]) == ["evs", "holitom"]
    with pytest.raises(ValueError, match="no temporal method divprune; there are"):
        cost.methods(["divprune"])


def test_the_video_is_one_that_methods_take():
    seen = cost.evidence(3, 16)
    assert (seen.n, seen.frames, seen.shape) == (3 * 196, 3, (14, 14))
    frames = torch.nn.functional.normalize(seen.x[0].reshape(3, 196, 16), dim=-1)
    assert float((frames[1:] * frames[:-1]).sum(-1).mean()) == pytest.approx(cost.ALIKE, abs=0.05)
    assert seen.blocks[0].keys.shape[:3] == (3, cost.HEADS, 196)


def test_rows_have_times_of_all_sizes_or_an_error():
    rows = {r.method: r for r in cost.measure(["evs", "uniform-frames"], (400, 1000), 0.25, 16, 1)}
    assert set(rows["evs"].seconds) == {2 * 196, 5 * 196}
    assert rows["evs"].kept == round(0.25 * 5 * 196)
    bad = cost.measure(["evs"], (400,), keep=7.5, width=16, rounds=1)[0]
    assert bad.error.startswith("ValueError")
    assert bad.seconds == {}


def test_exponents_are_of_the_larger_half():
    assert cost.exponent({1_000: 5.0, 10_000: 1.0, 100_000: 100.0}) == pytest.approx(2.0)
    assert cost.exponent({1_000: 1.0, 2_000: 2.0}) == pytest.approx(1.0)
    assert cost.exponent({10: 1.0}) is None


def test_shares_of_what_a_prefill_saves():
    rows = [cost.Row("a", {1000: 0.01, 2000: 0.03}, 500), cost.Row("b", {}, error="ValueError: no")]
    text = cost.markdown("temporal", rows, 2000, 1.0, "here", "command")
    assert "| a | 10 ms | 30 ms | 1.58 | 3.00% (above 2 %) |" in text
    assert "| b | ValueError: no |" in text
    assert cost.Prefill((3.0, 5.0, 4.0), (1.0, 1.0, 1.0)).saved == 3.0
    with pytest.raises(ValueError, match="no faster"):
        _ = cost.Prefill((1.0,), (2.0,)).saved


def test_the_command_prints_a_table(tmp_path):
    pytest.importorskip("transformers")
    import typer

    app = typer.Typer()
    app.command()(cost.main)
    page = tmp_path / "page.md"
    words = ["--methods", "evs", "--tokens", "400,800", "--prefill", "0", "--rounds", "1", "--shape", "tiny"]
    result = CliRunner().invoke(app, [*words, "--markdown", str(page)])
    assert result.exit_code == 0, result.output
    assert "| method | 392 tokens | 784 tokens | time ~ tokens^ |" in page.read_text()
    assert CliRunner().invoke(app, [*words[:4], "--prefill", "5"]).exit_code == 2
    timed = cost.prefills(cost.SIZES["tiny"], 64, 0.25, rounds=2)
    assert len(timed.long) == len(timed.short) == 2
