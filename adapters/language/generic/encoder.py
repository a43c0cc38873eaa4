"""Encoder-stage methods inside the tower of a discovered model.

The tower is one that an adapter of encoders knows, or found by how it is built. It runs on fewer tokens, and what
stands behind it gets all of them back, merged ones as copies: whatever the model makes of them, it makes as it was
written. Which visual token is made of which patches is read off the model's own code with the tower unreduced
(:mod:`tokenreduce.adapters.language.generic.patches`); a visual token stays where one of its patches is the place of a
token that is left, and goes where all of them only repeat others.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders import packed_found
from tokenreduce.adapters.encoders.handing import attach_hands
from tokenreduce.adapters.encoders.packed import Packed
from tokenreduce.adapters.encoders.plain import MayBePlain
from tokenreduce.adapters.encoders.readers_source import Known, find_givers, use_of
from tokenreduce.adapters.encoders.state import State, full_plan
from tokenreduce.adapters.encoders.tower import Tower
from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.generic.towers import stacks_in
from tokenreduce.adapters.language.towers import remaining, sizes
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["Inside", "check_looks", "left_of", "reduced_in", "served", "why_not"]


class Inside:
    """The adapter of a tower inside a discovered model: what it hands on are all tokens."""

    EXPANDS = True

    def __init__(self, adapter: ModuleType) -> None:
        self.adapter = adapter

    def attach(self, tower: Tower, reducers: tuple[Reducer, ...], undo: Undo) -> None:
        """Raises ``ValueError`` for methods across frames, whose order in a call is not known here."""
        for reducer in reducers:
            if getattr(reducer, "frames", 1) > 1:
                raise ValueError(
                    f"{reducer.spec()}: frames is for families of the table, whose towers are known to see the frames "
                    f"of a video one by one; leave frames out"
                )
        self.adapter.attach(tower, reducers, undo)
        if not getattr(self.adapter, "EXPANDS", False):
            attach_hands(tower, undo)
        for block in tower.blocks:
            undo.mix_in(block, MayBePlain)


def served(found: Language, towers: Sequence[tuple[ModuleType, Tower]]) -> list[tuple[Any, Tower]]:
    """Of the ``towers`` inside a discovered model those that methods can act in, as (adapter, tower): one, or none."""
    if why_not(found, towers) is not None:
        return []
    ((adapter, tower),) = towers
    if getattr(adapter, "EXPANDS", False):  # whatever class of the table it is, it can run plainly here
        return [(Inside(packed_found), replace(packed_found.tower_of(tower.name, tower.module), std=tower.std))]
    tower = replace(tower, hands="inside" if tower.hands == "inside" else "all")
    return [(Inside(adapter), replace(tower, resizes=False))]


def why_not(found: Language, towers: Sequence[tuple[ModuleType, Tower]]) -> str | None:
    """Why no encoder-stage method can act in a discovered model, None where one can."""
    inner: Any = found.inner
    stacks = [] if found.text is inner else list(stacks_in(inner, found.text))
    if not towers:
        return "its vision tower is not built as one that an adapter knows"
    if len(towers) > 1:
        return f"{len(towers)} towers see its images, and what one merges the other does not"
    (_, tower) = towers[0]
    others = [s for s in stacks if not any(b in set(tower.blocks) for b in s)]
    if others:
        kind = type(others[0][0]).__name__
        return f"its images go through layers of another kind, too ({kind}), of which each may see all tokens"
    if not any(all(b in set(s) for b in tower.blocks) for s in stacks):
        return f"which patches its tokens are made of cannot be told behind the layers of {tower.family}"
    if (other := _other_eye(inner, tower.module)) is not None:
        return f"{other} sees the same pixels, and what one tower merges the other does not"
    if (odd := _mixer(found, tower)) is not None:
        return odd
    for holder in _around(inner, tower.module):
        if (name := _reads(holder, tower)) is not None:
            return f"{type(holder).__name__}.{name} reads tokens of its tower between the blocks"
    return None


def _other_eye(inner: Any, tower: nn.Module) -> str | None:
    """A module besides the tower that the features of images are made with, and that takes pixels."""
    names = _of_images(inner)
    for name, child in inner.named_children():
        takes = inspect.signature(inspect.unwrap(type(child).forward)).parameters
        sees = any(n.startswith("pixel_values") for n in takes)
        if name in names and sees and not any(m is tower for m in child.modules()):
            return type(child).__name__
    return None


def _of_images(inner: Any) -> set[str]:
    """What the code that makes features of images and videos names, its children among it."""
    code, queue = vars_of(type(inner)), [f"get_{kind}_features" for kind in ("image", "video")]
    names: set[str] = set()
    while queue:
        if (function := code.get(queue.pop())) is not None:
            fresh = set(inspect.unwrap(function).__code__.co_names) - names
            names |= fresh
            queue += fresh
    return names


def vars_of(kind: type) -> dict[str, FunctionType]:
    """The functions of a model's class and of those that it inherits, without what all models have, by name."""
    code: dict[str, FunctionType] = {}
    for one in kind.__mro__:
        top = one.__module__.partition(".")[0]
        if top not in ("torch", "builtins", "tokenreduce") and (top != "transformers" or ".models." in one.__module__):
            code |= {n: f for n, f in vars(one).items() if isinstance(f, FunctionType) and n not in code}
    return code


def _mixer(found: Language, tower: Tower) -> str | None:
    """What stands behind the tower's blocks and makes tokens of patches that others are made of as well."""
    skip = set(found.text.modules()) if found.text is not found.inner else set()
    children, own = list(tower.module.children()), set(tower.module.modules())
    at = next(i for i, c in enumerate(children) if any(m is tower.blocks[0] for m in c.modules()))
    skip |= {m for child in children[: at + 1] for m in child.modules()}
    # A decoder of images, a tower for sound: what no feature of an image goes through does not matter.
    there = _of_images(found.inner)
    skip |= {m for name, child in found.inner.named_children() if name not in there for m in child.modules()}
    for name, module in found.inner.named_modules():
        if module in skip:
            continue
        if isinstance(module, nn.MultiheadAttention) and module not in own:  # a tower's own is its pooling head
            return f"its {name} attends to all patches, so that no token is of some of them"
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > max(module.stride):
            return f"its {name} makes every token of several patches that others are made of, too"
    return None


def _around(inner: nn.Module, tower: nn.Module) -> Iterator[nn.Module]:
    return (m for m in inner.modules() if m is not tower and any(t is tower for t in m.modules()))


def _reads(holder: Any, tower: Tower) -> str | None:
    """The function of a library's model that looks into its tower, None where all call it as a whole."""
    code = {n: inspect.unwrap(f) for n, f in vars_of(type(holder)).items() if not n.startswith("__")}
    for path in (n for n, m in holder.named_modules(remove_duplicate=False) if m is tower.blocks[0]):
        known = Known(code)
        chain = path.rpartition(".")[0]
        find_givers(code, chain, known)
        for name, function in code.items():
            if use_of(function, chain, known) == "reads":
                return name
    return None


def reduced_in(towers: Sequence[tuple[Any, Tower]]) -> tuple[int, int]:
    """Depth and leading tokens of the tower in which methods act."""
    ((_, tower),) = towers
    return len(tower.blocks), tower.prefix


def check_looks(reducers: Sequence[Reducer]) -> None:
    """Raise ``ValueError`` for a method that looks at a tower in which another one acts."""
    acting = [r.spec() for r in reducers if r.stage == "encoder"]
    looking = [r.spec() for r in reducers if r.stage != "encoder" and "tower" in r.required()]
    if acting and looking:
        raise ValueError(
            f"{looking[0]} looks at what the vision tower saw of all patches, of which {acting[0]} leaves fewer; in a "
            f"discovered model choose one on embeddings (divprune, random) beside it"
        )


def left_of(states: list[Any], depth: int, feature: int, prefix: int) -> tuple[Tensor | None, Tensor | None]:
    """(slots,) bool of the places of tokens that are left behind the block ``feature``, and (slots,) sizes of the token
    that every slot is in; slots as they lie in that block's output, of one call of the tower after the other. None
    where all are left, and where all count one."""
    calls = [states[i + feature] for i in range(0, len(states), depth)]
    marks = [_marks(s, prefix) for s in calls]
    if all(m is None for m, _, _ in marks):
        return None, None
    left = torch.cat([torch.ones(n, dtype=torch.bool) if m is None else m.cpu() for m, _, n in marks])
    if all(s is None for _, s, _ in marks):
        return left, None
    return left, torch.cat([torch.ones(n) if s is None else s.float().cpu() for _, s, n in marks])


def _marks(state: Any, prefix: int) -> tuple[Tensor | None, Tensor | None, int]:
    """Of one call; the last is its number of slots."""
    if isinstance(state, Packed):
        return _packed_marks(state)
    assert isinstance(state, State)
    here = remaining(state, prefix)
    if here is None:
        return None, None, 0
    front = here.new_zeros(len(here), prefix)
    number = sizes(state, prefix)
    own = None if number is None else torch.cat([front.to(number), number], 1).flatten()
    return torch.cat([front, here], 1).flatten(), own, here.shape[0] * (here.shape[1] + prefix)


def _packed_marks(packed: Packed) -> tuple[Tensor | None, Tensor | None, int]:
    packed = packed.lasting
    unit, total = packed.layout.unit, sum(p.numel() for p in packed.layout.places)
    if packed.at is None:
        return None, None, total * unit
    here = torch.zeros(total, dtype=torch.bool, device=packed.at.device)
    here[packed.at] = True
    number = torch.ones(total, device=packed.at.device)
    for part, place in zip(packed.parts, packed.layout.places, strict=True):
        plan, size = full_plan(part.state), part.state.size
        if plan is not None and size is not None:
            number[place] = plan.expand(size.float().unsqueeze(-1)).squeeze(-1)
    return here.repeat_interleave(unit), number.repeat_interleave(unit), total * unit
