"""Putting a method before the language model of a discovered model."""

from __future__ import annotations

import functools
from typing import Any

from tokenreduce.adapters.language.batching import attach_batching
from tokenreduce.adapters.language.drafts import attach_drafts
from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.generic.calls import enter, guard, leave
from tokenreduce.adapters.language.generic.discover import parameters_of, placeholders
from tokenreduce.adapters.language.generic.encoder import check_looks, reduced_in
from tokenreduce.adapters.language.generic.entry import Setting
from tokenreduce.adapters.language.generic.observe import attach_looks
from tokenreduce.adapters.language.generic.towers import has_axes
from tokenreduce.adapters.language.labels import attach_labels
from tokenreduce.adapters.language.projector.choose import check_projector
from tokenreduce.adapters.language.prompt import WholePrefill
from tokenreduce.adapters.language.towers import Everything, attach_encoder
from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["attach"]


def attach(found: Language, reducers: tuple[Reducer, ...], undo: Undo, towers: Any = ()) -> None:
    """Put ``reducers``, one of stage projector, into the model, and those of stage encoder into its ``towers``,
    (adapter, tower) each.

    Raises ``ValueError`` for evidence that is not there, positions that cannot be had, methods that act in one place,
    and a model whose forward was replaced.
    """
    inside = tuple(r for r in reducers if r.stage == "encoder")
    before = tuple(r for r in reducers if r.stage != "encoder")
    if len(before) > 1:
        raise ValueError(f"{' and '.join(r.spec() for r in before)} both act before the language model; choose one")
    check_looks(reducers)
    if inside:
        attach_encoder(towers, inside, undo)
    methods = " + ".join(r.spec() for r in reducers)
    _attach_before(found, before[0] if before else Everything(), methods, undo, reduced_in(towers) if inside else None)


def _attach_before(
    found: Language, reducer: Reducer, methods: str, undo: Undo, reduced: tuple[int, int] | None
) -> None:
    assert isinstance(reducer, Projector)
    assert found.site is not None
    check_projector(found, reducer)
    site, inner = found.site, found.inner
    for module in (site, inner):
        if "forward" in vars(module):
            raise ValueError(
                f"{type(module).__name__} has a forward of its own (accelerate's dispatch); call tr.patch before that"
            )
    takes = parameters_of(type(site).forward)
    setting = Setting(
        reducer, _compact(found, reducer, "position_ids" in takes), placeholders(inner.config), methods,
        "position_ids" in takes, "mm_encoder_outputs" in takes, _blank(inner),
    )  # fmt: skip
    if found.generator is not None and found.generator is not inner and site is inner:
        attach_labels(inner, found.generator, undo)
    elif undo.logits == "caller":
        raise ValueError(
            f"logits='caller' needs a model with a language head around an inner model, which {type(site).__name__} is "
            f"not; leave logits out: logits then stand at the columns that are left"
        )
    attach_looks(found, reducer.tower_blocks(), undo, reduced)
    undo.pre_hook(site, functools.partial(enter, inner=inner, setting=setting))
    undo.hook(site, leave, with_kwargs=True, always=True)
    if found.text is not inner:
        undo.pre_hook(found.text, functools.partial(guard, site=site))
    if found.generator is not None:
        undo.mix_in(found.generator, WholePrefill)
        attach_batching(found.generator, found.ids, undo)
        attach_drafts(found.generator, None, undo)
    if reducer.spec():
        undo.set(found.text, "_get_name", functools.partial(_name, type(found.text).__name__, reducer))


def _name(kind: str, reducer: Reducer) -> str:
    return f"{kind}[{reducer.spec()}]"


def _compact(found: Language, reducer: Projector, takes: bool) -> bool:
    """Whether positions are counted anew; see :class:`Projector`."""
    many = has_axes(found.inner)
    if reducer.positions == "compact" and many:
        raise ValueError(
            f"{reducer.name}: positions='compact' is not possible on {found.family}, whose positions are places in the "
            f"image; set positions='original' or leave it out"
        )
    if reducer.positions == "original" and not takes:
        raise ValueError(
            f"{reducer.name}: positions='original' is not possible on {type(found.site).__name__}, which takes no "
            f"position_ids; set positions='compact' or leave it out"
        )
    return not many if reducer.positions is None else reducer.positions == "compact"


def _blank(inner: Any) -> int:
    """A token that stands for text, for columns that nobody sees."""
    known = {v for n, v in vars(inner.config).items() if n.endswith(("token_id", "token_index")) and isinstance(v, int)}
    known |= set(placeholders(inner.config).values())
    return next(i for i in range(len(known) + 1) if i not in known)
