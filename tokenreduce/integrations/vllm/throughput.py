"""``python -m tokenreduce.integrations.vllm.throughput``: requests per second of one model, stock and reduced.

A LLaVA-1.5 with random weights (12 layers of width 1024, 576 visual tokens, a small tower) is served one way after
another: by vLLM's own class for it, and with fewer tokens. Every request brings another picture, so that no cache
serves it. A round asks at each concurrency; rounds take turns, and the median of a cell is shown with its range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tokenreduce.bench.markdown import replace_table
from tokenreduce.integrations.vllm.client import ask, data_url, free_port, running
from tokenreduce.integrations.vllm.command import check_installed, server
from tokenreduce.integrations.vllm.demo import CPU
from tokenreduce.integrations.vllm.stand_in import save_stand_in

__all__ = ["Cell", "main", "measure", "table"]

WAYS: tuple[tuple[str, str | None], ...] = (
    ("stock", None), ("192 tokens", "divprune:keep=192"), ("64 tokens", "divprune:keep=64"),
)  # fmt: skip
ENGINE = ("--dtype", "bfloat16", "--max-model-len", "2048", "--no-enable-prefix-caching")


@dataclass(frozen=True)
class Cell:
    """One way to serve at one concurrency: requests per second of every round, and tokens of a prompt."""

    way: str
    concurrency: int
    rates: tuple[float, ...]
    prompt_tokens: int

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def measure(
    folder: Path, ways: Sequence[tuple[str, str | None]], concurrencies: Sequence[int], requests: int, rounds: int,
    tokens: int, more: Sequence[str] = (),
) -> list[Cell]:  # fmt: skip
    """Serve the model in ``folder`` each way, and ask it."""
    from transformers import AutoConfig

    config, out = AutoConfig.from_pretrained(str(folder)), []
    for way, reduce in ways:
        port = free_port()
        serving = server(str(folder), config, reduce, name="model", port=port, more=(*ENGINE, *more))
        with running(serving.words, port, CPU, timeout=1200) as base:
            ask(base, "model", _picture(0), "describe", tokens=tokens)  # the first request of a server is slower
            rates: dict[int, list[float]] = {c: [] for c in concurrencies}
            prompt = 0
            for number in range(rounds):
                for c in concurrencies:
                    pictures = [_picture(1 + (number * 97 + c) * 1000 + i) for i in range(requests)]
                    rate, prompt = _ask_all(base, pictures, c, tokens)
                    rates[c].append(rate)
                    print(f"{way}: concurrency {c}, {rate:.2f} requests/s", file=sys.stderr, flush=True)
        out += [Cell(way, c, tuple(rates[c]), prompt) for c in concurrencies]
    return out


def _ask_all(base: str, pictures: Sequence[str], concurrency: int, tokens: int) -> tuple[float, int]:
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda p: ask(base, "model", p, "describe", tokens=tokens), pictures))
    return len(answers) / (time.perf_counter() - start), answers[0].prompt_tokens


def _picture(seed: int) -> str:
    return data_url(np.random.default_rng(seed).integers(0, 255, (336, 336, 3), dtype=np.uint8))


def table(cells: Sequence[Cell]) -> str:
    """A Markdown table: a row for each way, requests per second at each concurrency and how often the first way's."""
    concurrencies = list(dict.fromkeys(cell.concurrency for cell in cells))
    ways = list(dict.fromkeys(cell.way for cell in cells))
    at = {(cell.way, cell.concurrency): cell for cell in cells}
    lines = [
        "| | prompt tokens | " + " | ".join(f"requests/s at {c}" for c in concurrencies) + " |",
        "|---|---|" + "---|" * len(concurrencies),
    ]
    for way in ways:
        row = [way, str(at[way, concurrencies[0]].prompt_tokens)]
        for c in concurrencies:
            cell, stock = at[way, c], at[ways[0], c]
            text = f"{cell.rate:.2f} ({min(cell.rates):.2f}-{max(cell.rates):.2f})"
            row.append(text if way == ways[0] else f"{text}, {cell.rate / stock.rate:.1f}x")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--concurrency", default="1,4,8")
    parser.add_argument("--requests", type=int, default=24, help="of every cell and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="of every answer")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="a file for the cells")
    parser.add_argument("--markdown", type=Path, help="a page whose table 'throughput' is replaced")
    given, more = parser.parse_known_args(words)
    check_installed()
    with tempfile.TemporaryDirectory() as place:
        folder = save_stand_in(Path(place) / "model", layers=given.layers, width=given.width)
        cells = measure(
            folder, WAYS, [int(c) for c in given.concurrency.split(",")], given.requests, given.rounds, given.tokens,
            [word for word in more if word != "--"],
        )  # fmt: skip
    text = table(cells)
    print(text)
    if given.json:
        given.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")
    if given.markdown:
        replace_table(given.markdown, "throughput", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
