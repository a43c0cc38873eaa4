"""What a tower that packs images says of itself: where its layers are, what it does between them, and where the patches
of every image lie in the row."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_structure import core_of, projects
from tokenreduce.adapters.encoders.packed import Layout

__all__ = ["between", "bounds_of", "holders_of", "laid_out", "packs", "stack_of"]

#: Arguments that say the sizes of images: (frames, rows, columns) or (rows, columns) of patches, and of pixels.
_GRIDS = ("grid_thw", "image_grid_thw", "target_sizes")
_PIXELS = "image_sizes"
#: Arguments of what is no tower.
_OF_PROMPTS = ("input_ids",)
#: The library's function that says where patches are, by the units in which they come.
_PLACES = "get_vision_position_ids"
_WINDOWS = "get_vision_window_index"


def _takes(module: nn.Module) -> Any:
    return inspect.signature(inspect.unwrap(type(module).forward)).parameters


def _sizes(module: nn.Module) -> str | None:
    takes = _takes(module)
    return None if any(n in takes for n in _OF_PROMPTS) else next((n for n in (*_GRIDS, _PIXELS) if n in takes), None)


def _list_in(module: nn.Module) -> nn.ModuleList | None:
    """The list of layers in ``module`` itself."""
    for child in module.children():
        if not isinstance(child, nn.ModuleList) or not len(child) or len({type(c) for c in child}) != 1:
            continue
        if sum(projects(core_of(part)) for part in child[0].children()) == 1:
            return child
    return None


def stack_of(module: nn.Module) -> tuple[Any, Any]:
    """The part that has the layers, and their list."""
    return next((m, found) for m in module.modules() if (found := _list_in(m)) is not None)


def packs(module: nn.Module) -> bool:
    """Whether ``module`` is a tower that is told the sizes of images and has layers; the innermost such one."""
    if not any(c.__module__.startswith("transformers.") for c in type(module).__mro__) or _sizes(module) is None:
        return False
    if all(_list_in(m) is None for m in module.modules()):
        return False
    return not any(packs(child) for child in module.modules() if child is not module)


def holders_of(module: nn.Module) -> list[nn.Module]:
    """The tower and the parts on the way to the one that has the layers."""
    owner, _ = stack_of(module)
    return [m for m in module.modules() if any(o is owner for o in m.modules())]


# -- between the layers ------------------------------------------------------------------------------------------------
def between(module: nn.Module) -> str | None:
    """What the code of a tower does with tokens between its layers that is not known, None where that is nothing."""
    owner, layers = stack_of(module)
    name = next(n for n, child in owner.named_children() if child is layers)
    loops = [loop for holder in holders_of(module) for loop in _loops(holder, name)]
    if not loops:
        return "the code that runs its layers was not found"
    for loop in loops:
        if (odd := _odd(loop)) is not None:
            return f"between its layers it does '{odd}', so that tokens that are gone would be missed there"
    return None


def _loops(holder: nn.Module, name: str) -> Iterator[ast.For]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(holder).forward))))
    except (OSError, TypeError, SyntaxError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.For) and any(isinstance(n, ast.Attribute) and n.attr == name for n in ast.walk(node.iter)):
            yield node


def _odd(loop: ast.For) -> str | None:
    """The statement of a loop that is not ``x = layer(x, ...)`` and yet uses x in another way than giving it to a part
    of the model."""
    targets = [n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)]
    runs = [n for n in ast.walk(loop) if isinstance(n, ast.Assign) and _runs(n.value, targets)]
    names = {t.id for n in runs for t in n.targets if isinstance(t, ast.Name)}
    if len(names) != 1 or len(runs) != sum(_runs(n, targets) for n in ast.walk(loop)):
        return ast.unparse(loop).splitlines()[0]
    (tokens,) = names
    for statement in _flat(loop.body):
        if statement not in runs and not _harmless(statement, tokens):
            return ast.unparse(statement)
    return None


def _runs(node: ast.AST, targets: list[str]) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in targets


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _flat([*statement.body, *statement.orelse])
        else:
            yield statement


def _harmless(statement: ast.stmt, tokens: str) -> bool:
    """Whether a statement leaves ``tokens`` alone, or gives them to a part of the model and no more."""
    mentions = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == tokens]
    given = [
        a for call in ast.walk(statement) if isinstance(call, ast.Call) and _of_self(call.func)
        for a in (*call.args, *(k.value for k in call.keywords))
    ]  # fmt: skip
    return all(any(m is a for a in given) and isinstance(m.ctx, ast.Load) for m in mentions)


def _of_self(node: ast.AST) -> bool:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "self"


# -- where patches are -------------------------------------------------------------------------------------------------
def laid_out(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """Where the patches of a call are. Raises ``ValueError`` for a call that does not say the sizes of its images."""
    given = inspect.signature(inspect.unwrap(type(tower).forward)).bind(tower, *args, **kwargs).arguments
    name = _sizes(tower)
    assert name is not None
    sizes = given.get(name)
    pixels = next(v for v in given.values() if isinstance(v, Tensor) and v.is_floating_point())
    if name == _PIXELS:
        patch = tower.config.patch_size
        if sizes is None:
            sizes = [pixels.shape[-2:]] * len(pixels)
        grids = [[1, int(h) // patch, int(w) // patch] for h, w in _rows(sizes)]
        return Layout.of(grids, 1, None, pixels.device)
    if sizes is None:
        raise ValueError(f"a patched {type(tower).__name__} needs {name}, the size of every image, in its call")
    rows = _rows(sizes)
    grids = [[int(n) for n in (row if len(row) == 3 else (1, *row))] for row in rows]
    merge = _unit(tower)
    return Layout.of(grids, merge, _order(tower, sizes, merge), pixels.device)


def _rows(sizes: Any) -> list[Any]:
    return sizes.tolist() if isinstance(sizes, Tensor) else [list(map(int, row)) for row in sizes]


def _order(tower: Any, sizes: Any, merge: int) -> Tensor | None:
    """The order in which units come, where a tower puts windows side by side."""
    if not hasattr(tower, "fullatt_block_indexes") or not hasattr(tower, "window_size"):
        return None
    index = getattr(sys.modules[type(tower).__module__], _WINDOWS)
    found: Tensor = index(torch.as_tensor(sizes), merge, tower.window_size, tower.patch_size)[0]
    return found


def _unit(tower: Any) -> int:
    """Side of the squares of patches that come side by side, which the tower tells the library's function that counts
    the places of patches; 1 where it does not ask it."""
    for holder in holders_of(tower):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(holder).forward))))
        except (OSError, TypeError, SyntaxError):
            continue
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == _PLACES:
                named = [k.value for k in call.keywords if k.arg == "spatial_merge_size"]
                return int(_value(holder, (*call.args[1:2], *named)[0]))
    return 1


def _value(holder: Any, node: ast.AST) -> Any:
    """What a constant or ``self.a.b`` in the code of ``holder`` is."""
    if isinstance(node, ast.Constant):
        return node.value
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    found = holder
    for name in reversed(names):
        found = getattr(found, name)
    return found


def bounds_of(layout: Layout) -> Tensor:
    """Cumulative patches of the views, as they lie in the row."""
    starts = torch.cat([place.min(1).values for place in layout.places]).sort().values
    total = sum(place.numel() for place in layout.places)
    return torch.cat([starts, starts.new_tensor([total])]) * layout.unit
