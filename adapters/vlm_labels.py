"""Training with dropped tokens: the loss of a model whose logits have fewer rows than the caller's labels."""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from tokenreduce.adapters.generation import Run
from tokenreduce.patching import Undo

__all__ = ["FORWARD", "attach_labels"]

#: The run of the forward that is under way, None where nothing was dropped.
FORWARD: ContextVar[Run | None] = ContextVar("tokenreduce_forward", default=None)


def attach_labels(generator: nn.Module, undo: Undo) -> None:
    """Let ``model(**inputs, labels=...)`` take the labels of the whole prompt; those of dropped tokens do not count."""
    if "self.loss_function" not in inspect.getsource(type(generator).forward):  # Gemma3 in early releases
        undo.pre_hook(generator, refuse_labels)
        return
    stock: Any = generator.loss_function
    undo.set(generator, "_loss_function", functools.partial(reduced_loss, stock))


def refuse_labels(generator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook on a model that computes its loss in a way of its own. Raises ``ValueError`` for labels."""
    if kwargs.get("labels") is not None:
        raise ValueError(
            f"{type(generator).__name__} of this transformers release computes its loss itself, for all columns of the "
            f"prompt; compute the loss from the logits, or use a newer release"
        )


def reduced_loss(stock: Any, logits: Tensor, labels: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """``stock`` with ``labels`` (B,L) of the columns that are left. A label is predicted from the column before it that
    is left, as in a prompt that was this short.

    Raises ``ValueError`` for logits of only some columns (``logits_to_keep``).
    """
    run, shifted = FORWARD.get(), kwargs.get("shift_labels")
    cut = None if run is None or not run.cuts else run.cuts[-1]
    given = labels if labels is not None else shifted
    if cut is None or given is None or given.shape[1] != run.length:  # type: ignore[union-attr]
        return stock(logits, labels, *args, **kwargs)
    k = cut.index.shape[1]
    if logits.shape[1] != k:
        raise ValueError(
            f"logits of {logits.shape[1]} columns, labels of {given.shape[1]}, and {k} columns are left after "
            f"reduction: labels need the logits of all columns, leave logits_to_keep at 0"
        )

    def left(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        here = t.gather(1, cut.index.to(t.device))
        return here if cut.valid is None else here.masked_fill(~cut.valid.to(t.device), -100)

    if shifted is not None:
        kwargs["shift_labels"] = left(shifted)
    return stock(logits, left(labels), *args, **kwargs)
