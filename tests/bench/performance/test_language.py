from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

import tokenreduce as tr
from tokenreduce.bench.performance import own_work, prefills
from tokenreduce.bench.performance.language import cells, markdown
from tokenreduce.bench.performance.prefills import Settings, measure, methods_of, shell
from tokenreduce.bench.performance.sections import command_of, splice
from tokenreduce.bench.performance.shapes import SHAPES, Shape, build, prompt
from tokenreduce.core.evidence import Evidence
from tokenreduce.core.plan import Prune

pytest.importorskip("transformers")

#: 36 visual tokens and 8 of text; 4 layers of width 32 with 4 heads.
TINY = Shape((16, 3, 2, 32), (32, 4, 4, 48), side=6, text=8, vocabulary=200, budgets=(12, 5))
NEXT = Shape(
    (16, 3, 2, 32), (32, 2, 4, 48), side=4, text=8, vocabulary=200, pinpoints=((56, 112), (112, 56), (112, 112)),
    pixels=(112, 112),
)  # fmt: skip
ONCE = Settings(rounds=1, warmup=0, decode=2)
LAYERS, WIDTH = 4, 32


def flops(tokens_per_layer: list[int]) -> int:
    """The language model's layers alone: four projections, a gated MLP of 48, and attention."""
    return sum(2 * n * (4 * WIDTH * WIDTH + 3 * WIDTH * 48) + 2 * 2 * n * n * WIDTH for n in tokens_per_layer)


@pytest.fixture(scope="module")
def rows():
    return measure(TINY, ["divprune", "fastv", "pyramiddrop"], settings=ONCE)


def test_token_counts_flops_and_cache_are_what_the_budget_says(rows):
    assert [(r.method, r.stage, r.keep) for r in rows] == [
        ("stock", "", None),
        ("divprune", "projector", 12),
        ("divprune", "projector", 5),
        ("fastv", "language", 12),
        ("fastv", "language", 5),
        ("pyramiddrop", "language", 12),
        ("pyramiddrop", "language", 5),
    ]
    assert not any(r.error for r in rows)
    want = [(36,) * 4, (12,) * 4, (5,) * 4, (36, 36, 12, 12), (36, 36, 5, 5), None, None]
    stock = rows[0].cost
    for row, visual in zip(rows, want, strict=True):
        cost = row.cost
        if visual is not None:
            assert cost.visual == visual
        assert cost.visual[-1] == (row.keep or 36)
        lengths = [n + 8 for n in cost.visual]
        assert cost.mean == sum(cost.visual) / LAYERS
        assert cost.kv == sum(lengths) * 2 * WIDTH * 4
        saved = flops([44] * LAYERS) - flops(lengths)
        # What is left besides is the method's own: scores, attention rows, and where a method looks ahead a layer's
        # queries, keys and values.
        ahead = sum(2 * n * 3 * WIDTH * WIDTH for n in lengths) if row.method == "pyramiddrop" else 0
        own = cost.flops - (stock.flops - saved)
        assert 0 <= own < ahead + 0.05 * stock.flops
    assert rows[5].cost.visual[0] == 36
    assert sorted(rows[5].cost.visual, reverse=True) == list(rows[5].cost.visual)


def test_ratios_are_stock_over_reduced(rows):
    for row in rows:
        assert row.flops == rows[0].cost.flops / row.cost.flops
        assert row.yielded == pytest.approx(row.clock / row.flops)
        assert all(t > 0 for t in (*row.first, *row.token))
        assert (row.limit is None) == (row.stage != "projector")
    assert all(row.own > 0 for row in rows[1:])
    assert rows[0].own == 0


def test_every_method_that_fits_the_model_has_its_rows():
    model = build(TINY)
    described = tr.describe(model)
    found = methods_of(model)
    assert [n for n, s in found if s == "projector"] == described.methods("projector")
    assert [n for n, s in found if s == "language"] == described.methods("language")
    assert methods_of(model, ["fastv", "divprune@projector"]) == [("divprune", "projector"), ("fastv", "language")]
    with pytest.raises(ValueError, match=r"no method tome for this model; there are .*fastv"):
        methods_of(model, ["tome", "fastv"])


@dataclass(frozen=True)
class Failing(tr.FastV):
    def plan(self, evidence: Evidence):
        if self.keep == 5:
            raise RuntimeError("not today\nmore")
        return super().plan(evidence)


def test_a_failing_budget_gives_a_row_and_leaves_the_others(monkeypatch):
    monkeypatch.setattr(prefills, "methods_of", lambda model, wanted: [("failing", "language")])
    monkeypatch.setattr(prefills.tr, "get_method", lambda spec, stage: Failing(keep=int(spec.split("=")[1])))
    heard = []
    rows = measure(TINY, settings=ONCE, done=heard.append)
    assert heard == rows
    assert [r.error for r in rows] == ["", "", "RuntimeError: not today"]
    assert rows[1].clock is not None
    assert rows[2].cost is None or rows[2].clock is None
    assert "RuntimeError: not today" in cells(rows[2])
    assert len({len(cells(r)) for r in rows}) == 1


def test_own_work_is_the_time_inside_plan_counted_once(monkeypatch):
    now = [0.0]

    @dataclass(frozen=True)
    class Twice(tr.FastV):
        def plan(self, evidence):
            now[0] += 1.0
            if evidence.n > 1:  # as where tokens that must stay are taken out first
                self.plan(Evidence(evidence.x[:, :1]))
            return Prune(evidence.n, torch.zeros(1, 1, dtype=torch.long))

    monkeypatch.setattr(own_work.time, "perf_counter", lambda: now[0])
    timed = own_work.timed(Twice(keep=5), "cpu")
    assert timed.spec() == Twice(keep=5).spec()
    assert timed.acts_at(2, 4)
    timed.plan(Evidence(torch.zeros(1, 3, 2)))
    assert timed.watch.seconds == 2.0
    timed.plan(Evidence(torch.zeros(1, 1, 2)))
    assert timed.watch.seconds == 3.0
    assert dataclasses.replace(timed, keep=2).watch is timed.watch, "adapters may share a budget out among views"


def test_shells_share_weights_and_leave_the_stock_model_alone():
    model = build(TINY)
    given = prompt(TINY)
    before = model(**given).logits
    patched = tr.patch(shell(model), "divprune:keep=5")
    assert all(a is b for a, b in zip(model.parameters(), patched.parameters(), strict=True))
    assert not tr.describe(model).active
    assert torch.equal(model(**given).logits, before)


@pytest.mark.parametrize("shape", [TINY, NEXT], ids=["llava", "llava-next"])
def test_prompts_have_as_many_placeholders_as_the_model_makes_features(shape):
    model, given = build(shape), prompt(shape, batch=2)
    assert ((given["input_ids"] == shape.image).sum(1) == shape.visual).all()
    assert given["input_ids"].shape == (2, shape.visual + shape.text)
    with torch.no_grad():
        cache = model(**given, use_cache=True, logits_to_keep=1).past_key_values  # raises when they do not match
    assert cache.get_seq_length() == shape.visual + shape.text


def test_real_sizes():
    assert SHAPES["llava-7b"].visual == SHAPES["small"].visual == 576
    assert SHAPES["llava-next-7b"].visual == 5 * 576 + 48
    model = build(SHAPES["llava-7b"], "meta", torch.bfloat16)
    assert SHAPES["llava-7b"].image == model.config.image_token_id == 32_000
    assert sum(p.numel() for p in model.parameters()) == 7_063_427_072
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_section_goes_between_its_markers(rows, tmp_path):
    out = tmp_path / "page.md"
    section = markdown("small", rows, "python -m x", "2 threads")
    lines = section.splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert len(table) == 1 + len(rows)
    assert {line.count("|") for line in table} == {len(cells(rows[0])) - 1 + 1}  # no peak memory on a CPU
    assert "`python -m x`" in lines
    assert "2 threads" in lines
    splice(out, "small", section)
    assert out.read_text() == section
    out.write_text("above\n" + section + "below\n")
    again = markdown("small", rows[:2], "python -m y", "1 thread")
    splice(out, "small", again)
    assert out.read_text() == "above\n" + again + "below\n"
    with pytest.raises(ValueError, match="vlm-performance llava-7b: begin"):
        splice(out, "llava-7b", section)
    assert out.read_text() == "above\n" + again + "below\n"


def test_the_command_is_written_without_the_file():
    args = ["--shape", "small", "--markdown", "somewhere.md", "--rounds", "3", "--markdown=x"]
    assert command_of("language", args) == "python -m tokenreduce.bench.performance.language --shape small --rounds 3"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_memory_on_cuda():
    rows = measure(TINY, ["divprune"], (5,), Settings(1, 0, 0, "cuda"), torch.bfloat16)
    assert all(row.cost.peak > row.cost.kv for row in rows)
    assert rows[0].token is None
