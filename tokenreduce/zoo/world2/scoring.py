"""How an answer of several words is scored: as a whole, by its elements and by its words.

>>> score("red star blue ring", "red star green ring blue ring", "list")
Score(exact=False, elements=0.666..., words=0.666...)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

__all__ = ["Score", "elements", "score"]


class Score(NamedTuple):
    """``exact``: word for word; ``elements`` and ``words``: the share of those of the longer answer that both have, in
    this order."""

    exact: bool
    elements: float
    words: float


def elements(answer: str, type: str) -> list[str]:
    """What an answer tells, one by one: things of a ``list``, parts of a ``describe`` (between commas), characters of
    what is read, else the answer itself."""
    words = answer.split()
    if type == "list":  # a colour and a kind each
        return [" ".join(words[i : i + 2]) for i in range(0, len(words), 2)]
    if type == "describe":
        parts = " ".join(words).split(",")
        return [p.strip() for p in parts if p.strip()]
    return words


def score(said: str, answer: str, type: str) -> Score:
    """``said`` against the right ``answer`` to a question of ``type``, both in words of the world; case and blanks do
    not count."""
    said, answer = (" ".join(a.lower().split()) for a in (said, answer))
    return Score(
        said == answer, common(elements(said, type), elements(answer, type)), common(said.split(), answer.split())
    )


def common(said: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """Length of the longest common subsequence over that of the longer sequence; 1 for two empty ones.

    So what is left out, added or said in another order costs what it is worth, and a gap costs no more than that.
    """
    if not said or not right:
        return float(not said and not right)
    best = [0] * (len(right) + 1)
    for a in said:
        before = 0
        for j, b in enumerate(right, 1):
            before, best[j] = best[j], before + 1 if a == b else max(best[j], best[j - 1])
    return best[-1] / max(len(said), len(right))
