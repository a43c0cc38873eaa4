from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import typer
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce.bench.performance import fixed
from tokenreduce.bench.performance.fixed import TINY, generate, measure, methods
from tokenreduce.bench.performance.language_operators import count as counted
from tokenreduce.bench.performance.prefills import shell
from tokenreduce.bench.performance.shapes import build, prompt
from tokenreduce.measure.operators import entered

pytest.importorskip("transformers")


@pytest.mark.parametrize("stage", ["projector", "language", "cache"])
@torch.no_grad()
def test_the_empty_method_lets_the_last_visual_token_go_and_nothing_else(stage):
    model, given = build(TINY), prompt(TINY)
    tr.patch(model, methods(TINY.visual)[stage])
    out = model(**given, use_cache=True)
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    whole = TINY.visual + TINY.text
    assert lengths == ([whole, whole] if stage == "language" else [whole - 1] * 2) + [whole - 1] * 2
    if stage != "cache":
        columns, _ = tr.kept_columns(out)
        last = TINY.text // 2 + TINY.visual - 1
        assert [c for c in range(whole) if c not in columns.flatten().tolist()] == [last]


def test_rows_are_differences_to_the_stock_model():
    rows, (first, _) = measure(TINY, rounds=1, tokens=3)
    assert [row.stage for row in rows] == ["projector", "language", "cache"]
    assert first > 0
    for row in rows:
        assert row.first[1] <= row.first[0] <= row.first[2]
        assert row.operators[0] > 0
        assert min(row.functions) > 0


def test_the_command(tmp_path):
    app = typer.Typer()
    app.command()(fixed.main)
    page = tmp_path / "page.md"
    made = CliRunner().invoke(app, ["--quick", "--rounds", "1", "--tokens", "2", "--markdown", str(page)])
    assert made.exit_code == 0, made.output
    assert "| cache |" in page.read_text()
    made = CliRunner().invoke(app, ["--quick", "--profile", "language", "--tokens", "2"])
    assert "tokenreduce.adapters.language.site:run_before" in made.output
    assert CliRunner().invoke(app, ["--quick", "--profile", "tower"]).exit_code == 2


def test_a_generation_is_as_long_as_asked():
    model, given = build(TINY), prompt(TINY)
    assert generate(model, given, 3).shape[1] == given["input_ids"].shape[1] + 3


def entered_for_a_layer(stage, given):
    """Functions of this package that a decode step enters for one layer more, and the names of all."""
    width, layers, heads, mlp = TINY.llm
    found, names = [], set()
    for more in (0, 4):
        model = build(replace(TINY, llm=(width, layers + more, heads, mlp)))
        tr.patch(model, methods(TINY.visual)[stage])
        short, long = (entered(partial(generate, model, given, n)) for n in (2, 3))
        found.append(long.total() - short.total())
        names |= {name.rpartition(":")[2] for name in long}
    return (found[1] - found[0]) / 4, names


@pytest.mark.parametrize("stage", ["projector", "language", "cache"])
@torch.no_grad()
def test_a_layer_is_asked_and_left_alone_where_a_new_token_sees_all_that_is_held(stage):
    count, names = entered_for_a_layer(stage, prompt(TINY))
    assert count <= 6
    assert not names & {"decode_mask", "held_mask"}


@pytest.mark.parametrize("stage", ["projector", "language", "cache"])
@torch.no_grad()
def test_layers_of_a_padded_batch_share_their_mask(stage):
    given = prompt(TINY)
    ids, pixels = given["input_ids"].repeat(2, 1), given["pixel_values"].repeat(2, 1, 1, 1)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    count, names = entered_for_a_layer(stage, {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask})
    assert count <= (80 if stage == "cache" else 20)  # heads of a layer hold other keys than those of the next
    assert names & {"decode_mask", "held_mask"}


def test_a_prompt_tells_what_its_layers_share_once() -> None:
    """Which slots are there and which are visual is worked out for the first layer, and found again in the others."""
    count = {}
    for layers in (2, 4):
        shape = replace(TINY, llm=(TINY.llm[0], layers, *TINY.llm[2:]))
        stock, given = build(shape), prompt(shape)
        model = tr.patch(shell(stock), methods(shape.visual)["cache"])
        count[layers] = counted(model, given).prefill - counted(stock, given).prefill
    assert (count[4] - count[2]) / 2 <= 44
