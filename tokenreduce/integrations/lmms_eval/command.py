"""One evaluation by lmms-eval's own command, in a process of its own, and what came out of it.

Its exit status is 0 after many errors, so that the results file, its sample counts and the plug-in's report are what
counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenreduce.common.files import make_folder

__all__ = ["Evaluation", "FailedError", "metrics_of"]

REPORT, LOG = "tokenreduce.json", "log.txt"


class FailedError(RuntimeError):
    """lmms-eval ended without a result that can be used."""


@dataclass(frozen=True)
class Evaluation:
    """How lmms-eval is called.

    Args:
        model: an id of :data:`tokenreduce.integrations.lmms_eval.MODELS`.
        pretrained: a Hub id or a folder.
        tasks: their names, separated by commas.
        model_args: further arguments of the model class, ``device=cpu,device_map=cpu``.
        limit, include_path, batch_size: as lmms-eval takes them.
        workers: processes that share the questions (torchrun).
        python: the interpreter that has lmms-eval; this one by default.
    """

    model: str
    pretrained: str
    tasks: str
    model_args: str = ""
    limit: int | None = None
    include_path: Path | None = None
    batch_size: int = 1
    workers: int = 1
    python: str = field(default=sys.executable)

    def words(self, spec: str, folder: Path) -> list[str]:
        """The command line of an evaluation with ``spec`` that writes into ``folder``."""
        given = [f"pretrained={self.pretrained}", *([self.model_args] if self.model_args else [])]
        given += [f"tokenreduce_report={folder / REPORT}", *([f"tokenreduce='{spec}'"] if spec else [])]
        launch = ["-m"]
        if self.workers > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.workers}", "-m"]
        words = [
            self.python, *launch, "lmms_eval", "--model", f"tokenreduce_{self.model}", "--model_args", ",".join(given),
            "--tasks", self.tasks, "--batch_size", str(self.batch_size), "--log_samples", "--output_path", str(folder),
        ]  # fmt: skip
        words += [] if self.limit is None else ["--limit", str(self.limit)]
        return words + ([] if self.include_path is None else ["--include_path", str(self.include_path)])

    def run(self, spec: str, folder: Path) -> dict[str, Any]:
        """Evaluate; returns the metrics by ``task/metric`` and what the plug-in reports.

        Raises :class:`FailedError` with the end of the log where there is no result, or one of fewer questions than
        there are, and ``OSError`` where the interpreter or the folder is not there.
        """
        make_folder(folder, "choose another folder with --out")
        for old in [folder / REPORT, *folder.rglob("*_results.json")]:
            old.unlink(missing_ok=True)
        log = folder / LOG
        with open(log, "wb") as handle:
            status = subprocess.run(
                self.words(spec, folder.resolve()), stdout=handle, stderr=subprocess.STDOUT, check=False,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            ).returncode  # fmt: skip
        found = sorted(folder.rglob("*_results.json"))
        if status or len(found) != 1 or not (folder / REPORT).exists():
            raise FailedError(f"lmms-eval gave no result (exit status {status}): {_end(log)}")
        results = json.loads(found[0].read_text(encoding="utf-8"))
        told = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        return {**metrics_of(results, self.limit), **told}


def metrics_of(results: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    """Metrics of a results file by ``task/metric``, ``_stderr`` behind, and ``questions``.

    Raises :class:`FailedError` for a task of which fewer questions were answered than it has (or than ``limit``).
    """
    out: dict[str, Any] = {}
    questions = 0
    for task, counts in (results.get("n-samples") or {}).items():
        wanted = counts["original"] if limit is None else min(limit, counts["original"])
        if counts["effective"] < wanted:
            raise FailedError(f"{task}: {counts['effective']} of {wanted} questions were answered")
        questions += counts["effective"]
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if "_stderr_" in name:  # the same error by another rule
                continue
            if kind and isinstance(value, int | float) and not isinstance(value, bool):
                suffix = "_stderr" if name.endswith("_stderr") else ""
                out[f"{task}/{name.removesuffix('_stderr')}{'' if kind == 'none' else f',{kind}'}{suffix}"] = value
    if not out or not questions:
        raise FailedError("the results file has no metric that is a number")
    return {**out, "questions": questions}


def _end(log: Path, lines: int = 3) -> str:
    """The last lines of a log that look like errors, or its last ones."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said: Sequence[str] = [x.strip() for x in text if "Error" in x or "error" in x.lower().split(":")[0]] or text
    return " | ".join(s[:300] for s in list(said)[-lines:]) + f" (all of it: {log})"
