"""One decoder layer with the steps that act around it: one object, one pre-hook, one post-hook.

What happens at a layer is the list of its steps, in order; ``tr.describe(model, detail=True)`` prints it. A step is
frozen data that is made when a model is patched; what it remembers of a generation is a record of its own in the
generation's state.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import CALL, Call
from tokenreduce.adapters.language.columns import Columns
from tokenreduce.adapters.language.generation import KEYWORD, Forward, Generation, cache_in
from tokenreduce.adapters.language.state import State
from tokenreduce.core.undo import Undo

__all__ = ["LayerCall", "LayerSite", "LayerStep", "sites_in"]


@dataclass
class LayerCall:
    """One call of a decoder layer, which its steps change one after the other.

    ``x`` (B,N,C) are the hidden states that enter it, ``kwargs`` its other arguments, and ``forward`` says where in its
    generation the call is: in prefill, or behind it.
    """

    layer: Any
    index: int
    x: Tensor
    kwargs: dict[str, Any]
    forward: Forward
    #: (B,N,C) what a method of this call chose from, once one did.
    whole: Tensor | None = None

    @property
    def prefill(self) -> bool:
        return self.forward.prefill

    @property
    def generation(self) -> Generation:
        return self.forward.generation

    @property
    def columns(self) -> Columns:
        return self.forward.generation.columns

    @property
    def state(self) -> State:
        """What steps remember of the generation."""
        return self.forward.generation.state

    @property
    def cache(self) -> Any:
        return cache_in(self.kwargs)

    @property
    def mask(self) -> Any:
        """The attention mask: the stock one, until a step makes another."""
        return self.kwargs.get("attention_mask")

    @mask.setter
    def mask(self, mask: Any) -> None:
        self.kwargs["attention_mask"] = mask

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Rotary tables."""
        tables: tuple[Tensor, ...] = self.kwargs["position_embeddings"]
        return tables

    @tables.setter
    def tables(self, tables: tuple[Tensor, ...]) -> None:
        self.kwargs["position_embeddings"] = tables

    @property
    def attention(self) -> Call | None:
        """What the attention is to do besides attending, or to show."""
        return self.kwargs.get(CALL)

    @attention.setter
    def attention(self, call: Call) -> None:
        self.kwargs[CALL] = call


class LayerStep:
    """Something that happens around a decoder layer, in prefill, in decode or in both."""

    #: Whether the step has something to do behind the layer.
    ends: ClassVar[bool] = False

    @property
    def listens(self) -> bool:
        """Whether the step asks the layer's attention for what it saw."""
        return False

    @property
    def rests(self) -> bool:
        """Whether the step does nothing for one new token that sees all that its layer holds."""
        return False

    def before(self, call: LayerCall) -> None:
        """Change what enters the layer."""

    def behind(self, call: LayerCall, output: Any) -> Any:
        """The layer's output, changed or not; ``call`` is as the layer got it."""
        return output

    def attach(self, layer: Any, undo: Undo) -> None:
        """Hooks on parts of the layer, for the few steps that act inside it."""

    def __str__(self) -> str:
        return "".join(f" {c.lower()}" if c.isupper() else c for c in type(self).__name__).strip()


@dataclass(frozen=True)
class LayerSite:
    """Decoder layer ``index`` and its ``steps``, in order."""

    index: int
    steps: tuple[LayerStep, ...]

    @functools.cached_property
    def rests(self) -> bool:
        """Whether all steps do nothing for one new token that sees all that the layer holds."""
        return all(step.rests for step in self.steps)

    def attach(self, layer: Any, undo: Undo) -> None:
        """Put the steps into ``layer``."""
        for step in self.steps:
            step.attach(layer, undo)
        undo.pre_hook(layer, functools.partial(run_before, site=self))
        if any(step.ends for step in self.steps):
            undo.hook(layer, functools.partial(run_behind, site=self), with_kwargs=True)

    def __str__(self) -> str:
        return f"layer {self.index}: {', '.join(map(str, self.steps))}"


def parameters_of(layer: Any) -> tuple[str, ...]:
    """Names of what a layer takes behind its hidden states."""
    kind: Any = type(layer)
    return _names(kind)


@functools.lru_cache(maxsize=256)
def _names(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(inspect.unwrap(kind.forward)).parameters)[2:]  # type: ignore[attr-defined]


def run_before(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, site: LayerSite
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The one pre-hook of a layer."""
    forward: Forward | None = kwargs.get(KEYWORD)
    if forward is None:
        return None
    if site.rests and forward.quiet == args[0].shape[0] and len(args) == 1 and kwargs.get("attention_mask") is None:
        return None
    # What comes by position behind the hidden states has a name as well, by which steps find it.
    named = dict(zip(parameters_of(layer), args[1:], strict=False)) if len(args) > 1 else {}
    call = LayerCall(layer, site.index, args[0], {**named, **kwargs}, forward)
    for step in site.steps:
        step.before(call)
    return (call.x,), call.kwargs


def run_behind(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, site: LayerSite) -> Any:
    """The one hook behind a layer, where a step needs it."""
    forward: Forward | None = kwargs.get(KEYWORD)
    if forward is None or (site.rests and forward.quiet):
        return None
    call = LayerCall(layer, site.index, args[0], kwargs, forward)
    for step in site.steps:
        if step.ends:
            output = step.behind(call, output)
    return output


def sites_in(layers: Iterable[Any]) -> list[LayerSite]:
    """The sites that a patch put into decoder ``layers``."""
    hooks = (hook for layer in layers for hook in layer._forward_pre_hooks.values())
    return [h.keywords["site"] for h in hooks if isinstance(h, functools.partial) and h.func is run_before]
