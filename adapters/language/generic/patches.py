"""Which slots of a tower's attention a token is made of, read off the gradients of the model's own code.

Between the last block and the language model, families merge 2x2 patches, shuffle pixels, pool, drop class tokens, cut
padding off and add row ends, each in an order of its own. Here the blocks' outputs are cut free, and the number of a
token is written into the gradient that goes back from it, bit by bit: a slot that answers to the bits of one token is a
patch of that token, one that answers to none is no patch (class tokens, padding), a token that no slot answers to is
none (row ends, separators), and a slot that answers to several belongs to features of which each sees all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.state import Entry, note_entry
from tokenreduce.adapters.language.generic.features import rows_in

__all__ = ["tokens_of_slots"]


def tokens_of_slots(blocks: Sequence[Any], run: Callable[[], Any]) -> Tensor | None:
    """(slots,) the token that every slot of the last block that feeds features is a patch of, -1 for none; slots as
    they lie in that block's output. None where a slot is in several tokens, or gradients do not reach it.

    ``run`` makes the features, and leaves nothing behind.
    """
    leaves: list[Tensor] = []

    def free(block: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        leaf = note_entry(x.detach().requires_grad_(True), Entry())  # nothing that a patched tower would have lost
        leaves.append(leaf)
        torch.set_grad_enabled(True)
        return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

    handles = [block.register_forward_hook(free, prepend=True) for block in blocks]
    before = torch.is_grad_enabled()
    try:
        with torch.no_grad():
            rows = rows_in(run())
        return None if not rows.requires_grad or not leaves else _read(rows, leaves)
    except (RuntimeError, NotImplementedError):  # an operation without a gradient
        return None
    finally:
        torch.set_grad_enabled(before)
        for handle in handles:
            handle.remove()


def _read(rows: Tensor, leaves: list[Tensor]) -> Tensor | None:
    n = len(rows)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)
    number = torch.arange(n, device=rows.device)
    answers = _answers(rows, leaves, noise)
    fed = [i for i, a in enumerate(answers) if a is not None and bool(a.any())]
    if not fed:
        return None
    leaf, answer = leaves[fed[-1]], answers[fed[-1]]
    assert answer is not None
    out = torch.zeros_like(answer, dtype=torch.long)
    for bit in range(max(n - 1, 1).bit_length()):
        chosen = (number >> bit & 1).bool()
        (one,), (other,) = (_answers(rows, [leaf], noise * c[:, None].to(noise)) for c in (chosen, ~chosen))
        if one is None or other is None or bool((one & other).any()):
            return None
        out += one.long() << bit
    return torch.where(answer, out, -1)


def _answers(rows: Tensor, leaves: list[Tensor], upstream: Tensor) -> list[Tensor | None]:
    """(slots,) bool for every leaf: where the gradient of ``upstream`` comes out."""
    found = torch.autograd.grad(rows, leaves, upstream, retain_graph=True, allow_unused=True)
    return [None if g is None else (g != 0).any(-1).flatten() for g in found]
