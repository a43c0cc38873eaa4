"""How rows are called wherever they are shown."""

from __future__ import annotations

import json
from typing import Any

from tokenreduce.bench.methods import UNREDUCED
from tokenreduce.core.specs import split_specs

__all__ = ["label", "metric_label", "percent"]

METRICS = {"top1": "top-1 accuracy", "top5": "top-5 accuracy"}


def metric_label(key: str) -> str:
    """How pictures and tables call a metric."""
    return METRICS.get(key, key.replace("_", " "))


def percent(key: str) -> bool:
    """Whether a metric is a fraction that is printed in percent (all of ours but raw scores named so)."""
    return not key.endswith("_score")


def label(row: dict[str, Any]) -> str:
    """What stands in the method column: the spec with the budget that it ran at, or the point of a row that failed."""
    if row["id"] == UNREDUCED:
        return UNREDUCED
    spec = str(row.get("spec") or "")
    return str(row["id"]) if not spec or (row.get("error") and ":" not in spec) else _budgeted(spec, row)


def _budgeted(spec: str, row: dict[str, Any]) -> str:
    """``spec`` with ``keep``, which runs of earlier versions left out where it had its default."""
    parts = split_specs(spec)
    try:
        keeps = [json.loads(text).get("keep") for text in row.get("settings") or []]
    except (TypeError, ValueError, AttributeError):  # a file that somebody else wrote
        return spec
    if len(keeps) != len(parts):
        return spec
    return "+".join(
        part if keep is None or "keep=" in part else f"{part}{',' if ':' in part else ':'}keep={keep}"
        for part, keep in zip(parts, keeps, strict=True)
    )
