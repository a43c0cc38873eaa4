"""Measures what this machine does per second: products of matrices, attention, memory, and starting an operator."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenreduce.estimation.devices import BYTES
from tokenreduce.estimation.measured import Curve, Measured

__all__ = ["calibrate"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Rows, and (inner, outer) of weights.
ROWS = (1, 4, 16, 64, 256, 1024)
WEIGHTS = ((256, 256), (768, 768), (768, 3072), (2048, 4096))
KEYS = (64, 200, 576, 1372, 2048)
HEADS, WIDTH = 4, 64
#: Elements of what is streamed, in rows of 768.
ELEMENTS = (2**12, 2**16, 2**20, 2**23)
#: Calls that are shorter are timed several at once.
SHORT = 2e-3
#: Times that a call behind a large one is timed per round.
COLD = 5
Call = Callable[[], object]


def calibrate(dtype: str = "fp32", seconds: float = 20.0, clock: Callable[[], float] = time.perf_counter) -> Measured:
    """Measures the CPU with torch's present number of threads, in about ``seconds``.

    All points are timed in turns, and the lower quartile of each counts, which other work on the machine moves least;
    it makes all rates lower, as it does with a model's time. ``clock`` may be ``time.thread_time`` where torch has one
    thread: CPU time, which other work moves little. Raises ``ValueError`` for an unknown dtype
    or less than a second.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    if not seconds >= 1:
        raise ValueError(f"seconds is a number >= 1, not {seconds!r}")
    kind, size = DTYPES[dtype], BYTES[dtype]
    calls: dict[Any, Call] = {"launch": partial(_Small().to(kind), torch.zeros(1, 4, 8, dtype=kind))}
    # In a model, small operators stand between large ones, which leave the caches cold.
    cold: dict[Any, Call] = {
        "launch": partial(F.linear, torch.randn(200, 768, dtype=kind), torch.randn(3072, 768, dtype=kind))
    }
    for inner, outer in WEIGHTS:
        w = torch.randn(outer, inner, dtype=kind)
        for n in ROWS:
            calls[(inner, outer), n] = partial(F.linear, torch.randn(n, inner, dtype=kind), w)
    for n in KEYS:
        q = torch.randn(1, HEADS, n, WIDTH, dtype=kind)
        calls["attention", n] = partial(F.scaled_dot_product_attention, q, q, q)
    keys, one = torch.randn(1, HEADS, 1024, WIDTH, dtype=kind), torch.randn(1, HEADS, 1, WIDTH, dtype=kind)
    calls["row"] = partial(F.scaled_dot_product_attention, one, keys, keys)
    streams = _streams(kind)
    for name, (call, _) in streams.items():
        for elements in _sizes(name):
            calls[name, elements] = partial(call, torch.randn(max(elements // 768, 1), 768, dtype=kind))
    took = _times(calls, cold, seconds, clock)
    return Measured(
        "measured", dtype, torch.get_num_threads(), torch.__version__,
        tuple((float(i * o), _curve(ROWS, [2.0 * r * i * o / took[(i, o), r] for r in ROWS])) for i, o in WEIGHTS),
        _curve(KEYS, [4.0 * HEADS * n * n * WIDTH / took["attention", n] for n in KEYS]),
        2.0 * keys.numel() * size / took["row"],
        {
            name: _curve(
                [p * n * size for n in _sizes(name)], [p * n * size / took[name, n] for n in _sizes(name)]
            )
            for name, (_, p) in streams.items()
        },
        took["launch"] / _Small.OPERATORS, _memory(),
    )  # fmt: skip


class _Small(nn.Module):
    """A block of a transformer with next to no numbers, four times: what is left is starting its operators, with the
    views and the Python around them."""

    BLOCKS, OPERATORS = 4, 44

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.qkv, self.out, self.up, self.down = (nn.Linear(a, b) for a, b in ((8, 24), (8, 8), (8, 16), (16, 8)))
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.BLOCKS):
            x = self._block(x)
        return x

    def _block(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norms[0](x)).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.out(seen)
        return x + self.down(self.act(self.up(self.norms[1](x))))


def _sizes(name: str) -> tuple[int, ...]:
    """Elements to stream; sorting is slow, and alike for all that is large."""
    return ELEMENTS[:-1] if name == "sort" else ELEMENTS


def _curve(sizes: Any, rates: list[float]) -> Curve:
    return Curve(tuple(map(float, sizes)), tuple(rates))


def _streams(kind: torch.dtype) -> dict[str, tuple[Callable[[Tensor], object], float]]:
    """By kind of operator: one of its kind, and how many elements it moves for each of its input."""
    weight = torch.ones(768, dtype=kind)

    def pick(x: Tensor) -> object:
        return x.index_select(0, torch.arange(len(x) - 1, -1, -1))

    return {
        "plain": (lambda x: x + x, 3.0),
        "norm": (lambda x: F.layer_norm(x, (768,), weight, weight), 2.0),
        "act": (F.gelu, 2.0),
        "softmax": (lambda x: x.softmax(-1), 2.0),
        "move": (pick, 2.0),
        "sort": (lambda x: x.argsort(-1), 2.0),
    }


def _times(
    calls: dict[Any, Call], cold: dict[Any, Call], seconds: float, clock: Callable[[], float]
) -> dict[Any, float]:
    """Seconds of every call, timed in turns until ``seconds`` are over, at least twice: the lower quartile. Those in
    ``cold`` are timed one by one, behind a call that is not."""
    with torch.no_grad():
        began = time.perf_counter()
        often = {}
        for key, call in calls.items():
            call()
            once = _once(call, clock)
            if once < SHORT:
                once = min(once, _once(call, clock), _once(call, clock))
            often[key] = max(1, min(int(SHORT / once), 200))
        found: dict[Any, list[float]] = {key: [] for key in calls}
        rounds = 0
        while rounds < 2 or time.perf_counter() - began < seconds * rounds / (rounds + 1):
            for key, call in calls.items():
                if key in cold:
                    for _ in range(COLD):
                        cold[key]()
                        found[key].append(_once(call, clock))
                    continue
                start = clock()
                for _ in range(often[key]):
                    call()
                found[key].append((clock() - start) / often[key])
            rounds += 1
    return {key: sorted(times)[len(times) // 4] for key, times in found.items()}


def _once(call: Call, clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return max(clock() - start, 1e-9)


def _memory() -> float:
    """Bytes of memory of the machine; 16 GB where it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 16e9
