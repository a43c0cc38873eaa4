"""Lets ``import tokenreduce`` find the clone that was installed with ``pip install -e``, from any working folder.

The build backend beside this file copies it into site-packages; a ``.pth`` file there calls :func:`install` whenever
Python starts. It stands before the import system's own search, because that takes the clone's folder, itself called
``tokenreduce``, for the package when the working folder is the one above it.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location

NAME = "tokenreduce"


class Finder:
    """Finds the package in ``root``, unless a whole package of that name comes first on ``sys.path`` (a wheel on
    ``PYTHONPATH``, another clone as working folder), and its ``parts`` in the folders beside the package found."""

    def __init__(self, root: str, parts: tuple[str, ...]) -> None:
        self.init = os.path.join(root, NAME, "__init__.py")
        self.parts = {f"{NAME}.{part}": part for part in parts}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == NAME:
            return self._package(target)
        if name in self.parts:
            return self._part(name)
        return None

    def _package(self, target: object) -> ModuleSpec | None:
        found = PathFinder.find_spec(NAME, None, target)  # type: ignore[arg-type]
        folder_only = found is None or found.origin is None
        # The folder of links for type checkers is on sys.path, too; modules are to know their files by their own names.
        if folder_only or os.path.realpath(found.origin) == os.path.realpath(self.init):  # type: ignore[union-attr]
            return spec_from_file_location(NAME, self.init) if os.path.exists(self.init) else found
        return found

    def _part(self, name: str) -> ModuleSpec | None:
        for home in getattr(sys.modules.get(NAME), "__path__", ()):
            inside = os.path.join(home, self.parts[name])
            beside = os.path.join(os.path.dirname(home), self.parts[name], "__init__.py")
            if not os.path.isdir(inside) and os.path.exists(beside):
                return spec_from_file_location(name, beside)
        return None


def install(root: str, parts: tuple[str, ...]) -> None:
    """Put the finder first in ``sys.meta_path``, once."""
    if not any(type(finder).__name__ == "Finder" and type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(root, parts))  # type: ignore[arg-type]
