"""Plans in safetensors files: tensors as they are, everything else as JSON in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from tokenreduce.common.files import write_bytes
from tokenreduce.plan import Chain, Identity, Plan

__all__ = ["load", "save"]


def save(plan: Plan, path: str | Path) -> None:
    """Write ``plan`` to ``path``, whole or not at all. Raises ``OSError`` that names it."""
    tensors: dict[str, Tensor] = {}
    described = _describe(plan, "", tensors)
    write_bytes(path, to_bytes({k: t.contiguous() for k, t in tensors.items()}, {"plan": json.dumps(described)}))


def load(path: str | Path) -> Plan:
    """The plan in ``path``. Raises ``ValueError`` for a safetensors file without a plan."""
    with safe_open(str(path), "pt") as file:
        described = (file.metadata() or {}).get("plan")
        if described is None:
            raise ValueError(f"{path} holds no plan; write one with plan.save(path)")
        names = list(file.keys())
        return _rebuild(json.loads(described), {name: file.get_tensor(name) for name in names})


def _describe(plan: Plan, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(plan, Chain):
        parts = [_describe(p, f"{prefix}{i}.", tensors) for i, p in enumerate(plan.plans)]
        return {"kind": "Chain", "n": plan.n, "plans": parts}
    mine = plan._tensors()
    tensors.update({prefix + name: t for name, t in mine.items()})
    settings = {**plan._settings(), **({"device": str(plan.device)} if isinstance(plan, Identity) else {})}
    return {"kind": type(plan).__name__, "settings": settings, "tensors": {n: prefix + n for n in mine}}


def _rebuild(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    if described["kind"] == "Chain":
        return Chain(described["n"], tuple(_rebuild(p, tensors) for p in described["plans"]))
    settings = dict(described["settings"])
    if "device" in settings:
        settings["device"] = torch.device(settings["device"])
    kind: Any = Plan.KINDS.get(described["kind"])
    if kind is None:
        raise ValueError(f"unknown plan kind {described['kind']!r}; known: {sorted(Plan.KINDS)}")
    return kind(**settings, **{name: tensors[key] for name, key in described["tensors"].items()})
