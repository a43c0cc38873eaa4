"""Putting reducers into a model and taking them out again."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from tokenreduce.reducer import Reducer
from tokenreduce.registry import list_methods, parse

__all__ = ["Undo", "describe", "patch", "patched", "reduce_tokens", "reducers_of", "twin", "unpatch"]

MARK = "_tokenreduce"
M = TypeVar("M", bound=nn.Module)
F = TypeVar("F", bound=Callable[..., Any])
_MISSING = object()


@dataclass
class Undo:
    """Everything that a patch changed, so that it can be taken back in reverse order.

    Adapters change a model only through these methods. References to modules live in the patched model itself and
    are deep-copied and pickled with it, so a copy of a patched model can be unpatched on its own.
    """

    reducers: tuple[Reducer, ...] = ()
    actions: list[tuple[str, nn.Module, str, Any]] = field(default_factory=list)

    def swap_class(self, module: nn.Module, kind: type[nn.Module]) -> None:
        """Give ``module`` another class (a subclass of its own, defined at module level)."""
        self.actions.append(("class", module, "", type(module)))
        module.__class__ = kind

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set a plain attribute on the instance, whatever the class defines."""
        self.actions.append(("attribute", module, name, module.__dict__.get(name, _Nothing)))
        module.__dict__[name] = value

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Register a forward pre-hook with kwargs; ``hook`` is a module-level function or a partial of one."""
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        self.actions.append(("pre", module, "", handle.id))

    def hook(self, module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        """Register a forward hook; ``hook`` is a module-level function or a partial of one."""
        handle = module.register_forward_hook(hook, with_kwargs=with_kwargs)
        self.actions.append(("post", module, "", handle.id))

    def revert(self) -> None:
        """Take everything back."""
        while self.actions:
            kind, module, name, old = self.actions.pop()
            if kind == "class":
                module.__class__ = old
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


class _Nothing:
    """Marks an attribute that was not on the instance; a class, so that it survives deepcopy and pickle."""


def _patches(model: nn.Module) -> Iterator[tuple[str, nn.Module, Undo]]:
    for name, module in model.named_modules():
        if MARK in module.__dict__:
            yield name, module, module.__dict__[MARK]


def reducers_of(model: nn.Module) -> tuple[Reducer, ...]:
    """The reducers that act in ``model`` (also when a part of it was patched), () for an unpatched one."""
    return tuple(r for _, _, undo in _patches(model) for r in undo.reducers)


def patch(model: M, *reducers: Reducer | str) -> M:
    """Put one or more reducers into ``model``, in place, and return it.

    ``reducers`` are instances or text (``"tome:r=8+visionzip:keep=64"``). The model may be a timm, open_clip or
    transformers model or any module that contains one. Raises ``TypeError`` for a model without adapter and
    ``ValueError`` for a patched model, no method, or settings that the model cannot serve; the model is then
    unchanged.
    """
    from tokenreduce.adapters import attach, default_stage
    from tokenreduce.adapters.encoder import Reduced
    from tokenreduce.compiled import fix, refuse_script

    if not isinstance(model, nn.Module):
        raise TypeError(f"patch expects a torch.nn.Module, not {type(model).__name__}")
    chosen = parse(*reducers, stage=default_stage(model))
    if not chosen:
        raise ValueError(f"no method given; choose from {', '.join(list_methods())}")
    if any(MARK in m.__dict__ or isinstance(m, Reduced) for m in model.modules()):
        raise ValueError(
            "the model is patched already; call tr.unpatch(model) first (several methods go into one patch)"
        )
    for reducer in chosen:
        fix(reducer)
    undo = Undo(chosen)
    try:
        undo.set(model, "__prepare_scriptable__", refuse_script)
        attach(model, chosen, undo)
    except BaseException:
        undo.revert()
        raise
    model.__dict__[MARK] = undo
    return model


def unpatch(model: M) -> M:
    """Take every patch out of ``model``; its outputs are bit-identical to before. Returns the model.

    Raises ``ValueError`` when the model is not patched, or was patched as part of a larger one.
    """
    found = list(_patches(model))
    if not found:
        from tokenreduce.adapters.encoder import Reduced

        if any(isinstance(m, Reduced) for m in model.modules()):
            raise ValueError("this module was patched through its parent; unpatch the model that you gave to tr.patch")
        raise ValueError("the model is not patched; there is nothing to undo (tr.patch(model, ...) patches it)")
    for _, module, undo in found:
        undo.revert()
        del module.__dict__[MARK]
    return model


class patched(ContextDecorator):  # noqa: N801 - a verb, used like open()
    """``with tr.patched(model, tr.ToMe(r=8)) as m: ...`` or as a decorator; unpatches also after errors."""

    def __init__(self, model: nn.Module, *reducers: Reducer | str) -> None:
        self.model, self.reducers = model, reducers

    def __enter__(self) -> nn.Module:
        return patch(self.model, *self.reducers)

    def __exit__(self, *error: object) -> None:
        unpatch(self.model)


def twin(model: M) -> M:
    """A copy that can be patched, or kept unpatched, on its own; weights are shared, so that it costs no memory."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def reduce_tokens(*reducers: Reducer | str) -> Callable[[F], F]:
    """Decorate a function that returns a model, or an ``nn.Module`` class: what it builds comes out patched.

    A factory may return the model alone or a tuple with the model in it (``open_clip.create_model_and_transforms``).
    """
    parse(*reducers)  # a mistake shows here, not at the first model

    def decorate(target: F) -> F:
        if isinstance(target, type) and issubclass(target, nn.Module):
            original = target.__init__

            @functools.wraps(original)
            def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
                original(self, *args, **kwargs)
                if type(self) is target:  # a subclass is still being built at this point
                    patch(self, *reducers)

            target.__init__ = init  # type: ignore[misc, method-assign]
            return target

        @functools.wraps(target)
        def factory(*args: Any, **kwargs: Any) -> Any:
            made = target(*args, **kwargs)
            parts = made if isinstance(made, tuple) else (made,)
            model = next((p for p in parts if isinstance(p, nn.Module)), None)
            if model is None:
                raise TypeError(f"{target.__name__} returned {type(made).__name__}, which holds no nn.Module to patch")
            patch(model, *reducers)
            return made

        return factory  # type: ignore[return-value]

    return decorate


def describe(model: nn.Module) -> Any:
    """What can act where in ``model``: its sites, tokens, evidence and the methods that fit; prints as a table."""
    from tokenreduce.adapters import describe as by_adapter

    return by_adapter(model)
