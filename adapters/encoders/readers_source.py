"""Whether a function of a user's own only passes tokens through the blocks of a tower, or reads them between two."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

__all__ = ["use_of"]

#: Functions that take the blocks and run none.
_HARMLESS = {"len", "enumerate", "reversed", "list", "tuple", "iter", "range", "print", "isinstance", "id"}
#: Methods of a tower that return tokens of layers in between, of which a patched tower has its own version.
_BETWEEN = {"forward_intermediates", "get_intermediate_layers", "_intermediate_layers"}


def use_of(function: FunctionType, chain: str) -> str:
    """How ``function`` uses the blocks at ``chain`` below its first argument: "none", "passes" or "reads".

    "passes" is the container called as a whole, or a loop over all of it that does ``x = block(x)`` and nothing else.
    What cannot be told is "reads", as in a function without source that names the blocks.
    """
    named, parts = set(_names(function.__code__)), set(chain.split("."))
    if not {p for p in parts if not p.isdigit()} <= named and named.isdisjoint(_BETWEEN):
        return "none"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return "reads"
    arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
    if not arguments:
        return "none"
    visitor = _Uses(f"{arguments[0]}.{chain}")
    visitor.visit(tree)
    return next((u for u in ("reads", "passes") if u in visitor.found), "none")


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class _Uses(ast.NodeVisitor):
    def __init__(self, chain: str) -> None:
        self.tower, _, self.part = chain.rpartition(".")
        self.chains = {chain}  # also by the names of local variables that stand for the tower
        self.found: set[str] = set()

    def _is(self, node: ast.AST) -> bool:
        """The container itself, or the list of blocks in it."""
        if not isinstance(node, ast.Attribute):
            return False
        text = ast.unparse(node)
        return any(text == chain or text.startswith(chain + ".") for chain in self.chains)

    def _mentions(self, node: ast.AST) -> bool:
        return any(self._is(n) for n in ast.walk(node))

    def visit_For(self, node: ast.For) -> None:
        if not self._mentions(node.iter):
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
            assert isinstance(func, ast.Attribute)
            whole = ast.unparse(func) in self.chains  # self.blocks(x), not self.blocks.parameters()
            self.found.add("passes" if whole else "none" if _manages(func.attr) else "reads")
        elif isinstance(func, ast.Attribute) and func.attr in _BETWEEN and ast.unparse(func.value).startswith("super("):
            self.found.add("reads")
        elif any(self._is(a) for a in given) and _name(func) not in _HARMLESS:
            through = "checkpoint" in _name(func) and not any(isinstance(a, ast.Subscript) for a in node.args)
            self.found.add("passes" if through else "reads")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        value = node.value.value if isinstance(node.value, ast.Subscript) else node.value
        if self._is(value):  # under another name it is lost from sight
            self.found.add("reads")
        if ast.unparse(node.value) == self.tower:
            self.chains |= {f"{t.id}.{self.part}" for t in node.targets if isinstance(t, ast.Name)}
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
