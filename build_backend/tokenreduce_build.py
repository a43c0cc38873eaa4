"""The build backend: setuptools, except for what an editable install puts into site-packages.

setuptools' own editable install maps the folders beside ``tokenreduce/`` to its subpackages by a finder behind the
import system's search. From the folder above the clone that search finds the clone itself, which is called
``tokenreduce`` too, and type checkers run no finder at all. Here the finder comes first, and type checkers get two
folders of links.
"""

from __future__ import annotations

import base64
import hashlib
import locale
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

from setuptools.build_meta import (
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable", "get_requires_for_build_sdist",
    "get_requires_for_build_wheel", "prepare_metadata_for_build_editable", "prepare_metadata_for_build_wheel",
]  # fmt: skip

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FINDER = "tokenreduce_editable"
#: The folders beside ``tokenreduce/`` that are its subpackages, as in ``package-dir`` of pyproject.toml.
PARTS = ("adapters", "demo", "video", "vision")
LINKS = ROOT / ".editable"
WHEEL = "Wheel-Version: 1.0\nGenerator: tokenreduce_build\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Write a wheel with the metadata, the finder, and a ``.pth`` file that starts it; returns its name (PEP 660)."""
    home = Path(metadata_directory) if metadata_directory else _metadata(wheel_directory, config_settings)
    info = home if home.name.endswith(".dist-info") else next(home.glob("*.dist-info"))
    files = {f"{info.name}/{p.relative_to(info).as_posix()}": p.read_bytes() for p in info.rglob("*") if p.is_file()}
    files[f"{info.name}/WHEEL"] = WHEEL.encode()
    files[f"{FINDER}.py"] = (HERE / f"{FINDER}.py").read_bytes()
    files["__editable__.tokenreduce.pth"] = _pth(_links())
    if not metadata_directory:
        shutil.rmtree(home)
    name = f"{info.name.removesuffix('.dist-info')}-0.editable-py3-none-any.whl"
    _write(Path(wheel_directory, name), files, f"{info.name}/RECORD")
    return name


def _metadata(folder: str, config_settings: dict[str, Any] | None) -> Path:
    home = Path(folder, "metadata")
    home.mkdir()
    prepare_metadata_for_build_editable(str(home), config_settings)
    return home


def _links() -> list[Path]:
    """Folders that show the package and its parts as installed ones, for tools that read files and import nothing.

    Links to whole folders, so that new files are there at once; the second has what the first lacks. None where links
    cannot be made: everything but type checkers works without.
    """
    package, parts = LINKS / "package", LINKS / "parts"
    shutil.rmtree(LINKS, ignore_errors=True)
    wanted = {package / "tokenreduce": ROOT / "tokenreduce"}
    wanted |= {parts / "tokenreduce" / name: ROOT / name for name in PARTS}
    wanted |= {parts / "tokenreduce" / name: ROOT / "tokenreduce" / name for name in ("__init__.py", "py.typed")}
    try:
        for link, target in wanted.items():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=target.is_dir())
    except OSError as error:
        print(f"no links for type checkers: {error}", file=sys.stderr)
        return []
    return [package, parts]


def _pth(folders: list[Path]) -> bytes:
    start = f"import {FINDER}; {FINDER}.install({str(ROOT)!a}, {PARTS})"
    encoding = "utf-8" if sys.version_info >= (3, 13) else locale.getpreferredencoding(False)
    return "\n".join([*map(str, folders), start, ""]).encode(encoding)


def _write(wheel: Path, files: dict[str, bytes], record: str) -> None:
    files.pop(record, None)
    rows = []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(content)}\n")
        archive.writestr(record, "".join([*rows, f"{record},,\n"]))
