"""Models that turn pages and questions into one vector per token (ColPali, ColQwen2), with fewer tokens.

Such a model multiplies the vectors that its language model returns by the caller's padding mask, which has all columns.
So it gets no mask from a hook in front of it, its language model gets the mask back, and what it returns is multiplied
by the mask of the columns that are left: as many vectors fewer are stored. ColQwen2 merges image features into the
embeddings itself; here its language model's own ``get_image_features`` makes them, so that the columns are known.
"""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.generation import KEYWORD, Forward, Generation
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["attach_retrieval", "check_owner", "is_served", "limits", "note_generation", "owner_of"]

#: Wrappers that are served, and those that cannot be, with the reason.
_SERVED = ("ColPaliForRetrieval", "ColQwen2ForRetrieval")
_REFUSED = {
    "PI0Model": "its action expert reads the language model's cache with masks and positions of the whole prompt",
}


@dataclass
class _Page:
    """A call of the wrapper: the tensor by which its language model's call is known, the caller's mask (B,L), and the
    generation of that call."""

    given: Any
    mask: Tensor | None
    generation: Generation | None = None

    def left(self) -> Tensor | None:
        """(B,K) the mask of the columns that are left, None for one of ones."""
        cuts = [] if self.generation is None else self.generation.columns.cuts
        cut = cuts[-1] if cuts else None
        if cut is None:
            return self.mask
        if self.mask is None:
            return None if cut.columns.there is None else cut.columns.there.long()
        left = self.mask.gather(1, cut.columns.at.to(self.mask.device))
        return left if cut.columns.there is None else left * cut.columns.there.to(left.device)


_PAGE: ContextVar[_Page | None] = ContextVar("tokenreduce_page", default=None)


def owner_of(model: nn.Module, inner: nn.Module) -> nn.Module | None:
    """The wrapper in ``model`` that calls ``inner`` in a way of its own, or None."""
    known = (m for m in model.modules() if type(m).__name__ in (*_SERVED, *_REFUSED))
    return next((m for m in known if any(child is inner for child in m.children())), None)


def is_served(owner: nn.Module | None) -> bool:
    """Whether methods can act in a model with this wrapper."""
    return type(owner).__name__ not in _REFUSED


def limits(owner: nn.Module | None) -> tuple[str, ...]:
    """What the images of a model cannot have, in sentences for ``describe``."""
    name = type(owner).__name__
    if name in _REFUSED:
        return (f"no method acts: {_REFUSED[name]}",)
    if name in _SERVED:
        return ("one vector per token that is left; no new tokens are made",)
    return (
        "the first images of a generation are reduced, behind a cached text only by methods before the language model; "
        "images of later turns stay, with a warning",
    )


def check_owner(found: Language, reducers: tuple[Reducer, ...]) -> None:
    """Raise ``ValueError`` for a wrapper that cannot be served, and for methods that have nothing to do in it."""
    name = type(found.owner).__name__
    if name in _REFUSED:
        raise ValueError(
            f"{name} is not supported: {_REFUSED[name]}, which would not follow when tokens go. Leave it unpatched, or "
            f"give it smaller images"
        )
    caching = [r.name for r in reducers if r.stage == "cache"]
    if name in _SERVED and caching:
        raise ValueError(
            f"{' and '.join(caching)} act in decode, and {name} makes no new tokens; choose a method of stage "
            f"projector, language or encoder, such as divprune"
        )


def attach_retrieval(found: Language, undo: Undo) -> None:
    """Hooks on the wrapper and in front of those on its language model."""
    assert found.owner is not None
    merges = "inputs_embeds" in inspect.signature(type(found.owner).forward).parameters
    token = found.ids[0]
    undo.pre_hook(found.owner, functools.partial(take_mask, inner=found.inner, token=token if merges else None))
    undo.pre_hook(found.inner, give_mask)
    undo.hook(found.owner, reduce_mask)


def take_mask(
    wrapper: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, inner: Any, token: int | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook on the wrapper: keep the mask, and merge features where the wrapper would (``token`` marks where)."""
    given = dict(inspect.signature(type(wrapper).forward).bind(wrapper, *args, **kwargs).arguments)
    given.pop("self")
    given.update(given.pop("kwargs", {}))
    if token is not None and given.get("inputs_embeds") is None:
        given["inputs_embeds"] = _merged(inner, given, token)
        given["input_ids"] = given["pixel_values"] = None
    key = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    _PAGE.set(_Page(key, given.get("attention_mask")))
    given["attention_mask"] = None
    return (), given


def _merged(inner: Any, given: dict[str, Any], token: int) -> Tensor:
    """(B,L,D) embeddings of a prompt with its image features in them, from pixels padded to the largest page."""
    ids, pixels, grid = given["input_ids"], given.get("pixel_values"), given.get("image_grid_thw")
    embeds: Tensor = inner.get_input_embeddings()(ids)
    if pixels is None:
        return embeds
    if grid is not None and pixels.dim() == 3:
        count = grid[:, 1] * grid[:, 2]
        pixels = pixels[torch.arange(pixels.shape[1], device=count.device) < count[:, None]]
    features = inner.get_image_features(pixels, grid, return_dict=True).pooler_output
    features = torch.cat(list(features)) if isinstance(features, list | tuple) else features
    return embeds.masked_scatter((ids == token).unsqueeze(-1), features.to(embeds.device, embeds.dtype))


def give_mask(
    inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook on the language model: the mask that the wrapper was given."""
    page = _PAGE.get()
    key = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if page is None or key is None or key is not page.given or kwargs.get("attention_mask") is not None:
        return None
    return args, {**kwargs, "attention_mask": page.mask}


def note_generation(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook on the language model, behind the one that begins the generation."""
    page, forward = _PAGE.get(), kwargs.get(KEYWORD)
    if page is not None and isinstance(forward, Forward):
        page.generation = forward.generation


def reduce_mask(wrapper: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Hook on the wrapper: vectors of columns that are padding, or that stand for none, are zeros."""
    page = _PAGE.get()
    _PAGE.set(None)
    mask = None if page is None else page.left()
    if mask is None:
        return None
    if isinstance(output, tuple):  # return_dict=False: the embeddings come first
        return (output[0] * mask.unsqueeze(-1), *output[1:])
    output.embeddings = output.embeddings * mask.unsqueeze(-1)
    return output
