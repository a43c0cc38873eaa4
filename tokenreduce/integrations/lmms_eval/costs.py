"""What a prefill costs in an evaluation by lmms-eval: tokens and FLOPs of the first prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokenreduce.core.trace import record
from tokenreduce.measure.generation import layers_of
from tokenreduce.patching import describe

__all__ = ["PROBES", "Costs"]

#: Prompts that are looked at; each costs one prefill more.
PROBES = 8


class Costs:
    """Means over the first :data:`PROBES` prompts that come alone (a batch is padded, and its parts cannot be told
    apart)."""

    def __init__(self, model: Any) -> None:
        language = describe(model).language
        if language is None:
            raise TypeError(f"{type(model).__name__} has no language model with visual tokens that an adapter knows")
        self.model, self.ids, self.depth = model, torch.tensor(language.ids), len(language.layers)
        self.seen: list[dict[str, float]] = []

    def see(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Generate one token of this prompt under a trace."""
        ids = kwargs.get("input_ids")
        if len(self.seen) >= PROBES or not isinstance(ids, torch.Tensor) or len(ids) != 1:
            return
        visual = torch.isin(ids[0].cpu(), self.ids)
        with record(self.model) as trace:
            generate(*args, **{**kwargs, "max_new_tokens": 1})
        layers = layers_of(trace.steps, visual, self.depth)[1]
        self.seen.append(
            {
                "prompt_tokens": len(visual),
                "visual_tokens": int(visual.sum()),
                "entry_tokens": layers[0],
                "mean_visual_tokens": sum(layers) / len(layers),
                "prefill_flops": trace.flops,
            }
        )

    def facts(self) -> dict[str, Any]:
        """``prompt_tokens`` and ``visual_tokens`` as the caller's prompt has them, ``entry_tokens`` that enter the
        language model, ``mean_visual_tokens`` over its layers, ``prefill_flops``; ``probes`` prompts stand behind."""
        n = len(self.seen)
        return {"probes": n, **{k: sum(s[k] for s in self.seen) / n for k in (self.seen[0] if n else ())}}
