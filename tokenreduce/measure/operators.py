"""How many operators one forward starts: a measure of speed that does not depend on the machine.

Small tensors cost what it takes to start an operator, whatever is in them. Operators are counted where they reach the
dispatcher's last level, views among them, as :class:`torch.utils._python_dispatch.TorchDispatchMode` sees them: what a
composite operator is made of counts one by one, as for the stock model. What numpy computes is not counted, the ways
there and back are.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenreduce.core.trace import record

__all__ = ["Operators", "count_operators", "entered"]


@dataclass(frozen=True)
class Operators:
    """Operators of one forward.

    Attributes:
        blocks: of every block, by name (``aten.mm``), in the order of the blocks.
        around: those outside of blocks, by name.
        own: those of ``blocks`` that made or applied a plan, by name.
    """

    blocks: tuple[Counter[str], ...]
    around: Counter[str]
    own: tuple[Counter[str], ...]

    @property
    def total(self) -> int:
        """All operators of the forward."""
        return self.around.total() + sum(c.total() for c in self.blocks)

    @property
    def per_block(self) -> tuple[int, ...]:
        """Operators of every block."""
        return tuple(c.total() for c in self.blocks)

    @property
    def own_per_block(self) -> tuple[int, ...]:
        """Operators of every block that made or applied a plan."""
        return tuple(c.total() for c in self.own)


class _Counting(TorchDispatchMode):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.at = self.inside = 0
        self.blocks = [Counter[str]() for _ in range(blocks + 1)]  # the last one is for what is around them
        self.own = [Counter[str]() for _ in range(blocks + 1)]
        self.at = blocks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func.namespace}.{func._schema.name.partition('::')[2]}"
        self.blocks[self.at][name] += 1
        if self.inside:
            self.own[self.at][name] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def owning(self) -> Iterator[None]:
        """Around what makes and applies plans."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def count_operators(model: nn.Module, forward: Callable[[], object], blocks: Sequence[nn.Module]) -> Operators:
    """The operators of ``forward()``, which runs ``model``, patched or not, without gradients.

    ``blocks`` are its layers, for instance ``model.blocks`` of a timm model; operators of one that runs several times
    add up. The first forward of a shape also makes constants, which later ones find: run one before.
    """
    counting = _Counting(len(blocks))

    def enter(i: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counting.at = i

        return hook

    hooks = []
    for i, block in enumerate(blocks):
        hooks += [block.register_forward_pre_hook(enter(i)), block.register_forward_hook(enter(len(blocks)))]
    try:
        with torch.no_grad(), record(model, flops=False, own=counting.owning), counting:
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return Operators(tuple(counting.blocks[:-1]), counting.blocks[-1], tuple(counting.own[:-1]))


def entered(call: Callable[[], object]) -> Counter[str]:
    """Functions of this package that ``call`` enters in this thread, by module and name; comprehensions, which are one
    more in some versions of Python, do not count."""
    found: Counter[str] = Counter()

    def note(frame: Any, event: str, _: Any) -> None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if event == "call" and module.partition(".")[0] == "tokenreduce" and not name.startswith("<"):
            found[f"{module}:{name}"] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found
