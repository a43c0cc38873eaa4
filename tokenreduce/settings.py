"""What a setting of a method takes, read from the annotations of its dataclass: one check for every method."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

__all__ = ["check", "describe", "fit", "fits", "hints"]

_MISFIT = object()
_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
_NAMES: dict[Any, tuple[str, str, str]] = {  # in a list, alone, several
    int: ("int", "an int", "ints"),
    float: ("float", "a number", "numbers"),
    bool: ("true/false", "true or false (in text also yes, no, on, off)", "true/false values"),
    str: ("text", "text", "texts"),
    type(None): ("none", "none", "none"),
}


def check(settings: Any) -> None:
    """Give every field of a frozen dataclass instance a value of the kind that its annotation names: lists become
    tuples, numbers of numpy Python's own. Raises ``ValueError`` that names method, setting, value and what it takes."""
    kind = type(settings)
    for name, default, hint, plain in _fields(cast(Any, kind)):
        value = getattr(settings, name)
        if type(value) in plain and (type(value) is not float or math.isfinite(value)):
            continue  # the usual case, made short: reducers are made anew in every forward
        got = fit(value, hint)
        if not fits(got):
            if value is default:  # the author's own choice
                continue
            number = _python(value)
            finite = "; numbers are finite" if isinstance(number, float) and not math.isfinite(number) else ""
            owner = getattr(kind, "name", "") or kind.__name__
            raise ValueError(f"{owner}: {name} is {describe(hint)}, not {value!r}{finite}")
        if got is not value:
            object.__setattr__(settings, name, got)


@functools.cache
def _fields(kind: type) -> tuple[tuple[str, Any, Any, frozenset[type]], ...]:
    """Name, default, hint, and the types whose values all fit as they are, of every field."""
    samples = {int: (-98765, 10**400), float: (0.98765,), bool: (True,), str: ("\0",), type(None): (None,)}
    out = []
    for field in fields(kind):
        hint = hints(kind)[field.name]
        plain = frozenset(kind for kind, some in samples.items() if all(fit(value, hint) is value for value in some))
        out.append((field.name, field.default, hint, plain))
    return tuple(out)


def hints(kind: type) -> Mapping[str, Any]:
    """Field name to annotation, evaluated; ``Any`` where that cannot be done, so that nothing is checked there."""
    return _hints(cast(Any, kind))


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        scope = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
        for name, note in inspect.get_annotations(base).items():
            if isinstance(note, str):
                try:
                    note = eval(note, dict(scope))
                except Exception:  # a name that only type checkers import
                    note = Any
            found[name] = note
    return types.MappingProxyType({field.name: found.get(field.name, Any) for field in fields(kind)})


def fits(got: Any) -> bool:
    """Whether :func:`fit` found the value to be of the kind asked for."""
    return got is not _MISFIT


def fit(value: Any, hint: Any, *, words: bool = False) -> Any:
    """``value`` as ``hint`` wants it, see :func:`fits`; with ``words``, the words yes, no, on, off, true and false are
    bools. A bool is no number, a number no bool, an int also a float; floats are finite. A hint other than these,
    lists, unions and ``Literal`` of them takes everything."""
    origin = get_origin(hint)
    if origin is Annotated:
        return fit(value, get_args(hint)[0], words=words)
    if origin in (Union, types.UnionType):
        every = (fit(value, arm, words=words) for arm in get_args(hint))
        return next(filter(fits, every), _MISFIT)
    if origin is Literal:
        same = (arm for arm in get_args(hint) if type(arm) is type(value) and arm == value)
        return next(same, _MISFIT)
    if (items := _items(hint)) is not None:
        return _fit_items(value, items, words)
    if hint is None or hint in _NAMES:
        return _fit_plain(_python(value), type(None) if hint is None else hint, words)
    return value


def _fit_plain(value: Any, hint: type, words: bool) -> Any:
    if hint is bool and words and isinstance(value, str):
        return _WORDS.get(value.lower(), _MISFIT)
    if isinstance(value, bool) or hint not in (int, float):
        return value if isinstance(value, hint) and isinstance(value, bool) == (hint is bool) else _MISFIT
    if isinstance(value, int):
        return value if hint is int or abs(value) <= sys.float_info.max else _MISFIT
    return value if hint is float and isinstance(value, float) and math.isfinite(value) else _MISFIT


def _python(value: Any) -> Any:
    """The plain Python number or text of a scalar of numpy or torch, or of another kind of number."""
    if type(value) in (bool, int, float, str):
        return value
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        value = value.item()
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else value


def _items(hint: Any) -> tuple[Any, ...] | None:
    """What the items of a list are: ``(X, ...)`` for any number of X, one hint each otherwise; None for no list, and
    for a plain ``list``, which a method may mean to write to."""
    if hint is list:
        return None
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is tuple:
        return args if args else (Any, ...)
    return (args[0] if args else Any, ...) if kind in (list, Sequence) else None


def _fit_items(value: Any, items: tuple[Any, ...], words: bool) -> Any:
    if not isinstance(value, tuple | list):
        return _MISFIT
    kinds = items[:1] * len(value) if items[-1:] == (...,) else items
    if len(kinds) != len(value):
        return _MISFIT
    got = tuple(fit(item, kind, words=words) for item, kind in zip(value, kinds, strict=True))
    if not all(map(fits, got)):
        return _MISFIT
    return value if isinstance(value, tuple) and all(a is b for a, b in zip(got, value, strict=True)) else got


def describe(hint: Any, form: int = 1) -> str:
    """``"an int or a list of ints"``; ``form`` is 0 within a pair, 1 alone, 2 for several."""
    origin = get_origin(hint)
    if origin is Annotated:
        return describe(get_args(hint)[0], form)
    if origin in (Union, types.UnionType):
        arms = [arm for arm in get_args(hint) if arm is not float or int not in get_args(hint)]
        names = [_number(form) if arm is int and float in get_args(hint) else describe(arm, form) for arm in arms]
        return " or ".join(names)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if (items := _items(hint)) is not None:
        if items[-1:] == (...,):
            several = describe(items[0], 2)
            return f"a list of ({several})" if " or " in several else f"a list of {several}"
        return f"a list of {len(items)} values ({', '.join(describe(item, 0) for item in items)})"
    return _NAMES.get(type(None) if hint is None else hint, ("anything", "anything", "values"))[form]


def _number(form: int) -> str:
    return ("int or float", "an int or a float", "ints or floats")[form]
