"""``tuned.json``: methods that were found for a model, which :func:`tokenreduce.patch` takes by the file's name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenreduce.common.files import write_text

__all__ = ["Tuned", "is_tuned", "read_tuned"]

#: What such a file calls itself, with its version.
FORMAT = "tokenreduce-tuned-1"


@dataclass(frozen=True)
class Tuned:
    """``reduce`` is the recommendation as text, found for ``model`` of ``family``; ``facts`` are targets, scores and
    the Pareto set, for readers."""

    model: str
    family: str
    reduce: str
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Raises ``OSError`` where it cannot be written."""
        path = Path(path)
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")
        return path


def is_tuned(text: Any) -> bool:
    """Whether a method given as text is the name of such a file."""
    return isinstance(text, str) and text.endswith(".json") and ":" not in Path(text).name


def read_tuned(path: str | Path, family: str) -> Tuned:
    """The file at ``path``, for a model of ``family``.

    Raises ``FileNotFoundError``, and ``ValueError`` for a file of another kind and one that was found for another
    family.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; tokenreduce tune MODEL --out DIR writes DIR/tuned.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("format") != FORMAT:
            raise KeyError("format")
        made = Tuned(**raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} was not written by tokenreduce tune ({type(error).__name__}: {error})") from error
    if made.family != family:
        raise ValueError(
            f"{path} was found for {made.model}, a {made.family}, and this model is a {family}; run tokenreduce tune "
            f"on it, or give the methods themselves: {made.reduce}"
        )
    return made
