"""Streaming question answering: frames go through tower and language model block by block, and the cache is capped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.generation import cache_as
from tokenreduce.core.budget import check_count
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.registry import get_method
from tokenreduce.core.undo import reducers_of
from tokenreduce.streaming.entry import Block, Entry, entry_of
from tokenreduce.streaming.watching import watched

__all__ = ["Reply", "Stream", "stream"]


@dataclass(frozen=True)
class Reply:
    """An answer in the middle of a stream: its ``text`` and token ``ids``, the ``frames`` that were seen by then, the
    visual ``keys`` of a head and layer that it was given from, bytes of the cache, and ``seconds`` it took."""

    prompt: str
    text: str
    ids: tuple[int, ...]
    frames: int
    keys: int
    cache_bytes: int
    seconds: float


class Stream:
    """A video as it comes, in a cache of fixed size: :meth:`push` frames, :meth:`ask` at any time.

    Frames are collected into blocks. A block goes through the vision tower and, behind what the cache holds, through
    the language model, at the positions that it has in the whole video; then the method thins the cache of every layer.
    Text in front of the video stays. A question is answered on top, and taken out of the cache again, so that the
    stream goes on as if it had not been asked. Nothing is patched.

    Args:
        loaded: model and processor, see :func:`tokenreduce.bench.vlms.load_vlm`; :func:`stream` makes it.
        method: a method of the cache stage that leaves every layer and head as many keys as any other.
        block: frames of a block; a multiple of those that the tower joins.
        fps: frames per second that are pushed, for models that count time.

    Raises ``TypeError`` for models that cannot take a stream, and ``ValueError`` for a patched model, methods that
    decide in decode or share a budget over layers or heads, and bad numbers.
    """

    def __init__(self, loaded: Any, method: CacheReducer | str, *, block: int = 8, fps: float = 1.0) -> None:
        check_count(block, "block", 1)
        if not fps > 0:
            raise ValueError(f"fps is above 0, not {fps!r}")
        made = get_method(method, "cache") if isinstance(method, str) else method
        if not isinstance(made, CacheReducer) or made.every() or made.temporary() or made.moment() == "never":
            raise ValueError(
                f"{made.spec()} does not thin a cache between blocks; choose infinipot-v, streammem, snapkv, knorm or "
                f"keydiff"
            )
        if reducers_of(loaded.model):
            raise ValueError("the model is patched; a stream thins the cache itself: call tr.unpatch(model) first")
        self.loaded, self.method, self.block = loaded, made, block
        self.entry: Entry = entry_of(loaded, fps)
        if block % self.entry.joined:
            raise ValueError(f"block={block}: this model's tower joins {self.entry.joined} frames; give a multiple")
        from transformers import DynamicCache

        self._cache: Any = DynamicCache(config=self.entry.found.text.config)
        self._waiting: list[Any] = []
        self._prefix = 0
        #: Per layer (Hkv,N): the number of the visual token that a slot holds, -1 for text.
        self._tokens: list[Tensor] = []
        #: Per layer: what the method keeps of every slot from block to block.
        self._scores: list[Tensor | None] = []
        self.frames = 0

    # -- frames ----------------------------------------------------------------------------------------------------
    def push(self, frames: Sequence[Any]) -> None:
        """Take in ``frames`` (PIL images or (H,W,3) uint8 arrays), all of one size. What fills no block waits."""
        from PIL import Image

        for frame in frames:
            self._waiting.append(frame if isinstance(frame, Image.Image) else Image.fromarray(frame))
            self.frames += 1
            if len(self._waiting) == self.block:
                self._enter()

    @property
    def keys(self) -> int:
        """Visual keys that each head of each layer holds."""
        return int((self._tokens[0][0] >= 0).sum()) if self._tokens else 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values."""
        some = [t for layer in self._cache.layers for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in some)

    @torch.no_grad()
    def _enter(self) -> None:
        frames, self._waiting = self._waiting, []
        joined = self.entry.joined
        frames = frames + frames[-1:] * (-len(frames) % joined)
        question = self.entry.question(frames, "?")
        if not self._prefix:
            self._begin(question)
        seen = self.entry.tokens
        block = self.entry.block(question, len(frames) // joined)
        number = torch.arange(seen, seen + len(block.x), device=block.x.device)
        self._forward(block.x[None], block.positions + self._prefix)
        self._tokens = [torch.cat([t, number.expand(len(t), -1)], 1) for t in self._tokens]
        self._thin(block)

    def _begin(self, question: Any) -> None:
        ids, _ = self.entry.words(question)
        self._prefix = ids.shape[1]
        embed = self.entry.found.inner.get_input_embeddings()
        if self._prefix:
            self._forward(embed(ids), self.entry.prompt_at(self._prefix))
        config = self.entry.found.text.config
        text = torch.full((config.num_key_value_heads, self._prefix), -1, device=ids.device)
        self._tokens = [text for _ in range(config.num_hidden_layers)]
        self._scores = [None for _ in self._tokens]

    def _forward(self, x: Tensor, positions: Tensor, watch: Callable[..., Any] | None = None) -> Tensor:
        """Hidden states (1,Q,C) of new tokens behind what the cache holds."""
        text: Any = self.entry.found.text
        held = int(self._cache.get_seq_length())
        mask = torch.ones(1, held + x.shape[1], dtype=torch.long, device=x.device)
        with watched(text, watch):
            out = text(
                inputs_embeds=x.to(next(text.parameters()).dtype), attention_mask=mask, position_ids=positions,
                use_cache=True, **cache_as(text, self._cache),
            )  # fmt: skip
        hidden: Tensor = out.last_hidden_state
        return hidden

    # -- the cap ---------------------------------------------------------------------------------------------------
    def _thin(self, block: Block) -> None:
        from tokenreduce.streaming.capping import plans_of, thin_all

        each = len(block.x) // block.units
        rows = self._proxy() if "attention" in self.method.required() else {}
        plans, self._scores = plans_of(
            self.method, self._cache, self._tokens, each, rows, self.entry.found, self._scores
        )
        self._tokens = thin_all(self.method, plans, self._cache, self._tokens)

    def _proxy(self) -> dict[int, Tensor]:
        """Layer -> queries (1,H,R,d) of the words that open an answer, which stand for a question not asked yet."""
        seen: dict[int, Tensor] = {}
        _, suffix = self.entry.words(self.entry.question(self._blank(), "?"))
        x = self.entry.found.inner.get_input_embeddings()(suffix)
        self._forward(x, self.entry.words_at(self._prefix, suffix.shape[1]), lambda i, q: seen.__setitem__(i, q))
        self._cache.crop(-suffix.shape[1])
        return seen

    def _blank(self) -> list[Any]:
        from PIL import Image

        return [Image.new("RGB", (64, 64))] * self.entry.joined

    # -- questions -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def ask(self, prompt: str, *, max_new_tokens: int = 32) -> Reply:
        """Answer ``prompt`` greedily from what is held now; the stream is left as it was.

        Frames that wait for their block to fill enter first. Raises ``ValueError`` for an empty prompt, or before any
        frame.
        """
        check_count(max_new_tokens, "max_new_tokens", 1)
        if not prompt.strip():
            raise ValueError("the prompt is empty; ask something about the video")
        if not self.frames:
            raise ValueError("no frame has been pushed; push some before asking")
        if self._waiting:
            self._enter()
        began = time.perf_counter()
        held = int(self._cache.get_seq_length())
        question = self.entry.question(self._blank(), prompt)
        _, suffix = self.entry.words(question)
        embed = self.entry.found.inner.get_input_embeddings()
        behind = self.entry.behind()
        x = embed(suffix)
        if len(behind):
            x = torch.cat([behind[None].to(x), x], 1)
        positions = self.entry.words_at(self._prefix, x.shape[1])
        hidden = self._forward(x, positions)
        ids = self._greedy(hidden, positions[..., -1:], max_new_tokens, embed)
        keys, size = self.keys, self.cache_bytes
        self._cache.crop(held - int(self._cache.get_seq_length()))
        text = self.loaded.processor.batch_decode([ids], skip_special_tokens=True)[0].strip()
        return Reply(prompt, text, tuple(ids), self.frames, keys, size, time.perf_counter() - began)

    def _greedy(self, hidden: Tensor, last: Tensor, tokens: int, embed: Any) -> list[int]:
        model = self.loaded.model
        ends = model.generation_config.eos_token_id
        stop = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        head, ids = model.get_output_embeddings(), []
        for _ in range(tokens):
            ids.append(int(head(hidden[:, -1]).argmax(-1)))
            if ids[-1] in stop or len(ids) == tokens:
                break
            last = last + 1
            hidden = self._forward(embed(torch.tensor([ids[-1:]], device=hidden.device)), last)
        return ids


def stream(model: Any, processor: Any, method: CacheReducer | str, *, block: int = 8, fps: float = 1.0) -> Stream:
    """A :class:`Stream` through ``model`` with its ``processor``: ``tr.stream(model, processor, "infinipot-v:...")``.

    Raises what :class:`Stream` raises.
    """
    loaded = SimpleNamespace(name=type(model).__name__, model=model, processor=processor)
    return Stream(loaded, method, block=block, fps=fps)
