"""What a sweep found, in one sentence: the best method at a budget, what it keeps, its speed, and random."""

from __future__ import annotations

from typing import Any

from tokenreduce.bench.columns import label, misses
from tokenreduce.bench.methods import UNREDUCED, is_baseline
from tokenreduce.bench.names import metric_label, percent
from tokenreduce.bench.runs import Run
from tokenreduce.bench.times import within_noise

__all__ = ["finding"]


def finding(run: Run, budget: float | None = None) -> str:
    """For example "35 % of the FLOPs: visionzip keeps 95.0 of 98.1 % (accuracy), 1.70x faster; random 61.2 %".

    It is about ``budget``, one of those that the run has rows at, or about the smallest. "" where nothing was measured
    that a sentence could be about. Rows that miss their budget do not count. The best is the first of those with the
    highest value; how many others lie within its standard error is said. Raises ``ValueError`` for a budget that the
    run has no row at.
    """
    had = {r["budget"] for r in run.rows if r.get("budget") is not None and r["id"] != UNREDUCED}
    if budget is not None and budget not in had:
        there = ", ".join(f"{b:g}" for b in sorted(had, reverse=True)) or "none"
        raise ValueError(f"the run has no row at the budget {budget!r}; there are: {there}")
    rows = [r for r in run.good if r.get(run.metric) is not None]
    whole = next((r for r in rows if r["id"] == UNREDUCED), None)
    swept = [r for r in rows if r.get("budget") is not None and r["id"] != UNREDUCED and not misses(r, run.axis)]
    mine = [r for r in swept if not is_baseline(r["method"])]
    if budget is None:
        budget = min((r["budget"] for r in mine), default=None)
    mine = [r for r in mine if r["budget"] == budget]
    if whole is None or budget is None or not mine:
        return ""
    best = max(mine, key=lambda r: r[run.metric])
    near = [r for r in mine if r is not best and best[run.metric] - r[run.metric] <= _error(best, run.metric)]
    said = f"{100 * budget:.4g} % of the {run.axis.label}: {_name(best)} keeps {_keeps(best, whole, run.metric)}"
    if near:
        said += f", {len(near)} more within its standard error"
    if (faster := _speed(best)) is not None:
        said += f", {faster}"
    chance = next((r for r in swept if r["budget"] == budget and r["method"].partition("@")[0] == "random"), None)
    if chance is not None:
        said += f"; random {_value(chance[run.metric], run.metric)}"
    return said


def _name(row: dict[str, Any]) -> str:
    return label(row).partition(":")[0] if "+" not in label(row) else label(row)


def _error(row: dict[str, Any], metric: str) -> float:
    return float(row.get(f"{metric}_stderr") or 0.0)


def _value(value: float, metric: str) -> str:
    return f"{100 * value:.1f} %" if percent(metric) else f"{value:.3f}"


def _keeps(row: dict[str, Any], whole: dict[str, Any], metric: str) -> str:
    if not percent(metric):
        return f"{row[metric]:.3f} of {whole[metric]:.3f} ({metric_label(metric)})"
    return f"{100 * row[metric]:.1f} of {100 * whole[metric]:.1f} % ({metric_label(metric)})"


def _speed(row: dict[str, Any]) -> str | None:
    ratio = row.get("speedup")
    if ratio is None:
        return None
    if within_noise(row):
        return "as fast within noise"
    return f"{ratio:.2f}x faster" if ratio > 1 else f"{1 / ratio:.2f}x slower"
