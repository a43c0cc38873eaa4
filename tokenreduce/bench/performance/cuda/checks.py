"""The tests that need a CUDA device, as rows."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from tokenreduce.bench.performance.cuda.ledger import Ledger

__all__ = ["ALL", "run_tests"]

#: The row of all tests together.
ALL = "pytest -m gpu"


def run_tests(ledger: Ledger, root: Path, out: Path, tiny: bool = False) -> None:
    """Run the GPU-marked tests of the checkout at ``root`` in a process of their own, and write a row for each.

    In a dry run they are collected alone. Tests that the time was too short for have no row; :data:`ALL` says so.
    """
    folder = root / "tests"
    if not folder.is_dir():
        ledger.note(ALL, "error", error=f"there are no tests at {folder}: run this in a checkout")
        return
    report = out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junit-xml={report}", *FOLDERS]
    if tiny:
        command.append("--collect-only")
    log = out / "tests.log"
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command, cwd=root, stdout=file, stderr=subprocess.STDOUT, timeout=max(ledger.left(), 1), check=False,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            ledger.note(ALL, "error", error=f"the tests did not end in their time; see {log.name}")
            return
    _note(ledger, _results(report), code, tiny, log)


#: Where tests with the mark are: collecting all others would take a minute.
FOLDERS = (
    "tests/test_cuda.py", "tests/measure/test_timing.py", "tests/adapters/encoders/test_open_clip.py",
    "tests/bench/performance/test_language.py",
)  # fmt: skip


def _results(report: Path) -> list[dict[str, Any]]:
    """Every test with its outcome, by pytest's own report."""
    if not report.exists():
        return []
    out: list[dict[str, Any]] = []
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        bad = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        left = case.find("skipped")
        if bad is not None:
            out.append({"key": name, "status": "error", "error": (bad.get("message") or "")[:300]})
        elif left is not None:
            out.append({"key": name, "status": "skipped", "why": (left.get("message") or "")[:300]})
        else:
            out.append({"key": name, "status": "ok", "took": float(case.get("time", 0))})
    return out


def _note(ledger: Ledger, results: list[dict[str, Any]], code: int, tiny: bool, log: Path) -> None:
    for row in results:
        ledger.note(**row)
    passed = sum(row["status"] == "ok" for row in results)
    if code == 0 and (tiny or passed):
        ledger.note(ALL, "ok", passed=None if tiny else passed)
    else:
        ledger.note(ALL, "error", error=f"pytest ended with {code}, {passed} passed; see {log.name}")
