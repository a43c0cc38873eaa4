"""``python -m tokenreduce.integrations.vllm.throughput``: requests per second of one model, stock and reduced.

A LLaVA-1.5 with random weights (12 layers of width 1024, 576 visual tokens, a small tower) is served three ways: by
vLLM's own class for it, and with fewer tokens. All servers run, and are asked in turns with the same pictures; every
request brings another one, so that no cache serves it. The median of the rounds is shown with their range.
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
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tokenreduce.bench.performance.sections import section, splice
from tokenreduce.integrations.vllm.client import ask, data_url, free_port, running
from tokenreduce.integrations.vllm.command import check_installed, server
from tokenreduce.integrations.vllm.demo import CPU
from tokenreduce.integrations.vllm.stand_in import save_stand_in

__all__ = ["Cell", "lines_of", "main", "measure"]

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
    """Serve the model in ``folder`` each way at the same time, and ask one server after another."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder))
    rates: dict[tuple[str, int], list[float]] = {}
    prompts: dict[str, int] = {}
    with ExitStack() as servers:
        bases = {}
        for way, reduce in ways:
            port = free_port()
            serving = server(str(folder), config, reduce, name="model", port=port, more=(*ENGINE, *more))
            bases[way] = servers.enter_context(running(serving.words, port, CPU, timeout=1200))
            prompts[way] = ask(bases[way], "model", _picture(0), "describe", tokens=tokens).prompt_tokens  # warms it up
        for number in range(rounds):
            for c in concurrencies:
                pictures = [_picture(1 + (number * 97 + c) * 1000 + i) for i in range(requests)]
                for way, base in bases.items():
                    rate = _ask_all(base, pictures, c, tokens)
                    rates.setdefault((way, c), []).append(rate)
                    print(f"{way}: {c} at once, {rate:.2f} requests/s", file=sys.stderr, flush=True)
    return [Cell(way, c, tuple(rates[way, c]), prompts[way]) for way in bases for c in concurrencies]


def _ask_all(base: str, pictures: Sequence[str], concurrency: int, tokens: int) -> float:
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda p: ask(base, "model", p, "describe", tokens=tokens), pictures))
    return len(answers) / (time.perf_counter() - start)


def _picture(seed: int) -> str:
    return data_url(np.random.default_rng(seed).integers(0, 255, (336, 336, 3), dtype=np.uint8))


def lines_of(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: a row for each way, requests per second at each concurrency (median, lowest and highest
    of the rounds) and how many times the first way's."""
    concurrencies = list(dict.fromkeys(cell.concurrency for cell in cells))
    ways = list(dict.fromkeys(cell.way for cell in cells))
    at = {(cell.way, cell.concurrency): cell for cell in cells}
    head = ["", "prompt tokens", *(f"requests/s, {c} at once" for c in concurrencies)]
    rows = []
    for way in ways:
        row = [way, str(at[way, concurrencies[0]].prompt_tokens)]
        for c in concurrencies:
            cell, stock = at[way, c], at[ways[0], c]
            text = f"{cell.rate:.2f} ({min(cell.rates):.2f}-{max(cell.rates):.2f})"
            row.append(text if way == ways[0] else f"{text}, {cell.rate / stock.rate:.1f}x")
        rows.append(row)
    return head, rows


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write what was asked for."""
    words = sys.argv[1:] if words is None else words
    given, more = _parser().parse_known_args(words)
    check_installed()
    with tempfile.TemporaryDirectory() as place:
        folder = save_stand_in(Path(place) / "model", layers=given.layers, width=given.width)
        cells = measure(
            folder, WAYS, [int(c) for c in given.concurrency.split(",")], given.requests, given.rounds, given.tokens,
            [word for word in more if word != "--"],
        )  # fmt: skip
    head, rows = lines_of(cells)
    for row in (head, *rows):
        print(" | ".join(row))
    if given.json:
        given.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")
    if given.markdown:
        splice(given.markdown, "throughput", section("throughput", head, rows, _command(words), _about(given)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Requests per second of one model, stock and reduced.")
    parser.add_argument("--concurrency", default="1,4,8", help="how many requests at once")
    parser.add_argument("--requests", type=int, default=24, help="of every cell and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="of every answer")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="a file for the cells")
    parser.add_argument("--markdown", type=Path, help="a page whose table is replaced, docs/serving.md")
    return parser


def _command(words: Sequence[str]) -> str:
    shown = [w for i, w in enumerate(words) if w != "--markdown" and words[max(i - 1, 0)] != "--markdown"]
    return " ".join(["python -m tokenreduce.integrations.vllm.throughput", *shown])


def _about(given: argparse.Namespace) -> str:
    import os
    import platform

    import torch
    from vllm import __version__

    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return (
        f"{place}; vLLM {__version__}, torch {torch.__version__}, Python {platform.python_version()}; bfloat16, random "
        f"weights, {given.layers} layers of width {given.width}; {given.requests} requests of {given.tokens} tokens in "
        f"each of {given.rounds} rounds: median (lowest-highest)."
    )


if __name__ == "__main__":
    sys.exit(main())
