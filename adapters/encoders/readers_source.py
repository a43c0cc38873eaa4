"""Whether a function of a user's own only passes tokens through the blocks of a tower, or reads them between two."""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

from torch import nn

__all__ = ["Known", "find_givers", "use_of"]

#: Names of submodules from a module to the container of the blocks.
Path = tuple[str, ...]
#: What is inside the container.
_IN: Path = ("[]",)
#: Libraries whose functions read no tokens of a module that they get.
_OUTSIDE = ("torch", "builtins", "accelerate", "peft", "torchinfo", "fvcore", "numpy")

#: Functions that take the blocks and run none.
_HARMLESS = {
    "len",
    "enumerate",
    "reversed",
    "list",
    "tuple",
    "iter",
    "range",
    "print",
    "isinstance",
    "id",
    "type",
    "hasattr",
}
#: Methods of a tower that return tokens of layers in between, of which a patched tower has its own version.
_BETWEEN = {"forward_intermediates", "get_intermediate_layers", "_intermediate_layers"}


def use_of(function: FunctionType, chain: str, known: Known | None = None) -> str:
    """How ``function`` uses the blocks at ``chain`` below its first argument: "none", "passes" or "reads".

    "passes" is the container called as a whole, or a loop over all of it that does ``x = block(x)`` and nothing else.
    Functions that get the tower, or what it is in, are looked into. What cannot be told is "reads", as in a function
    without source that names the blocks, or a callee that nobody can find.
    """
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    names = {arguments[0]: {tuple(chain.split("."))}} if arguments else {}
    return _use(function, names, known or Known())


@dataclass
class Known:
    """What is known around a function: functions by name of the class it is in, what those that return the tower (or
    what it is in) stand for, and the way from modules to the blocks, by ``id``."""

    code: dict[str, FunctionType] = field(default_factory=dict)
    gives: dict[str, set[Path]] = field(default_factory=dict)
    modules: dict[int, Path] = field(default_factory=dict)
    seen: set[tuple[Any, ...]] = field(default_factory=set)


def find_givers(code: dict[str, FunctionType], chain: str, known: Known) -> None:
    """Note the properties and methods in ``code`` that do nothing but return the tower or what it is in."""
    for name, function in code.items():
        tree, arguments = _tree(function), function.__code__.co_varnames[: function.__code__.co_argcount]
        if tree is None or len(arguments) != 1:
            continue
        visitor = _Uses(function, {arguments[0]: {tuple(chain.split("."))}}, known)
        for node in ast.walk(tree):
            if isinstance(node, ast.Return) and node.value is not None and (found := visitor.rest(node.value)):
                known.gives.setdefault(name, set()).update(found)


def _use(function: FunctionType, names: dict[str, set[Path]], known: Known) -> str:
    names = {**names, **_outer(function, known)}
    key = (function, *sorted((n, *sorted(r)) for n, r in names.items()))
    if not names or key in known.seen:
        return "none"
    known.seen.add(key)
    mentioned = {*_names(function.__code__), *function.__code__.co_varnames, *known.gives}
    if not known.gives and all(n not in mentioned for n in names) and mentioned.isdisjoint(_BETWEEN):
        return "none"
    tree = _tree(function)
    if tree is None:
        parts = {p for rests in names.values() for rest in rests for p in rest if not p.isdigit()}
        return "reads" if parts <= mentioned or not mentioned.isdisjoint(_BETWEEN) else "none"
    visitor = _Uses(function, names, known)
    visitor.visit(tree)
    return next((u for u in ("reads", "passes") if u in visitor.found), "none")


def _tree(function: FunctionType) -> ast.AST | None:
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a lambda within a statement of several lines
        return None
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Lambda)] if function.__name__ == "<lambda>" else []
    return found[0] if len(found) == 1 else tree


def _outer(function: FunctionType, known: Known) -> dict[str, set[Path]]:
    """Names of a function from around it (closures, globals) that stand for a module on the way to the blocks."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    around = {name: _cell(cell) for name, cell in cells}
    around |= {n: function.__globals__[n] for n in set(_names(function.__code__)) & function.__globals__.keys()}
    return {n: {known.modules[id(v)]} for n, v in around.items() if id(v) in known.modules}


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
            yield from constant.co_varnames


class _Uses(ast.NodeVisitor):
    """Goes through a function; ``names`` are the ways from its variables to the container of the blocks."""

    def __init__(self, function: FunctionType, names: dict[str, set[Path]], known: Known) -> None:
        self.function, self.known = function, known
        self.names = {name: set(rests) for name, rests in names.items()}
        self.found: set[str] = set()

    def rest(self, node: ast.AST) -> set[Path]:
        """The ways from what ``node`` stands for to the container: ``()`` is the container, ``_IN`` what is in it."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, set())
        if isinstance(node, ast.NamedExpr):
            return self.rest(node.value)
        if isinstance(node, ast.Attribute):
            return self._below(self.rest(node.value), node.attr, node.value)
        if isinstance(node, ast.Subscript):
            key = str(node.slice.value) if isinstance(node.slice, ast.Constant) else None
            if isinstance(node.slice, ast.Slice | ast.Tuple):  # of a tensor
                return set()
            return {r[1:] for r in self.rest(node.value) if len(r) > 1 and key in (None, r[0])}
        if isinstance(node, ast.Call):
            if _name(node.func) == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                return self._below(self.rest(node.args[0]), str(node.args[1].value), node.args[0])
            if isinstance(node.func, ast.Attribute) and self.rest(node.func.value):
                return self.known.gives.get(node.func.attr, set())
        return set()

    def _below(self, rests: set[Path], name: str, holder: ast.AST) -> set[Path]:
        found = {_IN if r in ((), _IN) else r[1:] for r in rests if r in ((), _IN) or r[0] == name}
        given = self.known.gives.get(name, set()) if rests and isinstance(holder, ast.Name) else set()
        return found | given

    def _is(self, node: ast.AST) -> bool:
        """The container itself, or the list of blocks in it."""
        return not self.rest(node).isdisjoint({(), _IN})

    def _mentions(self, node: ast.AST) -> bool:
        return any(self._is(n) for n in ast.walk(node))

    def _alias(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List):
            for one, other in zip(target.elts, value.elts, strict=False):
                self._alias(one, other)
        elif isinstance(target, ast.Name) and (found := self.rest(value)):
            self.names.setdefault(target.id, set()).update(found)

    def _items(self, targets: ast.AST, over: ast.AST) -> None:
        """Loop variables over a list that the tower is in."""
        inside = {r[1:] for n in ast.walk(over) for r in self.rest(n) if len(r) > 1 and r[0].isdigit()}
        for name in (n.id for n in ast.walk(targets) if isinstance(n, ast.Name) and inside):
            self.names.setdefault(name, set()).update(inside)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._alias(node.target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        if not self._mentions(node.iter):
            self._items(node.target, node.iter)
            return self.generic_visit(node)
        at, target = node.iter, node.target
        if isinstance(at, ast.Call) and _name(at.func) == "enumerate" and isinstance(target, ast.Tuple):
            at, target = at.args[0], target.elts[-1]
        names = {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
        if any(_runs(n, names) for s in node.body for n in ast.walk(s)):
            exact = self._is(at) and isinstance(target, ast.Name) and all(_passes(s, target.id) for s in node.body)
            self.found.add("passes" if exact and not node.orelse else "reads")
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp) -> None:
        for part in node.generators:
            names = {n.id for n in ast.walk(part.target) if isinstance(n, ast.Name)}
            self._items(part.target, part.iter)
            if self._mentions(part.iter) and any(_runs(n, names) for n in ast.walk(node)):
                self.found.add("reads")
        self.generic_visit(node)

    visit_ListComp = visit_GeneratorExp = visit_SetComp = visit_DictComp = _comprehension  # noqa: N815

    def visit_Call(self, node: ast.Call) -> None:
        func = node.func
        given = [a.value if isinstance(a, ast.Starred) else a for a in (*node.args, *(k.value for k in node.keywords))]
        given = [a.value if isinstance(a, ast.Subscript) else a for a in given]
        if isinstance(func, ast.Subscript) and self._is(func.value):
            self.found.add("reads")
        elif self._is(func):
            whole = () in self.rest(func)  # self.blocks(x), not self.blocks.parameters()
            self.found.add("passes" if whole else "none" if _manages(_name(func)) else "reads")
        elif isinstance(func, ast.Attribute) and func.attr in _BETWEEN and ast.unparse(func.value).startswith("super("):
            self.found.add("reads")
        elif any(self._is(a) for a in given) and _name(func) not in _HARMLESS:
            through = "checkpoint" in _name(func) and not any(isinstance(a, ast.Subscript) for a in node.args)
            self.found.add("passes" if through else self._into(node))
        elif any(self.rest(a) for a in given) and _name(func) not in _HARMLESS:
            self.found.add(self._into(node))
        self.generic_visit(node)

    def _into(self, call: ast.Call) -> str:
        """The use that a called function makes of what it is given."""
        given = [*call.args, *(k.value for k in call.keywords)]
        blocks = [n for a in given for n in ast.walk(a) if self._is(n)]
        callee = self._callee(call.func)
        top = (getattr(callee, "__module__", None) or "").partition(".")[0]
        if not blocks and (top in _OUTSIDE or top in sys.stdlib_module_names):
            return "none"
        if isinstance(callee, FunctionType) and all(any(n is a for a in given) for n in blocks):
            return _use(callee, self._given(call, callee), self.known)
        # A model that hands itself to what nobody can look into is no reader; one that hands its tower is.
        whole = not blocks and all(len(r) == self._longest() for a in given for r in self.rest(a))
        return "none" if whole else "reads"

    def _longest(self) -> int:
        return max(len(r) for rests in self.names.values() for r in rests)

    def _given(self, call: ast.Call, callee: FunctionType) -> dict[str, set[Path]]:
        code = callee.__code__
        names = list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        if isinstance(call.func, ast.Attribute) and self.rest(call.func.value) and callee in self.known.code.values():
            call = ast.Call(call.func, [call.func.value, *call.args], call.keywords)
        pairs = [*zip(names, call.args, strict=False), *((k.arg, k.value) for k in call.keywords)]
        return {name: found for name, a in pairs if name is not None and (found := self.rest(a))}

    def _callee(self, func: ast.AST) -> Any:
        if isinstance(func, ast.Name):
            cells = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=False))
            around = {**vars(builtins), **self.function.__globals__, **{n: _cell(c) for n, c in cells.items()}}
            return inspect.unwrap(found) if callable(found := around.get(func.id)) else found
        if isinstance(func, ast.Attribute):
            if self.rest(func.value) and func.attr in self.known.code:
                return self.known.code[func.attr]
            found = getattr(self._callee(func.value), func.attr, None)
            return inspect.unwrap(found) if callable(found) else found
        return None

    def visit_Assign(self, node: ast.Assign) -> None:
        value = node.value.value if isinstance(node.value, ast.Subscript) else node.value
        if self._is(value):  # under another name it is lost from sight
            self.found.add("reads")
        for target in node.targets:
            self._alias(target, node.value)
        self.generic_visit(node)


def _manages(method: str) -> bool:
    """Whether a method is one that every module has for its weights, such as ``parameters`` or ``requires_grad_``."""
    return hasattr(nn.Module, method) and method != "forward" and "hook" not in method


def _name(func: ast.AST) -> str:
    return func.id if isinstance(func, ast.Name) else func.attr if isinstance(func, ast.Attribute) else ""


def _runs(node: ast.AST, blocks: set[str]) -> bool:
    """A call of a block or of a part of it, or one that is given a block."""
    if not isinstance(node, ast.Call) or _name(node.func) in _HARMLESS:
        return False
    if isinstance(node.func, ast.Attribute):
        root = node.func
        while isinstance(root, ast.Attribute):
            root = root.value  # type: ignore[assignment]
        if isinstance(root, ast.Name) and root.id in blocks and not _manages(node.func.attr):
            return True
    return any(isinstance(n, ast.Name) and n.id in blocks for n in (node.func, *node.args))


def _passes(statement: ast.stmt, block: str) -> bool:
    """``x = block(x, ...)``, also in branches and through checkpointing."""
    if isinstance(statement, ast.If):
        return all(_passes(s, block) for s in (*statement.body, *statement.orelse))
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    target, call = statement.targets[0], statement.value
    if not isinstance(target, ast.Name) or not isinstance(call, ast.Call):
        return False
    arguments = [a.id for a in call.args if isinstance(a, ast.Name)]
    called = _name(call.func) == block and isinstance(call.func, ast.Name)
    through = "checkpoint" in _name(call.func) and arguments[:1] == [block]
    return (called or through) and target.id in arguments
