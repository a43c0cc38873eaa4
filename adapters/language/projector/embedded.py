"""What language models and methods name of the models that ship with the package: a CLIP, and a tokenizer.

The zoo stands above this room, so it is found by name, and only where one of its names may be meant. A language model
says two things in its config: ``clip_model``, the CLIP whose vision tower it has, and ``tokenizer_model``, whose
tokenizer it has, where it was not loaded from a folder or the Hub.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.projector.clip_text import JointSpace, joint_space
from tokenreduce.algorithms.projector import AUTO, Projector

__all__ = ["check_tower", "settled", "tokenizer_source"]


def _config(found: Language) -> Any:
    owner: Any = found.inner if found.generator is None else found.generator
    return owner.config


def tokenizer_source(found: Language) -> str:
    """Where the language model's tokenizer can be loaded from: a folder, a Hub id, the name of an embedded model, or
    "" where nothing is known."""
    config = _config(found)
    return str(config.name_or_path or getattr(config, "tokenizer_model", ""))


def settled(found: Language, reducer: Projector) -> Projector:
    """``reducer`` with what it leaves to the model: ``clip="auto"`` is the CLIP that the model names, None where it
    names none, and the sign is that of this CLIP's patches. Raises what :func:`.joint_space` raises."""
    if not hasattr(reducer, "clip"):
        return reducer
    made: Any = reducer
    if made.clip == AUTO:
        own = getattr(_config(found), "clip_model", None)
        made = replace(made, clip=own if "clip" in found.projector else None)
    if made.clip is not None and made.sign is None and (sign := joint_space(made.clip).sign) > 0:
        made = replace(made, sign=sign)
    return made  # type: ignore[no-any-return]


def check_tower(found: Language, space: JointSpace) -> None:
    """Raise ``ValueError`` where ``space`` is that of an embedded CLIP and the model has another vision tower: both
    worlds have towers of one width, so that nothing else would show it."""
    if space.patch is None:
        return
    towers = () if found.vision is None else found.vision.towers
    for tower in towers:
        patch: Tensor | None = next((m.weight for m in tower.modules() if isinstance(m, nn.Conv2d)), None)
        if patch is None or not torch.equal(patch.detach().cpu(), space.patch.to(patch.dtype)):
            raise ValueError(
                f"clip={space.name!r} has another vision tower than this model; name the CLIP model that its vision "
                f"tower was taken from, or set clip=None for relevance in the space of the language model"
            )
