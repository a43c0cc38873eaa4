"""Classes of lmms-eval around a patched model, made when they are asked for: ``chat_llava_hf`` and the like."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenreduce.common.files import write_text
from tokenreduce.core.labels import label_of
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import parse
from tokenreduce.integrations.lmms_eval import MODELS
from tokenreduce.integrations.lmms_eval.costs import Costs
from tokenreduce.patching import patch

__all__ = ["Watched", "reduced", "reducers_from"]


def reducers_from(value: Any) -> tuple[Reducer, ...]:
    """The methods of a model argument: ``visionzip:keep=64+fastv:layer=2,keep=0.5`` (in quotes on a command line, where
    arguments are split at commas), or the JSON of one method or of a list of them. None and "" are none."""
    if value is None or value == "":
        return ()
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.strip().strip("'\"").strip()
    if text.startswith(("{", "[")):
        made = json.loads(text)
        return tuple(Reducer.from_json(one) for one in (made if isinstance(made, list) else [made]))
    return parse(text, stage="projector")


class Watched:
    """``generate`` of a model as lmms-eval calls it. Errors are kept, since some of its classes turn them into empty
    answers, and prompts are counted, since others leave those out that they cannot load."""

    def __init__(self, model: Any, costs: Costs) -> None:
        self.costs, self.failures, self.prompts = costs, list[Exception](), 0
        self._generate: Callable[..., Any] = model.generate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self.costs.see(self._generate, args, kwargs)
            out = self._generate(*args, **kwargs)
        except Exception as error:
            self.failures.append(error)
            raise
        self.prompts += len(out)
        return out

    def check(self, requests: int, before: int = 0) -> None:
        """Raises ``RuntimeError`` where a generation failed, or fewer prompts than ``requests`` reached the model
        since there were ``before``."""
        if self.failures:
            first = self.failures[0]
            raise RuntimeError(
                f"{len(self.failures)} generations failed, the first with {type(first).__name__}: {first}"
            ) from first
        lost = requests - (self.prompts - before)
        if lost > 0:
            raise RuntimeError(
                f"{lost} of {requests} requests never reached the model (a picture or video that "
                "cannot be loaded; lmms-eval's log says which); their answers would be empty"
            )


def reduced(base: Any, name: str) -> Any:
    """A subclass of a model class of lmms-eval that takes ``tokenreduce`` and ``tokenreduce_report``."""

    class Reduced(base):  # type: ignore[misc]
        def __init__(
            self, *args: Any, tokenreduce: Any = None, tokenreduce_report: str | None = None, **kwargs: Any
        ) -> None:
            reducers = reducers_from(tokenreduce)  # a typing error shows before weights are loaded
            super().__init__(*args, **kwargs)
            self._report = None if tokenreduce_report is None else Path(tokenreduce_report)
            self._spec = label_of(reducers)
            if reducers:
                patch(self.model, *reducers)
            self._watched = Watched(self.model, Costs(self.model))
            self.model.generate = self._watched

        def generate_until(self, requests: Any) -> Any:
            before = self._watched.prompts
            out = super().generate_until(requests)
            self._watched.check(len(requests), before)
            if self._report is not None and self.rank == 0:
                told = {"spec": self._spec, "prompts": self._watched.prompts, **self._watched.costs.facts()}
                write_text(self._report, json.dumps(told, indent=1) + "\n")
            return out

        def loglikelihood(self, requests: Any) -> Any:
            if self._spec:
                raise NotImplementedError(
                    "log-likelihoods of given answers are not taken from a reduced model: use tasks that generate"
                )
            return super().loglikelihood(requests)

    Reduced.__name__ = Reduced.__qualname__ = f"Reduced{base.__name__}"
    Reduced.__module__ = f"{__name__}.{name}"
    return Reduced


def __getattr__(name: str) -> Any:
    kind, _, model = name.partition("_")
    if kind not in ("chat", "simple") or model not in MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path = MODELS[model][kind == "simple"]
    if not path:
        raise AttributeError(f"lmms-eval has no {kind} class of {model}")
    module, _, cls = path.rpartition(".")
    made = reduced(getattr(importlib.import_module(f"lmms_eval.models.{module}"), cls), name)
    globals()[name] = made
    return made
