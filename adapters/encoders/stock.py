"""What of a model is no longer as its library made it: replaced methods, hooks on modules that a block goes around.

A patched block runs attention modules as modules, so hooks on them run. Code that a user put in place of a module's
own cannot be given token sizes or asked for keys; it is refused by name, never passed over.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

__all__ = ["refuse_hooks", "refuse_own", "refuse_patched", "refuse_pre_hooks"]


def refuse_own(module: nn.Module, *names: str) -> None:
    """Raise ``ValueError`` where ``module`` has a method of its own among ``names`` ("forward" by default) on the
    instance."""
    for name in names or ("forward",):
        if name in module.__dict__:
            kind = next(c for c in type(module).__mro__ if not c.__module__.startswith("tokenreduce."))
            raise ValueError(
                f"{kind.__name__} has a method {name} of its own on the instance, which token reduction would "
                f"go around or could not weigh tokens in; remove it (del module.{name}), use a hook on the module "
                "instead (hooks run), or call tr.patch before dispatching the model (accelerate puts one there)"
            )


def refuse_patched(kind: type, name: str = "forward") -> None:
    """Raise ``ValueError`` where the method ``name`` of a library's class was replaced on the class itself."""
    owner = next(c for c in kind.__mro__ if name in vars(c))
    method: Any = vars(owner)[name]
    if getattr(method, "__module__", owner.__module__) != owner.__module__:
        raise ValueError(
            f"{owner.__name__}.{name} was replaced by {method.__module__}.{method.__qualname__}, which token reduction "
            f"would go around; take it back before tr.patch"
        )


def refuse_pre_hooks(module: nn.Module) -> None:
    """Raise ``ValueError`` where pre-hooks of others are on an attention module whose queries and keys a method looks
    at before it is called: they would be of other features than those that the hooks make."""
    for hook in module._forward_pre_hooks.values():
        if not _ours(hook):
            raise ValueError(
                f"a forward pre-hook on {type(module).__name__} may change what a method that acts before the "
                "attention has looked at; remove the hook, or put it on the block or on a projection inside"
            )


def refuse_hooks(module: nn.Module, why: str) -> None:
    """Raise ``ValueError`` where hooks are on ``module``, which is not run as a module: ``why`` says when."""
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        raise ValueError(
            f"a hook on {type(module).__name__} would not run {why}; remove the hook, or put it on the block around it "
            "or on a module inside"
        )


def _ours(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith("tokenreduce.")
