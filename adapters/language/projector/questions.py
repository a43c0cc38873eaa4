"""The question of a prompt, for methods before the language model that read it."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.language.generation import Forward
from tokenreduce.adapters.language.projector.brought import brought_in
from tokenreduce.adapters.language.projector.clip_text import ZOO, JointSpace, joint_space, question_texts
from tokenreduce.algorithms.projector import Projector
from tokenreduce.algorithms.sequence import question

__all__ = ["ClipQuestion", "Question", "clip_question", "embedded_question", "tokenizer_of"]


@dataclass(frozen=True, eq=False)
class Question:
    """``x`` (B,M,D), the embeddings of a prompt's question, which of them are ``there`` (B,M)."""

    x: Tensor
    there: Tensor


@dataclass(frozen=True, eq=False)
class ClipQuestion:
    """``x`` (B,M,E), the questions in the ``space`` of a CLIP model."""

    space: JointSpace
    x: Tensor


def _asked(forward: Forward) -> Tensor:
    """(B,L) bool: the text behind the last image, all text where nothing is."""
    columns = forward.columns
    visual = columns.visual
    real = torch.ones_like(visual) if columns.real is None else columns.real.clone()
    real[:, : columns.front] = False  # its embeddings are not here
    behind = question(visual, real)
    return torch.where(behind.any(1, keepdim=True), behind, real & ~visual)


def embedded_question(forward: Forward, x: Tensor) -> Question:
    """The question in a prompt with embeddings ``x`` (B,L,D)."""
    behind = _asked(forward)
    most = max(int(behind.sum(1).max()), 1)
    where = (~behind).long().argsort(dim=1, stable=True)[:, :most]
    rows = torch.arange(len(x), device=x.device)[:, None]
    return Question(x[rows, where], behind.gather(1, where))


def clip_question(forward: Forward, reducer: Projector, source: str, device: torch.device) -> ClipQuestion:
    """The question for the CLIP model that ``reducer`` names; ``source`` is where the language model's tokenizer can be
    loaded from. Raises ``ValueError`` where there are no tokens to read, or no tokenizer."""
    ids = brought_in(forward).ids
    if ids is None:
        raise ValueError(f"{reducer.name} with clip reads the question in input_ids; pass them, or set clip=None")
    space = joint_space(reducer.clip, device)  # type: ignore[attr-defined]
    return ClipQuestion(space, space.texts(question_texts(ids, _asked(forward), tokenizer_of(source)))[0])


@functools.lru_cache(maxsize=4)
def tokenizer_of(source: str) -> Any:
    """The tokenizer of a language model, an embedded one or from a folder or the Hub. Raises ``ValueError`` where it
    cannot be loaded."""
    from transformers import AutoTokenizer

    zoo = importlib.import_module(ZOO)
    if source in zoo.names() and (own := zoo.processor(source)) is not None:
        return own.tokenizer
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the setting clip needs the tokenizer of the language model to read the question, and {source!r} (the "
            f"model's name_or_path) has none; load the model with from_pretrained from a folder with its tokenizer, or "
            f"set clip=None"
        ) from error
