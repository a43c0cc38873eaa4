"""The sweep by lmms-eval: the unreduced model, every spec, and baselines that cost as much."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenreduce.bench.methods import UNREDUCED
from tokenreduce.bench.runs import Run, RunWriter, open_run, versions
from tokenreduce.core.labels import label_of
from tokenreduce.core.registry import parse
from tokenreduce.integrations.lmms_eval.command import Evaluation, FailedError

__all__ = ["BASELINES", "baselines", "metrics_in", "sweep"]

#: What stands in every table, at the number of visual tokens that the specs reach.
BASELINES = ("random@projector", "resize@projector")
#: Specs whose shares of visual tokens differ by less have the same baselines.
SAME = 0.01
#: Keys of a row that are no metric.
OWN = ("questions", "prompts", "probes", "prefill_flops")


def sweep(
    evaluation: Evaluation, specs: Sequence[str], out: Path, *, fresh: bool = False, command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> Run:  # fmt: skip
    """Evaluate everything that ``out`` does not hold yet; every evaluation is a row of ``rows.jsonl`` and a folder with
    lmms-eval's own files. One that fails is a row with its error, and tried again by the next call.

    Raises ``ValueError`` for a spec that is none or a folder with other settings, ``OSError`` where nothing can be
    written.
    """
    names = {label_of(r): r for r in (parse(s, stage="projector") for s in specs) if r}
    settings = {
        "model": evaluation.pretrained, "data": evaluation.tasks, "class": evaluation.model, "limit": evaluation.limit,
        "model_args": evaluation.model_args, "batch_size": evaluation.batch_size,
    }  # fmt: skip
    info = {"task": "lmms-eval", "settings": settings, "versions": versions(), "command": command, "points": [],
            "problems": []}  # fmt: skip
    with open_run(out, info, fresh=fresh) as writer:
        for spec in ("", *names):
            _one(evaluation, spec, writer, say)
            if not spec and not writer.run.good:
                return writer.run  # without the unreduced model there is nothing to compare with
        for spec in baselines(writer.run.good):
            _one(evaluation, spec, writer, say)
        return writer.run


def baselines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Specs of :data:`BASELINES` at every share of the visual tokens that ``rows`` reach, mean over the layers."""
    shares: list[float] = []
    for row in rows:
        share = row.get("visual_share")
        if row["id"] == UNREDUCED or share is None or share >= 1 or row["method"] in BASELINES:
            continue
        if all(abs(share - other) > SAME for other in shares):
            shares.append(round(share, 3))
    return [f"{name}:keep={share}" for share in shares for name in BASELINES]


def _one(evaluation: Evaluation, spec: str, writer: RunWriter, say: Callable[[str], None]) -> None:
    name = spec or UNREDUCED
    if any(r["id"] == name for r in writer.run.good):
        return
    points = writer.run.info["points"]
    writer.update(points=[*points, *([] if name in points else [name])])
    say(f"{name}: {evaluation.tasks}")
    began = time.perf_counter()
    method = "+".join(p.partition(":")[0] for p in spec.split("+")) if spec else UNREDUCED
    row: dict[str, Any] = {"id": name, "method": method, "spec": spec, "budget": None, "notes": []}
    try:
        row.update(evaluation.run(spec, writer.run.folder / _slug(name)), spec=spec)
    except FailedError as error:
        row["error"] = str(error)
    whole = next((r for r in writer.run.good if r["id"] == UNREDUCED), row)
    if whole.get("mean_visual_tokens") and row.get("mean_visual_tokens"):
        row["visual_share"] = row["mean_visual_tokens"] / whole["mean_visual_tokens"]
        row["share"] = row["prefill_flops"] / whole["prefill_flops"]
    row["wall_s"] = round(time.perf_counter() - began, 3)
    writer.append(row)


def _slug(spec: str) -> str:
    return re.sub(r"[^\w.=]+", "-", spec)


def metrics_in(run: Run) -> list[str]:
    """Names of the metrics that rows have, ``task/metric``."""
    keys = dict.fromkeys(k for row in run.good for k in row if "/" in k and not k.endswith("_stderr"))
    return list(keys)
