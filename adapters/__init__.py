"""Adapters: one file per model family. They know models and no methods.

An adapter module offers ``towers(model)``, which yields the vision transformers it finds, ``attach(tower, reducers,
undo)`` and ``FAMILIES``, the names shown to users. Only the adapters of libraries that are loaded already are
imported: a model instance cannot exist without its library.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from tokenreduce.adapters.encoder import Tower
from tokenreduce.reducer import Reducer

__all__ = ["Description", "attach", "describe", "supported"]

#: library -> adapter modules that need it
LIBRARIES: dict[str, tuple[str, ...]] = {
    "timm": ("tokenreduce.adapters.timm",),
    "open_clip": ("tokenreduce.adapters.open_clip",),
    "transformers": ("tokenreduce.adapters.hf_encoders",),
}


def _adapters() -> Iterator[ModuleType]:
    for library, names in LIBRARIES.items():
        if library in sys.modules:
            for name in names:
                yield importlib.import_module(name)


def supported() -> dict[str, tuple[str, ...]]:
    """Names of the model families per library, for messages and documentation; imports nothing heavy."""
    return {
        "timm": ("VisionTransformer (ViT, DeiT, DINOv2, SigLIP, CLIP, ...)", "Eva (EVA02, DINOv3, RoPE ViTs)"),
        "open_clip": ("VisionTransformer", "CLIP and CustomTextCLIP with it or with a timm tower"),
        "transformers": ("ViT", "CLIP", "SigLIP", "SigLIP2", "DINOv2", "DINOv3"),
    }


def _towers(model: nn.Module) -> list[tuple[ModuleType, Tower]]:
    """Every tower in ``model`` with its adapter; a tower inside another one belongs to the outer."""
    found: list[tuple[ModuleType, Tower]] = []
    for adapter in _adapters():
        for tower in adapter.towers(model):
            found.append((adapter, tower))
    return [
        (a, t)
        for a, t in found
        if not any(o is not t and t.name.startswith(o.name + "." if o.name else "") and t.name != o.name for _, o in found)
    ]


def _unsupported(model: nn.Module) -> TypeError:
    known = "; ".join(f"{library}: {', '.join(names)}" for library, names in supported().items())
    return TypeError(f"no adapter for {type(model).__name__}. Supported are models that contain one of: {known}")


def attach(model: nn.Module, reducers: tuple[Reducer, ...], undo: Any) -> None:
    """Find the model's sites and attach ``reducers``; every change goes through ``undo``.

    Raises ``TypeError`` for a model without adapter and ``ValueError`` for a stage that it does not have.
    """
    towers = _towers(model)
    if not towers:
        raise _unsupported(model)
    for reducer in reducers:
        if reducer.stage != "encoder":
            raise ValueError(
                f"{reducer.name} acts at stage {reducer.stage}, which {type(model).__name__} does not have "
                "(its stages: encoder); tr.list_methods(stage='encoder') lists what fits"
            )
    for adapter, tower in towers:
        adapter.attach(tower, reducers, undo)


@dataclass(frozen=True)
class Description:
    """What can act where in a model. ``print`` shows a table; ``towers`` has the facts."""

    model: str
    towers: tuple[Tower, ...]
    active: tuple[Reducer, ...]

    def methods(self, stage: str = "encoder") -> list[str]:
        """Methods of ``stage`` that every tower can serve."""
        from tokenreduce.registry import list_methods, load_all

        return [
            name
            for name in list_methods(stage=stage)
            if all(need in tower.evidence for tower in self.towers for need in load_all()[name].needs)
        ]

    def __str__(self) -> str:
        lines = [self.model]
        for t in self.towers:
            where = t.name or "(the model itself)"
            grid = "set by the image" if t.grid is None else f"{t.prefix} + {t.grid[0]}x{t.grid[1]} = {t.tokens}"
            lines += [
                f"  encoder  {where}: {t.family}, {len(t.blocks)} layers, tokens {grid}",
                f"           class token: {'yes' if t.cls else 'no'}; evidence: {', '.join(t.evidence)}"
                + (f"; keys are {t.rope}-RoPE" if t.rope else ""),
            ]
        lines.append(f"  methods  {', '.join(self.methods())}")
        lines.append(f"  active   {' + '.join(r.spec() for r in self.active) or 'none'}")
        return "\n".join(lines)

    __repr__ = __str__


def describe(model: nn.Module) -> Description:
    """The sites of ``model``. Raises ``TypeError`` for a model without adapter."""
    from tokenreduce.patching import reducers_of

    towers = tuple(t for _, t in _towers(model))
    if not towers:
        raise _unsupported(model)
    return Description(type(model).__name__, towers, reducers_of(model))
