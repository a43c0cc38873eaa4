"""Hooks around transformers vision encoders that give what stands behind a reduced tower the tokens it expects.

Attention pooling heads count tokens by their sizes. Pooling that lives outside of the tower (classifiers that average
tokens) and dense outputs (backbones, masked image modelling) are served through the tower's output: see
:func:`regroup` and :func:`dense_states`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.rebuilding import complete
from tokenreduce.adapters.encoders.state import (
    State,
    expand_patches,
    known,
    log_size,
    pool_mean,
    set_state,
    state_of,
)

__all__ = ["dense_norm", "dense_states", "forget_mask", "regroup", "weigh_keys", "wish"]

_WISH = "_tokenreduce_wish"


def _reduced(x: Any) -> State | None:
    """The state of tokens on which a plan has acted, else None."""
    state = state_of(x)
    return state if state is not None and state.acted is not None else None


def _acted(x: Any, what: str) -> State | None:
    """The same. Raises ``RuntimeError`` for a tensor that lost what its tokens are."""
    state = known(x, what)
    return state if state is not None and state.acted is not None else None


def forget_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, reduces: bool) -> Any:
    """Pre-hook on an attention pooling head: SigLIP2 hands it the mask of the original tokens. ``reduces`` is whether
    its tower has a method that does anything.

    Raises ``RuntimeError`` for tokens that may be reduced and have lost their sizes.
    """
    found = _acted(args[0], type(module).__name__) if reduces else _reduced(args[0])
    return None if found is None else (args[:1], {})


def weigh_keys(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook on the ``nn.MultiheadAttention`` inside such a head: log sizes as key bias, -inf where no token is."""
    state = _reduced(args[1])
    if state is None or state.size is None:
        return None
    return args, {**kwargs, "key_padding_mask": log_size(state, 0, args[1].dtype)}


def wish(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook on a model around a tower: marks its pixels, so that the tower's output is made for this model.

    The mark is on a view of the caller's tensor, and a direct call of the tower carries none.
    """
    given = args[0] if args else kwargs.get("pixel_values")
    if not isinstance(given, Tensor):
        return None
    pixels = given.view_as(given)
    setattr(pixels, _WISH, True)
    return ((pixels, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": pixels})


def regroup(module: nn.Module, args: tuple[Any, ...], output: Any, *, how: str, prefix: int) -> Any:
    """Forward hook on a tower whose model averages its tokens (``how="mean"``) or makes a picture of them ("dense").

    ``last_hidden_state`` is given its original number of tokens back. For a mean every patch holds the mean over the
    tokens that are left, each counted by its size: whatever mean the model takes, with or without a mask, is that
    one. For dense outputs merged tokens are copied and dropped ones are zero.
    """
    if not getattr(args[0], _WISH, False):
        return None
    x = output.last_hidden_state
    state = _acted(x, f"the {how} of all tokens")
    if state is None:
        return None
    patches = x[:, prefix:]
    if how == "dense":
        patches = expand_patches(patches, state, prefix)
    else:
        mean = patches.mean(1) if state.size is None else pool_mean(patches, state.size[:, prefix:])
        patches = mean.unsqueeze(1).expand(-1, state.entry - prefix, -1)
    output.last_hidden_state = torch.cat([x[:, :prefix], patches], 1)
    return output


def _dense(x: Tensor, state: State | None, prefix: int) -> Tensor:
    if state is None:
        return x
    return torch.cat([x[:, :prefix], expand_patches(x[:, prefix:], state, prefix)], 1)


def _completed(h: Tensor) -> Tensor:
    state = state_of(h)
    if state is None or state.aside is None:
        return h
    return set_state(*complete(h, state))


def dense_states(module: nn.Module, args: tuple[Any, ...], output: Any, *, prefix: int, normed: str) -> Any:
    """Forward hook on a backbone's encoder: its hidden states get all tokens back, zero where dropped.

    Those that the backbone sends through its final norm (``normed``: "all", "last" or "none") are expanded behind
    it, by :func:`dense_norm`, so that dropped tokens are zero in every feature map.
    """
    states = output.hidden_states
    if states is None:
        return None
    # What was set aside is rebuilt in front of a norm; features behind it could not be.
    output.hidden_states = states = tuple(None if h is None else _completed(h) for h in states)
    if normed == "all":
        return None
    last = len(states) - 1
    output.hidden_states = tuple(
        h if h is None or (i == last and normed == "last") else _dense(h, _acted(h, "the feature map"), prefix)
        for i, h in enumerate(states)
    )
    return output


def dense_norm(module: nn.Module, args: tuple[Any, ...], output: Tensor, *, prefix: int) -> Tensor:
    """Forward hook on a backbone's final norm; see :func:`dense_states`."""
    return _dense(output, _acted(args[0], "the feature map"), prefix)
