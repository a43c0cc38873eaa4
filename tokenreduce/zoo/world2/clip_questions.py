"""Questions about a clip of the second world: what came when, how often, and what could be read meanwhile.

====================  ==========================================  =====================
type                  text                                        answer
====================  ==========================================  =====================
``order``             what thing comes before (after) the star    a kind
``first``, ``last``   what thing comes first (last)               a kind
``count_events``      how many times changes the star             zero ... three
``read_at``           what does the sign say when red is the star its characters: "k 7"
``colour_at``         what color is the star when the sign does   a colour
                      say k 7
``direction``         which way does move the star                left, right, still
``appear``            did appear a red star                       yes, no
====================  ==========================================  =====================
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from tokenreduce.zoo.world.questions import Groups, Pairs, Question, draw_questions
from tokenreduce.zoo.world2.clips import Clip
from tokenreduce.zoo.world2.questions import spelt
from tokenreduce.zoo.world2.vocabulary import COLOURS, KINDS, NUMBERS

__all__ = ["MIX", "VIDEO_TYPES", "ask", "spans"]


def _order(what: Clip) -> Groups:
    pairs = []
    for a, b in zip(what.objects, what.objects[1:], strict=False):
        pairs += [(f"what thing comes before the {b.kind}", a.kind), (f"what thing comes after the {a.kind}", b.kind)]
    return [(1, pairs)]


def _end(word: str) -> Callable[[Clip], Groups]:
    def groups(what: Clip) -> Groups:
        thing = what.objects[0 if word == "first" else -1]
        return [(1, [(f"what thing comes {word}", thing.kind)])] if len(what.objects) > 1 else []

    return groups


def _count_events(what: Clip) -> Groups:
    groups: dict[int, Pairs] = {}
    for a in what.objects:
        n = len(a.changes) - 1
        groups.setdefault(n, []).append((f"how many times changes the {a.kind}", NUMBERS[n]))
    return [(1, pairs) for _, pairs in sorted(groups.items())]


def spans(changes: tuple[tuple[int, str], ...], stop: int) -> list[tuple[int, int, str]]:
    """(first frame, frame behind the last, what it is) of every part."""
    starts = [f for f, _ in changes]
    return [(a, b, what) for (a, what), b in zip(changes, [*starts[1:], stop], strict=True)]


def _meanwhile(own: tuple[int, int, str], others: list[tuple[int, int, str]]) -> str | None:
    """What alone was the case during the whole of ``own``; None where that changed."""
    found = [what for a, b, what in others if a < own[1] and own[0] < b]
    return found[0] if len(found) == 1 else None


def _read_at(what: Clip) -> Groups:
    stop, pairs = len(what.frames), []
    for a in what.objects:
        for part in spans(a.changes, stop):
            if text := _meanwhile(part, spans(what.texts, stop)):
                pairs.append((f"what does the sign say when {part[2]} is the {a.kind}", spelt(text)))
    return [(1, pairs)]


def _colour_at(what: Clip) -> Groups:
    stop, pairs = len(what.frames), []
    shown = [t for _, t in what.texts]
    for a in what.objects:
        for part in spans(what.texts, stop):
            if shown.count(part[2]) == 1 and part[0] >= a.entry and (c := _meanwhile(part, spans(a.changes, stop))):
                pairs.append((f"what color is the {a.kind} when the sign does say {spelt(part[2])}", c))
    return [(1, pairs)]


def _direction(what: Clip) -> Groups:
    return [(1, [(f"which way does move the {a.kind}", a.motion) for a in what.objects])]


def _appear(what: Clip) -> Groups:
    there = {(c, a.kind) for a in what.objects for _, c in a.changes}
    lists: dict[str, Pairs] = {"yes": [], "mixed": [], "no": []}
    colours, kinds = {c for c, _ in there}, {k for _, k in there}
    for c in COLOURS:
        for k in KINDS:
            group = "yes" if (c, k) in there else "mixed" if c in colours and k in kinds else "no"
            lists[group].append((f"did appear a {c} {k}", "yes" if group == "yes" else "no"))
    return [(1, lists["yes"]), (0.6, lists["mixed"]), (0.4, lists["no"])]


_OF_CLIP: dict[str, Callable[[Clip], Groups]] = {
    "order": _order,
    "first": _end("first"),
    "last": _end("last"),
    "count_events": _count_events,
    "read_at": _read_at,
    "colour_at": _colour_at,
    "direction": _direction,
    "appear": _appear,
}
VIDEO_TYPES = tuple(_OF_CLIP)
MIX = dict.fromkeys(VIDEO_TYPES, 1.0)


def ask(
    what: Clip, seed: int, n: int, types: str | Collection[str] | Mapping[str, float] | None = None
) -> list[Question]:
    """``n`` different questions about ``what``; arguments and errors as in :func:`tokenreduce.zoo.world.ask`."""
    return draw_questions(what, _OF_CLIP, seed, n, types, MIX, stream=12)
