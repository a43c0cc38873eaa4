"""Handing the tokens of a reduced tower over to code that was written for all of them; see
:mod:`tokenreduce.adapters.encoders.readers`, which says to whom and what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokenreduce.adapters.encoders.rebuilding import complete
from tokenreduce.adapters.encoders.state import Entry, State, full_plan, note_entry, pool_mean, state_of
from tokenreduce.adapters.encoders.tower import Tower
from tokenreduce.core.plan import Prune
from tokenreduce.core.undo import Undo

__all__ = ["attach_hands", "raw_of", "whole"]

#: On tokens that were handed over: the reduced ones, for the tower's own pooling, or for its norm alone.
_RAW, _LEFT = "_tokenreduce_raw", "_tokenreduce_left"


def _reduced(x: Any) -> State | None:
    state = state_of(x) if isinstance(x, Tensor) else None
    return state if state is not None and state.acted is not None else None


def whole(x: Tensor, state: State, prefix: int) -> Tensor:
    """(B,K,C) back to (B,N,C): merged tokens are copied, dropped ones are the mean over patches that are left, each
    counted by its size."""
    x, state = complete(x, state)
    plan = full_plan(state)
    if plan is None or plan.is_identity:
        return x
    patches = x[:, prefix:]
    size = state.size if state.size is not None else x.new_ones(x.shape[:2])
    return plan.expand(x, pool_mean(patches, size[:, prefix:]).unsqueeze(1))


def raw_of(x: Tensor) -> Tensor:
    """The reduced tokens that ``x`` was made of by :func:`hand_over`, or ``x`` itself."""
    return getattr(x, _RAW, x)


def hand_over(module: nn.Module, args: tuple[Any, ...], output: Any, *, prefix: int, keep: bool) -> Any:
    """Forward hook on a part of a tower that returns its tokens: all of them again. ``keep`` lets the tower's own
    pooling find the reduced ones."""
    state = _reduced(output)
    if state is None:
        return None
    full = whole(output, state, prefix)
    setattr(full, _RAW if keep else _LEFT, output)
    note_entry(full, Entry())  # as many as entered, and nothing to weigh
    return full


def fill_again(module: nn.Module, args: tuple[Any, ...], output: Any, *, prefix: int) -> Any:
    """Forward hook on a norm behind :func:`hand_over`: places of dropped tokens hold the mean of normed tokens, which
    is not the norm of their mean."""
    left = getattr(args[0], _LEFT, getattr(args[0], _RAW, None))
    state = _reduced(left)
    plan = None if state is None else full_plan(state)
    if plan is None or state is None or output.shape != args[0].shape:
        return None
    full = whole(plan.gather(output), state, prefix)
    note_entry(full, Entry())
    return full


def _attentions(value: Any) -> bool:
    """Whether ``value`` is what transformers returns for ``output_attentions``: (B,H,N,N) of every layer."""
    maps = value if type(value) is tuple else ()
    return any(isinstance(m, Tensor) and m.dim() == 4 and m.shape[2] == m.shape[3] for m in maps)


def hand_out(module: nn.Module, args: tuple[Any, ...], output: Any, *, one: Callable[[Tensor, State], Tensor]) -> Any:
    """Forward hook on a transformers tower: ``one`` makes what is handed out of each of its token sequences.

    Raises ``ValueError`` where attention maps are asked for: theirs are rows and columns of fewer tokens.
    """
    values = tuple(output.values()) if isinstance(output, dict) else output
    if isinstance(values, tuple) and any(map(_reduced, values)) and any(map(_attentions, values)):
        raise ValueError(
            "output_attentions=True of a tower whose tokens are reduced gives maps over fewer tokens than the code "
            "around it may count on; call tr.unpatch for attention maps, or give tr.patch the tower itself"
        )

    def each(value: Any) -> Any:
        state = _reduced(value)
        if state is not None:
            return one(value, state)
        return tuple(each(v) for v in value) if type(value) is tuple else value

    if isinstance(output, dict):
        for key, value in output.items():
            if value is not None:
                output[key] = each(value)
        return output
    return each(output)


def as_all(x: Tensor, state: State, *, prefix: int) -> Tensor:
    return whole(x, state, prefix)


def as_keys(x: Tensor, state: State, *, prefix: int) -> Tensor:
    """Tokens for a cross-attention without a mask; see the module's page.

    Raises ``ValueError`` where some tokens are merged and others dropped, or more in one image than in another: no
    number of copies weighs those right.
    """
    x, state = complete(x, state)
    plan = full_plan(state)
    if plan is None or plan.is_identity:
        return x
    if isinstance(plan, Prune) and plan.valid is None:
        return x
    if bool((plan.sources() < 0).any()):
        raise ValueError(
            "the decoder attends to the tokens of this encoder without a mask, so that tokens can be "
            "merged, or dropped in equal numbers from every image, not both; choose a method that only merges (tome, "
            "pitome) or only drops (uniform)"
        )
    return plan.expand(x)


def attach_hands(tower: Tower, undo: Undo) -> None:
    """Hand the tokens of a patched ``tower`` over as ``tower.hands`` says."""
    module: Any = tower.module
    if tower.hands == "own":
        return
    inside, prefix = tower.hands == "inside", tower.prefix
    if inside:
        undo.hook(tower.blocks[-1], functools.partial(hand_over, prefix=prefix, keep=False))
        for norm in (
            "norm",
            "layernorm",
            "ln_post",
            "post_layernorm",
            "rms_norm",
        ):  # a norm of all tokens, by the name that the libraries use
            if isinstance(getattr(module, norm, None), nn.Module):
                undo.hook(getattr(module, norm), functools.partial(fill_again, prefix=prefix))
    if any(c.__module__.startswith("transformers.") for c in type(module).__mro__):
        one = as_keys if tower.hands == "keys" else as_all
        undo.hook(module, functools.partial(hand_out, one=functools.partial(one, prefix=prefix)))
    elif not inside:
        undo.hook(
            getattr(module, "norm", None) or module.transformer, functools.partial(hand_over, prefix=prefix, keep=True)
        )
        if hasattr(module, "ln_post"):
            undo.hook(module.ln_post, functools.partial(fill_again, prefix=prefix))
