"""Which methods can be put into a model that is asked questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenreduce.bench.asking.meter import Meter
from tokenreduce.bench.asking.runner import quiet
from tokenreduce.bench.methods import full_name
from tokenreduce.core.registry import get_class, get_method
from tokenreduce.patching import describe, patched

__all__ = ["STAGES", "Served", "served"]

STAGES = ("projector", "language", "encoder", "cache")


class Served(NamedTuple):
    """Full names of the methods that the model can serve, stage by stage, and why the others are left out."""

    names: list[str]
    refused: list[str]


def served(meter: Meter, stages: Sequence[str], films: bool) -> Served:
    """Tried on the model that ``meter`` counts on; those for videos alone only where questions are about ``films``."""
    model = meter.runner.loaded.model
    described = describe(model)
    out = Served([], [])
    for stage in stages:
        for kind in (get_class(n, stage) for n in described.methods(stage)):
            if getattr(kind, "temporal", False) and not films:  # it would leave every picture alone
                continue
            name = full_name(kind, STAGES)
            half = ":keep=0.5" if stage == "encoder" and hasattr(kind, "keep") else ""
            try:
                with patched(model, get_method(f"{kind.name}{half}", stage)), quiet():
                    if half:  # some only show in a forward that they do not fit
                        meter.runner.prefill(model, meter.probes[0])
                out.names.append(name)
            except ValueError as error:
                out.refused.append(f"{name} is left out: {error}")
    return out
