"""What a program of a user's looks like to a type checker: checked by ``mypy --strict``, never run (test_typed.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tokenreduce as tr
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Identity


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Mine(tr.Reducer, name="mine-typed", stage="encoder", title="Mine"):
    keep: int | float = 0.5

    def plan(self, evidence: EncoderEvidence) -> tr.Plan:
        return Identity.like(evidence.x)


@tr.reduce_tokens(tr.ToMe(r=4), "evit:keep=0.5", logits="auto")
def build(width: int) -> Net:
    return Net()


def patches(model: Net) -> Net:
    same: Net = tr.patch(model, tr.ToMe(r=4), "auto:flops=0.5", logits="auto")
    with tr.patched(same, Mine(keep=4)) as inner:
        inner(torch.zeros(1))
    back: Net = tr.unpatch(same)
    made: Net = build(3)
    return back if made is same else made


def plans(x: Tensor) -> Tensor:
    plan: tr.Plan = tr.ToMe(r=13, prop_attn=True).plan(tr.Evidence(x=x, keys=x, protected=1))
    rows: Tensor = plan.expand(plan.reduce(x))
    return rows


def facts(model: Net, x: Tensor) -> tuple[int, list[str]]:
    with tr.record(model) as trace:
        model(x)
    names: list[str] = tr.list_methods("*", stage="projector")
    one: tr.Reducer = tr.get_method("tome:r=13")
    several: tuple[tr.Reducer, ...] = tr.parse("visionzip:keep=64+fastv:layer=2", one)
    columns, valid = tr.kept_columns(model)
    kept: Tensor = columns[valid]
    return trace.flops + len(several) + int(kept.sum()), names


def costs() -> float:
    made = tr.estimate("timm:vit_base_patch16_224", "tome:r=16", device="l4", batch=8)
    found = tr.tune("world-vit", target="flops=0.5", trials=2)
    speed: float = made.speedup or 0.0
    return speed + found.share + found.score.value
