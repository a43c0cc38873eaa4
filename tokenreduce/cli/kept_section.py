"""What a method keeps of the gallery's pictures, in the words and pictures of its page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokenreduce.cli.methods_page import anchor

if TYPE_CHECKING:
    from tokenreduce.bench.gallery.kept import Kept, Without

__all__ = ["kept_section"]

_TOKENS = (
    "A patch that is alone in its token keeps its pixels. Merged ones show their common mean, with a line of the "
    "token's own colour around them; dropped ones are dark and hatched."
)
_KEYS = "A patch is the paler the fewer of the {heads} heads of a layer hold its key, and white where none does."
_ALIKE = "The heads of a layer hold the same keys: those of the patches that are not white."


def kept_section(name: str, kept: Kept | Without | None) -> Iterator[str]:
    """The paragraphs, with links to the picture's files; None is a method that nobody looked at."""
    from tokenreduce.bench.gallery.kept import Without
    from tokenreduce.bench.gallery.sheets import FILES

    if kept is None:
        yield "No picture yet: `python -m tokenreduce.bench.gallery docs/kept.json` makes it."
        return
    if isinstance(kept, Without):
        yield f"No picture: {kept.why}"
        return
    what = "three scenes" if kept.pictures == "scenes" else "eight frames of a clip"
    where = f" in `{kept.model}`" if kept.model else ""
    after = f" {kept.note}" if kept.note else ""
    yield f"`{kept.spec}`{where}, of {what} of the embedded world's test split, {_count(kept)}.{after}"
    yield f"![{what.capitalize()}, as they are]({FILES[kept.pictures]}){{ .kept }}"
    yield f"![What {name} keeps of them]({anchor(name)}.webp){{ .kept }}"
    how = _KEYS.format(heads=kept.heads) if kept.heads > 1 else _ALIKE if kept.heads else _TOKENS
    yield how + _asked(kept)


def _count(kept: Kept) -> str:
    left = [f"{a:.4g}" for a, _ in kept.left()]
    unit = "keys in a head, mean over layers and heads" if kept.heads else "tokens"
    shown = left[0] if len(set(left)) == 1 else f"{', '.join(left[:-1])} and {left[-1]}"
    return f"of which {shown} of {kept.left()[0][1]} {unit} are left"


def _asked(kept: Kept) -> str:
    """The questions, of methods that may look at them."""
    from tokenreduce.bench.gallery.pictures import QUESTIONS

    if kept.model in ("", "world-vit"):
        return ""
    asked = QUESTIONS[:-1] if kept.pictures == "scenes" else QUESTIONS[-1:]
    return " Asked was: " + "; ".join(f"*{q}*" for q in asked) + "."
