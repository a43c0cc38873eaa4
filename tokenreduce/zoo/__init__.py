"""Small trained models that ship with the package, so that accuracy is real without a download.

>>> import tokenreduce as tr
>>> tr.zoo.load("digits-vit").card["accuracy"]          # doctest: +SKIP
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from tokenreduce.zoo import weights

__all__ = ["ZooModel", "evaluate", "export", "load", "names", "processor"]


@dataclass(frozen=True)
class ZooModel:
    """A trained model: ``model`` (eval), ``transform`` (PIL image to tensor), class ``labels`` and its ``card``.

    Language models have a ``processor`` with a ``tokenizer`` (transformers), and answer with a word instead of a class.
    """

    model: nn.Module
    transform: Callable[[Image.Image], torch.Tensor]
    labels: tuple[str, ...]
    card: dict[str, Any] = field(repr=False)
    processor: Any = field(default=None, repr=False)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, None without a processor."""
        return getattr(self.processor, "tokenizer", None)


Progress = Callable[[int, int], None]
Facts = Callable[[nn.Module], dict[str, Any]]


def _untold(facts: Facts) -> Callable[[nn.Module, Progress | None], dict[str, Any]]:
    """Of models that are measured in one part."""
    return lambda model, _: facts(model)


@dataclass(frozen=True)
class _Entry:
    build: Callable[[], nn.Module]
    #: What the card says of a model; the second argument is told how many parts of the measuring are done, and of how
    #: many, where that takes long.
    facts: Callable[[nn.Module, Progress | None], dict[str, Any]]
    transform: Callable[[], Callable[[Image.Image], torch.Tensor]]
    labels: tuple[str, ...]
    extra: str
    processor: Callable[[], Any] = lambda: None


def _digits() -> _Entry:
    from tokenreduce.zoo import digits
    from tokenreduce.zoo.photo import DigitTransform

    def facts(model: nn.Module) -> dict[str, Any]:
        return {"accuracy": digits.accuracy(model)}

    return _Entry(digits.build, _untold(facts), DigitTransform, tuple("0123456789"), "bench")


def _world_vit() -> _Entry:
    from tokenreduce.zoo import world_vit

    return _Entry(world_vit.build, _untold(world_vit.facts), world_vit.WorldTransform, world_vit.LABELS, "timm")


def _world_llava() -> _Entry:
    from tokenreduce.zoo import world_llava, world_vit, world_words

    return _Entry(
        world_llava.build, _untold(world_llava.facts), world_vit.WorldTransform, tuple(world_words.IDS), "hf",
        world_words.processor,
    )  # fmt: skip


def _world_vit2() -> _Entry:
    from tokenreduce.zoo import world_vit2

    return _Entry(world_vit2.build, _untold(world_vit2.facts), world_vit2.World2Transform, world_vit2.LABELS, "timm")


def _world_llava2() -> _Entry:
    from tokenreduce.zoo import world2_words, world_llava2, world_vit2

    return _Entry(
        world_llava2.build, world_llava2.facts, world_vit2.World2Transform, tuple(world2_words.IDS), "hf",
        world2_words.processor,
    )  # fmt: skip


def _world_clip2() -> _Entry:
    from tokenreduce.zoo import world_clip2, world_vit2

    return _Entry(
        world_clip2.build, _untold(world_clip2.facts), world_vit2.World2Transform, world_clip2.LABELS, "hf",
        world_clip2.processor,
    )  # fmt: skip


_ENTRIES: dict[str, Callable[[], _Entry]] = {
    "digits-vit": _digits,
    "world-vit": _world_vit,
    "world-llava": _world_llava,
    "world-vit-2": _world_vit2,
    "world-llava-2": _world_llava2,
    "world-clip-2": _world_clip2,
}


def names() -> list[str]:
    """Names that :func:`load` knows."""
    return sorted(_ENTRIES)


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise ValueError(f"no embedded model {name!r}; there are: {', '.join(names())}")
    return _ENTRIES[name]()


def _build(name: str, entry: _Entry) -> nn.Module:
    try:
        return entry.build()
    except ImportError as error:
        raise ImportError(f"{name} needs {error.name}: pip install 'tokenreduce[{entry.extra}]'") from error


def load(name: str, *, device: torch.device | str = "cpu", folder: Path = weights.FOLDER) -> ZooModel:
    """A trained model by name, in eval mode and float32.

    A model that has not learned what it is for (its card's ``accuracy``) says so by a warning. Raises ``ValueError``
    for an unknown name, ``OSError`` for missing or damaged weights (checked by sha256) and
    ``ImportError`` naming the extra when its library is missing.
    """
    entry = _entry(name)
    if not (folder / f"{name}.json").exists():
        raise OSError(
            f"there are no weights of {name} in {folder} (there: {', '.join(weights.stored(folder)) or 'none'}); make "
            f"them with: tokenreduce train {name} --export --out DIR, and load them with "
            f"tr.zoo.load({name!r}, folder=Path(DIR))"
        )
    # The initial weights are thrown away: leave the user's random numbers alone.
    with torch.random.fork_rng(devices=[]):
        model = _build(name, entry)
    card = weights.load(model, name, folder)
    if card.get("accuracy", 1.0) < weights.LEARNED:
        warnings.warn(
            f"{name} is still learning (accuracy {card['accuracy']:.2f}, see its card): figures on it tell little; "
            f"tokenreduce train {name} trains it",
            stacklevel=2,
        )
    return ZooModel(model.eval().to(device), entry.transform(), entry.labels, card, entry.processor())


def processor(name: str) -> Any:
    """The processor of an embedded model, without its weights; None for a model that has none. Raises ``ValueError``
    for an unknown name."""
    return _entry(name).processor()


def evaluate(vlm: Any, *reducers: Any, split: str = "test", seed: int = 0, questions: int = 400, **more: Any) -> dict:
    """Accuracy of ``world-llava`` or ``world-llava-2`` with ``reducers`` by question type on questions of its own
    world; see :func:`.evaluation.evaluate` and :func:`.evaluation2.evaluate`."""
    from tokenreduce.zoo import evaluation, evaluation2, world2_words

    model: Any = vlm if isinstance(vlm, nn.Module) else vlm.model
    second = model.config.text_config.vocab_size == world2_words.SIZE
    run = evaluation2.evaluate if second else evaluation.evaluate
    return run(vlm, *reducers, split=split, seed=seed, questions=questions, **more)


def export(
    model: nn.Module,
    name: str,
    card: Mapping[str, Any],
    *,
    folder: Path = weights.FOLDER,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a trained ``model`` as the embedded weights of ``name`` and return the complete card.

    The weights are rounded to fp16; the accuracies in the card are measured after rounding, on held-out data. ``card``
    holds what training knows (steps, minutes, command). ``progress`` is told how many parts of the measuring are done,
    and of how many, for ``world-llava-2``, where it takes minutes. Raises ``ValueError`` for an unknown name.
    """
    entry = _entry(name)
    rounded = copy.deepcopy(model).half().float()
    facts = {**card, **entry.facts(rounded, progress)}
    weights.save(rounded, name, facts, folder)
    return weights.read_card(name, folder)
