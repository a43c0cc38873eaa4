"""A registered attention function for transformers models: it shows an adapter the queries, keys and values.

Attention modules of transformers 5 look their kernel up by a name in their config. An adapter gives each attention
module that it patches a copy of its config with our name (:func:`listen`), so models that share the config object
keep theirs, and hands every call a :class:`Call`. :func:`attend` fills it in and ends in the model's own
implementation, looked up at that moment: numerics and speed are stock, and ``model.set_attn_implementation`` works on
a patched model.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenreduce.adapters.encoders.joint import Windows
from tokenreduce.adapters.encoders.sizes import fold, folds
from tokenreduce.core.undo import Undo

__all__ = [
    "CALL", "NAME", "WATCH", "Call", "Seen", "attend", "called", "calling", "implementation", "is_causal", "listen",
    "softcap_of",
]  # fmt: skip

#: Our name among the attention implementations.
NAME = "tokenreduce"
#: Keyword under which attention modules that pass their kwargs on can carry a :class:`Call`.
CALL = "tokenreduce_call"
_STOCK = "_tokenreduce_stock"
#: Who is shown module, queries, keys and mask of every call, where modules hand nothing on to their attention.
WATCH: ContextVar[Callable[[Any, Tensor, Tensor, Any], None] | None] = ContextVar("tokenreduce_watch", default=None)
#: The call of an attention module that hands neither masks nor keywords on.
_calling: ContextVar[Call | None] = ContextVar("tokenreduce_calling", default=None)


class Seen(Exception):  # noqa: N818 - not an error
    """Ends a module's forward where its queries, keys and values are known."""


class Call:
    """One call of an attention module: what goes in besides the features, and what was seen.

    It travels as the module's ``attention_mask`` (which every module hands on untouched) or as keyword :data:`CALL`.

    Args:
        mask: the mask to use: the stock one, or a bias (B,1,1,N) to add to the logits, or
            :class:`~tokenreduce.adapters.encoders.joint.Windows` where frames share tokens.
        bias: whether ``mask`` is such a bias. It is cast to the queries' dtype, and implementations that take no
            additive mask (flash, flex) are replaced by sdpa for this call.
        record: keep queries, keys and values.
        rotate: ``(rotate_function, cos, sin)`` to rotate queries and keys here, after they were recorded; the module
            itself must then have been given empty tables.
        given: (B,H,N,N) the map to attend with, in place of queries and keys.
        only: raise :class:`Seen` once they are recorded, and attend to nothing.
        take: (B,K) keys and values to attend to, of those that the cache shows; ``mask`` and records are of these.

    Set :attr:`select` for a function of keys and values, asked once they are recorded, that returns which of them to
    attend to, with their mask.
    """

    __slots__ = (
        "bias", "given", "keys", "mask", "only", "queries", "reached", "record", "rotate", "rotated", "select", "take",
        "values",
    )  # fmt: skip

    def __init__(
        self,
        mask: Any = None,
        *,
        bias: bool = False,
        record: bool = False,
        rotate: tuple[Callable[..., tuple[Tensor, Tensor]], Tensor, Tensor] | None = None,
        only: bool = False,
        take: Tensor | None = None,
        given: Tensor | None = None,
    ) -> None:
        self.mask, self.bias, self.record, self.rotate, self.only = mask, bias, record, rotate, only
        self.take, self.given = take, given
        self.select: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Any]] | None = None
        #: Whether the attention function got it; a module with other code than its library's may not hand it on.
        self.reached = False
        self.queries: Tensor | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.rotated: tuple[Tensor, Tensor] | None = None

    def note(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """What the attention function was given, (B,H,N,d) each."""
        self.queries, self.keys, self.values = queries, keys, values


@contextmanager
def calling(call: Call | None) -> Iterator[None]:
    """Let :func:`attend` find ``call`` beside the attention module, which hands nothing on."""
    token = _calling.set(call)
    try:
        yield
    finally:
        _calling.reset(token)


def called() -> Call | None:
    """The call that :func:`calling` laid beside the attention module that runs."""
    return _calling.get()


@dataclass(frozen=True)
class _Stock:
    """What a patched attention module would use: the config it shares with its model, and its eager function."""

    config: Any
    eager: Callable[..., Any]


class _Unpatched:
    """An attention module with the config of its model: flash attention loads its kernel by the name in there."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function: (B,H,N,d) each to (B,N,H,d) and whatever weights the stock implementation returns."""
    if (watch := WATCH.get()) is not None:
        watch(module, query, key, attention_mask)
    stock: _Stock = module.__dict__[_STOCK]
    name = stock.config._attn_implementation
    call = attention_mask if isinstance(attention_mask, Call) else kwargs.pop(CALL, None)
    if call is None:
        call = _calling.get()
    if call is not None:
        attention_mask, call.reached = call.mask, True
        if call.take is not None:
            where = call.take[:, None, :, None]
            key, value = (t.gather(2, where.expand(-1, t.shape[1], -1, t.shape[-1])) for t in (key, value))
        if call.record:
            call.note(query, key, value)
        if call.only:
            raise Seen
        if call.select is not None:
            key, value, attention_mask = call.select(key, value)
        if call.given is not None:
            rows = F.dropout(call.given.to(value.dtype), kwargs.get("dropout") or 0.0, module.training)
            return (rows @ value).transpose(1, 2).contiguous(), None
        if call.rotate is not None:
            turn, cos, sin = call.rotate
            query, key = turn(query, key, cos, sin)
            call.rotated = (query, key)
        if call.bias and attention_mask is not None:
            if name != "eager" and folds(module, attention_mask):
                return _folded(module, name, query, key, value, attention_mask, kwargs)
            if not isinstance(attention_mask, Windows):
                attention_mask = attention_mask.to(query.dtype)
            if name not in ("sdpa", "eager"):
                name = "sdpa"
    stock_function = ALL_ATTENTION_FUNCTIONS.get_interface(name, stock.eager)
    if "flash" in name:
        module = _Unpatched(module, stock.config)  # type: ignore[assignment]
    compute = functools.partial(stock_function, module, **kwargs)
    if isinstance(attention_mask, Windows):
        return attention_mask.attend(compute, query, key, value), None
    return compute(query, key, value, attention_mask)


def _folded(
    module: nn.Module, name: str, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The same with ``bias`` inside the keys, by an implementation that may take no mask."""
    stock: _Stock = module.__dict__[_STOCK]
    made = fold(query, key, value, bias, kwargs.get("scaling"))
    if "flash" in name:
        module = _Unpatched(module, stock.config)  # type: ignore[assignment]
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, stock.eager)
    more = {**kwargs, "scaling": made.scale, "is_causal": False}
    out, weights = function(module, made.q, made.k, made.v, None, **more)
    return out[..., : made.width], weights


def implementation(module: Any) -> str:
    """Name of the implementation that an attention module uses, whether we listen to it or not."""
    stock: _Stock | None = vars(module).get(_STOCK)
    return str((module.config if stock is None else stock.config)._attn_implementation)


def is_causal(module: Any) -> bool:
    """What attention without a mask means; PaliGemma's Gemma sees everything then."""
    return bool(getattr(module, "is_causal", True))


def softcap_of(module: Any) -> float | None:
    """Where attention logits are capped (Gemma 2); None under sdpa, which computes without."""
    return None if implementation(module) == "sdpa" else getattr(module, "attn_logit_softcapping", None)


def listen(module: nn.Module, undo: Undo, copies: dict[int, Any]) -> None:
    """Let ``module`` call :func:`attend`. ``copies`` keeps one copied config per shared one."""
    config: Any = module.config
    if id(config) not in copies:
        mine = copy.copy(config)
        # The property's setter would reach into sub-configs, which the copy shares with the model.
        mine.__dict__["_attn_implementation_internal"] = NAME
        copies[id(config)] = mine
    eager = sys.modules[type(module).__module__].eager_attention_forward
    undo.set(module, _STOCK, _Stock(config, eager))
    undo.set(module, "config", copies[id(config)])


AttentionInterface.register(NAME, attend)
# Without a mask function of this name a model would silently run without any mask.
AttentionMaskInterface.register(NAME, sdpa_mask)
