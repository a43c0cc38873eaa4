"""Zero-shot classification: class names become prompts, prompts become one embedding per class (2103.00020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TEMPLATES", "classifier", "imagenet_names", "read_classes", "templates"]

#: openai: the 80 of the CLIP paper; simple: the 7 that its authors found to do nearly as well; one: a single prompt;
#: name: the name of the class and nothing else.
TEMPLATES = ("openai", "simple", "one", "name")


def _open_clip(what: str) -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"{what} come from open_clip: pip install 'tokenreduce[open_clip]'") from error
    return open_clip


def templates(name: str) -> tuple[Callable[[str], str], ...]:
    """Prompt templates by name. Raises ``ValueError`` for another name, ``ImportError`` without open_clip."""
    if name == "one":
        return ("a photo of a {}.".format,)
    if name == "name":
        return (str,)
    if name not in TEMPLATES:
        raise ValueError(f"unknown templates {name!r}; choose from {', '.join(TEMPLATES)}")
    library = _open_clip("the prompt templates (templates=one needs none)")
    return tuple(library.OPENAI_IMAGENET_TEMPLATES if name == "openai" else library.SIMPLE_IMAGENET_TEMPLATES)


def imagenet_names() -> tuple[str, ...]:
    """The 1,000 ImageNet class names that CLIP's authors curated, in the usual order."""
    return tuple(_open_clip("the ImageNet class names").IMAGENET_CLASSNAMES)


def read_classes(classes: str | Path | Sequence[str] | None) -> tuple[str, ...] | None:
    """Class names from a sequence, the word ``imagenet``, or a text file with one name per line.

    Raises ``ValueError`` for a missing or empty file and for names that occur twice in it.
    """
    if classes is None:
        return None
    if isinstance(classes, str) and classes == "imagenet":
        return imagenet_names()  # these hold some words twice (crane, maillot): both are classes
    if isinstance(classes, str | Path):
        try:
            lines = Path(classes).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"cannot read the class names {str(classes)!r} ({error}); give a text file with one name per line, "
                "in the order of the model's outputs, or the word imagenet"
            ) from error
        names = tuple(line.strip() for line in lines if line.strip())
        where = f"the file {classes}"
    else:
        names, where = tuple(classes), "the list of classes"
    if not names:
        raise ValueError(f"{where} holds no class name; write one per line")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice and names != _imagenet_or_none():
        raise ValueError(f"{where} names {', '.join(twice[:5])} more than once; class names must differ")
    return names


def _imagenet_or_none() -> tuple[str, ...] | None:
    try:
        return imagenet_names()
    except ImportError:
        return None


@torch.no_grad()
def classifier(
    encode: Callable[[list[str]], Tensor],
    classes: Sequence[str],
    prompts: Sequence[Callable[[str], str]],
    batch: int = 256,
) -> Tensor:
    """(C, classes) unit columns: the mean over ``prompts`` of the normalised text features of each class.

    ``encode`` maps a list of texts to (n, C). Underscores in class names (folders) are read as spaces.
    """
    texts = [prompt(name.replace("_", " ")) for name in classes for prompt in prompts]
    parts = [F.normalize(encode(texts[i : i + batch]).float(), dim=-1) for i in range(0, len(texts), batch)]
    mean = torch.cat(parts).view(len(classes), len(prompts), -1).mean(1)
    return F.normalize(mean, dim=-1).T.contiguous()
