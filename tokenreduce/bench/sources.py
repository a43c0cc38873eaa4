"""Where images come from: one reader per kind of data set. All of them are read by position."""

from __future__ import annotations

import glob
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from tokenreduce.bench.embedded_sources import read_digits, read_world, read_world2, read_world2_one
from tokenreduce.bench.labels import check_numbers, match_names, shown
from tokenreduce.bench.models import Loaded
from tokenreduce.bench.reading import Classes, Problem, Read, Source, find_split
from tokenreduce.common.images import EXTENSIONS
from tokenreduce.common.words import are, counted

__all__ = ["EXTENSIONS", "READERS", "all_images", "kind_of"]

KINDS = (
    "digits, world, world2, world2-one, an image folder, hf:FOLDER (a saved Hugging Face data set), *.tar (webdataset "
    "shards)"
)


def kind_of(name: str) -> tuple[str, str]:
    """The reader for a data set's name, and the place behind a prefix. Raises ``ValueError`` for anything else."""
    prefix, colon, place = name.partition(":")
    if name in ("digits", "world", "world2", "world2-one"):
        return name, ""
    if colon and prefix in ("folder", "hf", "wds"):
        if not place:
            raise ValueError(f"{name!r} names no place; write {prefix}:PATH")
        return prefix, place
    path = Path(name).expanduser()
    if path.is_dir():
        if any((path / f).exists() for f in ("dataset_info.json", "dataset_dict.json", "state.json")):
            return "hf", name
        return "wds" if any(path.glob("*.tar")) else "folder", name
    if name.endswith(".tar"):
        return "wds", name
    what = "it is a file" if path.exists() else "there is no such folder"
    raise ValueError(f"unknown data set {name!r}: {what}. Data sets are: {KINDS}")


# -- class folders -----------------------------------------------------------------------------------------------------
class _Files(Source):
    def open(self, item: Any) -> Image.Image:
        return Image.open(item)

    def where(self, item: Any) -> str:
        return str(item)


def _is_image(file: str) -> bool:
    stem, _, ending = file.rpartition(".")
    return bool(stem) and not file.startswith(".") and ending.lower() in EXTENSIONS


def _split_folder(root: Path, split: str) -> tuple[Path, list[str]]:
    """``root`` itself, or the folder of the split in it; a folder is a split only when it holds folders."""
    usual = ("train", "training", "test", "val", "validation", "valid", split)
    present = [n for n in dict.fromkeys(usual) if (root / n).is_dir() and any(p.is_dir() for p in (root / n).iterdir())]
    if not present:
        return root, []
    found, notes = find_split(split, present, str(root))
    return root / found, notes


def _read_folder(place: str, split: str, loaded: Loaded, classes: Classes) -> Read:
    root = Path(place).expanduser()
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    root, notes = _split_folder(root, split)
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    loose = sorted(p.name for p in root.iterdir() if p.is_file() and _is_image(p.name))
    if not folders:
        raise ValueError(
            f"{root} holds {counted(len(loose), 'image') + ' but ' if loose else ''}no class folders; the layout is "
            "FOLDER/class_name/image.jpg or FOLDER/val/class_name/image.jpg"
        )
    if loose:
        notes.append(
            f"{counted(len(loose), 'image')} outside of class folders {are(len(loose))} left out: {shown(loose, 3)}"
        )
    files: dict[str, list[Path]] = {}
    other: list[str] = []
    for folder in folders:
        files[folder] = []
        for base, inner, found in os.walk(root / folder):
            inner.sort()
            for file in sorted(found):
                if _is_image(file):
                    files[folder].append(Path(base) / file)
                elif not file.startswith("."):
                    other.append(str((Path(base) / file).relative_to(root)))
    if not any(files.values()):
        raise ValueError(
            f"{root} has class folders ({shown(folders)}) but no image in them; images end in {', '.join(EXTENSIONS)}"
        )
    if empty := [f for f in folders if not files[f]]:
        notes.append(f"class folders without an image: {shown(empty)}")
    if other:
        what = "1 file that is no image is" if len(other) == 1 else f"{len(other):,} files that are no images are"
        notes.append(f"{what} left out: {shown(other, 3)}")
    index, names = match_names(folders, loaded, classes, str(root))
    items = [f for folder in folders for f in files[folder]]
    labels = [i for i, folder in zip(index, folders, strict=True) for _ in files[folder]]
    return Read(_Files(), items, labels, names, notes)


# -- Hugging Face data sets --------------------------------------------------------------------------------------------
class _HuggingFace(Source):
    """Items are row numbers; the image column is not decoded by the library, so that a broken image is one problem."""

    def __init__(self, rows: Any, column: str, path: str) -> None:
        self.rows, self.column, self.path = rows, column, path

    def open(self, item: Any) -> Image.Image:
        value = self.rows[item][self.column]
        if value is None:
            raise ValueError("the row has no image")
        return Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"])

    def where(self, item: Any) -> str:
        return f"{self.path}[{item}]"


def _saved(place: str, split: str) -> tuple[Any, list[str], _HuggingFace]:
    """Rows of the split, notes, and what opens their images."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("datasets is not installed: pip install 'tokenreduce[data]'") from error
    try:
        rows = datasets.load_from_disk(str(Path(place).expanduser()))
    except Exception as error:
        raise ValueError(
            f"{place} is not a data set on disk ({' '.join(str(error).split())[:200]}). Fix: write one with "
            "datasets.load_dataset(...).save_to_disk(FOLDER) and give hf:FOLDER"
        ) from error
    notes: list[str] = []
    if isinstance(rows, datasets.DatasetDict):
        found, notes = find_split(split, list(rows), place)
        rows = rows[found]
    image = _column(rows.features, datasets.Image, ("image", "img", "jpg", "png", "picture"), place)
    undecoded = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return rows, notes, _HuggingFace(undecoded, image, place)


def _read_hf(place: str, split: str, loaded: Loaded, classes: Classes) -> Read:
    rows, notes, source = _saved(place, split)
    import datasets

    label = _column(rows.features, datasets.ClassLabel, ("label", "labels", "cls", "class", "fine_label"), place)
    values = list(rows.select_columns([label])[:][label])
    there = [v is not None and not (isinstance(v, int) and v < 0) for v in values]  # -1: a hidden test label
    problems = [Problem(source.where(i), "the row has no label") for i, ok in enumerate(there) if not ok]
    items = [i for i, ok in enumerate(there) if ok]
    own = getattr(rows.features[label], "names", None)
    if own is None and items and isinstance(values[items[0]], str):
        own = sorted({values[i] for i in items})
        number = {name: i for i, name in enumerate(own)}
        values = [number.get(v) for v in values]
    if own is None:
        labels = [int(values[i]) for i in items]
        return _numbered(Read(source, items, labels, (), notes, problems), loaded, classes, place)
    index, names = match_names(own, loaded, classes, place)
    return Read(source, items, [index[values[i]] for i in items], names, notes, problems)


def _column(features: Any, kind: Any, usual: Sequence[str], place: str) -> str:
    """The column of a feature type, by preference one with a usual name; a label may also be a plain number or text."""
    typed = [n for n, f in features.items() if isinstance(f, kind)]
    named = [n for n in usual if n in features]
    if both := [n for n in named if n in typed]:
        return both[0]
    if len(typed) == 1:
        return typed[0]
    plain = [
        n for n in named if str(getattr(features[n], "dtype", "")) in ("int64", "int32", "int16", "int8", "string")
    ]
    if not typed and plain and kind.__name__ == "ClassLabel":
        return plain[0]
    have = ", ".join(f"{name} ({type(f).__name__})" for name, f in features.items())
    raise ValueError(
        f"{place} has {'several' if typed else 'no'} columns of type {kind.__name__} and none is called {usual[0]!r}; "
        f"its columns: {have}. Fix: rename the right one to {usual[0]!r} and cast it to datasets.{kind.__name__}"
    )


def _numbered(read: Read, loaded: Loaded, classes: Classes, place: str) -> Read:
    """Labels that are bare numbers can only be trusted; say so."""
    read.classes = check_numbers(read.labels, loaded, classes, place)
    if loaded.kind == "classifier":
        read.notes.append(f"the labels of {place} have no names; they are taken as output numbers of {loaded.name}")
    return read


# -- webdataset shards -------------------------------------------------------------------------------------------------
class _Tar(Source):
    """Items are (shard, member, offset, size)."""

    def open(self, item: Any) -> Image.Image:
        return Image.open(io.BytesIO(_bytes(item[0], item[2], item[3])))

    def where(self, item: Any) -> str:
        return f"{item[0]}:{item[1]}"


def _bytes(shard: str, offset: int, size: int) -> bytes:
    with open(shard, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _shards(place: str) -> list[str]:
    """Shard files of a folder, a wildcard or a brace pattern, sorted. Raises ``ValueError`` for missing ones."""
    path = Path(place).expanduser()
    patterns = [str(path / "*.tar") if path.is_dir() else str(path)]
    if "{" in patterns[0]:
        try:
            from braceexpand import braceexpand
        except ImportError as error:
            raise ImportError("brace patterns need webdataset: pip install 'tokenreduce[data]'") from error
        patterns = list(braceexpand(patterns[0]))
    out: list[str] = []
    for pattern in patterns:
        files = sorted(glob.glob(pattern)) if any(c in pattern for c in "*?[") else [pattern]
        lost = [f for f in files if not Path(f).is_file()] if files else [pattern]
        if lost:
            raise ValueError(f"{place}: there is no shard {lost[0]}")
        out += files
    return out


def _read_wds(place: str, split: str, loaded: Loaded, classes: Classes) -> Read:
    read = Read(_Tar(), [], [], ())
    for shard in _shards(place):
        for key, parts in _samples(shard, read.problems):
            image = next((parts[e] for e in EXTENSIONS if e in parts), None)
            if image is None or "cls" not in parts:
                lacks = "image" if image is None else ".cls label"
                reason = f"the sample has no {lacks}; its parts: {', '.join(parts)}"
                read.problems.append(Problem(f"{shard}:{key}", reason))
                continue
            text = _bytes(shard, *parts["cls"][1:])
            if not text.strip().isdigit():
                reason = f"the label is {text[:20]!r}, not the number of a class"
                read.problems.append(Problem(f"{shard}:{key}", reason))
                continue
            read.items.append((shard, *image))
            read.labels.append(int(text))
    return _numbered(read, loaded, classes, place)


def _samples(shard: str, problems: list[Problem]) -> Iterator[tuple[str, dict[str, tuple[str, int, int]]]]:
    """Samples of a shard as webdataset groups them: consecutive members whose names agree up to the first dot."""
    key = ""
    parts: dict[str, tuple[str, int, int]] = {}
    try:
        with open(shard, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            size = os.path.getsize(shard)
            for member in tar:
                folder, slash, file = member.name.rpartition("/")
                stem, dot, ending = file.partition(".")
                if not (member.isfile() and stem and dot):
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"it ends inside {member.name}")
                if folder + slash + stem != key and parts:
                    yield key, parts
                    parts = {}
                key = folder + slash + stem
                parts[ending.lower()] = (member.name, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        after = f" after {key}" if key else " (a compressed one must be unpacked first)"
        problems.append(Problem(shard, f"the shard cannot be read{after}: {error}"))
    if parts:
        yield key, parts


# -- images without labels ---------------------------------------------------------------------------------------------
def all_images(name: str, split: str, loaded: Loaded) -> Read:
    """Every image of a data set, whatever labels it has or lacks: a folder with all that is below it, rows of a saved
    data set, samples of shards. ``labels`` and ``classes`` are empty. Raises ``ValueError`` where there is none."""
    kind, place = kind_of(name)
    if kind == "folder":
        read = _all_files(Path(place).expanduser())
    elif kind == "hf":
        rows, notes, source = _saved(place, split)
        read = Read(source, list(range(len(rows))), [], (), notes)
    elif kind == "wds":
        read = Read(_Tar(), [], [], ())
        for shard in _shards(place):
            for key, parts in _samples(shard, read.problems):
                image = next((parts[e] for e in EXTENSIONS if e in parts), None)
                if image is None:
                    reason = f"the sample has no image; its parts: {', '.join(parts)}"
                    read.problems.append(Problem(f"{shard}:{key}", reason))
                else:
                    read.items.append((shard, *image))
    else:  # the labels of embedded data need not fit
        read = READERS[kind](place, split, replace(loaded, kind="features", num_classes=0), None)
    if not read.items:
        found = "".join(f"\n  {p.path}: {p.reason}" for p in read.problems[:5])
        raise ValueError(f"{name} holds no image{':' if found else ''}{found}; images end in {', '.join(EXTENSIONS)}")
    return Read(read.source, read.items, [], (), read.notes, read.problems)


def _all_files(root: Path) -> Read:
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    items: list[Path] = []
    other: list[str] = []
    for base, inner, found in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for file in sorted(found):
            path = Path(base) / file
            if _is_image(file):
                items.append(path)
            elif not file.startswith("."):
                other.append(str(path.relative_to(root)))
    what = "1 file that is no image is" if len(other) == 1 else f"{len(other):,} files that are no images are"
    return Read(_Files(), items, [], (), [f"{what} left out: {shown(other, 3)}"] if other else [])


READERS: dict[str, Callable[[str, str, Loaded, Classes], Read]] = {
    "digits": read_digits,
    "world": read_world,
    "world2": read_world2,
    "world2-one": read_world2_one,
    "folder": _read_folder,
    "hf": _read_hf,
    "wds": _read_wds,
}
