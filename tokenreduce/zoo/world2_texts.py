"""Batches that teach ``world-clip-2``: pictures, texts with the patches that they are about, and captions.

A text is a question of the world or a name ("star", "red star", "k"). What a question is about is what has to be seen
to answer it: the thing that it names, and where the answer is read (:func:`about`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokenreduce.zoo.world2.questions import Question, ask
from tokenreduce.zoo.world2.scenes import CELL_OF, CHARACTER_OF, PLATE_OF, Scene, scene
from tokenreduce.zoo.world2.vocabulary import CHARACTERS, COLOURS, GRID, KINDS
from tokenreduce.zoo.world2_batches import FEW, choose, labels
from tokenreduce.zoo.world2_pointers import pointers
from tokenreduce.zoo.world2_words import IDS, encode
from tokenreduce.zoo.world_batches import seeds
from tokenreduce.zoo.world_words import BOS, PAD

__all__ = ["END", "NAMES", "ONE", "PAIRS", "Texts", "about", "caption", "rows", "texts"]

#: The token behind every text, at which the tower pools. Not ``<eos>``: transformers takes an end token 2 for a mistake
#: of old checkpoints, and pools at the highest id instead.
END = len(IDS)
PAIRS = tuple(f"{c} {k}" for k in KINDS for c in COLOURS)
#: What a patch or a picture can be named, by group.
NAMES: dict[str, tuple[str, ...]] = {"kind": KINDS, "colour": COLOURS, "character": CHARACTERS, "pair": PAIRS}
#: Scenes with one thing and nothing else: what zero-shot classification is measured on.
ONE: dict[str, Any] = dict(objects=(1, 1), signs=(0, 0), document=0.0)
#: Scenes that questions are asked about.
ASKED: dict[str, Any] = dict(objects=(3, 10), signs=(1, 3), document=0.6)


@dataclass(frozen=True)
class Texts:
    """One batch: B pictures, S patches of each, Q texts.

    ``pixels`` (B,224,224,3) uint8; ``seen`` (B,S) patches; ``words`` (B,Q,T) ids from ``<bos>`` to :data:`END`, filled
    with ``<pad>``; ``about`` (B,Q,S) bool; ``types`` Q names per picture ("name" for names); ``shows`` by group of
    :data:`NAMES` (B,S) which name a patch has, -1 for none; ``there`` by group (B,n) bool what is in the picture;
    ``captions`` (B,2,T) of the picture, and the same with one word that is wrong.
    """

    pixels: np.ndarray
    seen: np.ndarray
    words: np.ndarray
    about: np.ndarray
    types: tuple[tuple[str, ...], ...]
    shows: dict[str, np.ndarray] = field(repr=False)
    there: dict[str, np.ndarray] = field(repr=False)
    captions: np.ndarray = field(repr=False)


def rows(said: Sequence[str]) -> np.ndarray:
    """(n,T) ids of ``said``. Raises ``KeyError`` for a word that the world does not know."""
    made = [[BOS, *encode(text), END] for text in said]
    most = -(-max(map(len, made)) // 4) * 4
    out = np.full((len(made), most), PAD)
    for row, ids in zip(out, made, strict=True):
        row[: len(ids)] = ids
    return out


def about(made: Scene, question: Question) -> np.ndarray:
    """(784,) bool, the patches that have to be seen to answer ``question``: the background where it asks for that."""
    owners, words = made.labels.owners.ravel(), question.text.split()
    if question.type == "background":
        return owners < 0
    if question.type == "describe":
        return (owners >= 0) & ((owners < CHARACTER_OF) | (owners % 10 != PLATE_OF) | (owners >= CELL_OF))
    things = made.objects
    if question.type in ("count_all", "list"):
        mine = set(range(len(things)))
    elif question.type == "count_colour":
        mine = {i for i, t in enumerate(things) if t.colour == words[-1]}
    elif question.type == "other_count":
        colour = next(t.colour for t in things if t.kind == words[-1])
        mine = {i for i, t in enumerate(things) if t.colour == colour}
    elif question.type == "exist":
        colour, kind = words[-2:]
        # Whoever says no has looked at what is nearly that.
        mine = {i for i, t in enumerate(things) if (t.colour, t.kind) == (colour, kind)} or {
            i for i, t in enumerate(things) if t.colour == colour or t.kind == kind
        }
    else:
        mine = {own for pair in pointers(made, question) for own in pair if own >= 0}
    return np.isin(owners, sorted(mine))


def caption(made: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """What is in the picture, up to four things in any order, and the same with one colour, kind or character that is
    nowhere in it."""
    parts = [f"{t.colour} {t.kind}" for t in made.objects] + [f"sign {s.colour} {' '.join(s.text)}" for s in made.signs]
    parts = [parts[i] for i in rng.permutation(len(parts))[:4]]
    said = " , ".join(parts).split()
    there = set(" ".join(parts).split())
    there |= {w for t in made.objects for w in (t.colour, t.kind)} | {c for s in made.signs for c in s.text}
    groups = (KINDS, COLOURS, CHARACTERS)
    places = [i for i, word in enumerate(said) if any(word in group for group in groups)]
    i = int(rng.choice(places))
    other = [w for w in next(g for g in groups if said[i] in g) if w not in there]
    wrong = [*said]
    wrong[i] = str(rng.choice(other)) if other else "plain"
    return " ".join(said), " ".join(wrong)


def named(made: Scene, rng: np.random.Generator, n: int) -> list[tuple[str, np.ndarray]]:
    """``n`` names of what is there, with the patches (784,) bool that show it."""
    known = made.labels
    kind, colour, character = (a.ravel() for a in (known.kinds, known.colours, known.characters))
    found: list[tuple[str, np.ndarray]] = []
    for t in made.objects:
        k, c = KINDS.index(t.kind), COLOURS.index(t.colour)
        found += [(t.kind, kind == k), (f"{t.colour} {t.kind}", (kind == k) & (colour == c)), (t.colour, colour == c)]
    for s in made.signs:
        mine = (colour == COLOURS.index(s.colour)) & (kind < 0)
        found += [(c, character == CHARACTERS.index(c)) for c in s.text] + [(f"{s.colour} sign", mine)]
    found = [(text, where) for text, where in found if where.any()]
    return [found[i] for i in rng.integers(len(found), size=n)]


def texts(
    step: int, *, batch: int, seed: int, keep: int, split: str = "train", questions: int = 8, names: int = 6,
    types: dict[str, float] | None = None, scenes: Sequence[dict[str, Any]] = (ASKED, ASKED, ONE, FEW),
) -> Texts:  # fmt: skip
    """The batch of ``step``: ``batch`` pictures, of each of ``scenes`` (settings of :func:`.scene`) in turn, each with
    ``questions`` questions of ``types`` and ``names`` names; ``keep`` patches of each, those that show something
    first."""
    rng = np.random.default_rng((25, seed, step))
    made = [scene(s, **scenes[i % len(scenes)]) for i, s in enumerate(seeds(split, batch, rng))]
    known = np.stack([labels(m) for m in made])
    seen = choose(known[:, 4] >= 0, keep, rng)
    said: list[list[str]] = []
    where: list[np.ndarray] = []
    kinds: list[tuple[str, ...]] = []
    for m, patches in zip(made, seen, strict=True):
        asked = ask(m, int(rng.integers(1 << 40)), questions, types) if questions else []
        words = named(m, rng, names)
        said.append([q.text for q in asked] + [text for text, _ in words])
        where.append(np.stack([about(m, q) for q in asked] + [mine for _, mine in words])[:, patches])
        kinds.append((*(q.type for q in asked), *("name" for _ in words)))
    flat = rows([text for one in said for text in one])
    shows, there = _shown(known)
    at = {name: np.take_along_axis(index, seen, 1) for name, index in shows.items()}
    pairs = rows([text for m in made for text in caption(m, rng)])
    return Texts(
        np.stack([m.image for m in made]), seen, flat.reshape(batch, -1, flat.shape[1]), np.stack(where), tuple(kinds),
        at, there, pairs.reshape(batch, 2, -1),
    )  # fmt: skip


def _shown(known: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By group of :data:`NAMES` which name every patch has (B,784), and which names a picture has (B,n)."""
    kind, colour, character = (known[:, i] for i in range(3))
    pair = np.where(kind >= 0, kind * len(COLOURS) + colour, -1)
    shows = {"kind": kind, "colour": colour, "character": character, "pair": pair}
    there = {name: (index[..., None] == np.arange(len(NAMES[name]))).any(1) for name, index in shows.items()}
    return shows, there


assert GRID * GRID == 784
