"""The projector stage of image/video language models: dropping visual tokens before the language model.

A method sees one image at a time: a maximal run of placeholder tokens is an image (a tile where a family writes text
between tiles, a frame where it writes timestamps; images that stand side by side without a token between them are
one). Its plan is made from the embeddings at the entry of the language model, in a pre-hook on that, and becomes a
plan over the columns of the prompt. The columns go before layer 0, where the machinery of the language stage
(:mod:`tokenreduce.adapters.vlm`) takes over, so that masks, windows, prefixes and caches are exact in the same way.

Positions are compact or original (see :class:`~tokenreduce.projector.Projector`). ``generate`` counts the columns that
it gave us; compact ids are these less what was dropped before them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenreduce.adapters.generation import KEYWORD, Step
from tokenreduce.evidence import Evidence
from tokenreduce.patching import Undo
from tokenreduce.plan import Merge, Plan, Pool, Prune
from tokenreduce.reducer import Reducer
from tokenreduce.trace import Step as TraceStep
from tokenreduce.trace import active

if TYPE_CHECKING:
    from tokenreduce.adapters.vlm import Language

__all__ = ["attach_projector", "images"]


def attach_projector(found: Language, reducer: Reducer, windows: list[int | None], undo: Undo) -> None:
    """Put ``reducer`` before the language model.

    Raises ``ValueError`` for evidence that is not there and for compact positions where they have no meaning.
    """
    missing = [need for need in reducer.gathers() if need not in found.projector]
    if missing:
        raise ValueError(
            f"{reducer.name} needs {', '.join(missing)}, which is not gathered between the vision encoder and the "
            f"language model of {found.family}; methods that look at the visual embeddings only work there"
        )
    compact = _compact(found, reducer, windows)
    undo.pre_hook(found.text, functools.partial(choose, reducer=reducer, compact=compact))
    undo.set(found.text, "_get_name", functools.partial(_name, type(found.text).__name__, reducer))


def _name(kind: str, reducer: Reducer) -> str:
    return f"{kind}[{reducer.spec()}]"


def _compact(found: Language, reducer: Reducer, windows: list[int | None]) -> bool:
    wanted = getattr(reducer, "positions", None)
    config: Any = found.text.config
    why = None
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        why = "M-RoPE, whose positions are places in the image"
    elif any(w is not None for w in windows):
        why = "sliding windows, which count original positions"
    if wanted == "compact" and why is not None:
        raise ValueError(
            f"{reducer.name}: positions='compact' is not possible on {found.family}, which has {why}; "
            f"set positions='original' or leave it out"
        )
    return why is None if wanted is None else wanted == "compact"


def choose(
    text: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, reducer: Reducer, compact: bool
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on the language model: make the plan in prefill, keep the count of positions in decode."""
    step: Step | None = kwargs.get(KEYWORD)
    if step is None:
        return None
    run, x = step.run, kwargs["inputs_embeds"]
    if not step.prefill:
        return _positions_later(args, kwargs, step, x.shape[1])
    with torch.no_grad():  # a plan is a choice
        stay = _staying(x, run.visual, reducer, step.newline)
        plan = None if bool(stay.all()) else Prune.from_mask(stay)
    trace = active()
    if trace is not None:
        trace.add(text, TraceStep("projector", 0, x.shape[1] if plan is None else plan.k, plan, reducer.spec()))
    if plan is None:
        return None
    run.cut(-1, plan)
    if not compact:
        return None
    gone = (~stay).long().cumsum(1)
    run.shift = gone[:, -1:]
    ids = kwargs.get("position_ids")
    ids = torch.arange(run.length, device=x.device)[None] if ids is None else ids
    kwargs = {**kwargs, "position_ids": ids - gone.to(ids.device)}
    if kwargs.get("attention_mask") is None:  # else ids that stand still look like packed sequences to the library
        kwargs["attention_mask"] = torch.ones(stay.shape, dtype=torch.long, device=x.device)
    return args, kwargs


def _positions_later(
    args: tuple[Any, ...], kwargs: dict[str, Any], step: Step, new: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Position ids (B,Q) or (3 or 4,B,Q) of ``new`` tokens behind a shortened cache."""
    run = step.run
    ids: Any = kwargs.get("position_ids")
    if run.cut_at(-1) is None:
        return None
    run.check_batch(kwargs["inputs_embeds"].shape[0])
    if not step.given:  # the library counts from the length of the cache
        past = int(kwargs["past_key_values"].get_seq_length())
        if ids is None:
            ids = torch.arange(past, past + new, device=run.visual.device)[None]
        if ids.shape[-1] == new:
            ids = ids + (run.columns(past) - past)
    if run.shift is not None:
        ids = ids - run.shift.to(ids.device)
    return args, {**kwargs, "position_ids": ids}


def images(visual: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in ``visual`` (B,L), grouped by their number of tokens: rows (G,1) and columns (G,N) of each group."""
    edge = visual.new_zeros(visual.shape[0], 1)
    before, after = torch.cat([edge, visual[:, :-1]], 1), torch.cat([visual[:, 1:], edge], 1)
    row, start = (visual & ~before).nonzero(as_tuple=True)
    end = (visual & ~after).nonzero(as_tuple=True)[1]
    length = end - start + 1
    for n in sorted(set(length.tolist())):
        here = length == n
        yield row[here, None], start[here, None] + torch.arange(n, device=visual.device)


def _staying(x: Tensor, visual: Tensor, reducer: Reducer, newline: Tensor | None) -> Tensor:
    """(B,L) bool of the columns that stay: all text, and what ``reducer`` keeps of every image."""
    stay = torch.ones_like(visual)
    fixed = torch.zeros_like(visual)
    if newline is not None and getattr(reducer, "newlines", "keep") == "keep":
        fixed = visual & (x == newline.to(x)).all(-1)
    for rows, columns in images(visual):
        ends = fixed[rows, columns]
        number = ends.sum(1)
        for count in sorted(set(number.tolist())):  # so that every image of a group keeps as many
            here = number == count
            r, c = rows[here], columns[here]
            evidence = Evidence(x[r, c], protected=ends[here] if count else 0, cls=False)
            stay[r, c] = _kept(reducer.plan(evidence), reducer)
    return stay


def _kept(plan: Plan, reducer: Reducer) -> Tensor:
    """(G,N) bool of the tokens of an image that ``plan`` keeps."""
    if any(isinstance(p, Merge | Pool) for p in getattr(plan, "plans", (plan,))):
        raise ValueError(
            f"{reducer.name} made a plan of kind {type(plan).__name__}; before a language model tokens can be dropped, "
            f"but not merged: return a Prune plan"
        )
    return plan.sources() >= 0
