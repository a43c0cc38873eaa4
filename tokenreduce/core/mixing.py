"""Methods of ours in front of those of a module's class, whatever class that is.

A bound method or a ``functools.partial`` in an instance's ``__dict__`` computes with the module that it was made for:
in a shallow copy, or in a replica of ``nn.DataParallel``, that is the wrong one. So a patch gives a module another
class, and ``self`` is right by itself.
"""

from __future__ import annotations

import copyreg
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["assembled", "mixed", "parts"]

_PARTS = "_tokenreduce_parts"
_made: weakref.WeakKeyDictionary[type, dict[type, weakref.ref[type]]] = weakref.WeakKeyDictionary()


def mixed(kind: type, mixin: type) -> type:
    """A subclass of ``kind`` in which the methods of ``mixin`` come first; the same one as long as it is in use.

    It goes by the name of ``kind``, its methods say the signatures that they had in ``kind``, and instances copy and
    pickle wherever those of ``kind`` do: a pickle names ``kind`` and ``mixin``, which are found by import.
    """
    made = _made.setdefault(kind, {})
    known = made.get(mixin)
    found = None if known is None else known()
    if found is None:
        body = {
            "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__,
            "__reduce_ex__": _reducing(kind, mixin), _PARTS: (*parts(kind), mixin), **_signed(kind, mixin),
        }  # fmt: skip
        found = types.new_class(kind.__name__, (mixin, kind), exec_body=lambda space: space.update(body))
        made[mixin] = weakref.ref(found)
    return found


def parts(kind: type) -> tuple[type, ...]:
    """The class and the mixins that ``kind`` was made of, itself alone if it was not; these can be pickled."""
    found: tuple[type, ...] = vars(kind).get(_PARTS, (kind,))
    return found


def assembled(kind: type, *mixins: type) -> type:
    """The class of which these are the :func:`parts`."""
    for mixin in mixins:
        kind = mixed(kind, mixin)
    return kind


def _signed(kind: type, mixin: type) -> dict[str, Callable[..., Any]]:
    """The methods that ``mixin`` puts before those of ``kind``, with the signatures that callers look up."""
    out: dict[str, Callable[..., Any]] = {}
    for name, method in vars(mixin).items():
        stock = getattr(kind, name, None)
        if isinstance(method, types.FunctionType) and inspect.isfunction(stock) and not name.startswith("__"):
            own = types.FunctionType(
                method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__
            )
            own.__kwdefaults__, own.__doc__ = method.__kwdefaults__, method.__doc__
            own.__module__, own.__qualname__ = method.__module__, method.__qualname__
            own.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
            out[name] = own
    return out


def _reducing(kind: type, mixin: type) -> Callable[..., Any]:
    """``__reduce_ex__`` of a class made of these two; ``kind`` may be such a class itself."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        stock: Any = kind
        how, args, *rest = stock.__reduce_ex__(self, max(2, protocol))
        if how is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_new, (kind, mixin), *rest)
        return (_new, (*args, mixin), *rest) if how is _new else (how, args, *rest)

    return __reduce_ex__


def _new(kind: type, *mixins: type) -> Any:
    made: Any = assembled(kind, *mixins)
    return made.__new__(made)
