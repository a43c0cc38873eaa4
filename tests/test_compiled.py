"""Compiled graphs: settings and numbers of tokens are constants, the batch is not."""

from __future__ import annotations

import pytest
import torch
from support import ENCODER_METHODS, images, with_keep
from torch import nn

import tokenreduce as tr


def small_vit(depth: int = 3) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=24, patch_size=4, embed_dim=16, depth=depth, num_heads=2, num_classes=3, mlp_ratio=1.0
    ).eval()


class Graphs:
    """A backend that runs graphs as they are and keeps what they are made of."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.guards: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> object:
        self.graphs.append(graph)
        mode = torch._guards.detect_fake_mode(inputs)
        self.guards.append(len(mode.shape_env.guards))
        return graph.forward

    def inputs(self) -> set[str]:
        """Inputs that are numbers of this library. Stock models have some with ``dynamic=True`` (dropout, eps)."""
        found = set()
        for graph in self.graphs:
            for node in graph.graph.find_nodes(op="placeholder"):
                value = node.meta["example_value"]
                if isinstance(value, torch.SymFloat) or (isinstance(value, torch.Tensor) and value.dim() == 0):
                    found |= {node.name} if "tokenreduce" in node.name or "reducer" in node.name else set()
        return found

    def symbols(self) -> set[str]:
        """All symbols in the sizes of the last graph."""
        found: set[str] = set()
        for node in self.graphs[-1].graph.nodes:
            value = node.meta.get("example_value")
            for size in value.shape if isinstance(value, torch.Tensor) else [value]:
                if isinstance(size, torch.SymInt):
                    found |= {str(s) for s in size.node.expr.free_symbols}
        return found


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, graphs: Graphs, **settings):
    return torch.compile(model, backend=graphs, fullgraph=True, **settings)


slow = [pytest.param(n, marks=() if n in ("tome", "pitome", "resize") else pytest.mark.slow) for n in ENCODER_METHODS]


@pytest.mark.slow
@pytest.mark.parametrize("name", slow)
@torch.no_grad()
def test_a_second_float_setting_is_another_constant(name):
    graphs, x = Graphs(), images()
    for keep in (0.5, 0.8, 0.65):
        model = tr.patch(small_vit(), with_keep(name, keep))
        torch.testing.assert_close(compiled(model, graphs)(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(graphs.graphs) == 3
    assert graphs.inputs() == set()
    assert graphs.symbols() == set(), "nothing of this is symbolic"


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["tome:r=4,inflect={}", "pitome:ratio=0.9,margin=[{},0.5]", "mctf:tau_sim={}"])
@torch.no_grad()
def test_every_kind_of_float_is_a_constant(spec):
    graphs, x = Graphs(), images()
    for value in (0.5, 0.25, 0.75):
        model = tr.patch(small_vit(), spec.format(value))
        torch.testing.assert_close(compiled(model, graphs)(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(graphs.graphs) == 3
    assert graphs.inputs() == set()


@torch.no_grad()
def test_equal_settings_share_a_graph_and_others_do_not():
    graphs, x, model = Graphs(), images(), small_vit()
    run, got = compiled(model, graphs), []
    for spec in ("tome:r=4,inflect=0.5", "tome:r=4,inflect=0.5", "tome:r=4,inflect=-0.5", "tome:r=3,inflect=-0.5"):
        with tr.patched(model, spec):
            want = model(x)
            torch.testing.assert_close(run(x), want)
        got.append(want)
    assert len(graphs.graphs) == 3
    assert not torch.allclose(got[1], got[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", slow)
@torch.no_grad()
def test_dynamic_takes_any_batch_in_one_graph(name):
    graphs, model = Graphs(), tr.patch(small_vit(), with_keep(name, 0.5))
    run = compiled(model, graphs, dynamic=True)
    run(images(2))
    made = len(graphs.graphs)
    for batch in (5, 7):
        torch.testing.assert_close(run(images(batch)), model(images(batch)), rtol=1e-4, atol=1e-5)
    assert len(graphs.graphs) == made <= 2  # the fixed size of the image may cost one restart, as in the stock model
    assert graphs.inputs() == set(), "settings are no inputs"
    sides = 1 if name == "resize" else 0  # which rounds the image's side to whole patches
    assert len(graphs.symbols()) <= 1 + sides, "only the batch is symbolic"


@torch.no_grad()
def test_a_dynamic_graph_has_no_more_guards_on_sizes_than_the_stock_models():
    guards = []
    for model in (small_vit(4), tr.patch(small_vit(4), "tome:r=4")):
        torch.compiler.reset()
        graphs = Graphs()
        compiled(model, graphs, dynamic=True)(images())
        guards.append(graphs.guards[-1])
    assert guards[1] <= guards[0]


@pytest.mark.slow
@torch.no_grad()
def test_a_model_that_takes_any_image_has_a_graph_for_each_size():
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16
    )
    model, graphs = tr.patch(DINOv3ViTModel(config).eval(), "tome:keep=0.5"), Graphs()
    run = compiled(model, graphs, dynamic=True)
    for shape in ((2, 3, 64, 80), (3, 3, 64, 80), (2, 3, 96, 128), (4, 3, 96, 128)):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(run(x)[0], model(x)[0], rtol=1e-4, atol=1e-5)
    assert len([g for g in graphs.graphs if len(g.graph.nodes) > 50]) == 2


def _by_blocks(model: nn.Module, graphs: Graphs) -> None:
    for block in tr.describe(model).towers[0].blocks:
        block.compile(backend=graphs, dynamic=True)


@torch.no_grad()
def test_blocks_that_are_compiled_one_by_one_share_a_graph():
    """The first has no state yet, and the last has a single token that is not merged, which is never sorted."""
    model, x = small_vit(depth=10), images(2, size=24)
    tr.patch(model, "tome:r=3")
    want, graphs = model(x), Graphs()
    _by_blocks(model, graphs)
    assert torch.equal(model(x), want)
    assert len(graphs.graphs) == 3
    assert torch.equal(model(x), want)
    model(images(3, size=24))
    assert len(graphs.graphs) == 3
    stock = small_vit(depth=10)
    assert torch.equal(tr.unpatch(model)(x), stock(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODER_METHODS)
@torch.no_grad()
def test_every_method_is_right_block_by_block(name):
    model, x = small_vit(), images(2, size=24)
    try:
        tr.patch(model, with_keep(name, 0.5))
    except ValueError as error:
        pytest.skip(str(error))
    want = model(x)
    _by_blocks(model, Graphs())
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
