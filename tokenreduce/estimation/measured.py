"""This machine as a device, by rates that :mod:`tokenreduce.estimation.calibrate` measured."""

from __future__ import annotations

import bisect
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tokenreduce.common.files import write_text
from tokenreduce.estimation.devices import BYTES
from tokenreduce.estimation.ops import Op

__all__ = ["Curve", "Measured", "place", "save", "stored"]

#: Of a file; another number is measured again.
VERSION = 1


@dataclass(frozen=True)
class Curve:
    """A rate (per second) at growing sizes; between them it is drawn in logarithms, beyond them it stays."""

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def at(self, size: float) -> float:
        """
        >>> Curve((1.0, 100.0), (10.0, 1000.0)).at(10.0), Curve((1.0, 2.0), (3.0, 4.0)).at(9.0)
        (100.0, 4.0)
        """
        if size <= self.sizes[0]:
            return self.rates[0]
        if size >= self.sizes[-1]:
            return self.rates[-1]
        i = bisect.bisect_right(self.sizes, size)
        a, b = self.sizes[i - 1], self.sizes[i]
        t = math.log(size / a) / math.log(b / a)
        return round(math.exp((1 - t) * math.log(self.rates[i - 1]) + t * math.log(self.rates[i])), 12)


@dataclass(frozen=True)
class Measured:
    """Rates of one machine, dtype and number of threads.

    Attributes:
        matmul: FLOPs per second over rows, by elements of the weight (ascending).
        attention: FLOPs per second over keys. ``row``: bytes per second of keys and values that one query reads.
        streams: bytes per second over bytes, by kind of operator.
        launch: seconds to start an operator, its share of the Python around it included. ``memory``: bytes.
    """

    name: str
    dtype: str
    threads: int
    torch_version: str
    matmul: tuple[tuple[float, Curve], ...]
    attention: Curve
    row: float
    streams: dict[str, Curve]
    launch: float
    memory: float
    behind: bool = False
    version: int = VERSION

    def seconds(self, op: Op, batch: int, dtype: str) -> tuple[float, str]:
        size, n = BYTES[dtype], op.count
        moved = (op.moved * batch + op.weights) * size / n
        if op.kind == "matmul" and op.rows * batch > 0 and op.flops:
            rows = op.rows * batch
            each = op.flops * batch / n / self._matmul(rows, op.inner * op.outer)
            bound = "compute" if rows > 8 else "memory"
        elif op.kind == "attention" and op.rows > 1:
            each = op.flops * batch / n / self.attention.at(op.inner) * (0.6 if op.causal else 1.0)
            bound = "compute"
        elif op.kind == "attention":
            each, bound = moved / self.row, "memory"
        else:
            each, bound = moved / self.streams.get(op.kind, self.streams["plain"]).at(moved), "memory"
        return (each + self.launch) * n, bound if each > self.launch else "launch"

    def _matmul(self, rows: float, weight: float) -> float:
        sizes = [w for w, _ in self.matmul]
        rates = tuple(curve.at(rows) for _, curve in self.matmul)
        return Curve(tuple(sizes), rates).at(weight)


def place() -> Path:
    """Where calibrations are stored: ``TOKENREDUCE_CACHE``, or ``tokenreduce`` in the user's cache folder."""
    own = os.environ.get("TOKENREDUCE_CACHE")
    if own:
        return Path(own).expanduser() / "calibration"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "tokenreduce" / "calibration"


def _file(dtype: str, threads: int) -> Path:
    return place() / f"{dtype}-{threads}-threads.json"


def save(made: Measured) -> Path:
    """Raises ``OSError`` where the folder cannot be written."""
    path = _file(made.dtype, made.threads)
    write_text(path, json.dumps(asdict(made), indent=1) + "\n", "set TOKENREDUCE_CACHE to a folder that can be written")
    return path


def stored(dtype: str) -> Measured:
    """What was measured on this machine with as many threads as torch has now. Raises ``ValueError`` where nothing
    was, or the file is not one of this version."""
    threads = torch.get_num_threads()
    path = _file(dtype, threads)
    how = f"run tokenreduce calibrate --dtype {dtype} first (it takes less than 30 s)"
    if not path.is_file():
        raise ValueError(f"device measured: nothing was measured here for {dtype} and {threads} threads; {how}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != VERSION:
            raise ValueError("of another version")
        return Measured(**{
            **raw,
            "matmul": tuple((float(w), _curve(c)) for w, c in raw["matmul"]),
            "attention": _curve(raw["attention"]),
            "streams": {k: _curve(c) for k, c in raw["streams"].items()},
        })  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no calibration of this version ({error}); {how}") from error


def _curve(raw: dict[str, Sequence[float]]) -> Curve:
    return Curve(tuple(map(float, raw["sizes"])), tuple(map(float, raw["rates"])))
