"""``auto:flops=0.5``: text that stands for methods which are chosen for the model that it is given to."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenreduce.core.labels import label_of
from tokenreduce.core.reducer import STAGES, Reducer
from tokenreduce.core.specs import parse_spec, split_specs

__all__ = ["KINDS", "Auto", "Chosen", "auto_of", "chosen_for", "is_auto", "tell"]

#: What a target is a share of.
KINDS = {
    "flops": "FLOPs up to the first token",
    "ttft": "time to the first token",
    "kv": "bytes of keys and values behind the prompt",
    "tokens": "visual tokens that enter the language model",
}
#: Where the choosing is done: above the adapters, so that it is found by name and only when it is asked for.
HOME = "tokenreduce.estimation.auto"


@dataclass(frozen=True)
class Auto:
    """``share`` of what the unreduced model spends of ``kind``, by methods of ``stages`` (all that the model has where
    there are none); ``on`` is the device that a time is estimated on."""

    text: str
    kind: str
    share: float
    stages: tuple[str, ...] = ()
    on: str = "h100"


@dataclass(frozen=True)
class Chosen:
    """What ``text`` stands for in a model: ``reducers`` that spend ``share`` of what is counted there, and the
    ``reason``."""

    text: str
    reducers: tuple[Reducer, ...]
    share: float
    reason: str

    @property
    def spec(self) -> str:
        """The methods as text, which gives the same without ``auto``."""
        return label_of(self.reducers, [_named(r) for r in self.reducers])

    def __str__(self) -> str:
        return f"{self.text} stands for {self.spec} here: {self.reason}"


def _named(reducer: Reducer) -> str:
    return reducer.name if "@" in reducer.name else f"{reducer.name}@{reducer.stage}"


def is_auto(text: Any) -> bool:
    """Whether a method given as text leaves the choice to the library."""
    return isinstance(text, str) and any(part.partition(":")[0].strip() == "auto" for part in split_specs(text))


def auto_of(text: str) -> Auto:
    """
    >>> auto_of("auto:flops=0.5").share
    0.5

    Raises ``ValueError`` for another target, a share outside (0, 1], a stage that there is not, and other methods
    beside it.
    """
    if len(split_specs(text)) > 1:
        raise ValueError(f"auto stands for all methods of a patch, give it alone; {text!r} names others beside it")
    _, given = parse_spec(text)
    stages, on = given.pop("stages", ()), given.pop("on", None)
    targets = [kind for kind in KINDS if kind in given]
    if len(given) != 1 or len(targets) != 1:
        wrong = next((key for key in given if key not in KINDS), None)
        said = f"{text!r} gives {'none' if not targets else 'several'}"
        said = f"there is no {wrong!r}" if wrong else said
        raise ValueError(
            f"auto takes one target, {', '.join(f'auto:{kind}=SHARE' for kind in KINDS)}, and stages=, on=; {said}"
        )
    (kind,) = targets
    share = given[kind]
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"{kind} is a share of the unreduced {KINDS[kind]} in (0, 1], not {share!r}")
    if on is not None and kind != "ttft":
        raise ValueError(f"on= names the device that auto:ttft= is estimated on; auto:{kind}= takes none")
    return Auto(text.strip(), kind, float(share), _stages(stages), str(on or "h100"))


def _stages(given: Any) -> tuple[str, ...]:
    stages = (given,) if isinstance(given, str) else tuple(given)
    if odd := [s for s in stages if s not in STAGES]:
        raise ValueError(f"stages= lists some of {', '.join(STAGES)}, as [projector,language], not {odd[0]!r}")
    return stages


def chosen_for(model: Any, reducers: Sequence[Reducer | str]) -> Chosen:
    """What is chosen for ``model`` (a module), by the only text of ``reducers``.

    Raises ``ValueError`` for other methods beside it, for a model of which nothing is known, and for a target that
    nothing known reaches, with the nearest.
    """
    if len(reducers) > 1:
        raise ValueError("auto stands for all methods of a patch; give it alone")
    (text,) = reducers
    assert isinstance(text, str)
    found: Chosen = importlib.import_module(HOME).chosen(model, auto_of(text))
    return found


def tell(chosen: Chosen) -> None:
    """Log what was chosen, on the logger ``tokenreduce``; on standard error where nobody listens to that."""
    log = logging.getLogger("tokenreduce")
    if log.isEnabledFor(logging.INFO) and log.hasHandlers():
        log.info("%s", chosen)
    else:
        print(chosen, file=sys.stderr)
