"""Zero-shot classifiers of open_clip: ``open_clip:NAME/TAG``."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenreduce.bench import zeroshot
from tokenreduce.bench.loaders.loaded import Converted, Loaded, input_size
from tokenreduce.bench.loaders.shared import NETWORK, first_lines, known, library, seeded, unavailable

__all__ = ["load"]


def _encode_image(model: Any, x: Tensor) -> Tensor:
    return model.encode_image(x)


@dataclass
class _OpenClipText:
    """Texts to features; the tokenizer is fetched when first used, since some need a download."""

    model: Any
    name: str
    device: torch.device
    tokenizer: Any = None

    def __call__(self, texts: list[str]) -> Tensor:
        if self.tokenizer is None:
            import open_clip

            try:
                self.tokenizer = open_clip.get_tokenizer(self.name)
            except Exception as error:
                raise OSError(
                    f"cannot load the tokenizer of {self.name}: {first_lines(error)} Fix: {NETWORK}"
                ) from error
        return self.model.encode_text(self.tokenizer(texts).to(self.device))


def load(name: str, source: str, options: dict[str, Any], device: torch.device) -> Loaded:
    open_clip = library("open_clip", "open_clip")
    known(name, options, ("image_size", "templates", "seed"))
    templates = str(options.get("templates", "openai"))
    zeroshot.templates(templates)  # a wrong name fails before the download
    whole = source.startswith(("hf-hub:", "local-dir:"))
    mark = "@" if "@" in source.partition("/")[0] else "/"
    model_name, _, tag = (source, "", "") if whole else source.partition(mark)
    tag = "" if tag == "none" else tag
    if not whole and model_name not in open_clip.list_models():
        close = difflib.get_close_matches(model_name, open_clip.list_models(), 3, 0.5)
        raise ValueError(
            f"open_clip has no model {model_name!r}; "
            + (f"did you mean {' or '.join(close)}?" if close else "open_clip.list_models() lists them")
        )
    tags = [] if whole else open_clip.list_pretrained_tags_by_model(model_name)
    if tag and tag not in tags and not Path(tag).expanduser().is_file():
        raise ValueError(
            f"{name}: {tag!r} is neither a file nor a tag of {model_name}; its tags: {', '.join(tags) or 'none'}"
        )
    seed = options.get("seed", 0)
    try:
        with seeded(seed):
            model, _, transform = open_clip.create_model_and_transforms(
                model_name,
                pretrained=(str(Path(tag).expanduser()) if tag and tag not in tags else tag) or None,
                force_image_size=options.get("image_size"),
                pretrained_text=False,
                device=device,
            )
    except Exception as error:
        fix = f"{NETWORK}, or give a local file (open_clip:{model_name}@FILE)"
        raise unavailable(name, error, fix) from error
    return Loaded(
        model.eval(), name, "zero-shot", Converted("RGB", transform), input_size(transform),
        forward=_encode_image, encode=_OpenClipText(model, model_name, device), templates=templates,
        notes=() if tag or whole else (f"random weights (seed {seed})",),
    )  # fmt: skip
