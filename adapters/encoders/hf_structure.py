"""Layers of transformers vision encoders that compute by a :class:`Recipe`, which is read from the stock layer
(:mod:`tokenreduce.adapters.encoders.hf_reading`), so that no family needs a class of its own."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenreduce.adapters.encoders.ask import Attended
from tokenreduce.adapters.encoders.hf_attention import CALL, Call, Seen, called, calling, listen
from tokenreduce.adapters.encoders.hf_layers import _SEEN, Context, _Layer
from tokenreduce.adapters.encoders.sizes import note_form
from tokenreduce.adapters.encoders.state import State
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched, refuse_pre_hooks
from tokenreduce.core.undo import Undo

__all__ = [
    "PLACES",
    "QUERIES",
    "RECIPE",
    "ROTARY",
    "SHARED",
    "BiasedLayer",
    "Recipe",
    "StructuredLayer",
    "core_of",
    "hear",
    "projects",
]

#: Where a patched layer keeps its recipe.
RECIPE = "_tokenreduce_recipe"
#: Arguments of layers that say where tokens stand: rotary tables, and the places themselves.
ROTARY, PLACES = "position_embeddings", "position_mask"
#: Names of what makes queries.
QUERIES = ("q_proj", "query", "qkv", "q")
#: The name of biases by relative position, of layers and among their arguments.
SHARED = "relative_position_bias"


@dataclass(frozen=True)
class Recipe:
    """How a layer computes: ``x + behind(attention(before(x)))``, then ``y + second(y)``.

    Steps are pairs of what is done and with which part of the layer: "call" a child on what was last computed, "times"
    a parameter, "add" the branch's input (or add "onto" it, which is laid out as it), "close" a child that is given it
    and adds it itself.

    Args:
        arguments: names of the layer's arguments behind its tokens, in order.
        keyword: the name under which the attention gets its tokens, None where by position.
        mask: how it gets ``attention_mask``: "keyword", "position", or None where it takes none.
        passed: which argument of the layer goes to the attention under which name.
        rest: whether other keywords go there, too.
        carries: how a call reaches the attention function: as "mask", as "keyword", or beside it ("context").
        several: how many values the layer returns behind its tokens in a tuple, None where it returns the tokens alone.
        turn: how the attention rotates by its tables: "halves" or "pairs", None where it gets none.
        biased: whether a bias by relative position is added to its logits.
        flat: whether its parts run on rows (P,C) without a batch.
    """

    before: tuple[tuple[str, str], ...]
    attention: str
    behind: tuple[tuple[str, str], ...]
    second: tuple[tuple[str, str], ...]
    arguments: tuple[str, ...] = ()
    keyword: str | None = None
    mask: str | None = None
    passed: tuple[tuple[str, str], ...] = ()
    rest: bool = False
    carries: str = "context"
    several: int | None = None
    turn: str | None = None
    biased: bool = False
    flat: bool = False


# -- the layer ---------------------------------------------------------------------------------------------------------
class StructuredLayer(_Layer):
    """A layer that computes by its recipe."""

    _tokenreduce_recipe: Recipe

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        recipe = self._tokenreduce_recipe
        kwargs = {**dict(zip(recipe.arguments, args, strict=False)), **kwargs}
        mask = kwargs.pop("attention_mask", None)
        if recipe.several is not None and kwargs.get("output_attentions"):
            raise ValueError("output_attentions=True is not for a patched model of this family; call tr.unpatch first")
        out = self._started(hidden_states, mask, kwargs)
        return out if recipe.several is None else (out, *(None,) * recipe.several)

    def _started(self, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        return _Layer.forward(self, x, mask, **kwargs)

    def _core(self) -> tuple[Any, Any]:
        attn = getattr(self, self._tokenreduce_recipe.attention)
        return attn, core_of(attn)

    def _steps(self, steps: tuple[tuple[str, str], ...], y: Tensor, x: Tensor) -> Tensor:
        for kind, name in steps:
            if kind == "call":
                y = getattr(self, name)(y)
            elif kind == "times":
                y = getattr(self, name) * y
            elif kind == "close":
                y = getattr(self, name)(y, x)
            else:
                y = y + x if kind == "add" else x + y
        return y

    def _normed(self, x: Tensor) -> Tensor:
        return self._steps(self._tokenreduce_recipe.before, x, x)

    def _residual(self, x: Tensor, out: Tensor) -> Tensor:
        return self._steps(self._tokenreduce_recipe.behind, out, x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self._steps(self._tokenreduce_recipe.second, x, x)

    def _call(self, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        recipe = self._tokenreduce_recipe
        attn, core = self._core()
        call = mask if isinstance(mask, Call) else None
        y = self._normed(x)
        given = {new: kwargs[old] for old, new in recipe.passed if old in kwargs}
        if recipe.rest:
            given |= {k: v for k, v in kwargs.items() if k not in recipe.arguments}
        inside = False
        if call is not None:
            refuse_own(attn)
            refuse_own(core)
            if recipe.carries == "keyword":
                mask, given[CALL] = None, call
            elif recipe.carries == "context":
                mask, inside = None, True
        args: tuple[Any, ...] = () if recipe.keyword else (y,)
        if recipe.keyword:
            given[recipe.keyword] = y
        if recipe.mask == "position":
            args = (*args, mask)
        elif recipe.mask == "keyword":
            given["attention_mask"] = mask
        if not inside:
            got = attn(*args, **given)
        else:
            with calling(call):
                got = attn(*args, **given)
        if call is not None and not call.reached:
            raise RuntimeError(
                f"{type(attn).__name__} ran other code than its library's, which ignored token sizes; call tr.unpatch, "
                "undo what replaced it, and patch again"
            )
        return got[0] if isinstance(got, tuple) else got

    def _project(self, x: Tensor, context: Any) -> Attended:
        for module in self._core():
            refuse_pre_hooks(module)
        call = self._ask(context, None, record=True, only=True)
        with contextlib.suppress(Seen):
            self._call(x, call, self._neutral(context))
        return self._seen(x, call, context)

    # -- rotary embeddings
    def _context(self, context: Any, state: State) -> Any:
        """Every token that is left keeps the rotary angles of its representative."""
        context = super()._context(context, state)
        if state.origin is None:
            return context
        if PLACES in self._tokenreduce_recipe.arguments:
            return context._replace(kwargs={**context.kwargs, PLACES: state.origin})
        tables = context.kwargs.get(ROTARY)
        if tables is None:
            return context
        front = state.entry - tables[0].shape[-2]  # tokens in front that are not turned
        rows = state.origin[:, front:] - front
        tables = tuple(t.reshape(-1, t.shape[-1])[rows].unsqueeze(1) for t in tables)  # (B,1,K,d)
        return context._replace(kwargs={**context.kwargs, ROTARY: tables})

    def _turns(self, context: Any) -> bool:
        return not context.plain and context.kwargs.get(ROTARY) is not None

    def _ask(self, context: Any, bias: Tensor | None, **more: Any) -> Call:
        call = Call(context.mask if context.plain else bias, bias=not context.plain, **more)
        if self._turns(context):
            turn = turn_halves if self._tokenreduce_recipe.turn == "halves" else turn_pairs
            call.rotate = (turn, *context.kwargs[ROTARY])
        return call

    def _neutral(self, context: Any) -> dict[str, Any]:
        """The arguments of the attention: tables that turn nothing where the attention function turns by itself, since
        a model has one table for all samples."""
        if not self._turns(context):
            return context.kwargs
        cos, sin = context.kwargs[ROTARY]
        return {**context.kwargs, ROTARY: (torch.ones_like(cos[0, 0]), torch.zeros_like(sin[0, 0]))}

    def _seen(self, out: Tensor, call: Call, context: Any) -> Attended:
        q, k = (call.queries, call.keys) if call.rotated is None else call.rotated
        return Attended(out, q, k, call.values, table=context.table)

    def _attention(self, x: Tensor, bias: Tensor | None, needs: tuple[str, ...], context: Any) -> Attended:
        record = not _SEEN.isdisjoint(needs)
        if context.plain and not record:
            return Attended(self._call(x, context.mask, context.kwargs))
        call = self._ask(context, bias, record=record)
        return self._seen(self._call(x, call, self._neutral(context)), call, context)

    def _attend_with(self, x: Tensor, attention: Tensor, context: Any) -> Attended:
        call = Call(record=True, given=attention)
        return Attended(self._call(x, call, self._neutral(context)), values=call.values)


def turn_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the last tokens of (B,H,N,d), as many as tables have rows; the second half of d goes with the first."""

    def half(t: Tensor) -> Tensor:
        one, two = t.chunk(2, -1)
        return torch.cat([-two, one], -1)

    return _turn(q, cos, sin, half), _turn(k, cos, sin, half)


def turn_pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same where neighbours in d go together."""

    def pairs(t: Tensor) -> Tensor:
        return torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2)

    return _turn(q, cos, sin, pairs), _turn(k, cos, sin, pairs)


def _turn(t: Tensor, cos: Tensor, sin: Tensor, other: Any) -> Tensor:
    front = t.shape[-2] - cos.shape[-2]
    turned = t[..., front:, :].float()
    turned = turned * cos.float() + other(turned) * sin.float()
    return torch.cat([t[..., :front, :], turned.to(t.dtype)], -2) if front else turned.to(t.dtype)


class BiasedLayer(StructuredLayer):
    """A layer whose attention has a bias by relative position (BEiT, Data2Vec): every token that is left keeps the
    biases of its representative, as a query and as a key.

    The bias is the layer's own, the model's (which arrives as mask or argument), or both.
    """

    def _started(self, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        return self._run(x, Context(mask, kwargs))

    def _context(self, context: Any, state: State) -> Any:
        context = super()._context(context, state)
        owner, module = self._owner()
        reducer = self._tokenreduce_site.reducer
        if context.plain and owner is not self and (reducer is None or not reducer.required()):
            return context  # the attention module adds its bias by itself
        table = context.mask if "attention_mask" in self._tokenreduce_recipe.arguments else context.kwargs.get(SHARED)
        if module is not None:
            rows, cols = context.kwargs["resolution"]
            patch = self._core()[1].config.patch_size
            flag = context.kwargs.get("interpolate_pos_encoding", False)
            own = module((rows // patch, cols // patch), flag, dim_size=state.entry)
            table = own if table is None else own + table
        if table is None:
            return context
        if state.origin is not None:
            one, two = state.origin.unsqueeze(2), state.origin.unsqueeze(1)
            table = table[0][:, one, two].transpose(0, 1)  # (B,H,K,K)
        return context._replace(table=table, mask=table if context.plain and owner is self else context.mask)

    def _owner(self) -> tuple[Any, Any]:
        """The module that has a bias of its own, and that bias."""
        core = self._core()[1]
        if getattr(core, "has_relative_position_bias", None) is None:
            return self, getattr(self, SHARED, None)
        return core, core.relative_position_bias if core.has_relative_position_bias else None

    def _ask(self, context: Any, bias: Tensor | None, **more: Any) -> Call:
        if not context.plain and context.table is not None:
            bias = context.table if bias is None else bias + context.table
        return super()._ask(context, bias, **more)


class Projected:
    """Mixin of attention modules that do not ask transformers' registry for their function (BLIP, Data2Vec): with a
    :class:`Call` as a keyword or beside them they show their queries, keys and values, and attend with its bias."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.pop(CALL, None) or called()
        if call is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        me: Any = self
        call.reached = True
        q, k, v = heads_of(me, hidden_states)
        if call.record:
            call.queries, call.keys, call.values = q, k, v
        if call.only:
            raise Seen
        if not call.bias and call.given is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        drop = _dropout(me) if me.training else 0.0
        if call.given is not None:
            out = F.dropout(call.given.to(v.dtype), drop) @ v
        else:
            mask = None if call.mask is None else call.mask.to(q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        out = out.transpose(1, 2).flatten(2)
        last = next((getattr(me, n) for n in ("projection", "proj", "out_proj", "o_proj") if hasattr(me, n)), None)
        return (out if last is None else last(out), None)


def _dropout(attn: Any) -> float:
    drop = getattr(attn, "dropout", 0.0)
    return float(drop.p if isinstance(drop, nn.Dropout) else drop)


def heads_of(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B,H,N,d) by the projections of an attention module."""
    heads = attn.num_heads if hasattr(attn, "num_heads") else attn.num_attention_heads
    if hasattr(attn, "qkv"):
        q, k, v = attn.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
    names = ("q_proj", "k_proj", "v_proj") if hasattr(attn, "q_proj") else ("query", "key", "value")
    q, k, v = (getattr(attn, n)(x).unflatten(-1, (heads, -1)).transpose(1, 2) for n in names)
    return q, k, v


def hear(core: nn.Module, undo: Undo, copies: dict[int, Any]) -> None:
    """Let an attention module that is in no table take calls."""
    refuse_own(core)
    refuse_patched(type(core))
    if hasattr(sys.modules[type(core).__module__], "eager_attention_forward") and hasattr(core, "config"):
        listen(core, undo, copies)
        note_form(core, undo)
    else:
        undo.mix_in(core, Projected)


def core_of(attn: Any) -> Any:
    """The module with the projections: some attention modules hold another one."""
    return attn if projects(attn) else getattr(attn, "attention", attn)


def projects(module: Any) -> bool:
    return any(isinstance(getattr(module, n, None), nn.Module) for n in QUERIES)
