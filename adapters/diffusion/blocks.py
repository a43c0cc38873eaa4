"""What runs in a patched denoiser: the map noted, one plan for each block, and modules on merged tokens.

How it works. A hook on the denoiser notes the timestep in the keywords that diffusers hands on to attention
(``cross_attention_kwargs``), the spatial transformer adds the size of its feature map, and the block, which alone sees
both and its tokens, makes the plan. Attention modules get it by the same keyword and take it out again; the MLP, which
gets no keywords, by a context variable that is set while its block runs. The code of diffusers in between stays what it
is, nothing is stored on modules, and a block that runs again for its gradient is given the same arguments.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.diffusion.site import ON_BLOCK, ON_MODULE, DiffusionSite, Map
from tokenreduce.core.compiled import counted, refuse_script, settled
from tokenreduce.core.evidence import DiffusionEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.trace import Step, active

__all__ = [
    "KWARGS", "Mapped", "MergedAttention", "MergedFeedForward", "Merging", "check_processor", "note_timestep",
]  # fmt: skip

KWARGS = "cross_attention_kwargs"
#: The key of ours among these.
KEY = "tokenreduce"
#: Where ``cross_attention_kwargs`` stands among the positional arguments behind the tokens, of a spatial transformer
#: and of a block (checkpointing gives them by position).
IN_TRANSFORMER, IN_BLOCK = 4, 4
_PLAN: ContextVar[Plan | None] = ContextVar("tokenreduce_diffusion_plan", default=None)


def check_processor(module: nn.Module) -> None:
    """Raise ``ValueError`` where an attention module has a processor that is not one of diffusers' general ones, which
    treat tokens alike wherever they are."""
    processor = getattr(module, "processor", None)
    if processor is not None and type(processor).__module__ != "diffusers.models.attention_processor":
        kind = type(processor)
        raise ValueError(
            f"an attention module has the processor {kind.__module__}.{kind.__name__}, which may read or store where "
            "tokens are; on merged tokens it would see others. Use diffusers.models.attention_processor there, or "
            "merge for other modules"
        )


# -- the keywords that travel ------------------------------------------------------------------------------------------
def note_timestep(time: int, at: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of a denoiser: note the timestep, argument number ``time``, in the keywords for attention, number
    ``at``."""
    timestep = args[time] if len(args) > time else kwargs.get("timestep")
    return _noted(args, kwargs, at, Map(timestep))


def _noted(args: tuple[Any, ...], kwargs: dict[str, Any], at: int, note: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with ``note`` in the keywords for attention, or without one where it is None."""
    given = args[at] if len(args) > at else kwargs.get(KWARGS)
    new = {k: v for k, v in (given or {}).items() if k != KEY}
    if note is not None:
        new[KEY] = note
    changed = new or (None if given is None or KEY in given else given)
    if len(args) > at:
        return (*args[:at], changed, *args[at + 1 :]), kwargs
    return args, {**kwargs, KWARGS: changed}


def _note_of(args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
    given = args[at] if len(args) > at else kwargs.get(KWARGS)
    return None if given is None else given.get(KEY)


class Mapped:
    """Mixin for spatial transformers: adds the size of the feature map to the note, or takes the note out."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        note = None
        if self.__dict__[ON_MODULE]:
            rows, columns = (operator.index(side) for side in hidden_states.shape[-2:])
            given = _note_of(args, kwargs, IN_TRANSFORMER)
            note = Map(None if given is None else given.timestep, (rows, columns))
        args, kwargs = _noted(args, kwargs, IN_TRANSFORMER, note)
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


# -- the block ---------------------------------------------------------------------------------------------------------
class Merging:
    """Mixin for transformer blocks: the plan is made of what enters, for all modules of the block."""

    def _get_name(self) -> str:
        site: DiffusionSite = self.__dict__[ON_BLOCK]
        return f"{type(self).__name__}[{site.reducer.spec()}]"

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` asks first."""
        refuse_script()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        site: DiffusionSite = self.__dict__[ON_BLOCK]
        note = _note_of(args, kwargs, IN_BLOCK)
        if note is None or note.grid is None:
            raise RuntimeError(
                "a patched transformer block was not told the size of its feature map: it runs outside of the denoiser "
                "that was patched, or code in between drops cross_attention_kwargs; call tr.unpatch first"
            )
        plan = self._plan(site, hidden_states, note)
        args, kwargs = _noted(args, kwargs, IN_BLOCK, None if plan.is_identity else plan)
        if plan.is_identity or "mlp" not in site.reducer.modules():
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        token = _PLAN.set(plan)
        try:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        finally:
            _PLAN.reset(token)

    def _plan(self, site: DiffusionSite, x: Tensor, note: Map) -> Plan:
        trace = active()
        with nullcontext() if trace is None else trace.clock():
            evidence = DiffusionEvidence(
                counted(x), grid=note.grid, layer=site.layer, depth=site.depth, timestep=note.timestep
            )
            plan = settled(site.reducer).plan(evidence)
        if trace is not None:
            acted = None if plan.is_identity else plan
            step = Step("diffusion", site.layer, plan.k, acted, site.reducer.spec(), grid=note.grid)
            trace.add(self, step)  # type: ignore[arg-type]
        return plan


# -- its modules -------------------------------------------------------------------------------------------------------
class MergedAttention:
    """Mixin for attention modules of a patched block: takes the plan out of the keywords, and follows it where the
    method acts."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        plan: Plan | None = kwargs.pop(KEY, None)
        run: Any = super().forward  # type: ignore[misc]
        if plan is None or not self.__dict__[ON_MODULE]:
            return run(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        if not torch.compiler.is_compiling():
            check_processor(self)  # type: ignore[arg-type]
        _check_tokens(self, hidden_states, plan)
        by_place = attention_mask is not None and (
            encoder_hidden_states is None or (attention_mask.dim() > 2 and attention_mask.shape[-2] != 1)
        )
        if by_place or kwargs.get("ip_adapter_masks") is not None:
            raise ValueError(
                "this call has a mask over places of the feature map (attention_mask of the UNet, ip_adapter_masks), "
                "which merged tokens do not have; leave the mask out, merge for other modules, or call tr.unpatch first"
            )
        merged = run(plan.reduce(hidden_states), encoder_hidden_states, attention_mask, **kwargs)
        return plan.expand(merged)


class MergedFeedForward:
    """Mixin for the MLP of a patched block."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = _PLAN.get()
        run: Any = super().forward  # type: ignore[misc]
        if plan is None:
            return run(hidden_states, *args, **kwargs)
        _check_tokens(self, hidden_states, plan)
        return plan.expand(run(plan.reduce(hidden_states), *args, **kwargs))


def _check_tokens(module: Any, x: Tensor, plan: Plan) -> None:
    if x.dim() != 3 or x.shape[0] != plan.batch or x.shape[1] != plan.n:
        raise RuntimeError(
            f"{type(module).__name__} of a patched block got tokens of shape {tuple(x.shape)}, and the plan is for "
            f"{plan.batch} x {plan.n}: something between the block and this module takes tokens or samples apart "
            "(chunked feed-forward); switch that off, merge for other modules, or call tr.unpatch first"
        )
