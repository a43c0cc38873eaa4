"""Models by name, with the transform and the class names that belong to them.

========================================  ==================================================================
``digits-vit``, ``world-vit``,            the embedded ViTs for handwritten digits, for generated scenes and for those
``world-vit-2``                           of the second world
``world-clip-2``                          the embedded CLIP of the second world (zero-shot)
``timm:NAME``                             ``timm.create_model``; ``NAME@FILE`` a local checkpoint, ``NAME@FOLDER``
                                          a folder with ``config.json`` and weights
``open_clip:NAME/TAG``                    zero-shot classification; TAG as open_clip has it (also a file)
``hf:ID`` or ``hf:FOLDER``                transformers: image classifiers, CLIP and SigLIP (zero-shot), backbones
========================================  ==================================================================

Options follow a question mark: ``timm:vit_tiny_patch16_224?pretrained=false&img_size=64``. Random weights
(``pretrained=false``, an empty TAG) are drawn from ``seed``, 0 by default, so that two runs see one model.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch

from tokenreduce.bench import zeroshot
from tokenreduce.bench.loaders import hf_models, open_clip_models, timm_models
from tokenreduce.bench.loaders.loaded import Loaded
from tokenreduce.common.model_names import options_of

__all__ = ["EMBEDDED", "KINDS", "Loaded", "load_model"]

#: Embedded classifiers and the size of their input.
EMBEDDED = {
    "digits-vit": (1, 28, 28),
    "world-vit": (3, 112, 112),
    "world-vit-2": (3, 224, 224),
    "world-clip-2": (3, 224, 224),
}
#: What a model name may start with, for messages.
KINDS = (
    *EMBEDDED,
    "timm:NAME[@CHECKPOINT]",
    "open_clip:NAME/TAG",
    "hf:ID_OR_FOLDER",
)


def load_model(
    name: str, device: torch.device | str = "cpu", classes: str | Path | Sequence[str] | None = None
) -> Loaded:
    """A model by name (see the module's page) on ``device``.

    ``classes`` names the classes: a sequence, a text file with one name per line, or ``imagenet``.

    Raises ``ValueError`` for unknown kinds, models, tags and options, ``OSError`` for weights that are not there or
    damaged (no network, wrong file), ``ImportError`` naming the extra for a missing library.
    """
    kind, colon, body = name.partition(":")
    loaders = {"timm": timm_models, "open_clip": open_clip_models, "hf": hf_models}
    if name in EMBEDDED:
        loaded = _embedded(name, device)
    elif not colon or kind not in loaders or not body:
        raise ValueError(f"unknown model {name!r}; write one of: {', '.join(KINDS)}{_hint(name)}")
    else:
        source, _, text = body.partition("?")
        loaded = loaders[kind].load(name, source, options_of(name, text), torch.device(device))
    names = zeroshot.read_classes(classes)
    return loaded if names is None else loaded.with_classes(names)


def _hint(name: str) -> str:
    if Path(name).expanduser().is_dir():
        return f" (for a transformers folder: hf:{name})"
    kind = difflib.get_close_matches(name.partition(":")[0], [*EMBEDDED, "timm", "open_clip", "hf"], 1)
    return f" (did you mean {kind[0]}?)" if kind and kind[0] != name else ""


def _embedded(name: str, device: torch.device | str) -> Loaded:
    from tokenreduce import zoo

    z = zoo.load(name, device=device)
    if name == "world-clip-2":
        plain = Loaded(z.model, name, "zero-shot", z.transform, EMBEDDED[name], templates="name")
        return hf_models.with_towers(plain, z.tokenizer, torch.device(device))
    return Loaded(z.model, name, "classifier", z.transform, EMBEDDED[name], len(z.labels), z.labels)
