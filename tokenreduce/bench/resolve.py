"""What a bare model name means: a timm name, a Hub id or a folder, and whether it answers questions."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Literal

from tokenreduce.bench.models import EMBEDDED, KINDS
from tokenreduce.bench.vlms import EMBEDDED as LANGUAGE
from tokenreduce.bench.vlms import is_vlm

__all__ = ["resolve"]


def resolve(name: str) -> tuple[Literal["image", "language"], str]:
    """The kind of a model, and the name by which :func:`~tokenreduce.bench.models.load_model` or
    :func:`~tokenreduce.bench.vlms.load_vlm` loads it.

    Names with a prefix mean what they say, those of the zoo too; a folder and ``owner/name`` are models of
    transformers, any other name is timm's. Raises ``ValueError`` for a name that can be none of these.

    >>> resolve("vit_tiny_patch16_224"), resolve("digits-vit")
    (('image', 'timm:vit_tiny_patch16_224'), ('image', 'digits-vit'))
    """
    if name in LANGUAGE:
        return "language", name
    if name in EMBEDDED or name.startswith(("timm:", "open_clip:")):
        return "image", name
    bare = name.removeprefix("hf:")
    if name.startswith("hf:") or Path(bare).expanduser().is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", bare):
        return ("language", bare) if is_vlm(f"hf:{bare}") else ("image", f"hf:{bare}")
    if importlib.util.find_spec("timm") is not None:
        import timm

        if timm.is_model(name.partition("?")[0].partition(".")[0]):
            return "image", f"timm:{name}"
    known = ", ".join(KINDS)
    raise ValueError(f"unknown model {name!r}; give a timm name, a Hub id (owner/name), a folder, or {known}")
