from __future__ import annotations

import pytest
import torch
import typer
from support import images, tiny_vit
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce.bench.performance import compiled, encoders
from tokenreduce.bench.performance.cut import PublishedToMe, Sliced
from tokenreduce.bench.performance.encoders import COLUMNS, GROUPS, Group, cells, measure
from tokenreduce.common.pinned import Others

TINY = Group(
    "vit_tiny_patch16_224", 2, ("tome:r=2", "repshift:ratio=0.7", "tome:r=0"), (("img_size", 32), ("depth", 2))
)


def test_the_groups_are_those_that_the_page_promises():
    assert {(g.model, g.batch) for g in GROUPS} == {
        (model, batch)
        for model in ("vit_base_patch16_224", "deit_small_patch16_224", "vit_small_patch14_dinov2")
        for batch in (1, 8)
    }
    assert all(tr.get_method(m) for g in GROUPS for m in g.methods)


@torch.no_grad()
def test_the_published_way_gives_what_the_library_gives():
    model, x = tiny_vit(), images()
    want = PublishedToMe(model, 4)(x)
    torch.testing.assert_close(tr.patch(model, "tome:r=4")(x), want, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_sliced_blocks_see_as_many_tokens():
    model, x, seen = tiny_vit(), images(), []
    assert torch.equal(Sliced(model, [37] * 6)(x), model(x))
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    counts = [30, 30, 20, 12, 5, 2]
    Sliced(model, counts)(x)
    assert seen == counts
    seen.clear()
    Sliced(model, counts, "after")(x)
    assert seen == [37, *counts[:-1]]
    with pytest.raises(ValueError, match="6 counts"):
        Sliced(model, [3])
    with pytest.raises(ValueError, match="VisionTransformer"):
        Sliced(tr.patch(model, "tome:r=1"), counts)


def test_a_row_has_all_sides():
    rows = measure(TINY, rounds=2)
    assert [row.method for row in rows] == list(TINY.methods)
    tome, shift, whole = rows
    assert max(tome.left, shift.left) < whole.left == 5
    for row in rows:
        assert row.speedup.rounds == row.share.rounds == 2
        assert min(row.speedup.ratio, row.possible.ratio, row.share.ratio, row.memory) > 0
        assert len(cells(row)) == len(COLUMNS)
    assert tome.published is not None
    assert shift.published is whole.published is None
    assert whole.possible.ratio == 1
    assert tome.flops > 1 == whole.flops


@pytest.mark.parametrize(("module", "name"), [(encoders, "encoders"), (compiled, "encoders-compiled")])
def test_the_command_writes_its_section(module, name, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "QUICK", (TINY,))
    app = typer.Typer()
    app.command()(module.main)
    page = tmp_path / "page.md"
    args = ["--quick", "--rounds", "1", "--markdown", str(page)]
    made = CliRunner().invoke(app, args + (["--backend", "eager"] if module is compiled else []))
    assert made.exit_code == 0, made.output
    text = page.read_text()
    assert text.startswith(f"<!-- vlm-performance {name}: begin -->")
    assert "`tome:r=2`" in text
    torch.compiler.reset()


def test_bad_options_are_named():
    app = typer.Typer()
    app.command()(encoders.main)
    for args, said in ((["--dtype", "int8"], "fp32"), (["--only", "nothing"], "no model, batch and method")):
        made = CliRunner().invoke(app, args)
        assert made.exit_code == 2
        assert said in made.output


def test_a_busy_machine_is_refused(monkeypatch):
    monkeypatch.setattr(Others, "cores", lambda self: 1.5)
    with pytest.raises(typer.BadParameter, match=r"1\.50 cores"):
        encoders.refuse_busy(0.0)
    monkeypatch.setattr(Others, "cores", lambda self: None)
    encoders.refuse_busy(0.0)


@pytest.mark.parametrize("blocks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_row_counts_graphs(blocks):
    row = compiled.measure(compiled.QUICK[blocks], rounds=1, backend="eager")
    assert row.case.blocks is blocks
    assert (row.stock.graphs, row.patched.graphs) == (1, 1)
    assert row.patched.more == row.stock.more
    assert len(compiled.cells(row)) == len(compiled.COLUMNS)
    torch.compiler.reset()
