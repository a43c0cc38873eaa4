"""Vision transformers of transformers that are in no table: found by how they are built.

A tower is a module that makes tokens of pixels in ``embeddings`` and sends them through a list of layers. What else
must be known of it is tried on a copy without weights of its own: its layers by
:mod:`tokenreduce.adapters.encoders.hf_reading`; which tokens come in front of the patches, by looking which of them
do not depend on the image; and what stands behind its layers, by taking tokens away. Where all of it treats tokens one
by one and pools the class token, the tower returns what is left. Otherwise what stands behind gets all tokens back.
"""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenreduce.adapters.encoders.handing import whole
from tokenreduce.adapters.encoders.hf_reading import read
from tokenreduce.adapters.encoders.hf_structure import PLACES, RECIPE, ROTARY, BiasedLayer, Recipe, StructuredLayer
from tokenreduce.adapters.encoders.packed_layout import keeps, packs
from tokenreduce.adapters.encoders.pixels import Pixels
from tokenreduce.adapters.encoders.state import Entry, carry_state, known, log_size, note_entry, state_of
from tokenreduce.adapters.encoders.stock import refuse_own, refuse_patched
from tokenreduce.core.mixing import parts
from tokenreduce.core.undo import Undo

__all__ = ["Found", "attach_found", "depth_of", "is_tower", "layer_class", "look", "odd"]

#: Names under which models keep their layers, in themselves or in the part that is their encoder.
_LISTS = ("layers", "layer", "blocks")
#: Names of what makes one vector of all tokens.
_HEADS = ("pooler", "head")
#: Names of biases by relative position.
_BIASES = ("relative_position_bias", "shared_position_bias")
#: Heads that are given the sizes of tokens by an adapter.
WEIGHED = ("Aimv2AttentionPoolingHead",)
#: Names of the pixels among the arguments of a forward.
_PIXELS = ("pixel_values", "pixel_values_videos")


@dataclass(frozen=True)
class Found:
    """What was found out about a tower.

    Args:
        path: where its layers are.
        recipe: how they compute.
        prefix: tokens in front of the patches.
        grid: (rows, columns) or (frames, rows, columns) of an image of its own size, None where patches come in no
            order (masked autoencoders).
        tail: what stands behind the layers: "own" treats tokens one by one, "head" pools all of them in a part of its
            own, "inside" reads them in another way.
        resizes: whether it takes smaller images.
    """

    path: str
    recipe: Recipe
    prefix: int
    grid: tuple[int, ...] | None
    tail: str
    resizes: bool


@dataclass
class _Memory:
    """What was found before, by class and settings."""

    known: dict[tuple[type, str], Found | TypeError] = field(default_factory=dict)


_memory = _Memory()


def layers_in(module: nn.Module) -> str | None:
    """The path of the list of layers that ``module`` sends its tokens through, None where it has none."""
    for name, child in (("", module), *module.named_children()):
        if name == "embeddings":
            continue
        for listed in _LISTS:
            layers = getattr(child, listed, None)
            if isinstance(layers, nn.ModuleList) and len(layers) and len({type(x) for x in layers}) == 1:
                return f"{name}.{listed}".lstrip(".")
    return None


def _pixels(module: nn.Module) -> str | None:
    names = inspect.signature(type(module).forward).parameters
    return next((n for n in _PIXELS if n in names), None)


def is_tower(module: Any) -> bool:
    """Whether ``module`` is built as a vision transformer: embeddings of pixels, then layers."""
    return (
        any(c.__module__.startswith("transformers.") for c in type(module).__mro__)
        and isinstance(getattr(module, "embeddings", None), nn.Module)
        and hasattr(getattr(module, "config", None), "patch_size")
        and _pixels(module) is not None
        and layers_in(module) is not None
        and not packs(module)
    )


def odd(module: Any) -> str | None:
    """Why single tokens of a vision model of transformers cannot go, None for one that is built as others are."""
    config: Any = getattr(module, "config", None)
    if not any(c.__module__.startswith("transformers.") for c in type(module).__mro__) or config is None:
        return None
    if _pixels(module) is None:
        return None
    if isinstance(getattr(config, "depths", None), list | tuple):
        why = "a hierarchical model lays its tokens out on a grid between stages, so single tokens cannot go"
    elif any(hasattr(config, n) for n in ("global_attn_indexes", "window_block_indices")):
        why = "its blocks attend in windows of a map of rows and columns, so single tokens cannot go"
    else:
        return None
    return f"{type(module).__name__} is not supported: {why}"


def look(module: Any) -> Found:
    """What is found out about a tower. Raises ``TypeError`` where it cannot be reduced, with the reason."""
    key = (parts(type(module))[0], f"{module.config.to_json_string()} {module.config._attn_implementation}")
    known = _memory.known.get(key)
    if known is None:
        try:
            known = _look(module)
        except TypeError as refused:
            known = refused
        _memory.known[key] = known
    if isinstance(known, TypeError):
        raise TypeError(str(known))
    return known


def _look(module: Any) -> Found:
    kind, path = type(module).__name__, layers_in(module)
    assert path is not None
    if (why := odd(module)) is not None:
        raise TypeError(why)
    biased = any(n.rpartition(".")[2] in _BIASES for n, _ in module.named_modules())
    recipe = read(module.get_submodule(path)[0], kind, biased)
    trial = _without_layers(module, path)
    try:
        pixels = pixels_of(module.config)
        one, two = (_tokens(trial.embeddings, torch.randn(x, generator=g)) for x, g in zip(
            (pixels, pixels), (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)), strict=True
        ))  # fmt: skip
    except Exception as error:
        raise TypeError(
            f"{kind} is not supported: its embeddings make no tokens (B,N,C) of an image ({error})"
        ) from error
    size = patch_of(module.config)
    grid = tuple(side // each for side, each in zip(_sides(pixels), size, strict=True))
    same = (one == two).all(-1)[0]
    prefix = int(same.long().cumprod(0).sum())
    ordered = not hasattr(module.embeddings, "random_masking")
    patches = one.shape[1] - prefix
    if bool(same[prefix:].any()) or (ordered and patches != torch.Size(grid).numel()):
        sides = "x".join(map(str, grid))
        raise TypeError(f"{kind} is not supported: {one.shape[1]} tokens that are not {sides} patches behind a prefix")
    flag = "interpolate_pos_encoding" in inspect.signature(type(module.embeddings).forward).parameters
    free = not {ROTARY, PLACES}.intersection(recipe.arguments) and not recipe.biased
    tail = _tail(module, trial, one)
    if tail == "inside" and (kept := keeps(module, path.rpartition(".")[2])) is not None:
        raise TypeError(
            f"{kind} is not supported: between its layers it does '{kept}', of tokens that may be fewer there"
        )
    return Found(path, recipe, prefix, grid if ordered else None, tail, flag and free and ordered)


# -- trying ------------------------------------------------------------------------------------------------------------
def _without_layers(module: Any, path: str) -> Any:
    """A copy of ``module`` on the CPU in float32, without its layers and with random weights."""
    kept: dict[int, Any] = {id(module.get_submodule(path)): nn.ModuleList()}
    inner = {id(p) for p in module.get_submodule(path).parameters()}
    for p in (*module.parameters(), *module.buffers()):
        if id(p) not in inner:
            floats = p.is_floating_point()
            made = torch.empty(p.shape, dtype=torch.float32 if floats else p.dtype)
            kept[id(p)] = nn.Parameter(made, requires_grad=False) if isinstance(p, nn.Parameter) else made
            if p.is_meta:
                made.zero_()
            elif not floats:
                made.copy_(p.detach().cpu())
    trial = copy.deepcopy(module, kept).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (*trial.parameters(), *trial.buffers()):
            if p.is_floating_point():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (0.5 if p.dim() == 1 else 0.0))
    for part in trial.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            getattr(part, name).clear()
    return trial


def patch_of(config: Any) -> tuple[int, ...]:
    """Pixels of one token: (rows, columns), or (frames, rows, columns) of the tubelets of a clip."""
    patch = config.patch_size
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch)
    tubelet = getattr(config, "tubelet_size", None)
    if tubelet is None or len(sides) == 3:
        return sides
    return (tubelet, *sides) if isinstance(tubelet, int) else tuple(tubelet)


def pixels_of(config: Any) -> tuple[int, ...]:
    """The shape of one image, or clip, of a model's own size."""
    side = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    if side is None:
        raise ValueError("no image_size in its config")
    sides = (side, side) if isinstance(side, int) else tuple(side)
    channels: Any = getattr(config, "num_channels", None) or getattr(config, "in_chans", 3)
    frames: Any = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", 1)
    return (1, channels, *sides) if len(patch_of(config)) == 2 else (1, frames, channels, *sides)


def _sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[-2:] if len(shape) == 4 else (shape[1], *shape[-2:])


def embedded(output: Any) -> Tensor:
    """The tokens among what embeddings return."""
    return next(o for o in output if isinstance(o, Tensor)) if isinstance(output, tuple) else output


@torch.no_grad()
def _tokens(embeddings: Any, pixels: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # masked autoencoders shuffle their patches
        out = embedded(embeddings(pixels))
    if out.dim() != 3:
        raise ValueError(f"they are of shape {tuple(out.shape)}")
    return out


@torch.no_grad()
def _tail(module: Any, trial: Any, tokens: Tensor) -> str:
    """See :class:`Found`."""
    if _is_own(module, trial, tokens):
        return "own"
    for name in _HEADS:
        if isinstance(head := getattr(trial, name, None), nn.Module):
            weighed = type(head).__name__ in WEIGHED
            setattr(trial, name, nn.Identity())
            if _is_own(module, trial, tokens):
                return "own" if weighed else "head"
    return "inside"


def _is_own(module: Any, trial: Any, tokens: Tensor) -> bool:
    """Whether ``trial`` makes of some tokens what it makes of these among all."""
    g = torch.Generator().manual_seed(3)
    full = torch.randn(tokens.shape, generator=g)
    n = full.shape[1]
    left = torch.tensor([0, *range(2, n - 1)])
    outs = []
    for given in (full, full[:, left]):
        handle = trial.embeddings.register_forward_hook(_Replaced(given))
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                outs.append(trial(torch.zeros(pixels_of(module.config))))
        except Exception:
            return False
        finally:
            handle.remove()
    pairs = zip(*([v for v in _values(o) if isinstance(v, Tensor)] for o in outs), strict=True)
    seen = False
    for every, some in pairs:
        if not every.is_floating_point():
            continue
        tokenwise = every.dim() == 3 and every.shape[1] == n
        want = every[:, left] if tokenwise else every
        if want.shape != some.shape or not torch.allclose(want, some, rtol=1e-4, atol=1e-5):
            return False
        seen |= tokenwise
    return seen


def _values(output: Any) -> list[Any]:
    return (
        list(output.values()) if isinstance(output, dict) else list(output) if isinstance(output, tuple) else [output]
    )


class _Replaced:
    """Forward hook on embeddings: other tokens in place of theirs."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(self.tokens if o is embedded(output) else o for o in output)
        return self.tokens


# -- attaching ---------------------------------------------------------------------------------------------------------
def layer_class(recipe: Recipe) -> type:
    """The mixin for layers of ``recipe``."""
    return BiasedLayer if recipe.biased else StructuredLayer


def depth_of(module: Any) -> int | None:
    """How many layers see patches alone; None for all. EoMT's queries join the tokens in front of its last blocks,
    which run on all tokens."""
    last = getattr(module.config, "num_blocks", None)
    return None if last is None or not hasattr(module, "query") else int(module.config.num_hidden_layers - last)


def attach_found(module: Any, blocks: tuple[nn.Module, ...], found: Found, undo: Undo) -> None:
    """What a tower that is in no table needs besides its layers.

    Raises ``TypeError`` for layers that are built in different ways.
    """
    names = [n for n, _ in blocks[0].named_children()]
    for block in blocks:
        if [n for n, _ in block.named_children()] != names:
            raise TypeError(f"{type(module).__name__} is not supported: its layers are built in different ways")
        undo.set(block, RECIPE, found.recipe)
    undo.hook(module.embeddings, functools.partial(note_found, patch=patch_of(module.config), ordered=bool(found.grid)),
              with_kwargs=True)  # fmt: skip
    for name, part in module.named_children():
        if "norm" in name or "layrnorm" in name:
            undo.hook(part, carry_state)
    for name in _HEADS:
        head = getattr(module, name, None)
        if not isinstance(head, nn.Module):
            continue
        refuse_own(head)
        if type(head).__name__ in WEIGHED:
            refuse_patched(type(head))
            undo.mix_in(head, WeighedPooling)
        elif found.tail == "head":
            undo.pre_hook(head, functools.partial(give_all, prefix=found.prefix))


def note_found(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, patch: tuple[int, ...],
    ordered: bool,
) -> None:  # fmt: skip
    """Forward hook on embeddings: the grid of this image goes with its tokens, where patches are in order."""
    pixels: Tensor = args[0] if args else next(kwargs[n] for n in _PIXELS if n in kwargs)
    grid = tuple(side // each for side, each in zip(_sides(pixels.shape), patch, strict=True))
    note_entry(embedded(output), Entry(grid, Pixels(pixels, patch)) if ordered else Entry())


def give_all(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, prefix: int) -> Any:
    """Pre-hook on a pooling of all tokens: it gets as many as entered, so that its mean counts merged ones by size."""
    state = state_of(args[0])
    return None if state is None or state.acted is None else ((whole(args[0], state, prefix), *args[1:]), kwargs)


class WeighedPooling:
    """Mixin of AIMv2's attention pooling: keys are weighed by the sizes of tokens."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        state, head = known(hidden_states, "attention pooling"), self
        if state is None or state.size is None:
            return super().forward(hidden_states)  # type: ignore[misc]
        split: Any = head
        b, n, c = hidden_states.shape
        shape = (b, n, split.num_heads, c // split.num_heads)
        k, v = (p(hidden_states).reshape(shape).transpose(1, 2) for p in (split.k_proj, split.v_proj))
        q = split.cls_token.expand(b, -1, -1).reshape(b, 1, *shape[2:]).transpose(1, 2)
        bias = log_size(state, 0, q.dtype)[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return split.output_proj(out.transpose(1, 2).reshape(b, 1, c).mean(dim=1))
