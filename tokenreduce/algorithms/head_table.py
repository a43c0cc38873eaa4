"""Which KV heads of a model look far back: tables of scores, measured once, and the base of methods that use them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenreduce.algorithms.keys import check_what
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence

__all__ = ["FILE", "HeadTable", "Headwise", "load_table"]

#: Name of a table beside the weights of a model.
FILE = "tokenreduce_heads.json"
_FORMAT = "tokenreduce heads"

#: (layer, KV head), 0-based.
Head = tuple[int, int]
#: A number for every KV head of every layer; None for a layer without such heads.
Scores = tuple[tuple[float, ...] | None, ...]


@dataclass(frozen=True)
class HeadTable:
    """Scores of the KV heads of one model.

    Attributes:
        model: class of the model that they were measured on.
        layers, kv_heads: its decoder layers, and KV heads of each.
        scores: name to one row for each layer, of one number for each KV head, or None where a layer has no attention
            of that kind. ``echo`` and ``induction`` are RazorAttention's, ``gate`` is DuoAttention's trained one,
            ``on_the_fly`` what stands for it.
        probe: how they were measured.
    """

    model: str
    layers: int
    kv_heads: int
    scores: Mapping[str, Scores]
    probe: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rows in self.scores.items():
            if len(rows) != self.layers or any(row is not None and len(row) != self.kv_heads for row in rows):
                raise ValueError(
                    f"scores {name!r} have {self.layers} rows of {self.kv_heads} numbers, one for each KV head; got "
                    f"{[None if row is None else len(row) for row in rows]}"
                )
            if any(not math.isfinite(value) for row in rows if row is not None for value in row):
                raise ValueError(f"scores {name!r} hold a number that is not finite; measure the heads again")

    def check(self, layers: int, kv_heads: int, model: str | None = None) -> None:
        """Raise ``ValueError`` for another model than the one measured."""
        mine, theirs = f"{self.layers} layers of {self.kv_heads} KV heads", f"{layers} layers of {kv_heads} KV heads"
        if model is not None and model != self.model:
            mine, theirs = f"a {self.model} with {mine}", f"a {model} with {theirs}"
        if mine != theirs:
            raise ValueError(
                f"the head table is of {mine}, and the model is {theirs}; measure its heads with: tokenreduce heads "
                f"MODEL"
            )

    def ranked(self, name: str) -> list[tuple[float, Head]]:
        """(score, head) of all heads, best first; ties have the lower head first. Raises ``ValueError`` for scores that
        the table does not have."""
        if name not in self.scores:
            raise ValueError(f"the head table has no scores {name!r}; it has {', '.join(self.scores) or 'none'}")
        rows = enumerate(self.scores[name])
        found = [(value, (i, h)) for i, row in rows if row is not None for h, value in enumerate(row)]
        return sorted(found, key=lambda item: (-item[0], item[1]))

    def save(self, path: str | Path) -> Path:
        """Write a JSON file."""
        from tokenreduce.common.files import write_text

        text = {
            "format": _FORMAT, "version": 1, "model": self.model, "layers": self.layers, "kv_heads": self.kv_heads,
            "probe": dict(self.probe), "scores": dict(self.scores),
        }  # fmt: skip
        return write_text(path, json.dumps(text, indent=1) + "\n")

    @staticmethod
    def from_json(text: str, source: str = "the head table") -> HeadTable:
        """From the text of :meth:`save`'s file. Raises ``ValueError`` for another one, which names ``source``."""
        try:
            read = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{source} is no JSON: {error}") from None
        if not isinstance(read, dict) or read.get("format") != _FORMAT:
            raise ValueError(f"{source} is no head table; write one with: tokenreduce heads MODEL")
        try:
            scores = {
                str(name): tuple(None if row is None else tuple(float(v) for v in row) for row in rows)
                for name, rows in read["scores"].items()
            }
            made = (str(read["model"]), int(read["layers"]), int(read["kv_heads"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{source} is a damaged head table ({type(error).__name__}: {error}); measure again"
            ) from None
        return HeadTable(*made, scores, read.get("probe") or {})


def load_table(path: str | Path) -> HeadTable:
    """The table in a file, or beside the weights in a model's folder. Raises ``ValueError`` for a path without one."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / FILE
    try:
        stamp = file.stat().st_mtime_ns
    except OSError:
        raise ValueError(
            f"there is no head table {file}; write one with: tokenreduce heads MODEL --out {file}"
        ) from None
    return _read(str(file), stamp)


@functools.lru_cache(maxsize=32)
def _read(path: str, stamp: int) -> HeadTable:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the head table {path}: {error}") from None
    return HeadTable.from_json(text, path)


@dataclass(frozen=True)
class Headwise(CacheReducer):
    """Base of methods that leave some KV heads alone and thin the others.

    Args:
        table: file that ``tokenreduce heads MODEL`` wrote, or the folder of a model that it wrote it into.
        heads: instead of ``table``: (layer, KV head), 0-based, of the heads that are left alone.
        what: "visual" thins visual keys, and all text stays; "all" thins all keys, as published.
    """

    table: str | None = None
    heads: tuple[tuple[int, int], ...] | None = None
    what: str = "visual"

    def __post_init__(self) -> None:
        check_what(self.what)
        if self.table is not None and self.heads is not None:
            raise ValueError("give table or heads, not both")
        if self.heads is not None and any(min(head) < 0 for head in self.heads):
            raise ValueError(f"heads are pairs (layer, KV head), counted from 0, not {self.heads!r}")

    def choose(self, table: HeadTable) -> Iterable[Head]:
        """The heads of ``table`` that are left alone."""
        raise NotImplementedError("abstract")

    def whole_heads(self) -> frozenset[Head]:
        """The heads that are left alone. Raises ``ValueError`` where nothing says which."""
        if self.heads is not None:
            return frozenset(self.heads)
        return frozenset(self.choose(self._table()))

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.heads is None:
            table = self._table()
            table.check(depth, table.kv_heads)
        elif any(head[0] >= depth for head in self.heads):
            raise ValueError(f"heads={self.heads!r}: the language model has layers 0 to {depth - 1}")
        return True

    def check_model(self, model: str, layers: int, kv_heads: int) -> None:
        if self.heads is None:
            self._table().check(layers, kv_heads, model)
        elif any(head[1] >= kv_heads for head in self.heads):
            raise ValueError(f"heads={self.heads!r}: the language model has KV heads 0 to {kv_heads - 1}")

    def whole(self, evidence: CacheEvidence) -> Tensor:
        """(B*Hkv,1) bool: which heads of this layer are left alone. Raises ``ValueError`` for another model's table."""
        self.acts_at(evidence.layer, evidence.depth)
        if self.heads is None:
            table = self._table()
            table.check(evidence.depth, evidence.kv_heads)
            if all(rows[evidence.layer] is None for rows in table.scores.values()):  # a layer that was not measured
                return torch.ones_like(evidence.counts, dtype=torch.bool)
        elif any(head[1] >= evidence.kv_heads for head in self.heads):
            raise ValueError(f"heads={self.heads!r}: the language model has KV heads 0 to {evidence.kv_heads - 1}")
        mine = {h for layer, h in self.whole_heads() if layer == evidence.layer}
        marks = [h in mine for h in range(evidence.kv_heads)]
        return torch.tensor(marks * evidence.batch, device=evidence.keys.device).unsqueeze(1)

    def _table(self) -> HeadTable:
        if self.table is None:
            raise ValueError(
                f"{self.name} needs to know which heads look far back: measure them with tokenreduce heads MODEL, and "
                f"give table=FILE (or heads=[[layer,head],...])"
            )
        return load_table(self.table)
