"""Records of a generation that one step writes and another reads; those of a single step are in its file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import Call
from tokenreduce.adapters.language.state import Record

__all__ = ["Decided", "Frames", "LayerInput", "LeftInside", "Places", "PromptFeatures", "Recorded", "TowerScores"]


@dataclass
class Decided(Record):
    """``layers`` whose plan is made: gradient checkpointing runs a layer again, and must get the same tokens."""

    layers: set[int] = field(default_factory=set)


@dataclass
class Recorded(Record):
    """By layer: the ``call`` of its attention, for the method that acts before the next one."""

    call: Call


@dataclass
class LayerInput(Record):
    """By layer: ``x`` (B,K,C), what entered it, until the method before the next one has chosen."""

    x: Tensor


@dataclass
class LeftInside(Record):
    """By layer: ``x`` (B,K,C), what enters it, where tokens left in the middle of the layer before."""

    x: Tensor


@dataclass
class PromptFeatures(Record):
    """``x`` (B,L,C): features before layer 0, while a method still needs them."""

    x: Tensor


@dataclass
class Frames(Record):
    """``of`` (B,L,4): what ``frame_of`` of :class:`~tokenreduce.core.evidence.LanguageEvidence` says of columns."""

    of: Tensor


@dataclass
class Places(Record):
    """``of`` (B,L,6): what ``place_of`` of :class:`~tokenreduce.core.evidence.LanguageEvidence` says of columns."""

    of: Tensor


@dataclass
class TowerScores(Record):
    """Method -> (B,L), its scores of columns, see :meth:`tokenreduce.Reducer.tower_scores`."""

    by: dict[Any, Tensor] = field(default_factory=dict)
