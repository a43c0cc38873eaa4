"""The registry: every method is found by its class statement; a new file in a stage folder needs no other change.

Methods are looked for in ``tokenreduce.vision.<stage>`` and ``tokenreduce.video.<stage>``, in installed packages'
entry points of group ``tokenreduce.methods`` (modules), and in the files and folders that the environment variable
``TOKENREDUCE_PLUGINS`` lists (separated like ``PATH``).

Baselines exist at several stages under one name: ``random`` inside an encoder is another class than ``random`` before
a language model. Their full names are ``random`` and ``random@projector``; where a stage is known the short one is
enough.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import importlib.util
import os
import pkgutil
import sys
import threading
import traceback
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from tokenreduce.core.auto import is_auto
from tokenreduce.core.reducer import FIND, METHODS, STAGES, Reducer, build
from tokenreduce.core.specs import parse_spec, split_specs

__all__ = ["get_class", "get_method", "list_methods", "load_all", "parse"]

#: Published methods that people ask for and that are nothing without what was trained for them, and what is nearest.
LEARNED = {
    "sparsifiner": "which keys each query attends to is said by a predictor that is trained with the model, and no "
    "token leaves. For attention on fewer tokens choose fastv or pyramiddrop, in an encoder evit or tome",
    "acm": "Adaptive Computation Modules replace MLPs and projections by small learners, and gates that are trained to "
    "say how many of them a token runs through. To spend less on tokens alike, choose tome or pitome",
}
LEARNED["adaptive-computation-modules"] = LEARNED["acm"]

_loaded = False
_lock = threading.RLock()


def load_all() -> dict[str, type[Reducer]]:
    """Import every method once; returns name to class.

    Raises ``ImportError`` that names file and line for a plug-in that cannot be loaded.
    """
    global _loaded
    with _lock:
        if not _loaded:
            _loaded = True
            try:
                for root in ("tokenreduce.vision", "tokenreduce.video"):
                    _import_methods(root)
                for point in entry_points(group="tokenreduce.methods"):
                    _import_point(point)
                for place in filter(None, os.environ.get("TOKENREDUCE_PLUGINS", "").split(os.pathsep)):
                    _import_plugin(Path(place))
            except BaseException:
                _loaded = False
                raise
    return METHODS


def _import_methods(root: str) -> None:
    package = importlib.import_module(root)
    for stage in pkgutil.iter_modules(package.__path__, root + "."):
        if stage.ispkg:
            inner = importlib.import_module(stage.name)
            for leaf in pkgutil.iter_modules(inner.__path__, stage.name + "."):
                importlib.import_module(leaf.name)


def _import_plugin(place: Path) -> None:
    files = sorted(place.glob("*.py")) if place.is_dir() else [place]
    if not files or not all(f.exists() for f in files):
        raise FileNotFoundError(f"TOKENREDUCE_PLUGINS names {place}, which holds no Python file")
    for file in files:
        name = f"tokenreduce_plugin_{file.stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"TOKENREDUCE_PLUGINS names {file}, which is no Python file: its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            remedy = "mend the file, or take it out of TOKENREDUCE_PLUGINS"
            raise ImportError(
                f"the plug-in {_place(error, file)} cannot be loaded: {_said(error)}; {remedy}"
            ) from error


def _import_point(point: EntryPoint) -> None:
    try:
        point.load()
    except (Exception, SystemExit) as error:
        package = point.dist.name if point.dist is not None else point.value
        where = ", ".join(filter(None, (point.value, _place(error, None))))
        raise ImportError(
            f"the methods of {package} ({where}) cannot be loaded: {_said(error)}; mend or uninstall {package}"
        ) from error


def _place(error: BaseException, file: Path | None) -> str:
    """Where in a plug-in ``error`` arose: its file and the last line of it that ran."""
    frames = [
        (f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename
    ]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    own = [f for f in frames if file is None or Path(f[0]).resolve() == file.resolve()]
    if file is not None and frames and not own:
        own = [(str(file), None)]
    if not own:
        return str(file or "")
    name, line = own[-1]
    return f"{name}, line {line}" if line else name


def _said(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split()) or 'no message'}"


def get_class(name: str, stage: str | None = None) -> type[Reducer]:
    """The class of a method; where several stages have one of that name, that of ``stage`` (``"random@projector"``
    names it too). Raises ``ValueError`` with the nearest names for an unknown one."""
    methods = load_all()
    name, _, own = name.partition("@")
    stage = own or stage
    if stage is not None and f"{name}@{stage}" in methods:
        return methods[f"{name}@{stage}"]
    if own and (name not in methods or methods[name].stage != own):
        raise ValueError(f"no method {name!r} at stage {own!r}; there are {', '.join(list_methods(stage=own))}")
    if name not in methods:
        if why := LEARNED.get(name.lower()):
            raise ValueError(f"{name!r} is not here: {why}")
        close = difflib.get_close_matches(name, methods, 3, 0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"unknown method {name!r}; {hint}Known: {', '.join(sorted(methods))}.")
    return methods[name]


def get_method(spec: str, stage: str | None = None) -> Reducer:
    """One reducer from text such as ``"tome:r=13"``; ``stage`` decides where several stages have a method of that name.

    Raises ``ValueError`` for an unknown method, an unknown or bad setting, or several methods joined by ``+``
    (those go to :func:`tokenreduce.patch` directly).
    """
    if len(split_specs(spec)) > 1:
        raise ValueError(f"{spec!r} names several methods; pass it to tr.patch(model, spec) or tr.parse(spec)")
    kind = get_class(parse_spec(spec)[0], stage)
    return build(kind, parse_spec(spec, kind)[1])


def parse(*reducers: Reducer | str, stage: str | None = None) -> tuple[Reducer, ...]:
    """Reducers and texts, several joined by ``+`` allowed, to a flat tuple of reducers; ``stage`` as in
    :func:`get_method`."""
    out: list[Reducer] = []
    for item in reducers:
        if isinstance(item, Reducer):
            out.append(item)
        elif isinstance(item, str):
            if is_auto(item):
                raise ValueError(
                    f"{item!r} is chosen for a model: tr.patch(model, {item!r}) does it, and --reduce of generate, "
                    "describe, estimate and bench"
                )
            out.extend(get_method(part, stage) for part in split_specs(item))
        else:
            raise TypeError(f"expected a reducer or text such as 'tome:r=13', not {type(item).__name__}")
    return tuple(out)


def list_methods(pattern: str = "*", *, stage: str | None = None) -> list[str]:
    """Names of methods that match a wildcard, sorted, of one ``stage`` if given (``ValueError`` for a bad one); short
    names then, full ones (``random@projector``) otherwise."""
    if stage is not None and stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; stages: {', '.join(STAGES)}")
    methods = load_all()
    if stage is None:
        return sorted(fnmatch.filter(methods, pattern))
    return sorted(fnmatch.filter((n.partition("@")[0] for n, k in methods.items() if k.stage == stage), pattern))


FIND[:] = [get_class]
