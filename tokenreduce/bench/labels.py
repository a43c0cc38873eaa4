"""From the class names of a data set to the outputs of a model. A mapping that could be wrong is an error."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenreduce.bench import zeroshot
from tokenreduce.bench.models import Loaded

__all__ = ["check_numbers", "digits_of", "match_names", "shown"]

WNID = re.compile(r"n\d{8}")
_FIX = (
    "rename the folders to WordNet ids (n01440764, ...), or give --classes FILE with one class name per line, in the "
    "order of the model's outputs"
)


def shown(names: Sequence[str], most: int = 6) -> str:
    """Names for a message, cut after ``most``."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def digits_of(count: int) -> tuple[str, ...]:
    """``("0", "1", ...)``."""
    return tuple(str(i) for i in range(count))


def match_names(
    names: Sequence[str], loaded: Loaded, classes: tuple[str, ...] | None, where: str
) -> tuple[list[int], tuple[str, ...]]:
    """The label of each class name of a data set, and the names of all labels.

    ``classes`` (given by the user) come first, then WordNet ids, the model's own label names, and the order of
    ``names`` where the model has as many outputs. Models without fixed outputs take any names. Raises ``ValueError``
    that shows the names that do not fit, and the fix.
    """
    free = loaded.kind != "classifier"
    if free and len(names) < 2:
        raise ValueError(
            f"{where} has one class only ({shown(names)}), so that accuracy would mean nothing; each class has a "
            "folder of its own: is this one folder too high?"
        )
    if classes is not None:
        return _given(names, loaded, classes, where)
    ids = [n for n in names if WNID.fullmatch(n)]
    if ids and len(ids) < len(names):
        strange = [n for n in names if not WNID.fullmatch(n)]
        raise ValueError(
            f"{where} mixes WordNet ids with other class folders: {shown(strange)}. Fix: move those away, or give "
            "--classes FILE with one name per line"
        )
    known = loaded.wnids
    if ids and known is None and (free or (loaded.num_classes == 1000 and len(names) != 1000)):
        known = _imagenet_ids()
    if ids and known is not None:
        lost = [n for n in names if n not in known]
        if lost:
            raise ValueError(
                f"{where}: {shown(lost)} are not among the {len(known)} ImageNet classes of {loaded.name}. Fix: remove "
                "these folders, use a model that knows them, or give --classes FILE with one name per folder"
            )
        position = {wnid: i for i, wnid in enumerate(known)}
        titles = zeroshot.imagenet_names() if loaded.kind == "zero-shot" else loaded.labels or known
        return [position[n] for n in names], tuple(titles)
    if free:
        return list(range(len(names))), tuple(names)
    if loaded.labels is not None:
        position = {_plain(label): i for i, label in enumerate(loaded.labels)}
        if all(_plain(n) in position for n in names):
            return [position[_plain(n)] for n in names], loaded.labels
    if len(names) == loaded.num_classes:
        return list(range(len(names))), tuple(names)
    more = " (outputs of an image encoder may be features: ?num_classes=0)" if loaded.wnids is None else ""
    raise ValueError(
        f"{where} has {len(names)} classes ({shown(names)}), {loaded.name} has {loaded.num_classes} outputs{more}. "
        f"Fix: use a model with the classes of the data; or {_FIX}"
    )


def _given(
    names: Sequence[str], loaded: Loaded, classes: tuple[str, ...], where: str
) -> tuple[list[int], tuple[str, ...]]:
    if loaded.kind == "classifier" and len(classes) != loaded.num_classes:
        raise ValueError(f"{len(classes)} class names were given for the {loaded.num_classes} outputs of {loaded.name}")
    if set(names) <= set(classes):
        return [classes.index(n) for n in names], classes
    if len(names) == len(classes):
        return list(range(len(names))), classes
    strange = [n for n in names if n not in classes]
    raise ValueError(
        f"{where} has {len(names)} classes, but {len(classes)} class names were given; not among them: "
        f"{shown(strange)}. Fix: give the name of every class, or as many names as there are classes, in their order"
    )


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ").replace("-", " ")


def _imagenet_ids() -> tuple[str, ...]:
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise ImportError(
            "the table of ImageNet's WordNet ids comes from timm: pip install 'tokenreduce[timm]'"
        ) from error
    return tuple(ImageNetInfo("imagenet-1k").label_names())


def check_numbers(
    labels: Sequence[int], loaded: Loaded, classes: tuple[str, ...] | None, where: str
) -> tuple[str, ...]:
    """Names for labels that are numbers without names. Raises ``ValueError`` where they do not fit the model."""
    if not labels:
        return classes or ()
    count = max(labels) + 1
    if loaded.kind == "classifier":
        if count > loaded.num_classes:
            raise ValueError(
                f"{where} has labels up to {count - 1}, {loaded.name} has {loaded.num_classes} outputs. "
                "Fix: use a model with the classes of the data"
            )
        if classes is not None and len(classes) != loaded.num_classes:
            raise ValueError(
                f"{len(classes)} class names were given for the {loaded.num_classes} outputs of {loaded.name}"
            )
        return classes or loaded.labels or digits_of(loaded.num_classes)
    if classes is None and loaded.kind == "features":
        return digits_of(count)
    if classes is None:
        raise ValueError(
            f"{where} holds labels but no class names, which a zero-shot model needs. Fix: --classes FILE with one "
            "name per line, or --classes imagenet for ImageNet"
        )
    if count > len(classes):
        raise ValueError(f"{where} has labels up to {count - 1} but only {len(classes)} class names; name every class")
    return classes
