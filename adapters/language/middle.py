"""Plans that are made between the attention and the MLP of a decoder layer, for methods that need ``middle``.

A layer's residual stream is a local variable of its forward, so the tokens that go cannot leave there. Instead a
pre-hook on the norm in front of the MLP makes the plan and hands on the tokens that are left, so that the MLP sees only
these; a hook behind it puts its result by and gives the layer zeros, and the next layer starts with what was put by.
"""

from __future__ import annotations

import copy
import functools
import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_attention import CALL, Call
from tokenreduce.adapters.language.generation import KEYWORD, Forward, Generation
from tokenreduce.adapters.language.records import LeftInside, Recorded
from tokenreduce.adapters.language.reduce import Chooser
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["attach_middle", "is_middle", "taken"]


@dataclass
class Open:
    """A layer that is under way: the generation, and what its attention saw. ``x`` (B,N,C) is the stream in front of
    the MLP and ``left`` (B,K,C) what is left of it, once the plan is made and drops something."""

    generation: Generation
    call: Call | None
    x: Tensor | None = None
    left: Tensor | None = None


_OPEN: ContextVar[Open | None] = ContextVar("tokenreduce_open_layer", default=None)
#: Whether the layer that is under way was called for its gradient.
_LEARNS: ContextVar[bool] = ContextVar("tokenreduce_layer_learns", default=False)


def is_middle(reducer: Reducer | None, index: int) -> bool:
    """Whether ``reducer``, which acts before layer ``index``, does so in the middle of the layer before."""
    return reducer is not None and index > 0 and "middle" in reducer.required()


def attach_middle(layer: Any, chooser: Chooser, undo: Undo) -> None:
    """Let a method, which acts before the next layer, do so in the middle of ``layer``.

    Raises ``ValueError`` for a layer without a norm and an MLP of known names, or that does more than add the MLP to
    the stream (a factor, another norm behind).
    """
    name = chooser.reducer.name
    before = getattr(layer, "pre_feedforward_layernorm", getattr(layer, "post_attention_layernorm", None))
    behind = getattr(layer, "post_feedforward_layernorm", getattr(layer, "mlp", None))
    if not isinstance(before, nn.Module) or not isinstance(behind, nn.Module):
        raise ValueError(
            f"{name} acts between attention and MLP, which {type(layer).__name__} does not have under the "
            f"names post_attention_layernorm and mlp"
        )
    if not _adds(layer, before, behind):
        raise ValueError(
            f"{name} acts between attention and MLP, and {type(layer).__name__} does more behind that than to "
            f"add the MLP to its stream; choose a method that acts between layers, such as fastv or pyramiddrop"
        )
    undo.pre_hook(layer, _note_gradient)
    undo.pre_hook(layer.self_attn, _open)
    undo.pre_hook(before, functools.partial(_choose, layer=layer, chooser=chooser))
    undo.hook(behind, functools.partial(_put_by, index=chooser.index))


class _Stub(nn.Module):
    """Stands for a part of a layer: remembers what it was given and returns what it is told to."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.given = answer, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given = args[0] if args else None
        return self.answer


def _adds(layer: Any, before: nn.Module, behind: nn.Module) -> bool:
    """Whether a layer returns what enters the norm ``before`` plus what ``behind`` gives: tried on two tokens, with
    stubs for the parts, so that no large matrix is multiplied."""
    weight = next((p for p in before.parameters() if p.is_floating_point()), None)
    width = layer.self_attn.config.hidden_size
    where: dict[str, Any] = {} if weight is None else {"device": weight.device, "dtype": weight.dtype}
    if weight is not None and weight.is_meta:  # nothing can be computed there yet
        return True
    x, a, m, y = (torch.linspace(-1, i + 1, 2 * width, **where).view(1, 2, width) for i in range(4))
    attention, norm, end = _Stub((a, None)), _Stub(m), _Stub(y)
    trial = copy.copy(layer)
    stubs = {id(layer.self_attn): attention, id(before): norm, id(behind): end}
    trial._modules = {n: stubs.get(id(p), p) for n, p in layer._modules.items()}
    if behind is not getattr(layer, "mlp", None):  # a norm follows the MLP
        trial._modules["mlp"] = _Stub(m)
    asked = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    given = {p.name: None for p in asked if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    try:
        with torch.no_grad():
            out = type(layer).forward(trial, x, **given)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    out = out[0] if isinstance(out, tuple) else out
    return norm.given is not None and torch.equal(out, norm.given + y)


def _note_gradient(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook on the layer, which runs outside of its checkpoint, and inside in earlier releases."""
    inside = type(layer).__call__ is not nn.Module.__call__
    _LEARNS.set(args[0].requires_grad if inside else torch.is_grad_enabled())


def _check_gradient(layer: Any, method: str) -> None:
    """Raise ``RuntimeError`` where a layer's gradient would get lost: what is put by passes by what reentrant
    checkpointing gives to the next layer."""
    if layer.training and _LEARNS.get() and not torch.is_grad_enabled():
        raise RuntimeError(
            f"{method} drops tokens in the middle of a layer, where reentrant checkpointing loses the gradient; call "
            f"model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={{'use_reentrant': False}})"
        )


def _open(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook on the attention, which gets the keyword also where the layer runs again for its gradient."""
    forward: Forward | None = kwargs.get(KEYWORD)
    _OPEN.set(None if forward is None or not forward.prefill else Open(forward.generation, kwargs.get(CALL)))


def taken(generation: Generation, index: int) -> Tensor | None:
    """(B,K,C) what enters layer ``index``, where the plan in the middle of the layer before dropped something."""
    # Kept where a layer may run again for its gradient.
    state = generation.state
    left = state.get(LeftInside, index) if torch.is_grad_enabled() else state.pop(LeftInside, index)
    return None if left is None else left.x


def _choose(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, layer: Any, chooser: Chooser
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on the norm in front of the MLP."""
    now = _OPEN.get()
    if now is None:
        return None
    now.generation.state.pop(Recorded, chooser.index - 1)
    x = args[0]
    y = chooser.reduce(x, now.generation, layer, now.call)
    if y is x:
        _OPEN.set(None)
        return None
    _check_gradient(layer, chooser.reducer.name)
    now.x, now.left = x, y
    return (y, *args[1:]), kwargs


def _put_by(module: nn.Module, args: tuple[Any, ...], output: Tensor, *, index: int) -> Tensor | None:
    """Hook behind the MLP, or behind the norm that follows it."""
    now = _OPEN.get()
    if now is None or now.left is None or now.x is None:
        return None
    _OPEN.set(None)
    now.generation.state.put(LeftInside(now.left + output), index)
    return torch.zeros_like(now.x)
