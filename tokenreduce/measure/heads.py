"""Which KV heads of a language model look far back, measured: RazorAttention's scores and DuoAttention's stand-in."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.algorithms.head_table import HeadTable
from tokenreduce.core.undo import Undo, reducers_of

__all__ = ["echo_and_induction", "measure_heads", "on_the_fly"]

#: The probe of RazorAttention: so many random tokens, so often, and their ids.
TOKENS, REPEATS, IDS = 2500, 4, (10000, 12500)
#: Positions over which DuoAttention's stand-in spreads a mean key.
POSITIONS = 500
#: Rows of attention that are computed at once.
_BLOCK = 256


@torch.no_grad()
def measure_heads(
    model: nn.Module,
    *,
    tokens: int | None = None,
    repeats: int = REPEATS,
    texts: Sequence[Tensor] = (),
    seed: int = 0,
) -> HeadTable:
    """The head table of a transformers language model, or of the one inside an image/video language model.

    Args:
        model: unpatched, in eval mode.
        tokens, repeats: random tokens in a block, and how often it is repeated; 2500 and 4 as published, fewer tokens
            by default where the model has fewer positions.
        texts: token ids (S,) of texts, on which ``on_the_fly`` is measured; without any it is the random block's.
        seed: of the random tokens.

    Echo and induction are those of :func:`echo_and_induction`. Raises ``ValueError`` for a patched model, one whose
    parts are not found, an encoder-decoder, and numbers out of range.
    """
    if reducers_of(model):
        raise ValueError("heads are measured on the model as it is; call tr.unpatch(model) first")
    parts = _parts(model)
    ids, probe = _probe(parts, tokens, repeats, seed)
    scores: dict[str, list[tuple[float, ...] | None]] = {"echo": [], "induction": [], "on_the_fly": []}
    block = probe["tokens"]
    plain = [_plain_means(parts, text.to(ids)) for text in texts]
    seen = _Seen(block, repeats, int(probe["front"]), plain=not texts)
    _run(parts, ids, seen)
    for i in range(len(parts.layers)):
        got = seen.layers.get(i)
        if got is None:
            for rows in scores.values():
                rows.append(None)
            continue
        means = [got.means] if got.means is not None else [p[i] for p in plain]
        areas = [on_the_fly(q, k, got.turn, got.scale) for q, k in means]
        for name, row in (("echo", got.echo), ("induction", got.induction), ("on_the_fly", torch.stack(areas).mean(0))):
            scores[name].append(tuple(float(v) for v in row))
    first = next((row for row in scores["echo"] if row is not None), None)
    if first is None:
        raise ValueError(f"no layer of {type(model).__name__} has attention over all earlier tokens that can be seen")
    probe["texts"] = [len(text) for text in texts]
    return HeadTable(
        type(model).__name__, len(parts.layers), len(first), {name: tuple(rows) for name, rows in scores.items()}, probe
    )


def echo_and_induction(
    rows: Callable[[int, int], Tensor], front: int, block: int, repeats: int
) -> tuple[Tensor, Tensor]:
    """(H,) echo and induction scores of H heads, by RazorAttention (arXiv 2407.15891).

    ``rows(start, stop)`` are softmax rows (H,stop-start,N) of a prompt of ``front`` tokens and ``repeats`` times the
    same ``block`` tokens. Echo is the attention of a token to its earlier occurrences, induction that to the tokens
    behind these, each summed over the occurrences and averaged over the tokens of all repetitions but the first.
    """
    first, end = front + block, front + block * repeats
    totals: list[Tensor] = []
    for start in range(first, end, _BLOCK):
        stop = min(start + _BLOCK, end)
        part = rows(start, stop)
        at = torch.arange(start, stop, device=part.device)
        echo, induction = part.new_zeros(part.shape[0]), part.new_zeros(part.shape[0])
        for m in range(1, repeats):
            earlier = at - m * block
            there = earlier >= front
            for offset, into in ((0, echo), (1, induction)):
                index = (earlier + offset).clamp(min=0).view(1, -1, 1).expand(part.shape[0], -1, 1)
                into += (part.gather(2, index).squeeze(-1) * there).sum(1)
        totals.append(torch.stack([echo, induction]))
    mean = torch.stack(totals).sum(0) / (end - first)
    return mean[0], mean[1]


def on_the_fly(query: Tensor, key: Tensor, turn: Callable[[Tensor], Tensor], scale: float) -> Tensor:
    """(Hkv,) what stands for DuoAttention's trained gates in kvpress: how even a head's attention is over positions.

    ``query`` (H,d) and ``key`` (Hkv,d) are means over a text before rotation; ``turn`` rotates (H,1,d) to positions 0
    to P-1, (H,P,d). The mean query at the last position attends to the mean key at all; the score is the area under
    the cumulated attention, averaged over the query heads of a KV head: 1/2 for even attention, near 0 for the last
    positions alone.
    """
    groups = query.shape[0] // key.shape[0]
    at = turn(query.float()[:, None])[:, -1]
    keys = turn(key.float()[:, None]).repeat_interleave(groups, 0)
    weights = ((keys @ at[..., None]).squeeze(-1) * scale).softmax(-1)
    return weights.cumsum(-1).mean(-1).unflatten(0, (-1, groups)).mean(1)


# -- the model -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Parts:
    """The language model inside a model: what takes ids, and its decoder layers."""

    text: Any
    layers: tuple[Any, ...]
    config: Any


def _parts(model: nn.Module) -> _Parts:
    from tokenreduce.adapters.language.find import find

    found = find(model)
    if found is not None:
        config: Any = found.text.config
        return _Parts(found.text, found.layers, config)
    whole: Any = model
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is no decoder of transformers; heads are measured on causal language models and "
            f"on image/video language models"
        )
    text = whole.get_decoder() if hasattr(whole, "get_decoder") else getattr(whole, "model", None)
    layers = tuple(getattr(text, "layers", ()))
    if not layers or not any(hasattr(layer, "self_attn") for layer in layers):
        raise ValueError(f"{type(model).__name__} has no decoder layers with a .self_attn, whose heads are measured")
    return _Parts(text, layers, getattr(text, "config", config))


def _probe(parts: _Parts, tokens: int | None, repeats: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """(1,N) ids: a first token, and a block of random ones, repeated; and what a table says about it."""
    if repeats < 2:
        raise ValueError(f"repeats is an int >= 2, not {repeats!r}: scores are of the second block and those behind it")
    longest = getattr(parts.config, "max_position_embeddings", None) or math.inf
    most = int(min(TOKENS, (longest - 1) // repeats))
    block = most if tokens is None else tokens
    if block < 2 or block * repeats + 1 > longest:
        raise ValueError(
            f"a block of {block} tokens {repeats} times is too {'short' if block < 2 else 'long'} for a model of "
            f"{longest} positions; give tokens from 2 to {most}"
        )
    vocabulary = int(parts.text.get_input_embeddings().num_embeddings)
    special = set(_special(parts.config))
    low, high = IDS if vocabulary >= IDS[1] else (0, vocabulary)
    pool = torch.tensor([i for i in range(low, high) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    if len(pool) >= block:
        drawn = pool[torch.randperm(len(pool), generator=generator)[:block]]
    else:
        drawn = pool[torch.randint(len(pool), (block,), generator=generator)]
    start = next((i for name in ("bos_token_id", "eos_token_id") for i in _ids(parts.config, name)), None)
    front = torch.tensor([] if start is None else [start], dtype=torch.long)
    device = parts.text.get_input_embeddings().weight.device
    probe = {"tokens": block, "repeats": repeats, "front": len(front), "ids": [low, high], "seed": seed}
    return torch.cat([front, drawn.repeat(repeats)])[None].to(device), probe


def _ids(config: Any, name: str) -> list[int]:
    value = getattr(config, name, None)
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, int) and v >= 0]


def _special(config: Any) -> Iterator[int]:
    for name in vars(config):
        if name.endswith(("_token_id", "_token_index")):
            yield from _ids(config, name)


# -- what is seen of a forward ---------------------------------------------------------------------------------------
@dataclass
class _Layer:
    """What was measured in one layer: (Hkv,) scores, the means (H,d), (Hkv,d) of queries and keys before rotation,
    how vectors are rotated, and the factor of the logits."""

    echo: Tensor
    induction: Tensor
    means: tuple[Tensor, Tensor] | None
    turn: Callable[[Tensor], Tensor]
    scale: float


@dataclass
class _Seen:
    block: int
    repeats: int
    front: int
    plain: bool
    layers: dict[int, _Layer] = field(default_factory=dict)

    def take(self, index: int, attention: Any, call: Any, plain: Any, tables: tuple[Tensor, Tensor]) -> None:
        scale = float(getattr(attention, "scaling", None) or call.queries.shape[-1] ** -0.5)
        echo, induction = self._scores(attention, call, scale)
        means = _means(plain, slice(self.front, self.front + self.block)) if self.plain else None
        turn = functools.partial(_turned, attention, *(_first(t)[:, :POSITIONS] for t in tables))
        self.layers[index] = _Layer(echo, induction, means, turn, scale)

    def _scores(self, attention: Any, call: Any, scale: float) -> tuple[Tensor, Tensor]:
        """(Hkv,) each: the largest of the query heads of a KV head."""
        from tokenreduce.adapters.encoders.hf_attention import softcap_of

        queries, keys = call.queries[0], call.keys[0].float()
        groups, n = queries.shape[0] // keys.shape[0], keys.shape[1]
        cap, window = softcap_of(attention), getattr(attention, "sliding_window", None)
        mask = call.mask if isinstance(call.mask, Tensor) and call.mask.dim() == 4 else None
        both: list[tuple[Tensor, Tensor]] = []
        for h, key in enumerate(keys):
            mine = queries[h * groups : (h + 1) * groups].float()

            def rows(start: int, stop: int, key: Tensor = key, mine: Tensor = mine) -> Tensor:
                logits = mine[:, start:stop] @ key.T * scale
                logits = logits if cap is None else cap * torch.tanh(logits / cap)
                at, to = (torch.arange(a, b, device=key.device) for a, b in ((start, stop), (0, n)))
                sees = to <= at[:, None]
                if mask is not None:
                    part = mask[0, 0, start:stop, :n]
                    sees = sees & (part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2)
                elif window is not None:
                    sees = sees & (to > at[:, None] - window)
                return logits.masked_fill(~sees, float("-inf")).softmax(-1)

            both.append(echo_and_induction(rows, self.front, self.block, self.repeats))
        return torch.stack([e.amax() for e, _ in both]), torch.stack([i.amax() for _, i in both])


@dataclass
class _Means:
    """Means over a text, of every layer."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def take(self, index: int, attention: Any, call: Any, plain: Any, tables: Any) -> None:
        self.layers[index] = _means(plain, slice(None))


def _means(plain: Any, where: slice) -> tuple[Tensor, Tensor]:
    """(H,d), (Hkv,d): mean query and mean key of a call."""
    return plain.queries[0, :, where].float().mean(1), plain.keys[0, :, where].float().mean(1)


def _plain_means(parts: _Parts, text: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    if text.dim() != 1 or not len(text):
        raise ValueError(f"texts are token ids (S,), at least one each, not of shape {tuple(text.shape)}")
    seen = _Means()
    _run(parts, text[None], seen)
    return seen.layers


def _run(parts: _Parts, ids: Tensor, seen: Any) -> None:
    """One forward, with ``seen.take`` behind every attention that knows its queries and keys."""
    with _listening(parts, seen):
        parts.text(input_ids=ids, use_cache=False)


@contextmanager
def _listening(parts: _Parts, seen: Any) -> Iterator[None]:
    from tokenreduce.adapters.encoders.hf_attention import listen

    undo, copies = Undo(), {}  # type: ignore[var-annotated]
    try:
        for i, layer in enumerate(parts.layers):
            attention = getattr(layer, "self_attn", None)
            if attention is not None and hasattr(attention, "config"):
                listen(attention, undo, copies)
                undo.pre_hook(attention, functools.partial(_before, i, seen))
        yield
    finally:
        undo.revert()


def _before(index: int, seen: Any, attention: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Look at what the attention of a layer is about to do: as it rotates, and as it would without rotation."""
    tables = kwargs.get("position_embeddings")
    if tables is None:  # a layer that knows positions in a way of its own
        return
    cos, sin = tables
    turned = _look(attention, args, kwargs, tables)
    plain = _look(attention, args, kwargs, (torch.ones_like(cos), torch.zeros_like(sin)))
    seen.take(index, attention, turned, plain, tables)


def _look(attention: Any, args: Any, kwargs: dict[str, Any], tables: tuple[Tensor, Tensor]) -> Any:
    """The queries and keys of an attention with these rotary tables; nothing is attended to."""
    from tokenreduce.adapters.encoders.hf_attention import CALL, Call, Seen

    call = Call(kwargs.get("attention_mask"), record=True, only=True)
    try:
        type(attention).forward(attention, *args, **{**kwargs, "position_embeddings": tables, CALL: call})
    except Seen:
        return call
    raise ValueError(f"{type(attention).__name__} does not hand its keywords to the attention function")


def _first(table: Tensor) -> Tensor:
    """(1,N,r) of a table, of text alone, whose axes are equal where there are several (M-RoPE)."""
    return table[0][:1] if table.dim() == 4 else table[:1]


def _turned(attention: Any, cos: Tensor, sin: Tensor, x: Tensor) -> Tensor:
    """(H,1,d) at the positions of the tables (1,P,r), (H,P,d), as the module of ``attention`` rotates."""
    spread = x.expand(-1, cos.shape[1], -1).to(cos.dtype)[None]
    width = cos.shape[-1]
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    part = spread[..., :width]
    if turn is not None:
        part = turn(part, part, cos, sin)[0]
    else:
        low, high = part.chunk(2, -1)
        part = part * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
    return torch.cat([part, spread[..., width:]], -1)[0].float()
