"""What a tower that packs images says of itself: where its layers are, what it does between them, and where the patches
of every image lie in the row."""

from __future__ import annotations

import ast
import inspect
import math
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapters.encoders.hf_structure import core_of, projects
from tokenreduce.adapters.encoders.packed import Layout
from tokenreduce.core.mixing import parts

__all__ = [
    "Laid", "between", "bounds_of", "embeds_pixels", "holders_of", "keeps", "laid_out", "packs", "stack_of", "start_of",
]  # fmt: skip

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
        if not isinstance(child, nn.ModuleList) or not len(child) or len({parts(type(c))[0] for c in child}) != 1:
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
@dataclass(frozen=True)
class Loop:
    """A loop over the layers: the layer behind which a part makes other tokens of all (0 where none does), and what
    happens to tokens besides that is not known."""

    start: int
    odd: str | None


def between(module: nn.Module) -> str | None:
    """What the code of a tower does with tokens between its layers that is not known, None where that is nothing."""
    loops = loops_of(module)
    if not loops:
        return "the code that runs its layers was not found"
    odd = next((loop.odd for loop in loops if loop.odd is not None), None)
    return None if odd is None else f"between its layers it does '{odd}', so that tokens that are gone would be missed"


def start_of(module: nn.Module) -> int:
    """The first layer from which on tokens stay what they are."""
    return max((loop.start for loop in loops_of(module)), default=0)


def loops_of(module: nn.Module) -> list[Loop]:
    """The loops over the layers in the code of a tower."""
    owner, layers = stack_of(module)
    name = next(n for n, child in owner.named_children() if child is layers)
    return [_loop(holder, tree, node) for holder in holders_of(module) for tree, node in _nodes(holder, name)]


def _code(holder: nn.Module) -> Iterator[ast.AST]:
    """The functions of the library's class."""
    for kind in type(holder).__mro__:
        if kind.__module__.partition(".")[0] != "torch" and parts(kind) == (kind,):
            yield from (tree for f in vars(kind).values() if (tree := _parsed(f)) is not None)
        if "forward" in vars(kind) and parts(kind) == (kind,):  # those of its bases were written for others
            return


def _parsed(function: Any) -> ast.AST | None:
    if not isinstance(function, FunctionType):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None


def _nodes(holder: nn.Module, name: str) -> Iterator[tuple[ast.AST, ast.For]]:
    for tree in _code(holder):
        for node in ast.walk(tree):
            over = ast.walk(node.iter) if isinstance(node, ast.For) else ()
            if isinstance(node, ast.For) and any(isinstance(n, ast.Attribute) and n.attr == name for n in over):
                yield tree, node


def keeps(holder: nn.Module, name: str) -> str | None:
    """The statement by which code of ``holder`` puts tokens aside in a loop over its layers ``name``, None for none."""
    for _, loop in _nodes(holder, name):
        tokens = {
            t.id for n in ast.walk(loop) if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
        }
        for call in (n for n in ast.walk(loop) if isinstance(n, ast.Call)):
            puts = isinstance(call.func, ast.Attribute) and call.func.attr == "append"
            if puts and any(isinstance(a, ast.Name) and a.id in tokens for a in call.args):
                return ast.unparse(call)
    return None


def _loop(holder: nn.Module, tree: ast.AST, loop: ast.For) -> Loop:
    targets = [n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)]
    runs = [n for n in ast.walk(loop) if isinstance(n, ast.Assign) and _runs(n.value, targets)]
    names = {t.id for n in runs for t in n.targets if isinstance(t, ast.Name)}
    if len(names) != 1 or len(runs) != sum(_runs(n, targets) for n in ast.walk(loop)):
        return Loop(0, ast.unparse(loop).splitlines()[0])
    (tokens,) = names
    start = 0
    for test, statement in _flat(loop.body):
        if statement in runs or _harmless(statement, tokens):
            continue
        at = _layer_of(holder, tree, test) if _remakes(statement, tokens) else None
        if at is None:
            return Loop(0, ast.unparse(statement))
        start = max(start, at + 1)
    return Loop(start, None)


def _remakes(statement: ast.stmt, tokens: str) -> bool:
    """``tokens = self.part(tokens, ...)``."""
    return (
        isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call) and _of_self(statement.value.func)
        and [ast.unparse(t) for t in statement.targets] == [tokens]
        and [ast.unparse(a) for a in statement.value.args[:1]] == [tokens]
    )  # fmt: skip


def _layer_of(holder: nn.Module, tree: ast.AST, test: ast.expr | None) -> int | None:
    """The number that a test ``index == number`` asks for, which a constant or the config says."""
    if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.Eq):
        return None
    wanted = test.comparators[0]
    if isinstance(wanted, ast.Name):
        said = [n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == wanted.id]
        inside = (n for value in said for n in ast.walk(value) if isinstance(n, ast.Attribute) and _of_self(n))
        wanted = next(inside, wanted)
    found = _value(holder, wanted, {})
    return found if isinstance(found, int) and not isinstance(wanted, ast.Name) else None


def _runs(node: ast.AST, targets: list[str]) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in targets


def _flat(body: list[ast.stmt], test: ast.expr | None = None) -> Iterator[tuple[ast.expr | None, ast.stmt]]:
    """The statements of a loop, each with the test that it is behind."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _flat(statement.body, statement.test)
            yield from _flat(statement.orelse)
        else:
            yield test, statement


def _harmless(statement: ast.stmt, tokens: str) -> bool:
    """Whether a statement leaves ``tokens`` alone, or gives them to a part of the model and no more."""
    where = [n.value for n in ast.walk(statement) if isinstance(n, ast.Attribute) and n.attr in ("device", "dtype")]
    mentions = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == tokens and n not in where]
    given = [
        a for call in ast.walk(statement) if isinstance(call, ast.Call) and _of_self(call.func)
        for a in (*call.args, *(k.value for k in call.keywords))
    ]  # fmt: skip
    return all(any(m is a for a in given) and isinstance(m.ctx, ast.Load) for m in mentions)  # else read or made anew


def _of_self(node: ast.AST) -> bool:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "self"


# -- where patches are -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Laid:
    """Where the patches of a call are: (frames, rows, columns) of every image, and squares of ``unit`` x ``unit``
    patches side by side, in the ``order`` of windows."""

    grids: list[list[int]]
    unit: int = 1
    order: Tensor | None = None

    def row(self, tokens: Tensor) -> Layout:
        """The layout of a row (...,P,C); where r x r patches were made one before, of what they were made. Raises
        ``ValueError`` for a row of another length."""
        patches, count = sum(t * h * w for t, h, w in self.grids), tokens.shape[-2]
        if patches == count:
            return Layout.of(self.grids, self.unit, self.order, tokens.device)
        r = math.isqrt(patches // count) if count else 0
        if not r or r * r * count != patches or any(h % r or w % r for _, h, w in self.grids):
            raise ValueError(f"a row of {count} tokens is not what images of {patches} patches are made of")
        return Layout.of([[t, h // r, w // r] for t, h, w in self.grids], 1, None, tokens.device)


def laid_out(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Laid:
    """Where the patches of a call are. Raises ``ValueError`` for a call that does not say the sizes of its images."""
    given = inspect.signature(inspect.unwrap(type(tower).forward)).bind(tower, *args, **kwargs).arguments
    name = _sizes(tower)
    assert name is not None
    sizes = given.get(name)
    if name == _PIXELS:
        patch = tower.config.patch_size
        if sizes is None:
            pixels = next(v for v in given.values() if isinstance(v, Tensor) and v.is_floating_point())
            sizes = [pixels.shape[-2:]] * len(pixels)
        grids = [[1, int(h) // patch, int(w) // patch] for h, w in _rows(sizes)]
        return Laid(grids)
    if sizes is None:
        raise ValueError(f"a patched {type(tower).__name__} needs {name}, the size of every image, in its call")
    rows = _rows(sizes)
    grids = [[int(n) for n in (row if len(row) == 3 else (1, *row))] for row in rows]
    merge = _unit(tower, given)
    return Laid(grids, merge, _order(tower, sizes, merge))


def embeds_pixels(tower: Any) -> bool:
    """Whether every row that ``tower`` is called with is the pixels of one patch, (channels, frames, rows, columns),
    and its first layer gets what its ``patch_embed`` makes of each: by a convolution as large as the patch, behind
    which nothing makes other tokens."""
    embed = getattr(tower, "patch_embed", None)
    made = getattr(embed, "proj", None)
    if not isinstance(made, nn.Conv3d) or start_of(tower) or _sizes(tower) == _PIXELS:
        return False
    side = getattr(embed, "patch_size", None)
    shape = (getattr(embed, "temporal_patch_size", None), side, side)
    whole = made.kernel_size == made.stride == shape and made.in_channels == getattr(embed, "in_channels", None)
    return whole and not any(made.padding) and any(
        isinstance(n, ast.Call) and ast.unparse(n.func) == "self.patch_embed"
        and [ast.unparse(a) for a in n.args[:1]] == [next(iter([*_takes(tower)][1:]), "")]
        for tree in _code(tower) for n in ast.walk(tree)
    )  # fmt: skip


def _rows(sizes: Any) -> list[Any]:
    return sizes.tolist() if isinstance(sizes, Tensor) else [list(map(int, row)) for row in sizes]


def _order(tower: Any, sizes: Any, merge: int) -> Tensor | None:
    """The order in which units come, where a tower puts windows side by side."""
    if not hasattr(tower, "fullatt_block_indexes") or not hasattr(tower, "window_size"):
        return None
    index = getattr(sys.modules[type(tower).__module__], _WINDOWS)
    found: Tensor = index(torch.as_tensor(sizes), merge, tower.window_size, tower.patch_size)[0]
    return found


def _unit(tower: Any, given: dict[str, Any]) -> int:
    """Side of the squares of patches that come side by side, which the tower tells the library's function that counts
    the places of patches; 1 where it does not ask it, and where it says another one for every image."""
    for holder in holders_of(tower):
        for call in (n for tree in _code(holder) for n in ast.walk(tree)):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == _PLACES:
                named = [k.value for k in call.keywords if k.arg == "spatial_merge_size"]
                found = _value(holder, (*call.args[1:2], *named)[0], given)
                each = set(found.flatten().tolist()) if isinstance(found, Tensor) else {int(found)}
                return each.pop() if len(each) == 1 else 1
    return 1


def _value(holder: Any, node: ast.AST, given: dict[str, Any]) -> Any:
    """What a constant, an argument or ``self.a.b`` in the code of ``holder`` is; ``given`` are the arguments."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return given.get(node.id, 1)
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
