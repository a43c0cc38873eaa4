"""Plans in safetensors files: tensors as they are, everything else as JSON in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenreduce.common.files import write_bytes

__all__ = ["load", "save"]


def save(plan: Any, path: str | Path) -> None:
    """Write ``plan`` to ``path``, whole or not at all. Raises ``OSError`` that names it."""
    from safetensors.torch import save as to_bytes

    tensors: dict[str, Tensor] = {}
    described = plan._described("", tensors)
    write_bytes(path, to_bytes({k: t.contiguous() for k, t in tensors.items()}, {"plan": json.dumps(described)}))


def load(path: str | Path, kinds: Mapping[str, Any]) -> Any:
    """The plan in ``path``, of one of ``kinds``. Raises ``ValueError`` for a safetensors file without a plan."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        described = (file.metadata() or {}).get("plan")
        if described is None:
            raise ValueError(f"{path} holds no plan; write one with plan.save(path)")
        names = list(file.keys())
        return _rebuild(json.loads(described), {name: file.get_tensor(name) for name in names}, kinds)


def _rebuild(described: Mapping[str, Any], tensors: Mapping[str, Tensor], kinds: Mapping[str, Any]) -> Any:
    kind = kinds.get(described["kind"])
    if kind is None:
        raise ValueError(f"unknown plan kind {described['kind']!r}; known: {sorted(kinds)}")
    if "plans" in described:
        return kind(described["n"], tuple(_rebuild(p, tensors, kinds) for p in described["plans"]))
    settings = dict(described["settings"])
    if "device" in settings:
        settings["device"] = torch.device(settings["device"])
    return kind(**settings, **{name: tensors[key] for name, key in described["tensors"].items()})
