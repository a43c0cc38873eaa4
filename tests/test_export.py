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
TOWERS = {"timm": None, "open_clip": "open_clip vit", "transformers": "transformers clip"}
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
def check_export(library: str, reducer) -> None:
    model = tr.patch(build(library), reducer)
    whole, batch = Pooled(model).eval(), torch.export.Dim("batch")
    program = torch.export.export(whole, (pictures(library, 2),), dynamic_shapes=({0: batch},))
    for number in (5, 1):
        x = pictures(library, number)
        torch.testing.assert_close(program.module()(x), whole(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_onnx(library: str, reducer) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = tr.patch(build(library), reducer)
    whole, batch = Pooled(model).eval(), torch.export.Dim("batch")
    program = torch.onnx.export(
        whole, (pictures(library, 2),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue())
    for number in (5, 1):
        x = pictures(library, number)
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(got), whole(x), rtol=1e-3, atol=1e-3)


def test_the_table_lists_every_encoder_method():
    assert sorted(rows()) == sorted(ENCODER_METHODS)
    assert all(cell == "yes" or len(cell) > 10 for cells in rows().values() for cell in cells), "a no says why"


@pytest.mark.parametrize("library", TOWERS)
def test_tome_exports_with_any_batch(library):
    check_export(library, tr.ToMe(r=3))


def test_evit_goes_to_onnx():
    check_onnx("timm", "evit:keep=0.5")


@pytest.mark.slow
@pytest.mark.parametrize("library", TOWERS)
@pytest.mark.parametrize("name", ENCODER_METHODS)
@pytest.mark.parametrize("way", ["export", "onnx"])
def test_the_table_holds(way, name, library):
    check = check_export if way == "export" else check_onnx
    promised = rows()[name][0 if way == "export" else 1] == "yes"
    if promised:
        check(library, with_keep(name, 0.5))
    else:
        with pytest.raises(Exception, match=r"."):
            check(library, with_keep(name, 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("spec", VARIANTS)
def test_other_settings_export(spec):
    check_export("timm", spec)


@pytest.mark.slow
@pytest.mark.parametrize("spec", VARIANTS)
def test_other_settings_go_to_onnx(spec):
    check_onnx("timm", spec)


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
