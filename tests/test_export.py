"""What docs/export.md promises: which encoder methods go through torch.export and to ONNX, with any batch."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from support import ENCODER_METHODS, images, tiny_vit, with_keep
from torch import nn

import tokenreduce as tr

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
WAYS = ("export", "onnx")
TOWERS = {"timm": None, "open_clip": "open_clip vit", "transformers": "transformers clip"}
#: Every method in one library, and a few in all: plans do not know whose tower they are in.
EVERYWHERE = ("tome", "evit", "ats", "pixelprune")
EACH = [
    (name, library) for name in ENCODER_METHODS for at, library in enumerate(TOWERS)
    if name in EVERYWHERE or at == sum(map(ord, name)) % len(TOWERS)
]  # fmt: skip
#: Settings beside ``keep`` that take another path.
VARIANTS = (
    "ats", "ats:num_tokens=9,drop_tokens=false", "dpcknn:order=score", "evit:fuse_token=true", "mctf:one_step_ahead=2",
    "mustdrop-merge:threshold=0.1", "pitome:ratio=0.8,preset=clip", "tofu:r=3", "tome:r=3,inflect=-0.5",
    "tome_kth:k=3,tail=drop", "vid-tldr:r=[0.2,0.1]", "zerotprune:r=2,k=20",
)  # fmt: skip


class Pooled(nn.Module):
    """The features of an image, whatever a tower returns."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x):
        out = self.tower(x)
        return out if isinstance(out, torch.Tensor) else out.pooler_output


def build(library: str) -> nn.Module:
    if TOWERS[library] is None:
        return tiny_vit()
    torch.manual_seed(0)
    model, _ = FAMILIES[TOWERS[library]]()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3.0)
    return model.eval()


def pictures(library: str, batch: int) -> torch.Tensor:
    return images(batch) if library == "timm" else images(batch, 48)


def rows() -> dict[str, list[str]]:
    """The table of the page: method to the cells behind it."""
    found = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in found}


@torch.no_grad()
def check(library: str, reducer, ways=WAYS) -> None:
    """Outputs for other batches than the one that was exported."""
    if "onnx" in ways:
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
    model = tr.patch(build(library), reducer)
    whole, batch = Pooled(model).eval(), torch.export.Dim("batch")
    given, shapes = (pictures(library, 2),), ({0: batch},)
    inputs = [pictures(library, number) for number in (5, 1)]
    if "export" in ways:
        program = torch.export.export(whole, given, dynamic_shapes=shapes)
        for x in inputs:
            torch.testing.assert_close(program.module()(x), whole(x), rtol=1e-4, atol=1e-4)
    if "onnx" in ways:
        file = io.BytesIO()
        torch.onnx.export(whole, given, dynamo=True, dynamic_shapes=shapes, verbose=False).save(file)
        session = runtime.InferenceSession(file.getvalue())
        for x in inputs:
            got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
            torch.testing.assert_close(torch.from_numpy(got), whole(x), rtol=1e-3, atol=1e-3)


def test_the_table_lists_every_encoder_method():
    assert sorted(rows()) == sorted(ENCODER_METHODS)
    assert all(cell == "yes" or len(cell) > 10 for cells in rows().values() for cell in cells), "a no says why"


@pytest.mark.slow
@pytest.mark.parametrize("library", TOWERS)
def test_tome_exports_with_any_batch(library):
    check(library, tr.ToMe(r=3), ["export"])


@pytest.mark.slow
def test_evit_goes_to_onnx():
    check("timm", "evit:keep=0.5")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "library"), EACH)
def test_the_table_holds(name, library):
    promised = [way for way, cell in zip(WAYS, rows()[name], strict=False) if cell == "yes"]
    if promised:
        check(library, with_keep(name, 0.5), promised)
    for way in set(WAYS) - set(promised):
        with pytest.raises(Exception, match=r"."):
            check(library, with_keep(name, 0.5), [way])


@pytest.mark.slow
@pytest.mark.parametrize("spec", VARIANTS)
def test_other_settings_export_and_go_to_onnx(spec):
    check("timm", spec)


@torch.no_grad()
def test_equal_scores_keep_their_order_in_onnx():
    """Where everything ties, the lower index wins, in ONNX as here."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    from tokenreduce.algorithms.scoring import ascending, descending

    class Sorts(nn.Module):
        def forward(self, x):
            return descending(x), ascending(x)

    x = torch.tensor([[1.0, 2.0, 1.0, 2.0, 2.0, 0.0, 1.0]]).repeat(1, 9)
    program = torch.onnx.export(Sorts(), (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue())
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for mine, theirs in zip(Sorts()(x), got, strict=True):
        assert torch.equal(mine, torch.from_numpy(theirs))


@torch.no_grad()
def test_another_size_of_image_is_another_program():
    """The number of tokens is a constant of the program, and it says so."""
    model = tr.patch(copy.deepcopy(tiny_vit(dynamic_img_size=True)), "tome:r=3")
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with pytest.raises(AssertionError, match=r"size|shape|Guard"):
        program.module()(images(2, 32))
