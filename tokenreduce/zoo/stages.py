"""Trainings in stages: each starts from the weights before it, with an optimiser and a checkpoint of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tokenreduce.common.files import append_line
from tokenreduce.zoo.ahead import Ahead
from tokenreduce.zoo.training import Schedule, fit

__all__ = ["Staged", "fit_stages"]


class Staged(Protocol):
    """What every stage has: a ``name`` for its checkpoint, and how long and how fast it learns."""

    @property
    def name(self) -> str: ...

    @property
    def schedule(self) -> Schedule: ...


S = TypeVar("S", bound=Staged)


def fit_stages(
    model: nn.Module,
    stages: Sequence[S],
    out: Path,
    *,
    draw: Callable[[S], Callable[[int], Any]],
    loss: Callable[[S, Any, int], Tensor],
    judge: Callable[[S], dict[str, Any]],
    device: str = "cpu",
    stop_after: float | None = None,
    workers: int = 1,
    save_every: int = 200,
    report: Callable[[dict[str, Any]], None] = print,
) -> None:
    """Train ``model`` in place through ``stages``, or go on from the checkpoints in ``out``.

    ``draw(stage)`` makes what ``workers`` processes call for the batch of a step; it is asked when the stage begins.
    ``loss(stage, batch, step)`` is a scalar; ``judge(stage)`` says how good the model is by now. After every
    ``save_every`` steps a row (``stage``, ``step`` over all stages, ``loss``, ``minutes``, and what ``judge`` said) is
    reported and appended to ``out/curve.jsonl``. ``stop_after`` minutes in total it ends early; the checkpoint stays.
    """
    before, minutes = 0, 0.0
    for number, stage in enumerate(stages, 1):
        checkpoint = out / f"checkpoint-{number}-{stage.name}.pt"
        with Ahead(draw(stage), stage.schedule.steps, workers) as batches:

            def one(_: nn.Module, step: int, __: torch.Generator, batches: Any = batches, stage: S = stage) -> Tensor:
                return loss(stage, batches(step), step)

            left = None if stop_after is None else stop_after - minutes
            spent = 0.0
            for row in fit(
                model, one, stage.schedule, checkpoint, save_every=save_every, device=device, stop_after=left
            ):
                spent = row["minutes"]
                row = {**row, "stage": stage.name, "step": before + row["step"], "minutes": minutes + spent}
                row.update(judge(stage))
                append_line(out / "curve.jsonl", json.dumps(_short(row)), "choose another folder with --out")
                report(row)
        spent = spent or torch.load(checkpoint, map_location="cpu", weights_only=True)["minutes"]
        minutes, before = minutes + spent, before + stage.schedule.steps
        if stop_after is not None and minutes >= stop_after:
            break


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value
