"""Weights that ship with the package: fp16 safetensors with a card beside them that holds their checksum."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenreduce.common.files import make_folder, write_bytes, write_text

__all__ = ["FOLDER", "LEARNED", "learned", "load", "read_card", "save", "stored"]

FOLDER = Path(__file__).parent / "weights"
#: From this accuracy on a model is shown to visitors, and loaded without a warning.
LEARNED = 0.8
_FIX = "reinstall the package: pip install --force-reinstall --no-deps tokenreduce"


def learned(folder: Path = FOLDER) -> list[str]:
    """Of :func:`stored`, the models whose card gives an accuracy that figures can be made with (:data:`LEARNED`)."""
    return [name for name in stored(folder) if read_card(name, folder).get("accuracy", 0) >= LEARNED]


def stored(folder: Path = FOLDER) -> list[str]:
    """Names with both a card and weights in ``folder``, sorted."""
    return sorted(f.stem for f in folder.glob("*.json") if f.with_suffix(".safetensors").exists())


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save(model: nn.Module, name: str, card: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Write ``name.safetensors`` (floating point as fp16) and ``name.json`` into ``folder``; returns the former.

    ``card`` is anything JSON-able about the model; ``sha256``, ``parameters`` and ``dtype`` are added to it. Raises
    ``ValueError`` for weights that fp16 cannot hold and ``OSError`` for a folder that cannot be written.
    """
    from safetensors.torch import save as to_bytes

    tensors = {}
    for key, value in model.state_dict().items():
        half = value.detach().cpu().contiguous()
        if half.is_floating_point():
            half = half.half()
            if not half.isfinite().all():
                raise ValueError(f"{name}: {key} does not fit into fp16 (not finite after rounding)")
        tensors[key] = half.clone()  # tied weights: safetensors refuses tensors that share memory
    file = make_folder(folder, "choose another folder") / f"{name}.safetensors"
    data = to_bytes(tensors)
    facts = {
        "name": name,
        **card,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "float16",
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_bytes(file, data)
    # A list of numbers stands on one line.
    text = re.sub(r"\[[^][{}\"]*\]", lambda m: f"[{' '.join(m[0][1:-1].split())}]", json.dumps(facts, indent=2))
    write_text(file.with_suffix(".json"), text + "\n")
    return file


def read_card(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The card of ``name``. Raises ``OSError`` when it is missing or not readable."""
    file = folder / f"{name}.json"
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(card, dict) or "sha256" not in card:
            raise ValueError("it has no sha256")
    except (OSError, ValueError) as error:
        raise OSError(f"the card {file} of {name} is missing or damaged ({error}); {_FIX}") from error
    return card


def load(model: nn.Module, name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Fill ``model`` with the weights of ``name`` (in the model's own dtype) and return the card.

    Raises ``OSError`` for a missing file or one whose sha256 is not the card's, ``ValueError`` for a model of another
    architecture.
    """
    from safetensors.torch import load_file

    card = read_card(name, folder)
    file = folder / f"{name}.safetensors"
    if not file.exists():
        raise OSError(f"the weights {file} are missing; {_FIX}")
    found = _checksum(file)
    if found != card["sha256"]:
        raise OSError(
            f"the weights {file} are damaged: sha256 is {found[:12]}..., the card says {card['sha256'][:12]}...; {_FIX}"
        )
    try:
        with torch.no_grad():
            model.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise ValueError(f"{name} does not fit {type(model).__name__}: {error}") from error
    return card
