"""Memory and clock of the cache stage: ``python -m tokenreduce.bench.performance.caches`` makes its sections of
docs/performance.md again.

The language model alone, with random weights, on ready image features: the tower has no part in what a cache costs.
Decoding is timed against the stock model on the whole prompt, and on a prompt as short as what is held, which is what
no method can be faster than.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_as, cache_of
from tokenreduce.bench.performance.prefills import shell
from tokenreduce.bench.performance.sections import deliver
from tokenreduce.common.pinned import load_of_machine, pin
from tokenreduce.common.words import speak_everywhere
from tokenreduce.measure.cached import cache_peak
from tokenreduce.measure.generation import layer_bytes
from tokenreduce.measure.timing import Speedup, interleaved

__all__ = ["SHAPES", "Row", "Shape", "measure"]

#: Methods of every kind: no attention, a window's, all rows', heads that differ, budgets over layers, merging.
METHODS = ("knorm", "keydiff", "snapkv", "h2o", "pyramidkv", "adakv", "vl-cache", "look-m")


@dataclass(frozen=True)
class Shape:
    """A language model of ``layers`` layers of ``width``, ``heads`` query and ``kv`` KV heads, on a prompt of
    ``visual`` tokens between 64 of text."""

    width: int
    layers: int
    heads: int
    kv: int
    mlp: int
    visual: int
    text: int = 64

    @property
    def said(self) -> str:
        return (
            f"{self.layers} layers of width {self.width}, {self.heads} heads, {self.kv} KV heads; {self.visual} visual "
            f"and {self.text} text tokens"
        )


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 96),
    "llava": Shape(1024, 12, 16, 16, 2816, 576),
    "video": Shape(896, 8, 14, 2, 4864, 8192),
}


@dataclass(frozen=True)
class Row:
    """One method at one share of the visual keys: bytes ``held`` and at the ``peak`` of the prefill, of (stock,
    reduced); ``own`` work as a share of the stock prefill; decoding against the stock model (``clock``) and against
    one on as short a prompt (``short``: above 1 is slower than that)."""

    method: str
    keep: float
    held: tuple[int, int]
    peak: int
    own: float
    clock: Speedup
    possible: Speedup
    short: float
    each: float


def build(shape: Shape) -> Any:
    """A LLaVA with a tower of one layer, which nothing runs."""
    import transformers as hf

    text = hf.Qwen2Config(
        hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv, intermediate_size=shape.mlp, vocab_size=2048, max_position_embeddings=32768,
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                 image_size=28, patch_size=14)  # fmt: skip
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=2000, vision_feature_layer=-1)
    torch.manual_seed(0)
    return hf.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


def prompt(shape: Shape, visual: int) -> dict[str, Any]:
    """One prompt, and the features of its ``visual`` tokens."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1900, (1, shape.text + visual), generator=g)
    ids[:, shape.text // 2 : shape.text // 2 + visual] = 2000
    features: Any = [torch.randn(visual, shape.width, generator=g) * 0.02]
    made = BaseModelOutputWithPooling(pooler_output=features)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_encoder_outputs": {"image": made}}


def prefill(model: Any, given: dict[str, Any]) -> Any:
    with torch.no_grad():
        return cache_of(model(**given, use_cache=True, logits_to_keep=1))


def step(model: Any, token: Tensor, cache: Any, count: int) -> None:
    with torch.no_grad():
        for _ in range(count):
            model(input_ids=token, use_cache=True, **cache_as(model, cache))


def measure(
    shape: Shape, methods: Sequence[str], shares: Sequence[float], rounds: int = 7, decode: int = 8
) -> list[Row | tuple[str, float, str]]:
    """One row for each method and share of the visual keys; ``(method, share, why)`` for what does not run."""
    stock = build(shape)
    given, token = prompt(shape, shape.visual), torch.tensor([[5]])
    whole = interleaved({"stock": lambda: prefill(stock, given)}, 2, 1)["stock"].median
    full = prefill(stock, given)
    rows: list[Row | tuple[str, float, str]] = []
    for name in methods:
        for share in shares:
            try:
                rows.append(_row(shape, stock, full, whole, given, token, name, share, rounds, decode))
            except (ValueError, RuntimeError) as error:
                rows.append((name, share, f"{type(error).__name__}: {str(error).splitlines()[0]}"))
    return rows


def _row(
    shape: Shape, stock: Any, full: Any, whole: float, given: Any, token: Tensor, name: str, share: float, rounds: int,
    decode: int,
) -> Row:  # fmt: skip
    """``full`` is the stock model's cache behind the prompt, and is that again afterwards; ``whole`` are the seconds of
    its prefill."""
    model = tr.patch(shell(stock), tr.get_method(f"{name}:keep={share}", "cache"))
    own = []
    for _ in range(2):
        with tr.record(model, flops=False, timing=True) as trace:
            cache = prefill(model, given)
        own.append(trace.seconds)
    layers, held = layer_bytes(cache), sum(layer_bytes(full))
    kept = round(statistics.fmean(layer.keys.shape[2] for layer in cache.layers))
    short = prefill(stock, prompt(shape, max(kept - shape.text, 1)))
    caches = {"stock": full, "reduced": cache, "short": short}
    models = {"stock": stock, "reduced": model, "short": stock}
    times = interleaved({n: partial(step, models[n], token, caches[n], decode) for n in caches}, rounds, 1)
    full.crop(-decode * (rounds + 1))
    return Row(
        name, share, (held, sum(layers)), cache_peak(layers, trace.cache), min(own) / whole,
        times["stock"].against(times["reduced"]), times["stock"].against(times["short"]),
        times["reduced"].ratio(times["short"]), times["stock"].median / decode,
    )  # fmt: skip


COLUMNS = (
    "method", "visual keys", "held", "peak in prefill", "own work of a prefill", "decoding", "possible",
    "time of a short prompt's step",
)  # fmt: skip


def cells(row: Row | tuple[str, float, str]) -> tuple[str, ...]:
    if isinstance(row, tuple):
        return (row[0], f"{row[1]:.0%}", row[2], "", "", "", "", "")
    full = row.held[0]
    return (
        row.method, f"{row.keep:.0%}", f"{row.held[1] / 2**20:.1f} MiB ({row.held[1] / full:.0%})",
        f"{row.peak / 2**20:.1f} MiB ({row.peak / full:.0%})", f"{row.own:.1%}", row.clock.cell, row.possible.cell,
        f"{row.short:.2f}",
    )  # fmt: skip


def main(
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "llava",
    methods: Annotated[str, typer.Option(help="'snapkv,h2o'")] = ",".join(METHODS),
    shares: Annotated[str, typer.Option(help="shares of the visual keys that stay")] = "0.25,0.1",
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    decode: Annotated[int, typer.Option(min=1, help="tokens of a round")] = 8,
    markdown: Annotated[Path | None, typer.Option(help="file whose marked section is replaced")] = None,
) -> None:
    """Memory and decode time of methods that thin the KV cache."""
    speak_everywhere()
    if shape not in SHAPES:
        raise typer.BadParameter(f"--shape is one of {', '.join(SHAPES)}")
    chosen = SHAPES[shape]
    rows = measure(chosen, methods.split(","), [float(s) for s in shares.split(",")], rounds, decode)
    first = next(r for r in rows if isinstance(r, Row))
    load = load_of_machine()
    busy = "" if load is None else f", {load:.1f} processes per core wanted to run"
    about = (
        f"CPU, {torch.get_num_threads()} thread(s), float32, torch {torch.__version__}, allocator pinned{busy}; "
        f"{chosen.said}; the whole cache has {first.held[0] / 2**20:.1f} MiB, a stock step takes "
        f"{first.each * 1e3:.1f} ms; {rounds} interleaved rounds of {decode} tokens, medians of per-round ratios "
        f"(≈: within noise)."
    )
    deliver("caches", COLUMNS, [cells(row) for row in rows], about, markdown, f"cache-{shape}")


if __name__ == "__main__":
    pin()
    typer.run(main)
