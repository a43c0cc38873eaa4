"""The model that a server is to load: a folder, a Hub id, or the embedded one, which is written to a folder first."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

from tokenreduce.common.files import cache_folder, make_folder

__all__ = ["EMBEDDED", "config_of", "save_embedded", "source_of"]

EMBEDDED = "world-llava"


def source_of(model: str, *, write: bool = True) -> str:
    """What vLLM is to load for ``model``; ``world-llava`` is a folder in the cache, made there if ``write``.

    Raises ``ValueError`` for an embedded model that answers no questions, and ``OSError`` for a folder that cannot be
    written.
    """
    from tokenreduce import zoo

    if model == EMBEDDED:
        folder = _embedded_folder()
        if write and not (folder / "config.json").exists():
            save_embedded(folder)
        return str(folder)
    if model in zoo.names():
        raise ValueError(f"{model} classifies images; the embedded model that answers questions is {EMBEDDED}")
    source = model.removeprefix("hf:")
    folder = Path(source).expanduser()
    return str(folder) if folder.is_dir() else source


def config_of(model: str) -> Any:
    """The config of ``model``. Raises ``OSError`` where there is none, ``ImportError`` without transformers."""
    if model == EMBEDDED:
        from tokenreduce.zoo.world_llava import build

        return build().config
    from transformers import AutoConfig

    source = model.removeprefix("hf:")
    folder = Path(source).expanduser()
    try:
        return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else source)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OSError(f"cannot read the config of {model}: {said}") from error


def save_embedded(folder: Path) -> None:
    """Write the embedded model and its processor to ``folder`` as ``save_pretrained`` does, whole or not at all."""
    from tokenreduce import zoo

    made = zoo.load(EMBEDDED)
    model: Any = made.model
    processor: Any = made.processor
    model.config.text_config.architectures = ["LlamaForCausalLM"]  # vLLM's own class asks for it
    make_folder(folder.parent, "set TOKENREDUCE_CACHE to a folder that can be written")
    partial = folder.with_name(f".{secrets.token_hex(4)}.partial")
    try:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _embedded_folder() -> Path:
    from tokenreduce import __version__

    cache = cache_folder()
    base = Path.cwd() / "runs" if cache is None else cache
    return base / "serve" / f"{EMBEDDED}-{__version__}"
