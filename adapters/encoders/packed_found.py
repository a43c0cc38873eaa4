"""Vision towers of transformers whose patches are packed over images, that are in no table: GLM-4V, Qwen3.5, Pixtral,
Kimi-VL, PaddleOCR and whatever is built as they are.

Such a tower is a module that is told the size of every image and sends one row of patches through a list of layers. How
a layer computes is read (:mod:`tokenreduce.adapters.encoders.packed_reading`), what happens between two of them is told
by the tower's own code, and where the patches of an image are in the row by the sizes that a call is given. Methods see
the units of patches that lie side by side, as in :mod:`tokenreduce.adapters.encoders.qwen`; keys are those behind RoPE.

The last layer hands all patches on, merged ones as copies, so that whatever stands behind it (mergers, shuffles,
projectors) reads as it was written. Parts that read tokens between two layers (DeepStack) get all of them, too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_attention import calling
from tokenreduce.adapters.encoders.hf_reading import read
from tokenreduce.adapters.encoders.hf_structure import RECIPE, Recipe, StructuredLayer, core_of, hear
from tokenreduce.adapters.encoders.packed import Layout, Packed
from tokenreduce.adapters.encoders.packed_call import RowCall
from tokenreduce.adapters.encoders.packed_layout import (
    Laid,
    between,
    bounds_of,
    embeds_pixels,
    holders_of,
    laid_out,
    packs,
    stack_of,
    start_of,
)
from tokenreduce.adapters.encoders.packed_pixels import PackedPixels
from tokenreduce.adapters.encoders.packed_reading import BOUNDS, LONGEST, FlatReading, RowReading
from tokenreduce.adapters.encoders.qwen import EVIDENCE, FAMILIES
from tokenreduce.adapters.encoders.qwen_blocks import _SEEN, PackedBlock
from tokenreduce.adapters.encoders.rebuilding import entered_of, note_entered
from tokenreduce.adapters.encoders.site import Site
from tokenreduce.adapters.encoders.state import collected, set_state, state_of
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched
from tokenreduce.adapters.encoders.tower import Tower, attach_tower
from tokenreduce.core.mixing import mixed, parts
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import active
from tokenreduce.core.undo import Undo

__all__ = ["PackedLayer", "attach", "refusal", "tower_of", "towers"]

#: Our towers' outputs have all their patches by themselves.
EXPANDS = True
_ON_ROW = "_tokenreduce_row"


class _Call(NamedTuple):
    """What a tower was called with: where patches are, and their pixels where a method looks at them."""

    laid: Laid
    pixels: PackedPixels | None


class _Row(NamedTuple):
    """The same of the row in front of the first layer."""

    layout: Layout | None
    pixels: PackedPixels | None


#: What is known of the row that is on its way through a tower.
_CALL: ContextVar[_Call | None] = ContextVar("tokenreduce_call", default=None)


@dataclass(frozen=True)
class RowTower(Tower):
    """A packed tower, with the recipe of its layers."""

    recipe: Recipe | None = None


# -- layers ------------------------------------------------------------------------------------------------------------
class PackedLayer(StructuredLayer, PackedBlock):
    """A layer on a packed row (P,C) or (1,P,C) that computes by its recipe."""

    _tokenreduce_recipe: Recipe
    _tokenreduce_site: Site

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        recipe, site = self._tokenreduce_recipe, self._tokenreduce_site
        given = _Given({**dict(zip(recipe.arguments, args, strict=False)), **kwargs})
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        row = _row(hidden_states) if site.layer == 0 else _Row(None, None)
        packed = self._begin(site, hidden_states, row.layout)
        if site.entry is not None:
            given.checked(packed)
            assert row.pixels is not None  # the tower's hook knows them where it knows the layout
            x, packed = self._drop_at_input(site, site.entry, x, packed, row.pixels)
        first = x if site.leads else None
        if site.reducer is not None and site.reducer.rebuilds:
            note_entered(x, entered_of(hidden_states))
        x, packed = self._through(x, packed, given)
        states = collected()
        if states is not None:
            states.append(packed)  # type: ignore[arg-type]
        last = site.layer == site.depth - 1
        x = packed.expand(x, packed.layout.unit) if last else x
        out = x.view(*hidden_states.shape[:-2], *x.shape)
        if first is not None:
            note_entered(out, first)
        return out if last else set_state(out, packed)  # type: ignore[arg-type]

    def _through(self, x: Tensor, packed: Packed, given: _Given) -> tuple[Tensor, Packed]:
        site = self._tokenreduce_site
        reducer = site.reducer
        where = None if reducer is None else reducer.acting_position()
        sees = reducer is not None and not _SEEN.isdisjoint(reducer.required())
        given = given.checked(packed)
        every = packed.every(x, site.layer)
        if reducer is not None and reducer.rebuilds:
            where = "aside"
            every, x, packed = self._set_patches_aside(site, reducer, x, packed)
        elif where == "before":
            assert reducer is not None
            shown = self._ask_row(x, packed, given, glance=True)[1] if sees else None
            x, packed = self._shrink(site, reducer, x, packed, given, shown, None)  # type: ignore[arg-type]
        entered = x
        record = sees and where in ("middle", "after")
        y = x if every is None else every
        out, call = self._ask_row(y, packed if every is None else packed.lasting, given, record=record)
        x = self._residual(y, out)
        x = x if every is None else packed.take(x)
        if where == "middle":
            assert reducer is not None
            x, packed = self._shrink(site, reducer, x, packed, given, call, entered)  # type: ignore[arg-type]
        middle, seen = (x, call) if where == "after" else (None, None)
        # Nothing of the attention half may stay alive while the MLP holds its hidden layer.
        del call, entered, out, every, y
        x = self._feed_forward(x)
        if where == "after":
            assert reducer is not None
            x, packed = self._shrink(site, reducer, x, packed, given, seen, middle)  # type: ignore[arg-type]
        trace = active()
        if trace is not None and where is None and site.entry is None:
            self._tell_all(trace, site, packed)
        return x, packed

    def _ask_row(
        self, x: Tensor, packed: Packed, given: _Given, record: bool = False, glance: bool = False
    ) -> tuple[Tensor, RowCall | None]:
        """The attention branch on (P,C), and what was seen there."""
        added = packed.bias()
        kwargs = given.at(packed)
        mask = kwargs.pop("attention_mask", None)
        call = None
        if record or glance or added is not None:
            if added is not None:
                mask = None if mask is None else mask + added.to(mask.dtype)
            call = RowCall(mask, added, record=record or glance, glance=glance)
        row = x if self._tokenreduce_recipe.flat else x[None]
        with calling(None):
            out = self._call(row, mask if call is None else call, kwargs)
        if call is not None:
            call.gather()
        return out.reshape(x.shape), call


@dataclass(frozen=True)
class _Given:
    """What a layer was called with besides its tokens, for all patches."""

    kwargs: dict[str, Any]
    bounds: Tensor = None  # type: ignore[assignment]

    def checked(self, packed: Packed) -> _Given:
        """With the bounds of windows. Raises ``ValueError`` where they cut units, or join images or frames, which a
        method sees one by one."""
        views = bounds_of(packed.layout)
        if (cut := self.kwargs.get(BOUNDS)) is None:
            return _Given(self.kwargs, views.to(torch.int32))
        if "cu_seq_lens_q" in self.kwargs:
            raise ValueError("a patched tower of this family runs with sdpa; set attn_implementation='sdpa'")
        unit = packed.layout.unit
        if bool((cut % unit != 0).any()) or not bool(torch.isin(views, cut.to(views)).all()):
            raise ValueError(
                "attention windows of this tower do not follow its images and frames (frames of a video that see each "
                "other), so that a method has no view of its own to act on; give single images, or a method before the "
                "language model"
            )
        return _Given(self.kwargs, cut)

    def at(self, packed: Packed) -> dict[str, Any]:
        """The arguments for the patches that are left."""
        if packed.at is None:
            return dict(self.kwargs)
        rows = packed.taken()
        assert rows is not None
        total = sum(p.numel() for p in packed.layout.places) * packed.layout.unit
        out = {name: _taken(name, value, rows, total) for name, value in self.kwargs.items()}
        if BOUNDS in out:
            out[BOUNDS] = packed.bounds(self.bounds)
        if LONGEST in out:
            out[LONGEST] = None  # the stock code counts again
        return out


def _taken(name: str, value: Any, rows: Tensor, total: int) -> Any:
    """What of an argument belongs to the patches ``rows`` of ``total``."""
    if isinstance(value, tuple | list) and value and all(isinstance(v, Tensor) for v in value):
        return type(value)([_taken(name, v, rows, total) for v in value])
    if not isinstance(value, Tensor) or name == BOUNDS or total not in value.shape:
        return value
    if name == "attention_mask":
        return value[..., rows, :][..., rows]
    if value.dim() > 1 and value.shape[-2] == total:
        return value.index_select(value.dim() - 2, rows.to(value.device))
    raise ValueError(f"{name} {tuple(value.shape)} runs along patches in a way that a patched tower does not know")


def _row(x: Tensor) -> _Row:
    """What is known of a row, which stays with it where a checkpoint runs the layer again."""
    found: _Row | None = getattr(x, _ON_ROW, None)
    call = _CALL.get()
    if found is None and call is not None:
        found = _Row(call.laid.row(x), call.pixels)
        setattr(x, _ON_ROW, found)
    return _Row(None, None) if found is None else found


# -- the tower ---------------------------------------------------------------------------------------------------------
def enter(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, looks: Reducer | None = None) -> None:
    """Pre-hook on a tower: where the patches of every image are, and their pixels where a method ``looks`` at them."""
    laid, pixels = laid_out(tower, args, kwargs), None
    if looks is not None:
        rows = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point())
        across = bool(getattr(looks, "temporal", False))
        pixels = PackedPixels.of(tower.patch_embed, rows, laid.grids, laid.unit, laid.order, across)
    _CALL.set(_Call(laid, pixels))


def leave(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Hook behind a tower, and behind errors in it: hidden states of layers in between get all patches."""
    _CALL.set(None)
    if isinstance(output, dict):
        for name, value in output.items():
            output[name] = _whole(value)
        return output
    return _whole(output)


def give_all(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook on a part of a tower that is no layer: it gets all patches."""
    return tuple(map(_whole, args)), {n: _whole(v) for n, v in kwargs.items()}


def _whole(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_whole, value)) if type(value) is tuple else value
    packed: Any = state_of(value) if isinstance(value, Tensor) else None
    if not isinstance(packed, Packed) or packed.at is None:
        return value
    flat = value.reshape(-1, value.shape[-1])
    return packed.expand(flat, packed.layout.unit).view(*value.shape[:-2], -1, value.shape[-1])


def towers(model: nn.Module) -> Iterator[Tower]:
    """Packed towers inside ``model`` that can be reduced; see :func:`refusal` for why others cannot."""
    for name, module in model.named_modules():
        if type(module) not in FAMILIES and packs(module) and refusal(module) is None:
            yield tower_of(name, module)


def tower_of(name: str, module: Any) -> RowTower:
    """The tower ``module``. Raises ``TypeError`` for one whose layers are not served."""
    layers = stack_of(module)[1][start_of(module) :]
    recipe = _recipe(module)
    stock = parts(type(layers[0]))[0]
    return RowTower(
        name, module, f"transformers {type(module).__name__}", tuple(layers), {stock: mixed(stock, PackedLayer)}, 0,
        False, None, (*EVIDENCE, "pixels") if embeds_pixels(module) else EVIDENCE, "post", resizes=False, recipe=recipe,
    )  # fmt: skip


def refusal(module: Any) -> str | None:
    """Why a tower that packs images cannot be reduced, None where it can, or is none."""
    if type(module) in FAMILIES or not packs(module):
        return None
    if not len(stack_of(module)[1][start_of(module) :]):
        return f"{type(module).__name__} is not supported: it has no layers behind where its tokens become others"
    try:
        _recipe(module)
    except TypeError as error:
        return str(error)
    why = between(module)
    return None if why is None else f"{type(module).__name__} is not supported: {why}"


_known: dict[tuple[type, str], Recipe | str] = {}


def _recipe(module: Any) -> Recipe:
    """How the layers of ``module`` compute. Raises ``TypeError`` for those that are not served, with the reason."""
    layer, family = stack_of(module)[1][0], type(module).__name__
    config: Any = getattr(module, "config", None)
    key = (parts(type(layer))[0], f"{config.to_json_string()} {config._attn_implementation}" if config else "")
    found = _known.get(key)
    if found is None:
        try:
            try:
                found = read(layer, family, reading=FlatReading)
            except TypeError as flat:
                try:
                    found = read(layer, family, reading=RowReading)
                except TypeError as row:
                    raise (row if "does not run by itself" in str(flat) else flat) from None
        except TypeError as error:
            found = str(error)
        _known[key] = found
    if isinstance(found, str):
        raise TypeError(found)
    return found


def attach(tower: Tower, reducers: tuple[Reducer, ...], undo: Undo) -> None:
    """Put ``reducers`` into a packed tower.

    Raises ``ValueError`` for methods that shrink the image or join frames, and for modules whose forward was replaced.
    """
    assert isinstance(tower, RowTower)
    module: Any = tower.module
    for reducer in reducers:
        if reducer.acting_position() == "input" and not reducer.drops_at_input:
            raise ValueError(
                f"{reducer.name} cannot act on {tower.family}, whose processor cuts images into patches: give the "
                f"processor a smaller max_pixels instead"
            )
        if getattr(reducer, "frames", 1) > 1:
            raise ValueError(
                f"{reducer.spec()}: frames is for vision towers that see the frames of a video one by one in a known "
                f"order, which {tower.family} is not; leave frames out"
            )
    attach_tower(tower, reducers, undo)
    copies: dict[int, Any] = {}
    for block in tower.blocks:
        assert tower.recipe is not None
        attn = getattr(block, tower.recipe.attention)
        refuse_own(attn)
        refuse_patched(type(attn))
        hear(core_of(attn), undo, copies)
        undo.set(block, RECIPE, tower.recipe)
    looks = next((r for r in reducers if r.drops_at_input), None)
    undo.pre_hook(module, enter if looks is None else functools.partial(enter, looks=looks))
    undo.hook(module, leave, with_kwargs=True, always=True)
    for part in _beside(module):
        undo.pre_hook(part, give_all)


def _beside(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a tower that are no layers and hold none."""
    holders, layers = holders_of(module), stack_of(module)[1]
    for child in (c for holder in holders for c in holder.children()):
        if child is layers or any(child is h for h in holders):
            continue
        yield from child.children() if isinstance(child, nn.ModuleList) else (child,)
