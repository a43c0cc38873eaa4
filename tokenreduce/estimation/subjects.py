"""Subjects by name."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from tokenreduce.estimation.subject import Ask, Subject

__all__ = ["subject_of"]


def subject_of(name: str, ask: Ask) -> Subject:
    """``name`` is an embedded model, ``timm:NAME?options`` (or a bare timm name), ``open_clip:NAME``, a Hub id or a
    folder with a ``config.json`` (``hf:`` may stand in front). Weights are neither read nor downloaded.

    Raises ``ValueError`` for a name that is none of these, a model without a vision part, an image or clip that it does
    not take; ``OSError`` for a config that is not there; ``ImportError`` that names a missing extra.
    """
    from tokenreduce import zoo

    if name in zoo.names():
        from tokenreduce.estimation.real_subjects import embedded

        return embedded(name, ask)
    bare = name.removeprefix("hf:")
    if name.startswith("hf:") or Path(bare).expanduser().exists() or re.fullmatch(r"[\w.-]+/[\w.-]+", bare):
        from tokenreduce.estimation.hf_subjects import from_config

        return from_config(name, bare, ask)
    kind, _, body = name.rpartition(":")
    if kind == "open_clip":
        from tokenreduce.estimation.real_subjects import open_clip

        return open_clip(name, body, ask)
    if kind in ("timm", "") and importlib.util.find_spec("timm") is not None:
        from tokenreduce.estimation.timm_subjects import from_timm

        return from_timm(name, body, ask)
    if kind == "timm":
        raise ImportError("timm is not installed: pip install 'tokenreduce[timm]'")
    raise ValueError(
        f"unknown model {name!r}; give an embedded one ({', '.join(zoo.names())}), timm:NAME, open_clip:NAME, a Hub id "
        "(owner/name) or a folder with a config.json"
    )
