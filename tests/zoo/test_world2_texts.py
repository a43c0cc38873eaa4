"""Texts of the second world: what they are about, captions, and batches of them."""

from __future__ import annotations

import numpy as np
import pytest

from tokenreduce.zoo import world2_texts as made_of
from tokenreduce.zoo.world2 import IMAGE_TYPES, scene
from tokenreduce.zoo.world2.questions import Question, ask
from tokenreduce.zoo.world2.scenes import CELL_OF, CHARACTER_OF, PLATE_OF
from tokenreduce.zoo.world2_words import IDS

BACK = {i: word for word, i in IDS.items()} | {made_of.END: "<end>"}
BATCH = dict(batch=4, seed=3, keep=160, questions=5, names=4)


def said(ids: np.ndarray) -> str:
    return " ".join(BACK[i] for i in ids if i)


def test_a_question_is_about_what_has_to_be_seen_to_answer_it() -> None:
    what = scene(11, objects=(5, 8), signs=(2, 3), document=1.0)
    owners = what.labels.owners.ravel()
    for name in IMAGE_TYPES:
        try:
            questions = ask(what, 1, 1, name)
        except ValueError:  # not every scene has a question of every type
            continue
        mine = made_of.about(what, questions[0])
        assert mine.any(), name
        assert not mine.all(), name
        assert (owners[mine] >= 0).all() or name == "background"
    first = what.objects[0]
    by_colour = made_of.about(what, Question(f"how many things are {first.colour}", "one", "count_colour"))
    for i, thing in enumerate(what.objects):
        assert (by_colour[owners == i] == (thing.colour == first.colour)).all()
    sign = what.signs[1]
    read = owners[made_of.about(what, Question(f"what does the sign say that is {sign.colour}", "", "read"))]
    assert len(sign.text) <= len(sign.characters)
    text = " ".join(sign.text)
    read = owners[made_of.about(what, Question(f"what does the sign say that is {sign.colour}", text, "read"))]
    assert set(read) == {CHARACTER_OF + 10 + j for j in range(len(sign.text))}
    cell = owners[made_of.about(what, Question("what is in row two column one", "0", "cell"))]
    assert set(cell) == {CELL_OF + 3}
    everything = owners[made_of.about(what, Question("describe the picture", "", "describe"))]
    assert set(everything) == {o for o in owners if o >= 0 and (o < CHARACTER_OF or o >= CELL_OF or o % 10 != PLATE_OF)}
    assert np.array_equal(made_of.about(what, Question("what is the background", "", "background")), owners < 0)


def test_who_says_no_has_looked_at_what_is_nearly_that() -> None:
    what = scene(12, objects=(3, 3), signs=(0, 0), document=0.0)
    a, b = what.objects[:2]
    owners = what.labels.owners.ravel()
    here = made_of.about(what, Question(f"is there a {a.colour} {a.kind}", "yes", "exist"))
    assert 0 in set(owners[here])
    assert (a.colour, a.kind) != (b.colour, b.kind)
    mixed = made_of.about(what, Question(f"is there a {a.colour} {b.kind}", "no", "exist"))
    near = {i for i, t in enumerate(what.objects) if t.colour == a.colour or t.kind == b.kind}
    assert set(owners[mixed]) <= near
    assert len(set(owners[mixed])) > 0


def test_the_wrong_caption_differs_in_one_word_that_is_nowhere() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        what = scene(seed, objects=(1, 4), signs=(0, 2), document=0.0)
        right, wrong = (text.split() for text in made_of.caption(what, rng))
        other = [(a, b) for a, b in zip(right, wrong, strict=True) if a != b]
        assert len(other) == 1
        there = {w for t in what.objects for w in (t.colour, t.kind)} | {c for s in what.signs for c in s.text}
        assert other[0][0] in there | {s.colour for s in what.signs}
        assert other[0][1] not in there


def test_batches_say_what_is_where() -> None:
    made = made_of.texts(0, **BATCH)
    assert made.words.shape[:2] == (4, 9)
    assert made.about.shape == (4, 9, 160)
    assert made.pixels.shape == (4, 224, 224, 3)
    for b, types in enumerate(made.types):
        assert types[5:] == ("name",) * 4
        for q, name in enumerate(types):
            text = said(made.words[b, q]).split()
            assert text[0] == "<bos>"
            assert text[-1] == "<end>"
            if name == "name" and len(text) == 3 and text[1] in made_of.NAMES["kind"]:
                kind = made_of.NAMES["kind"].index(text[1])
                assert np.array_equal(made.about[b, q], made.shows["kind"][b] == kind)
    for group, names in made_of.NAMES.items():
        assert made.there[group].shape == (4, len(names))
        for b in range(4):
            assert set(made.shows[group][b]) - {-1} <= set(np.flatnonzero(made.there[group][b]))
    again, other = made_of.texts(0, **BATCH), made_of.texts(1, **BATCH)
    assert np.array_equal(made.words, again.words)
    assert not np.array_equal(made.pixels, other.pixels)


def test_words_of_no_world_are_refused() -> None:
    assert said(made_of.rows(["red star", "k"])[1]) == "<bos> k <end>"
    with pytest.raises(KeyError, match="dog"):
        made_of.rows(["red dog"])
