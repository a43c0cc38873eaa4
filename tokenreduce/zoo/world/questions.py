"""Questions about a scene or a clip with one-word answers.

The word that a question is about comes last ("what color is the star"): a small model that reads the answer at that
word needs one attention hop, and learns in a tenth of the steps. Every type lists all its questions for the scene at
hand in groups, and a draw first chooses a group by its weight: that balances the answers. Yes and no are half each;
a type that has run out of one of them waits until the other types are used up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenreduce.zoo.world.clips import Clip
from tokenreduce.zoo.world.drawing import Draw
from tokenreduce.zoo.world.scenes import Scene
from tokenreduce.zoo.world.vocabulary import COLOURS, KINDS, NUMBERS

__all__ = [
    "IMAGE_TYPES", "MIX", "TWO_HOP", "TYPES", "VIDEO_TYPES", "Groups", "Pairs", "Question", "ask",
    "draw_questions", "scene_types",
]  # fmt: skip


@dataclass(frozen=True)
class Question:
    """``text`` in lower case without a question mark, the one-word ``answer`` and the ``type``."""

    text: str
    answer: str
    type: str


Pairs = list[tuple[str, str]]
Groups = list[tuple[float, Pairs]]


def _single(what: Scene | Clip) -> list:
    """Things whose kind is unique, so that "the K" names them."""
    seen = Counter(t.kind for t in what.objects)
    return [t for t in what.objects if seen[t.kind] == 1]


def _colours(what: Scene | Clip) -> Counter[str]:
    return Counter(t.colour for t in what.objects)


def _colour_of(what: Scene | Clip) -> Groups:
    return [(1, [(f"what color is the {t.kind}", t.colour) for t in _single(what)])]


def _kind_of(what: Scene | Clip) -> Groups:
    seen = _colours(what)
    return [(1, [(f"what thing is {t.colour}", t.kind) for t in what.objects if seen[t.colour] == 1])]


def _presence(text: str, known: Sequence[str] = KINDS) -> Callable[[Scene | Clip], Groups]:
    """60 % of the no's name a kind and a colour that are there, but not together."""

    def groups(what: Scene | Clip) -> Groups:
        there = {(t.colour, t.kind) for t in what.objects}
        colours, kinds = {c for c, _ in there}, {k for _, k in there}
        lists: dict[str, Pairs] = {"yes": [], "mixed": [], "no": []}
        for c in COLOURS:
            for k in known:
                group = "yes" if (c, k) in there else "mixed" if c in colours and k in kinds else "no"
                lists[group].append((f"{text} {c} {k}", "yes" if group == "yes" else "no"))
        return [(1, lists["yes"]), (0.6, lists["mixed"]), (0.4, lists["no"])]

    return groups


def _counts(pairs: list[tuple[str, int]], rare: dict[int, float], numbers: Sequence[str] = NUMBERS) -> Groups:
    """One group per count, so that the frequent small counts do not crowd out the others."""
    groups: dict[int, Pairs] = {}
    for text, n in pairs:
        if n < len(numbers):
            groups.setdefault(n, []).append((text, numbers[n]))
    return [(rare.get(n, 1.0), group) for n, group in sorted(groups.items())]


def _count_all(numbers: Sequence[str]) -> Callable[[Scene], Groups]:
    return lambda what: _counts([("how many things are there", len(what.objects))], {}, numbers)


def _count_colour(what: Scene) -> Groups:
    seen = _colours(what)
    return _counts([(f"how many things are {c}", seen[c]) for c in COLOURS], {0: 0.35, 1: 0.4})


def _side(what: Scene) -> Groups:
    middle_x, middle_y = _middle(what)
    pairs = []
    for t in _single(what):
        if abs(t.x - middle_x) >= 5:
            pairs.append((f"left or right is the {t.kind}", "left" if t.x < middle_x else "right"))
        if abs(t.y - middle_y) >= 5:
            pairs.append((f"top or bottom is the {t.kind}", "top" if t.y < middle_y else "bottom"))
    return [(1, pairs)]


def _middle(what: Scene) -> tuple[int, int]:
    return what.image.shape[1] // 2, what.image.shape[0] // 2


def _relation(what: Scene) -> Groups:
    groups: dict[str, Pairs] = {"yes": [], "no": []}
    named = _single(what)
    for a in named:
        for b in named:
            for first, second, near in (("left of", "right of", b.x - a.x), ("above", "below", b.y - a.y)):
                if a is not b and abs(near) >= 9:
                    for words, holds in ((first, near > 0), (second, near < 0)):
                        answer = "yes" if holds else "no"
                        groups[answer].append((f"is the {a.kind} {words} the {b.kind}", answer))
    return [(1, pairs) for pairs in groups.values()]


def _quadrant(text: str, attribute: str) -> Callable[[Scene], Groups]:
    """The only thing in a quarter of the picture; nothing else may be nearer than 4 px to that quarter."""

    def groups(what: Scene) -> Groups:
        middle_x, middle_y = _middle(what)
        pairs = []
        for down, high in ((-1, "top"), (1, "bottom")):
            for right, wide in ((-1, "left"), (1, "right")):
                depth = [(t, min((t.x - middle_x) * right, (t.y - middle_y) * down)) for t in what.objects]
                near = [(t, d) for t, d in depth if d > -4]
                if len(near) == 1 and near[0][1] >= 4:
                    pairs.append((f"{text} is at the {high} {wide}", getattr(near[0][0], attribute)))
        return [(1, pairs)]

    return groups


def _background(what: Scene) -> Groups:
    return [(1, [("what is the background", what.background)])]


def _other_kind(what: Scene) -> Groups:
    seen, pairs = _colours(what), []
    for t in _single(what):
        if seen[t.colour] == 2:
            other = next(o for o in what.objects if o is not t and o.colour == t.colour)
            pairs.append((f"what other thing shares color with the {t.kind}", other.kind))
    return [(1, pairs)]


def _other_count(what: Scene) -> Groups:
    seen = _colours(what)
    pairs = [(f"how many things shares color with the {t.kind}", seen[t.colour] - 1) for t in _single(what)]
    return _counts(pairs, {0: 0.5})


def _direction(what: Clip) -> Groups:
    return [(1, [(f"which way does move the {t.kind}", t.motion) for t in _single(what)])]


def _entry(word: str) -> Callable[[Clip], Groups]:
    def groups(what: Clip) -> Groups:
        if len(what.objects) < 2:  # with one thing the order is no question
            return []
        thing = (min if word == "first" else max)(what.objects, key=lambda t: t.entry)
        return [(1, [(f"what thing comes {word}", thing.kind)])]

    return groups


_EITHER: dict[str, Callable] = {"colour_of": _colour_of, "kind_of": _kind_of}


def scene_types(kinds: Sequence[str] = KINDS, numbers: Sequence[str] = NUMBERS) -> dict[str, Callable]:
    """What lists the questions of each type about a picture with things of ``kinds``, counted in ``numbers``."""
    return {
        **_EITHER,
        "exist": _presence("is there a", kinds),
        "count_all": _count_all(numbers),
        "count_colour": _count_colour,
        "side": _side,
        "relation": _relation,
        "at_kind": _quadrant("what thing", "kind"),
        "at_colour": _quadrant("what color", "colour"),
        "background": _background,
        "other_kind": _other_kind,
        "other_count": _other_count,
    }


_OF_SCENE = scene_types()
_OF_CLIP: dict[str, Callable] = {
    "direction": _direction,
    "first": _entry("first"),
    "last": _entry("last"),
    "appear": _presence("did appear a"),
    **_EITHER,
}

#: Types that need the colours or kinds of two things one after the other.
TWO_HOP = ("other_kind", "other_count")
IMAGE_TYPES = tuple(t for t in _OF_SCENE if t not in TWO_HOP)
VIDEO_TYPES = tuple(_OF_CLIP)
TYPES = tuple(dict.fromkeys((*IMAGE_TYPES, *TWO_HOP, *VIDEO_TYPES)))

_YES_NO = ("exist", "relation", "appear")

#: How often a type is drawn when nothing else is said, relative to the others that have a question left.
MIX = {
    **dict.fromkeys(TYPES, 1.0),
    "count_all": 0.6, "background": 0.7, "relation": 1.2, "count_colour": 1.2, "direction": 1.5,
}  # fmt: skip


def ask(
    what: Scene | Clip, seed: int, n: int, types: str | Collection[str] | Mapping[str, float] | None = None
) -> list[Question]:
    """``n`` different questions about ``what``, drawn by ``seed``.

    ``types`` names the type or types to draw from, a mapping also their weights (default: :data:`MIX` over all types
    of a scene or of a clip); types without a question for ``what`` are passed over. Raises ``ValueError`` for an
    unknown type and when there are fewer than ``n`` different questions, so also for a single type without any.
    """
    return draw_questions(what, _OF_SCENE if isinstance(what, Scene) else _OF_CLIP, seed, n, types, MIX)


def draw_questions(
    what: Any,
    known: Mapping[str, Callable],
    seed: int,
    n: int,
    types: str | Collection[str] | Mapping[str, float] | None,
    mix: Mapping[str, float],
    stream: int = 2,
) -> list[Question]:
    """:func:`ask` for a world whose types are those of ``mix``; ``known`` lists the questions about ``what``."""
    wanted = tuple(known) if types is None else (types,) if isinstance(types, str) else tuple(types)
    if unknown := [t for t in wanted if t not in mix]:
        raise ValueError(f"unknown question type {', '.join(map(repr, unknown))}; choose from {', '.join(mix)}")
    weights = types if isinstance(types, Mapping) else mix
    if any(weights[t] < 0 for t in wanted):
        raise ValueError(f"weights of question types must not be negative: {dict(weights)}")
    draw = Draw(stream, seed)
    pools: dict[str, Groups] = {}
    left = {t: float(weights[t]) for t in dict.fromkeys(wanted) if t in known and weights[t] > 0}
    waiting: dict[str, float] = {}
    out: list[Question] = []
    while len(out) < n:
        if not left:
            left, waiting = waiting, {}
        if not left:
            kind = "clip" if hasattr(what, "frames") else "scene"
            raise ValueError(
                f"the {kind} of seed {what.seed} has only {len(out)} of {n} different questions of type "
                + ", ".join(wanted)
            )
        name = _weighted(draw, list(left.items()))
        if name not in pools:  # listed only when drawn: most types cost more than the draw
            pools[name] = [(weight, list(pairs)) for weight, pairs in known[name](what)]
        groups = [(pairs, weight) for weight, pairs in pools[name] if pairs]
        if not groups:
            del left[name]
            continue
        if name in _YES_NO:
            answer = "yes" if draw.below(2) else "no"
            groups = [g for g in groups if g[0][0][1] == answer] or groups
        pairs = _weighted(draw, groups)
        text, answer = pairs.pop(draw.below(len(pairs)))
        out.append(Question(text, answer, name))
        if name in _YES_NO and len({p[0][1] for _, p in pools[name] if p}) < 2:
            waiting[name] = left.pop(name)
    return out


def _weighted(draw: Draw, options: list[tuple]):
    """The first of one of ``options`` (item, weight), by weight."""
    place = draw.random() * sum(weight for _, weight in options)
    for item, weight in options:
        place -= weight
        if place < 0:
            return item
    return options[-1][0]
