"""What is constant in a compiled graph: the settings of a method, and the number of tokens.

``torch.compile`` takes a float attribute for an input of the graph as soon as it has seen two values of it (with
``dynamic=True`` from the start). A schedule is then made of symbolic numbers of tokens, every layer's a longer
expression than the last one's, and a deep model takes minutes to trace. So does a schedule on a symbolic number of
tokens at the entry. Settings never change, so a traced forward asks :func:`settled` for its reducer: a copy whose
floats are read from text, which is guarded by its value like every string. And the first block takes the number of
tokens as it is, :func:`counted`: the batch stays symbolic, another size of image is another graph.
"""

from __future__ import annotations

import operator
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from tokenreduce.core.reducer import Reducer

__all__ = ["counted", "fix", "refuse_script", "settled"]

R = TypeVar("R", bound=Reducer)


def fix(reducer: Reducer) -> None:
    """Note the settings of ``reducer`` for :func:`settled`, floats as text."""
    reducer.__dict__["_fixed"] = tuple((f.name, *_written(getattr(reducer, f.name))) for f in fields(reducer))


def settled(reducer: R) -> R:
    """``reducer`` itself; while a graph is traced, a copy with constant settings."""
    if not torch.compiler.is_compiling() or not reducer._fixed:
        return reducer
    copy = object.__new__(type(reducer))
    for name, kind, value in reducer._fixed:
        object.__setattr__(copy, name, _read(kind, value))
    return copy


def counted(x: Tensor) -> Tensor:
    """Tokens ``x`` (B,N,C) themselves; while a graph is traced, with an N that is a constant of the graph."""
    if not torch.compiler.is_compiling():
        return x
    return x.narrow(1, 0, operator.index(x.shape[1]))


def refuse_script() -> NoReturn:
    """Raises ``RuntimeError``: TorchScript cannot compile a patched model."""
    raise RuntimeError(
        "torch.jit.script cannot compile a patched model: token plans are Python objects. Use "
        "torch.export.export(model, args, dynamic_shapes=...), or torch.onnx.export(..., dynamo=True); both take a "
        "dynamic batch, see docs/export.md. Or call tr.unpatch(model) first"
    )


def _written(value: Any) -> tuple[str, Any]:
    """What kind of setting ``value`` is, and how it is kept."""
    if type(value) is float:
        return "float", repr(value)
    if type(value) is tuple:
        return "tuple", tuple(_written(v) for v in value)
    return "", value


def _read(kind: str, value: Any) -> Any:
    if kind == "float":
        return float(value)
    return tuple(_read(k, v) for k, v in value) if kind == "tuple" else value
