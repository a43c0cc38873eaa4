"""Encoders that are in no table, or have biases and masks of their own: exactness against the stock models.

The references are stock models whose blocks are made to see other tokens by hooks: behind block ``LAYER`` some tokens
are left out, or pairs of them are replaced by their mean, as copies; blocks behind it get the rotary tables, places,
relative biases and masks of what they see.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import OTHERS, first_tensor
from torch import Tensor, nn

import tokenreduce as tr
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity, Merge, Plan, Prune
from tokenreduce.core.reducer import Reducer

LAYER = 1
#: Poolings of other tokens than those that are left: dropped patches are zero or a mean in maps, or never go.
MAPS = ("eomt", "vitpose", "vjepa2", "merging", "masked autoencoder")


@dataclass(frozen=True)
class After(Reducer, needs=("keys",)):
    """Leaves patches out behind block ``LAYER`` (other ones in every sample), or merges pairs of neighbours."""

    merges: bool = False
    proportional = True

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer == LAYER

    def acting_position(self) -> str:
        return "after"

    def plan(self, evidence: EncoderEvidence) -> Plan:
        rows = [sources(evidence.n, evidence.prefix, row, self.merges) for row in range(evidence.batch)]
        if self.merges:
            return Merge.from_assignment(torch.stack(rows), int(rows[0].max()) + 1)
        return Prune(evidence.n, torch.stack([(r >= 0).nonzero().flatten() for r in rows]))


@dataclass(frozen=True)
class Everything(Reducer, needs=("keys", "queries", "values", "before")):
    """Looks at everything and keeps everything."""

    place: str = "middle"

    def acting_position(self) -> str:
        return self.place

    def required(self) -> tuple[str, ...]:
        return tuple(n for n in self.needs if n != "before" or self.place != "before")

    def plan(self, evidence: EncoderEvidence) -> Plan:
        assert evidence.keys.shape[2] == evidence.n == evidence.values.shape[2]
        return Identity.like(evidence.x)


def sources(n: int, prefix: int, row: int, merges: bool) -> Tensor:
    """(N,) which output an input goes to; -1 for tokens that are left out. All of them are among the first patches,
    which are there in padded images, too."""
    out = torch.arange(n)
    odd = torch.arange(prefix + 1 + row, prefix + 22, 3)
    if merges:
        out[odd] = out[odd - 1]
        return torch.unique(out, return_inverse=True)[1]
    out[odd] = -1
    return out


def build(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, given = OTHERS[name]()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(2.0)
    return model.eval(), given


def blocks_of(model: nn.Module) -> tuple[tuple[nn.Module, ...], int]:
    tower = tr.describe(model).towers[0]
    return tower.blocks, tower.prefix


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for v in values if isinstance(v, Tensor | tuple | list | dict) for t in tensors(v)]


# -- the reference -----------------------------------------------------------------------------------------------------
class Seeing:
    """Pre-hook on a stock block: what it is told of N tokens becomes what it must know of the tokens ``where`` (K,)."""

    def __init__(self, where: Tensor, n: int) -> None:
        self.where, self.n = where, n

    def square(self, t: Tensor) -> Tensor:
        return t[..., self.where, :][..., self.where] if t.shape[-2] == self.n else t[..., self.where]

    def rows(self, t: Tensor) -> Tensor:
        front = self.n - t.shape[-2]
        return t[..., self.where[self.where >= front] - front, :]

    def __call__(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        for name, value in kwargs.items():
            if name == "position_embeddings":
                kwargs[name] = tuple(self.rows(t) for t in value)
            elif name == "rope" and value is not None:
                kwargs[name] = self.rows(value)
            elif isinstance(value, Tensor) and value.shape[-1] == self.n:
                kwargs[name] = self.square(value)
        if type(block).__name__ == "VJEPA2Layer":
            return (args[0], self.where.unsqueeze(0)), kwargs
        return (args[0], *map(self.tables, args[1:])), kwargs

    def tables(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(map(self.rows, value))
        return None if value is None else self.rows(value)


def bias(block: Any, seeing: Seeing) -> None:
    """Cut the relative biases that a stock block makes by itself."""
    for module in block.modules():
        if type(module).__name__.endswith("RelativePositionBias"):
            module.register_forward_hook(lambda m, a, out: seeing.square(out))
        for name in ("_get_rel_pos_bias", "get_bias"):
            if hasattr(module, name):
                stock = getattr(module, name)
                setattr(module, name, lambda stock=stock: seeing.square(stock()))


def reference(model: Any, given: dict[str, Tensor], row: int, merges: bool) -> tuple[Any, Tensor]:
    """What a stock ``model`` makes of one sample, and the tokens behind its last block."""
    model = copy.deepcopy(model)
    blocks, prefix = blocks_of(model)
    last: list[Tensor] = []

    def change(block: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        n = x.shape[1]
        source = sources(n, prefix, row, merges)
        if merges:
            y = torch.stack([x[:, source == source[i]].mean(1) for i in range(n)], 1)
            first = {int(s): i for i, s in reversed(list(enumerate(source)))}
            where = torch.tensor([first[int(s)] for s in source])
        else:
            where = (source >= 0).nonzero().flatten()
            y = x[:, where]
        seeing = Seeing(where, n)
        for later in blocks[LAYER + 1 :]:
            later.register_forward_pre_hook(seeing, with_kwargs=True)
            bias(later, seeing)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def note(block: Any, args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    blocks[LAYER].register_forward_hook(change)
    blocks[-1].register_forward_hook(note)
    try:
        out = model(**{k: v[row : row + 1] for k, v in given.items()})
    except (RuntimeError, ValueError):
        if not last:
            raise
        out = None  # what stands behind the blocks lays them out on a grid
    return out, last[0]


# -- tests -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_keep_everything_is_bit_identical(name: str) -> None:
    model, given = build(name)
    want, keys = tensors(model(**given)), list(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    for reducer in (tr.ToMe(r=0), Everything(), Everything("before"), Everything("after")):
        with tr.patched(model, reducer):
            got = tensors(model(**given))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), reducer
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(a, b) for a, b in zip(tensors(model(**given)), want, strict=True))


def there(name: str, given: dict[str, Tensor], row: int, n: int) -> Tensor:
    """(N,) which tokens of a sample are there."""
    valid = given.get("patch_valid")
    if valid is None:
        return torch.ones(n, dtype=torch.bool)
    return torch.cat([torch.ones(n - valid.shape[1], dtype=torch.bool), valid[row]])


def left_by(model: Any, given: dict[str, Tensor], reducer: Reducer) -> tuple[Any, Tensor, Plan]:
    """Outputs of a patched model, the tokens behind its last block, and the plan."""
    seen: list[Tensor] = []
    last = blocks_of(model)[0][-1]
    with tr.patched(model, reducer), tr.record(model, flops=False) as trace:
        note = last.register_forward_hook(
            lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out), prepend=True
        )
        out = model(**given)
        note.remove()
    assert trace.tokens[-1] < trace.tokens[0], "some tokens went"
    return out, seen[0], trace.plan


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_dropped_tokens_are_those_that_are_left_out(name: str) -> None:
    model, given = build(name)
    out, left, plan = left_by(model, given, After())
    for row in range(2):
        want, tokens = reference(model, given, row, merges=False)
        real = there(name, given, row, plan.n)[plan.representatives()[row]]
        scale = float(tokens[0, real].abs().max())
        torch.testing.assert_close(left[row][real], tokens[0, real], rtol=0, atol=2e-5 * scale)
        if want is None or any(m in name for m in MAPS):
            continue
        for one, two in zip(tensors(out), tensors(want), strict=True):
            if one.dim() == 2 and one.shape[1:] == two.shape[1:]:
                torch.testing.assert_close(one[row], two[0], rtol=0, atol=2e-5 * float(two.abs().max()))


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_merged_tokens_are_copies(name: str) -> None:
    """Through every block, pooling and map."""
    model, given = build(name)
    out, left, plan = left_by(model, given, After(merges=True))
    full = plan.expand(left)
    for row in range(2):
        want, tokens = reference(model, given, row, merges=True)
        real = there(name, given, row, plan.n)
        scale = float(tokens[0, real].abs().max())
        torch.testing.assert_close(full[row][real], tokens[0, real], rtol=0, atol=2e-5 * scale)
        assert want is not None
        for one, two in zip(tensors(out), tensors(want), strict=True):
            if one.dim() and one.shape[1:] == two.shape[1:] and two.is_floating_point():
                torch.testing.assert_close(one[row], two[0], rtol=0, atol=3e-5 * float(two.abs().max()))


@torch.no_grad()
def test_pooled_outputs_are_compared() -> None:
    """The comparisons above see what the models pool, not only tokens."""
    for name in ("transformers beit", "transformers aimv2", "timm naflex", "torchvision vit"):
        model, given = build(name)
        want, _ = reference(model, given, 0, merges=False)
        assert any(t.dim() == 2 for t in tensors(want)), name
        assert not torch.equal(first_tensor(want), first_tensor(model(**given))[:1]), name
