"""What a patch changed in a model, so that it can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tokenreduce.core.mixing import assembled, mixed, parts
from tokenreduce.core.reducer import Reducer

__all__ = ["MARK", "Undo", "note_of", "reducers_of"]

MARK = "_tokenreduce"


@dataclass
class Undo:
    """Everything that a patch changed, so that it can be taken back in reverse order.

    Adapters change a model only through these methods. References to modules live in the patched model itself and
    are deep-copied and pickled with it, so a copy of a patched model can be unpatched on its own.
    """

    reducers: tuple[Reducer, ...] = ()
    #: The patched model; another one in a shallow copy of it.
    model: nn.Module | None = None
    actions: list[tuple[str, nn.Module, str, Any]] = field(default_factory=list)
    #: Whether logits stand at the caller's columns always, see :func:`patch`.
    logits: str = "auto"
    #: What text stood for methods that were chosen here, and why.
    note: str = ""

    def swap_class(self, module: nn.Module, kind: type[nn.Module]) -> None:
        """Give ``module`` another class (a subclass of its own, defined at module level)."""
        self.actions.append(("class", module, "", (parts(type(module)), parts(kind))))
        module.__class__ = kind

    def mix_in(self, module: nn.Module, mixin: type) -> None:
        """Put the methods of ``mixin`` (a class at module level) in front of those of the module's class."""
        self.swap_class(module, mixed(type(module), mixin))

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set a plain attribute on the instance, whatever the class defines."""
        self.actions.append(("attribute", module, name, module.__dict__.get(name, _Nothing)))
        module.__dict__[name] = value

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Register a forward pre-hook with kwargs; ``hook`` is a module-level function or a partial of one."""
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        self.actions.append(("pre", module, "", handle.id))

    def hook(
        self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False, always: bool = False
    ) -> None:
        """Register a forward hook, which runs behind errors as well if ``always``; ``hook`` is a module-level function
        or a partial of one."""
        handle = module.register_forward_hook(hook, with_kwargs=with_kwargs, always_call=always)
        self.actions.append(("post", module, "", handle.id))

    def check(self, model: nn.Module) -> None:
        """Raise ``ValueError`` where ``model`` cannot be taken back to what it was: in a shallow copy, and where a
        module got another class since."""
        if self.model is not model:
            raise ValueError(
                "this is a shallow copy (copy.copy) or a replica of a patched model, whose modules it shares; unpatch "
                "the model that you gave to tr.patch, or copy it with copy.deepcopy"
            )
        current = {id(module): (module, new[1]) for kind, module, _, new in self.actions if kind == "class"}
        for module, kind in current.values():
            if parts(type(module)) != kind:
                raise ValueError(
                    f"{type(module).__name__} got another class after tr.patch (parametrizations, FSDP); take that "
                    "back before tr.unpatch, or do it before tr.patch"
                )

    def revert(self) -> None:
        """Take everything back."""
        while self.actions:
            kind, module, name, old = self.actions.pop()
            if kind == "class":
                module.__class__ = assembled(*old[0])
            elif kind == "attribute":
                if old is _Nothing:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = old
            elif kind == "pre":
                module._forward_pre_hooks.pop(old, None)
                module._forward_pre_hooks_with_kwargs.pop(old, None)
            else:
                module._forward_hooks.pop(old, None)
                module._forward_hooks_with_kwargs.pop(old, None)
                module._forward_hooks_always_called.pop(old, None)


class _Nothing:
    """Marks an attribute that was not on the instance; a class, so that it survives deepcopy and pickle."""


def _patches(model: nn.Module) -> Iterator[tuple[str, nn.Module, Undo]]:
    for name, module in model.named_modules():
        if MARK in module.__dict__:
            yield name, module, module.__dict__[MARK]


def note_of(model: nn.Module) -> str:
    """What text stood for the methods in ``model``, and why; "" where they were given themselves."""
    return "; ".join(undo.note for _, _, undo in _patches(model) if undo.note)


def reducers_of(model: nn.Module) -> tuple[Reducer, ...]:
    """The reducers that act in ``model`` (also when a part of it was patched), () for an unpatched one."""
    return tuple(r for _, _, undo in _patches(model) for r in undo.reducers)
