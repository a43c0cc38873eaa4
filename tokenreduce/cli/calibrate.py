"""``tokenreduce calibrate``: how fast this machine is, for ``estimate --device measured``."""

from __future__ import annotations

from typing import Annotated

import typer

from tokenreduce.cli.shared import print_json
from tokenreduce.common.screen import console

__all__ = ["command"]


def command(
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    seconds: Annotated[float, typer.Option(min=1, help="About how long to measure.")] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Measure this machine for ``estimate --device measured``, and store what was measured."""
    from dataclasses import asdict

    from tokenreduce.estimation.calibrate import calibrate
    from tokenreduce.estimation.measured import save
    from tokenreduce.estimation.table import amount, took

    out = console()
    if as_json:
        made = calibrate(dtype, seconds)
    else:
        with out.status("products of matrices, attention, memory"):
            made = calibrate(dtype, seconds)
    path = save(made)
    if as_json:
        print_json({"path": str(path), **asdict(made)})
        return
    best = max(rate for _, curve in made.matmul for rate in curve.rates)
    out.say(
        f"{made.dtype}, {made.threads} threads: matrices {amount(best, 'FLOP/s')}, attention "
        f"{amount(max(made.attention.rates), 'FLOP/s')}, memory {amount(made.streams['plain'].rates[-1], 'B/s')}, "
        f"an operator {took(made.launch)}"
    )
    out.say(f"stored in {path}; use it with tokenreduce estimate MODEL --device measured --dtype {dtype}")
