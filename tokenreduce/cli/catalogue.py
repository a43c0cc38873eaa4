"""The table behind ``tokenreduce methods``, kept in a cache: making it loads torch and every method.

What is kept says what it was made from: the files of all methods, of what they are built on, and of plug-ins, the
folders where methods are looked for, and the entry points of other packages. A table is used only while all of that is
as it was; the cache may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tokenreduce.common.files import cache_folder, write_text

if TYPE_CHECKING:
    from tokenreduce.core.reducer import Reducer

__all__ = ["Catalogue", "catalogue", "defaults_of"]

#: ``stages``, and ``methods``: one dict with name, stage, title, settings, text (of the settings) and paper for each.
Catalogue = dict[str, Any]


def catalogue() -> Catalogue:
    """All methods, from the cache where it is good. Raises what :func:`~tokenreduce.core.registry.load_all` raises."""
    if "tokenreduce.core.reducer" in sys.modules:  # classes may be there that no file has
        return _made()
    place, key = _place(), _key()
    if place is not None and (kept := _kept(place, key)) is not None:
        return kept
    made = _made()
    if place is not None:
        with contextlib.suppress(OSError):
            write_text(place, json.dumps({"key": key, **_origin(_modules()), "table": made}))
    return made


def _made() -> Catalogue:
    from tokenreduce.core.reducer import STAGES
    from tokenreduce.core.registry import load_all

    methods = load_all()
    return {"stages": list(STAGES), "methods": [_row(name, methods[name]) for name in sorted(methods)]}


def _row(name: str, kind: type[Reducer]) -> dict[str, Any]:
    from tokenreduce.common.words import plain
    from tokenreduce.core.specs import format_spec

    defaults = defaults_of(kind)
    paper = f"arXiv {kind.paper}" if kind.paper[:1].isdigit() else kind.paper
    text = format_spec("", defaults)[1:].replace(",", ", ")
    return {
        "name": name, "stage": kind.stage, "title": kind.title, "settings": plain(defaults), "text": text,
        "paper": paper,
    }  # fmt: skip


def defaults_of(kind: type[Reducer]) -> dict[str, Any]:
    """The settings of a method with their defaults."""
    out = {}
    for f in fields(kind):
        made = f.default_factory() if f.default_factory is not MISSING else f.default
        out[f.name] = "(required)" if made is MISSING else made
    return out


def _place() -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    own = "\n".join([sys.prefix, __file__, *_plugins()])
    return folder / f"methods-{hashlib.sha256(own.encode('utf-8', 'backslashreplace')).hexdigest()[:16]}.json"


def _plugins() -> list[str]:
    listed = os.environ.get("TOKENREDUCE_PLUGINS", "").split(os.pathsep)
    return [os.path.abspath(place) for place in listed if place]


def _key() -> list[Any]:
    """What besides files decides what methods there are."""
    points = [
        [p.name, p.value, p.dist.name if p.dist else "", p.dist.version if p.dist else ""]
        for p in entry_points(group="tokenreduce.methods")
    ]
    return [sys.version, _plugins(), sorted(points)]


def _kept(place: Path, key: list[Any]) -> Catalogue | None:
    """The table in ``place`` if everything is as it was."""
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        good = kept["key"] == key and _files(kept["files"]) == kept["files"] and _dirs(kept["dirs"]) == kept["dirs"]
        return kept["table"] if good else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _modules() -> list[ModuleType]:
    """Modules that methods are defined in or built on: those of their packages, and those beside plug-in files."""
    from tokenreduce.core.registry import load_all

    plugins = [name for name in sys.modules if name.startswith("tokenreduce_plugin_")]
    points = [point.value.partition(":")[0] for point in entry_points(group="tokenreduce.methods")]
    own = {kind.__module__ for kind in load_all().values()} | {*plugins, *points}
    roots = {name.partition(".")[0] for name in own}
    beside = {os.path.dirname(file) for name in plugins if (file := _file(sys.modules[name]))}
    return [
        module
        for name, module in list(sys.modules.items())
        if (file := _file(module)) and (name.partition(".")[0] in roots or os.path.dirname(file) in beside)
    ]


def _file(module: Any) -> str | None:
    file = getattr(module, "__file__", None)
    return os.path.abspath(file) if isinstance(file, str) else None


def _origin(modules: Iterable[ModuleType]) -> dict[str, Any]:
    import tokenreduce.video
    import tokenreduce.vision

    files = sorted({file for module in modules if (file := _file(module))})
    roots = [str(path) for package in (tokenreduce.vision, tokenreduce.video) for path in package.__path__]
    dirs = {os.path.dirname(file) for file in files} | set(roots) | set(_plugins())
    return {"files": _files(files), "dirs": _dirs(d for d in dirs if os.path.isdir(d))}


def _files(paths: Iterable[str] | Mapping[str, Any]) -> dict[str, list[int]]:
    """When each file was written, and its size. Raises ``OSError`` for one that is gone."""
    return {path: [(s := os.stat(path)).st_mtime_ns, s.st_size] for path in paths}


def _dirs(paths: Iterable[str] | Mapping[str, Any]) -> dict[str, list[str]]:
    """Python files and packages in each folder."""
    return {
        path: sorted(e.name for e in os.scandir(path) if e.name.endswith(".py") or (e.is_dir() and _package(e)))
        for path in paths
    }


def _package(entry: os.DirEntry[str]) -> bool:
    return os.path.exists(os.path.join(entry.path, "__init__.py"))
