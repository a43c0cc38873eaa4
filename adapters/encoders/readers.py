"""Who reads the tokens of a tower that stands inside a larger model, and what is handed to them.

A reduced tower ends with fewer tokens than the code behind it was written for: a plain mean counts a merged token
once, a decoder that lays tokens out on a grid takes others. So every module around a tower (and every piece of code of
a user's own inside it) is looked at before anything is patched:

- models of timm, open_clip and transformers in :data:`KNOWN` read pooled features, are served by their adapter, or
  get what they need here. Any other model of these libraries is refused by name: nobody checked how it reads;
- a user's own module may read tokens in any way. It gets all of them back (``hands="all"``): every place holds the
  token that it was merged into, so that a mean, an attention or a grid counts each as often as the full model does,
  and places of dropped tokens hold the mean of what is left. Pooled features and logits are what they are without
  the wrapper;
- code of a user's own that runs inside the tower (a subclass with a forward of its own) gets them from the last block
  on (``hands="inside"``). Code that reads tokens between blocks is refused,
  :mod:`tokenreduce.adapters.encoders.readers_source`;
- cross-attention (``hands="keys"``) gets all tokens back where some were merged, and those that are left where tokens
  were only dropped: as if the others were masked.

Only the model that was given to ``tr.patch`` hands out fewer tokens: its caller asked for them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from tokenreduce.adapters.encoders.readers_source import Known, find_givers, use_of
from tokenreduce.adapters.encoders.tower import Tower

__all__ = ["KNOWN", "VLMS", "hands_of", "is_vlm", "outside", "own_code", "strictest"]

LIBRARIES = ("timm", "open_clip", "torchvision", "transformers")
#: Image/video language models that are served, by the names that users know.
VLMS = (
    "LLaVA-1.5", "LLaVA-NeXT", "LLaVA-NeXT-Video", "LLaVA-OneVision", "Video-LLaVA", "Qwen2-VL", "Qwen2.5-VL",
    "Qwen3-VL", "InternVL", "Idefics3", "SmolVLM", "PaliGemma", "Gemma3",
)  # fmt: skip
#: Models around a tower, by what they read: "own" is what the adapter of the tower serves (pooled features, the class
#: token, means); for "all" and "keys" see the module's page. "dense" hands out maps of all places itself, so whoever
#: stands around it is served; "maps" is "all" on a fixed grid, so that the image cannot be made smaller.
KNOWN: dict[str, dict[str, str]] = {
    "own": {
        "timm": "ModelEma ModelEmaV2 ModelEmaV3 Qwen3VitClassifier DeepseekVitClassifier Gemma4VitClassifier",
        "open_clip": "CLIP CustomTextCLIP CoCa TimmModel",
        "transformers": (
            "CLIPModel CLIPVisionModelWithProjection CLIPForImageClassification SiglipModel "
            "SiglipForImageClassification "
            "Siglip2Model Siglip2ForImageClassification Dinov2ForImageClassification "
            "Dinov2WithRegistersForImageClassification ViTForImageClassification ViTForMaskedImageModeling "
            "VideoMAEForPreTraining VideoMAEForVideoClassification VivitForVideoClassification "
            "VisionTextDualEncoderModel TimmWrapperModel TimmWrapperForImageClassification "
            "DeiTForImageClassification DeiTForImageClassificationWithTeacher BeitForImageClassification "
            "Data2VecVisionForImageClassification ViTMSNForImageClassification MetaClip2Model "
            "MetaClip2VisionModelWithProjection Aimv2Model AltCLIPModel ChineseCLIPModel CLIPSegModel "
            "OwlViTModel OwlViTVisionModel Owlv2Model Owlv2VisionModel"
        ),
    },
    "dense": {"timm": "FeatureGetterNet", "transformers": "TimmBackbone"},
    "all": {
        "transformers": (
            "IJepaForImageClassification MetaClip2ForImageClassification DeiTForMaskedImageModeling "
            "BeitForMaskedImageModeling ViTMAEForPreTraining VJEPA2Model VJEPA2ForVideoClassification"
        ),
    },
    "maps": {
        "transformers": (
            "CLIPSegForImageSegmentation OwlViTForObjectDetection Owlv2ForObjectDetection "
            "BeitForSemanticSegmentation BeitBackbone Data2VecVisionForSemanticSegmentation VitPoseForPoseEstimation "
            "DepthProForDepthEstimation DepthProModel DepthProEncoder DepthProPatchEncoder DepthProImageEncoder "
            "DepthProFovModel DepthProFovEncoder"
        ),
    },
    "keys": {
        "transformers": (
            "VisionEncoderDecoderModel BlipForImageTextRetrieval Blip2ForImageTextRetrieval "
            "Blip2VisionModelWithProjection"
        )
    },
}  # fmt: skip
_HOW = {(lib, name): how for how, table in KNOWN.items() for lib, names in table.items() for name in names.split()}
#: Modules of torch that hand on what a module inside returns, to the same caller.
_WRAPPERS = {
    "ModuleList", "ModuleDict", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel",
    "OptimizedModule", "AveragedModel",
}  # fmt: skip
#: From the most specific to the least: a tower whose tokens go several ways takes the first.
_ORDER = ("inside", "keys", "maps", "all", "own")


def strictest(*hands: str) -> str:
    """The way of these that is most careful."""
    return min(hands, key=_ORDER.index)


#: Methods that run behind the blocks, by library.
_BEHIND = {
    "timm": {"forward", "forward_features", "forward_head", "pool", "get_intermediate_layers"},
    "open_clip": {"forward", "_pool", "_global_pool"},
    "torchvision": {"forward"},
    "transformers": {"forward"},
}
#: Classes and functions of these read no tokens: the base classes of modules, and wrappers of a whole forward.
_NEUTRAL = ("torch", "accelerate", "builtins", "abc", "typing", "collections", "contextlib", "functools")
#: Tools whose hooks watch and read no tokens.
_TOOLS = ("wandb", "deepspeed", "peft", "fvcore", "torchinfo", "thop")
#: Config attributes that name the tokens of a prompt that images take the place of.
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


# -- code that is not a library's --------------------------------------------------------------------------------------
def _top(kind: Any) -> str:
    return (getattr(kind, "__module__", None) or "").partition(".")[0]


def _foreign(kind: Any) -> bool:
    """Whether a class or function is neither torch's, Python's, a model library's nor of our adapters."""
    module, top = getattr(kind, "__module__", None) or "", _top(kind)
    return not (module.startswith("tokenreduce.adapters") or top in LIBRARIES or top in _NEUTRAL)


def _plain(value: Any) -> FunctionType | None:
    """The function behind a method, a property, a partial or a decorated function; None for anything else."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.partial):
        value = value.func
    value = getattr(value, "__func__", value) if isinstance(value, (MethodType, staticmethod, classmethod)) else value
    found = inspect.unwrap(value) if isinstance(value, FunctionType) else None
    found = found.__func__ if isinstance(found, MethodType) else found
    return found if isinstance(found, FunctionType) else None


def own_code(module: nn.Module) -> dict[str, FunctionType]:
    """Functions of a user's own in the class of ``module`` or on the instance, by name; constructors are left out."""
    code: dict[str, FunctionType] = {}
    for holder in (module, *(c for c in type(module).__mro__ if _foreign(c))):
        for name, value in vars(holder).items():
            found = _plain(value) if name == "__call__" or not name.startswith("__") else None
            if found is not None and _foreign(found):
                code.setdefault(name, found)
    return code


# -- looking at a model ------------------------------------------------------------------------------------------------
def _holders(root: nn.Module, inner: nn.Module) -> list[nn.Module]:
    """Modules of ``root`` that hold ``inner``, itself left out, innermost first; by whatever path they hold it."""
    seen: dict[int, bool] = {id(inner): True}
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> bool:
        if id(module) not in seen:
            seen[id(module)] = False  # a circle ends here
            seen[id(module)] = any([visit(child) for child in module.children()])
            if seen[id(module)]:
                found.append(module)
        return seen[id(module)]

    visit(root)
    return found


def _paths(holder: nn.Module, inner: nn.Module) -> Iterator[str]:
    return (name for name, m in holder.named_modules(remove_duplicate=False) if m is inner)


def _container(tower: Tower) -> tuple[str, nn.Module]:
    """The part of a tower that its blocks are in."""
    return next((n, c) for n, c in tower.module.named_children() if any(m is tower.blocks[0] for m in c.modules()))


def hands_of(root: nn.Module, tower: Tower, maps: bool = False, known: tuple[str, ...] = ()) -> str:
    """Into whose hands the tokens of ``tower`` inside ``root`` come: "own", "all", "maps", "keys" or "inside".

    ``maps`` says that the tower hands out dense maps only, whoever reads; ``known`` are further classes that the
    caller answers for. Raises ``TypeError``, by name, for a model of a library that reads tokens in a way that nobody
    checked, and for code that reads tokens between blocks; ``ValueError`` for hooks that do, where code reads them.
    """
    found = {_inside(tower)}
    holders = _holders(root, tower.module)
    maps = maps or any(_known(_base(type(holder))) == "dense" for holder in holders)
    for holder in reversed(holders):  # the outermost names itself
        if type(holder).__name__ in known and not _foreign(type(holder)):
            continue
        found.add(_around(holder, tower, maps))
    if {"inside", "keys"} <= found:
        raise TypeError(
            f"{type(tower.module).__name__} runs its blocks in code of its own and a decoder attends to its tokens; "
            "supported there is the tower class of the library itself"
        )
    how = next(how for how in _ORDER if how in found)
    _check_parts(root, tower)
    if how != "own":
        _check_hooks(tower)
    return how


def is_vlm(module: Any) -> bool:
    """Whether ``module`` is an image/video language model of transformers, by its structure."""
    config: Any = getattr(module, "config", None)
    if _top(type(module)) != "transformers" or not hasattr(config, "get_text_config"):
        return False
    sees = any(hasattr(module, f"get_{kind}_features") for kind in ("image", "video"))
    if not sees and not hasattr(config, "vision_config"):
        return False
    if any(isinstance(getattr(config, name, None), int) for name in _PLACEHOLDERS):
        return True
    return getattr(module, "can_generate", bool)() and config.get_text_config() is not config


def _around(holder: nn.Module, tower: Tower, maps: bool) -> str:
    kind = type(holder)
    base = _base(kind)
    if is_vlm(holder):
        raise outside(holder)
    how = "own" if base is None or maps else _known(base)
    if how is None:
        raise _unknown(base, tower)
    code = own_code(holder)
    if code:
        chains = list(dict.fromkeys(_paths(holder, _container(tower)[1])))
        how = min(how, _used(code, chains, holder, tower), key=_ORDER.index)
    elif base is None and kind.__name__ not in _WRAPPERS:  # nn.Sequential hands tokens to whatever comes next
        how = "all"
    return how


def _ways(holder: nn.Module, chain: str) -> dict[int, tuple[str, ...]]:
    """The names from every module on the way to the blocks, by its ``id``."""
    parts = tuple(chain.split("."))
    return {id(holder.get_submodule(".".join(parts[:i]))): parts[i:] for i in range(len(parts) + 1)}


def _check_parts(root: nn.Module, tower: Tower) -> None:
    """Raise ``TypeError`` where blocks are held outside their tower as well, so that they may be run one by one."""
    container, blocks, seen = _container(tower)[1], set(map(id, tower.blocks)), set()
    queue = [("", root)]
    while queue:
        path, module = queue.pop()
        if module is container or id(module) in seen:
            continue
        seen.add(id(module))
        for name, child in module.named_children():
            if id(child) in blocks:
                raise TypeError(
                    f"{path}.{name} is a block of {tower.family} outside of it, where tokens may be read between "
                    "blocks and a patched model has fewer of them; hold the blocks in the tower alone, or use "
                    "forward_intermediates of timm or open_clip, which returns all tokens".lstrip(".")
                )
            queue.append((f"{path}.{name}".lstrip("."), child))


def _check_hooks(tower: Tower) -> None:
    """Raise ``ValueError`` where a hook of a user's sees tokens inside a tower, and code around it reads tokens: hooks
    see those that are left, which that code cannot know."""
    module = tower.module
    norms = [n for n in ("norm", "layernorm", "ln_post", "post_layernorm") if hasattr(module, n)]
    for part in (_container(tower)[0], *norms):
        for name, inner in getattr(module, part).named_modules(prefix=part):
            for hook in (*inner._forward_hooks.values(), *inner._forward_pre_hooks.values()):
                called = _plain(hook) or type(hook)
                if _foreign(called) and _top(called) not in _TOOLS:
                    raise ValueError(
                        f"the hook {called.__qualname__} on {name} of {tower.family} would see fewer tokens than the "
                        "code around the model may count on; read all of them from what the model returns "
                        "(forward_intermediates, output_hidden_states), take the hook off, or give tr.patch the tower "
                        "itself and read what is left"
                    )


def _base(kind: type) -> type | None:
    """The class of a model library that a class takes its forward from."""
    reads = (c for c in kind.__mro__ if _top(c) in LIBRARIES and "forward" in vars(c) and c.__name__ != "BackboneMixin")
    return next(reads, None)


def _known(base: type | None) -> str | None:
    return None if base is None else _HOW.get((_top(base), base.__name__))


def _used(code: dict[str, FunctionType], chains: list[str], holder: nn.Module, tower: Tower) -> str:
    uses: dict[str, str] = {}
    for chain in chains:
        known = Known(code, modules=_ways(holder, chain))
        find_givers(code, chain, known)
        uses |= {use_of(function, chain, known): name for name, function in code.items()}
    if "reads" in uses:
        container = _container(tower)[1]
        listed = next(_paths(holder, next(iter(_holders(container, tower.blocks[0])), container)))
        raise TypeError(
            f"{type(holder).__name__}.{uses['reads']} reads tokens of {tower.family} between its blocks, where a "
            f"patched model has fewer of them; run the blocks with 'for block in self.{listed}: x = block(x)' and "
            "nothing else in the loop, or use forward_intermediates of timm or open_clip, which returns all tokens"
        )
    return "inside" if "passes" in uses else "all"


def _inside(tower: Tower) -> str:
    """What code of a user's own inside the tower asks for."""
    module: Any = tower.module
    name, container = _container(tower)
    for part in (container, *_holders(container, tower.blocks[0])):
        if part is not tower.blocks[0] and (_foreign(type(part)) or own_code(part)):
            raise TypeError(
                f"{type(part).__name__} runs the blocks of {tower.family}; supported is the library's own "
                "(nothing may read or change tokens between blocks)"
            )
    if _foreign_behind(module, container):
        return "inside"
    code = own_code(module)
    if not code:
        return "own"
    base = next(c for c in type(module).__mro__ if _top(c) in LIBRARIES)
    if "forward_intermediates" in code:
        raise TypeError(
            f"{type(module).__name__} has a forward_intermediates of its own, which would get fewer tokens; "
            f"leave it to {base.__name__}"
        )
    how = _used(code, [name], module, tower)
    return "inside" if any(n in _BEHIND[_top(base)] or n == "__call__" for n in code) else how


def _foreign_behind(module: Any, container: nn.Module) -> bool:
    """Whether a part of a user's own stands where tokens pass behind the blocks: a norm, a pooler, a head."""
    pooled = ("fc_norm", "head_drop", "head", "head_dist") if getattr(module, "global_pool", "") else ()
    children = list(module.named_children())
    at = next(i for i, (_, c) in enumerate(children) if c is container)
    return any(_own_part(c) for name, c in children[at + 1 :] if name not in pooled)


def _own_part(part: nn.Module) -> bool:
    """A library's own part reads as it was written, also where its weights were wrapped or quantised."""
    if _top(type(part)) == "torch":
        return any(_own_part(c) for c in part.children())
    return _foreign(type(part))


def outside(model: nn.Module) -> TypeError:
    """What to say of an image/video language model that is not supported."""
    return TypeError(
        f"{type(model).__name__} is an image/video language model outside the supported families: how it reads the "
        "tokens of its vision tower is not known, so no method acts there. Supported are: "
        f"{', '.join(VLMS)}"
    )


def _unknown(reader: type | None, tower: Tower) -> TypeError:
    name = getattr(reader, "__name__", "")
    fits = ", ".join(sorted(n for lib, n in _HOW if lib == _top(reader)))
    return TypeError(
        f"{name} reads the tokens of {tower.name or 'its tower'} ({tower.family}) in a way that no adapter knows, and "
        f"may count merged or dropped ones wrongly. Models around a tower that are supported: {fits}; a module of your "
        "own around the tower is given all tokens"
    )
