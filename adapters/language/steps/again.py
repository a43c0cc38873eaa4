"""Decode steps in which a method chooses again: which cached tokens the new one sees, and tokens that come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenreduce.adapters.language.again import Site
from tokenreduce.adapters.language.decode import choose_again, last_only
from tokenreduce.adapters.language.site import LayerCall, LayerStep

__all__ = ["ChooseAgain", "LastOnly"]


@dataclass(frozen=True)
class ChooseAgain(LayerStep):
    """Behind the prefill: ask the method of ``site`` where it has one, and show the layer the keys of what the last
    choice left."""

    site: Site

    def before(self, call: LayerCall) -> None:
        done = choose_again(call.layer, (call.x,), call.kwargs, index=call.index, site=self.site)
        if done is not None:
            (call.x,), call.kwargs = done[0], dict(done[1])

    def __str__(self) -> str:
        return "show what was chosen again" if self.site.method is None else f"choose again ({self.site.method.spec()})"


@dataclass(frozen=True)
class LastOnly(LayerStep):
    """Behind the last layer: the new token alone goes on, whatever came back beside it."""

    ends = True

    def behind(self, call: LayerCall, output: Any) -> Any:
        return last_only(call.step, output)
