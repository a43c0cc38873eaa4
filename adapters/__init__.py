"""Adapters: one file per model family. They know models and no methods.

An adapter module offers ``towers(model)``, which yields the vision transformers it finds, ``attach(tower, reducers,
undo)`` and ``FAMILIES``, the names shown to users.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from tokenreduce.adapters.across_frames import check_frames
from tokenreduce.adapters.description import Description, describe
from tokenreduce.adapters.encoders.handing import attach_hands
from tokenreduce.adapters.encoders.readers import own_code
from tokenreduce.adapters.finding import (
    default_stage,
    denoisers_in,
    encoder_refusal,
    language_in,
    module_of,
    stages_of,
    supported,
    towers_in,
    unsupported,
    why_not,
)
from tokenreduce.core.reducer import Reducer

__all__ = ["Description", "attach", "default_stage", "describe", "encoder_refusal", "module_of", "supported"]


def attach(model: nn.Module, reducers: tuple[Reducer, ...], undo: Any) -> None:
    """Find the model's sites and attach ``reducers``; every change goes through ``undo``.

    Raises ``TypeError`` for a model without adapter and ``ValueError`` for a stage that it does not have.
    """
    if denoisers := denoisers_in(model):
        importlib.import_module("tokenreduce.adapters.diffusion.attach").attach(denoisers, reducers, undo)
        return
    language = language_in(model)
    towers = towers_in(model, language)
    if not towers and language is None:
        raise unsupported(model)
    stages = stages_of(towers, language)
    reducers = tuple(part for reducer in reducers for part in reducer.parts())
    for reducer in reducers:
        if reducer.stage not in stages:
            raise ValueError(
                f"{reducer.name} acts at stage {reducer.stage}, which is not available on {type(model).__name__}"
                f"{why_not(model, language, reducer.stage)} (stages there: {', '.join(stages)}); "
                f"tr.list_methods(stage='{stages[0]}') lists what fits"
            )
    check_frames(model, reducers, towers, language)
    _attach_towers(model, towers, language, reducers, undo)


def _attach_towers(model: nn.Module, towers: Any, language: Any, reducers: tuple[Reducer, ...], undo: Any) -> None:
    """:func:`attach` for vision transformers and language models that have the stages of ``reducers``."""
    if language is not None and language.how == "table":
        importlib.import_module("tokenreduce.adapters.language.attach").attach(language, reducers, undo, towers)
        return
    if language is not None:
        inner = set(language.inner.modules())
        own = [(a, t) for a, t in towers if t.module in inner]
        towers = [(a, t) for a, t in towers if t.module not in inner]  # beside it
        mine = reducers if own else tuple(r for r in reducers if r.stage != "encoder")
        if mine:
            early = all(r.stage in ("projector", "encoder") for r in mine)
            where = importlib.import_module(f"tokenreduce.adapters.language.{'generic.' if early else ''}attach")
            where.attach(language, mine, undo, own)
        reducers = tuple(r for r in reducers if r.stage == "encoder")
        if not reducers or not towers:
            return
    elif undo.logits == "caller":
        raise ValueError(f"logits='caller' is for image/video language models, not for {type(model).__name__}")
    for adapter, tower in towers:
        resizing = any(r.acting_position() == "input" and not r.drops_at_input for r in reducers)
        if own_code(tower.module) and not tower.resizes and resizing:
            raise ValueError(
                f"{type(tower.module).__name__} lays its patches out in code of its own, so it cannot be resized here; "
                "give the model smaller images instead"
            )
        adapter.attach(tower, reducers, undo)
        if not getattr(adapter, "EXPANDS", False):  # those that do hand out all tokens by themselves
            attach_hands(tower, undo)
