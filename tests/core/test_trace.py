from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import tokenreduce as tr
from tokenreduce.core.trace import DecodeStep, Step, Trace


def test_the_repr_is_short() -> None:
    trace = Trace(modules=frozenset(range(10_000, 10_400)))
    assert repr(trace) == "Trace(0 steps, 0 plans)"
    for layer, left in enumerate((40, 30, 30, 20, 10, 5, 4, 3)):
        trace.steps.append(Step("encoder", layer, left, tr.Prune(50, torch.arange(left)[None]) if layer != 2 else None))
    trace.note("clamped")
    assert repr(trace) == "Trace(8 steps, 7 plans, tokens 40>30>20>..>3, 1 note)"
    trace.decode.append(DecodeStep(2, "lazyllm", torch.ones(2, 500, dtype=torch.bool), torch.ones(2)))
    assert "1 choice in decode" in repr(trace)
    assert "tensor" not in repr(trace.steps) + repr(trace.decode)


def test_own_is_entered_around_making_and_applying_plans() -> None:
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    inside: list[str] = []

    @contextmanager
    def own():
        inside.append("in")
        yield
        inside.append("out")

    with torch.no_grad(), tr.patched(vit, "tome:r=1"), tr.record(vit, flops=False, own=own) as trace:
        vit(torch.zeros(1, 3, 32, 32))
    assert len(trace.plans) == 2
    assert inside == ["in", "out"] * (len(inside) // 2)
    assert len(inside) >= 4


def test_a_recorded_trace_says_what_was_counted() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(200)))
    with tr.record(model) as trace:
        model(torch.ones(1, 8))
    assert repr(trace) == "Trace(0 steps, 0 plans, 2.56e-05 GFLOPs)"
    with tr.record(model, flops=False, timing=True) as trace:
        model(torch.ones(1, 8))
    assert repr(trace) == "Trace(0 steps, 0 plans, 0.0 ms of its own)"
