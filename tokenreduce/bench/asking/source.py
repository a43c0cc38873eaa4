"""What questions come from, and how a model is asked them: the part in which tasks on images and on videos differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tokenreduce.bench.questions import Item
from tokenreduce.bench.vlms import LoadedVlm
from tokenreduce.measure.question import Question

__all__ = ["Asker", "Batch", "Opened", "Source", "processed", "reason_of", "runs"]

#: A question and what it is about, open.
Opened = tuple[Item, Any]


class Batch(NamedTuple):
    """Inputs of ``items``, or ``remake(model)`` where they hold features that must be those of the patched tower."""

    items: list[Item]
    inputs: dict[str, Any]
    remake: Callable[[Any], dict[str, Any]] | None = None


class Source(Protocol):
    """Questions of a data set, whatever model they are asked of.

    ``data`` is its name; ``items`` are asked in this order; ``problems`` say by id what is wrong with those that cannot
    be ({"path", "reason"}), and grow while they are opened; ``notes`` belong to the unreduced row.
    """

    data: str
    items: list[Item]
    problems: dict[int, dict[str, str]]

    @property
    def notes(self) -> tuple[str, ...]: ...

    def open(self, item: Item) -> Any:
        """What ``item`` is about. Raises ``OSError`` or ``ValueError`` where it is missing or broken."""
        ...

    def read(self, item: Item, text: str) -> tuple[str, bool]:
        """An answer as answers are compared with each other, and whether it is right."""
        ...

    def graded(self, said: Mapping[int, str]) -> dict[str, float]:
        """What answers, by the id of their question, are worth besides being right or wrong."""
        ...

    def asker(self, loaded: LoadedVlm) -> Asker:
        """How these questions are put to a model."""
        ...

    def columns(self, probes: Sequence[Question], row: dict[str, Any]) -> dict[str, Any]:
        """What a row says besides, of the questions on which costs were counted."""
        ...


class Asker(Protocol):
    """Makes inputs of one model. ``words`` says that an answer is the likeliest token behind the question,
    ``lone_batches`` that :meth:`together` is right for one question too and never refuses."""

    words: bool
    lone_batches: bool

    def groups(self, items: Sequence[Item], size: int) -> Iterable[list[Item]]:
        """Questions that go through the model together, ``size`` at most."""
        ...

    def alike(self, opened: list[Opened]) -> Iterable[list[Opened]]:
        """Parts that processors can put into one batch."""
        ...

    def question(self, item: Item, opened: Any) -> Question:
        """One question alone."""
        ...

    def together(self, opened: Sequence[Opened]) -> Batch:
        """Several as one batch, padded on the left; raises what the processor raises where it makes none."""
        ...


def runs(items: Sequence[Item], size: int) -> Iterable[list[Item]]:
    """``items`` in order, ``size`` at a time."""
    return (list(items[i : i + size]) for i in range(0, len(items), size))


def processed(processor: Any, texts: list[str], **inputs: Any) -> dict[str, Any]:
    """What ``processor`` makes of a batch, padded on the left."""
    settings: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    bos = processor.tokenizer.bos_token
    if bos and texts[0].startswith(bos):  # else it would be there twice
        settings["add_special_tokens"] = False
    made = dict(processor(text=texts, **inputs, **settings))
    made.pop("labels", None)
    return made


def reason_of(item: Item, error: Exception) -> dict[str, str]:
    """Why ``item`` cannot be asked, as reports list it."""
    path = str(item.image) if isinstance(item.image, Path) else f"question {item.id}"
    reason = str(error).removeprefix(f"{path}: ").splitlines()[0] if str(error) else type(error).__name__
    return {"path": path, "reason": reason}
