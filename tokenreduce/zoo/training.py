"""A small resumable training loop: AdamW, warm-up and cosine, bf16 autocast where that is fast, checkpoints.

The models that ship with the package are trained by this loop and nothing else; a killed run continues at the
last checkpoint with the same random numbers, because every batch is drawn from a generator seeded by its step.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from tokenreduce.common.files import write_bytes

__all__ = ["Schedule", "curve", "fit", "followed", "half", "progress"]

T = TypeVar("T")


@dataclass(frozen=True)
class Schedule:
    """Hyper-parameters of one run. ``steps`` optimiser steps; ``lr`` is the peak learning rate, of which the share
    ``final`` is left at the end."""

    steps: int
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 300
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    final: float = 0.0

    def rate(self, step: int) -> float:
        """Learning rate at ``step``: linear warm-up, then cosine to ``final * lr``."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.lr * (self.final + (1 - self.final) * left)


def followed(parts: Sequence[T], progress: Callable[[int, int], None] | None) -> Iterator[T]:
    """``parts`` in order; behind each ``progress``, where it is given, hears how many are done, and of how many."""
    for done, part in enumerate(parts, 1):
        yield part
        if progress is not None:
            progress(done, len(parts))


def progress(folder: Path) -> tuple[int, float]:
    """Steps and minutes that the checkpoints in ``folder`` (one per stage) hold, (0, 0.0) when there are none."""
    states = [torch.load(f, map_location="cpu", weights_only=True) for f in folder.glob("checkpoint*.pt")]
    return sum(s["step"] for s in states), sum(s["minutes"] for s in states)


def curve(folder: Path) -> dict[str, list[float]]:
    """Steps, losses and held-out accuracies in ``folder/curve.jsonl`` as lists, {} when there is none.

    A model's card keeps them, so that whoever trains again can compare. Of rows with one step the last counts.
    """
    file = folder / "curve.jsonl"
    if not file.exists():
        return {}
    rows = {row["step"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    return {key: [rows[step][key] for step in sorted(rows)] for key in ("step", "loss", "accuracy")}


def half(device: str) -> torch.autocast:
    """bf16 autocast where ``device`` has instructions for bf16 products; float32 on a CPU without, where autocast is
    nine times slower (measured on AVX2)."""
    kind = torch.device(device).type
    able = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = kind != "cpu" or any(getattr(torch.cpu, name, lambda: False)() for name in able)
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=fast)


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, int, torch.Generator], torch.Tensor],
    schedule: Schedule,
    checkpoint: Path,
    *,
    save_every: int = 500,
    device: str = "cpu",
    stop_after: float | None = None,
) -> Iterator[dict]:
    """Train ``model`` in place and yield ``{"step", "loss", "minutes"}`` after every ``save_every`` steps.

    ``loss(model, step, generator)`` draws its own batch from ``generator`` (seeded by the step) and returns a
    scalar. The checkpoint is written atomically after every yield and removed by nobody: running again with the
    same schedule continues, with another schedule raises ``ValueError``. ``stop_after`` minutes ends the run early
    (the checkpoint stays), which is how a curve's first points are reproduced.
    """
    model.to(device).train()
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=schedule.lr,
        betas=(0.9, 0.98),
    )
    start, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["schedule"] != asdict(schedule):
            raise ValueError(
                f"{checkpoint} belongs to another schedule {state['schedule']}; delete it or choose another --out"
            )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        start, spent = state["step"], state["minutes"]
    began, total, seen = time.monotonic(), 0.0, 0
    for step in range(start, schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step)
        generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + step)
        # Dropout and drop-path draw from the global generator: seed it too, or a resumed run differs.
        torch.manual_seed(schedule.seed * 1_000_003 + step)
        with half(device):
            value = loss(model, step, generator)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimiser.step()
        total, seen = total + float(value.detach()), seen + 1
        minutes = spent + (time.monotonic() - began) / 60
        last = step + 1 == schedule.steps
        out_of_time = stop_after is not None and minutes >= stop_after
        if (step + 1) % save_every == 0 or last or out_of_time:
            made = io.BytesIO()  # torch turns a full disk into a RuntimeError that names no file
            torch.save(
                {
                    "schedule": asdict(schedule),
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "step": step + 1,
                    "minutes": minutes,
                },
                made,
            )
            write_bytes(checkpoint, made.getvalue(), "choose another folder with --out")
            yield {"step": step + 1, "loss": total / seen, "minutes": minutes}
            model.train()
            total, seen = 0.0, 0
        if out_of_time:
            return
