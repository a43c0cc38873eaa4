"""The second world: pictures, labels, questions and their answers agree, and what cannot be is refused by name."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tokenreduce.zoo import world
from tokenreduce.zoo.world2 import (
    CHARACTERS,
    COLOURS,
    IMAGE_TYPES,
    KINDS,
    LETTERS,
    SPLITS,
    VIDEO_TYPES,
    WORDS,
    ask,
    clip,
    elements,
    scene,
    score,
)
from tokenreduce.zoo.world2.clip_questions import spans
from tokenreduce.zoo.world2.clips import frame_labels
from tokenreduce.zoo.world2.questions import beside
from tokenreduce.zoo.world2.scenes import CELL_OF, CHARACTER_OF, PLATE_OF
from tokenreduce.zoo.world2.vocabulary import NUMBERS
from tokenreduce.zoo.world2_pointers import film_pointers, pointers

SEEDS = range(SPLITS["test"].start, SPLITS["test"].start + 40)


@pytest.fixture(scope="module")
def scenes():
    return [scene(s, document=0.6) for s in SEEDS]


@pytest.fixture(scope="module")
def clips():
    return [clip(s, frames=16) for s in SEEDS[:6]]


# -- pictures ----------------------------------------------------------------------------------------------------------
def test_a_seed_is_a_scene_byte_for_byte_whatever_came_before():
    a = scene(SEEDS[3])
    scene(SEEDS[5])
    b = scene(SEEDS[3])
    assert np.array_equal(a.image, b.image)
    assert (a.objects, a.signs, a.document) == (b.objects, b.signs, b.document)
    assert not np.array_equal(a.image, scene(SEEDS[4]).image)


def test_scenes_hold_what_they_promise(scenes):
    for s in scenes:
        xs = [t.x for t in s.objects]
        assert 3 <= len(xs) <= 10
        assert xs == sorted(set(xs))  # from left to right, no two at one x
        assert len({sign.colour for sign in s.signs}) == len(s.signs)
    assert {sign.size for s in scenes for sign in s.signs} == set(LETTERS)
    assert {len(sign.text) for s in scenes for sign in s.signs} == {1, 2, 3, 4}
    assert {len(s.document.rows) for s in scenes if s.document} == {2, 3}
    means = [s.image.mean() for s in scenes]
    assert 40 < min(means) < max(means) < 160
    assert max(means) > 110  # brighter than the first world ever is


def test_nothing_overlaps_and_every_thing_and_character_has_a_patch(scenes):
    for s in scenes:
        boxes = [sign.box for sign in s.signs] + ([s.document.box] if s.document else [])
        boxes += [(t.x - t.size // 2, t.y - t.size // 2, t.x + t.size // 2, t.y + t.size // 2) for t in s.objects]
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= 224
            assert 0 <= top < bottom <= 224
            for other in boxes[:i]:
                assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
        owners = set(s.labels.owners.ravel().tolist())
        wanted = set(range(len(s.objects)))
        wanted |= {CHARACTER_OF + 10 * i + j for i, sign in enumerate(s.signs) for j in range(len(sign.text))}
        if s.document:
            rows = s.document.rows
            wanted |= {CELL_OF + 3 * r + c for r in range(len(rows)) for c in range(len(rows[0]))}
        assert wanted <= owners


def test_labels_say_what_their_owner_is(scenes):
    for s in scenes[:10]:
        for kind, colour, character, slot, owner in zip(*(a.ravel() for a in vars(s.labels).values()), strict=True):
            if owner < 0:
                assert kind == colour == character == slot == -1
            elif owner < CHARACTER_OF:
                thing = s.objects[owner]
                assert (KINDS[kind], COLOURS[colour], character, slot) == (thing.kind, thing.colour, -1, -1)
            elif owner >= CELL_OF:
                row, column = divmod(owner - CELL_OF, 3)
                assert CHARACTERS[character] == s.document.rows[row][column]
                assert (slot, colour) == (4 + 3 * row + column, -1)
            else:
                sign, j = s.signs[(owner - CHARACTER_OF) // 10], owner % 10
                assert COLOURS[colour] == sign.colour
                assert j == PLATE_OF or (CHARACTERS[character], slot) == (sign.text[j], j)


def test_given_texts_are_on_the_signs_and_seen():
    a, b = (scene(SEEDS[0], texts=[text, "x"]) for text in ("8", "3"))
    assert {sign.text for sign in a.signs} == {"8", "x"}
    assert not np.array_equal(a.image, b.image)
    glyphs = [scene(SEEDS[0], texts=[c]).image.tobytes() for c in CHARACTERS]
    assert len(set(glyphs)) == len(CHARACTERS)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(texts=["k7!"]), r"cannot draw '!' \(in 'k7!'\); it has 0123456789cefhklnptuxy"),
        (dict(texts=["Ärger"]), "cannot draw 'g', 'r', 'ä'"),
        (dict(texts=["12345"]), "1 to 4 characters, not 5"),
        (dict(texts=[""]), "1 to 4 characters, not 0"),
        (dict(texts=["1"] * 9), "most <= 8"),
        (dict(objects=(0, 3)), "1 <= least <= most"),
        (dict(objects=(3, 11)), "only 10 fit"),
        (dict(signs=(2, 1)), "signs must be"),
        (dict(document=1.5), r"shares in \[0, 1\]"),
    ],
)
def test_bad_settings_of_scenes_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        scene(0, **settings)


# -- questions ---------------------------------------------------------------------------------------------------------
def test_every_type_is_asked_in_known_words(scenes, clips):
    seen = Counter()
    for what in (*scenes, *clips):
        for q in ask(what, what.seed, 10):
            seen[q.type] += 1
            assert set(f"{q.text} {q.answer}".split()) <= set(WORDS)
    assert set(seen) == {*IMAGE_TYPES, *VIDEO_TYPES}


def test_words_of_the_first_world_keep_their_ids():
    assert WORDS[: len(world.WORDS)] == world.WORDS


def test_answers_are_read_at_the_owners_that_are_named(scenes):
    """What a lesson points at shows the word of the answer."""
    checked = Counter()
    for s in scenes:
        for q in ask(s, s.seed, 12):
            at = pointers(s, q)
            assert len(at) == len(q.answer.split())
            for (first, owner), word in zip(at, q.answer.split(), strict=True):
                if first >= 0 and q.type in ("where_read", "other_kind", "other_count", "relation"):
                    checked["first"] += 1
                    assert first >= CHARACTER_OF or s.objects[first].kind in q.text.split()
                if owner < 0 or q.type in ("side", "exist", "relation"):
                    continue
                checked[q.type] += 1
                if owner < CHARACTER_OF:
                    assert word in (s.objects[owner].kind, s.objects[owner].colour)
                elif owner >= CELL_OF:
                    row, column = divmod(owner - CELL_OF, 3)
                    assert word == s.document.rows[row][column]
                else:
                    sign, j = s.signs[(owner - CHARACTER_OF) // 10], owner % 10
                    assert word == sign.text[j] or (q.type == "describe" and word == sign.colour)
    assert {"first", "colour_of", "kind_of", "read", "letter", "where_read", "cell", "list", "describe"} <= set(checked)


def test_the_sign_next_to_a_thing_is_the_nearest_by_far(scenes):
    found = [(s, t, sign) for s in scenes for t in s.objects if (sign := beside(s, t))]
    assert len(found) > 10
    for _, t, sign in found:
        left, top, right, bottom = sign.box
        assert max(left - t.x, t.x - right, top - t.y, t.y - bottom) <= 20


def test_lists_and_descriptions_have_6_to_60_words(scenes):
    for kind, least, most in (("list", 6, 20), ("describe", 10, 60)):
        lengths = [len(ask(s, 0, 1, kind)[0].answer.split()) for s in scenes]
        assert least <= min(lengths) < max(lengths) <= most


@pytest.mark.parametrize(("kind", "settings"), [("cell", dict(document=0.0)), ("read", dict(signs=(0, 0)))])
def test_a_type_that_the_scene_lacks_is_refused_by_name(kind, settings):
    what = scene(SEEDS[0], **settings)
    with pytest.raises(
        ValueError, match=f"scene of seed {SEEDS[0]} has only 0 of 1 different questions of type {kind}"
    ):
        ask(what, 0, 1, kind)
    with pytest.raises(ValueError, match=r"unknown question type 'order'; choose from .*read"):
        ask(what, 0, 1, "order")


# -- clips -------------------------------------------------------------------------------------------------------------
def test_clips_show_events_in_order(clips):
    for c in clips:
        assert c.frames.shape == (16, 224, 224, 3)
        entries = [a.entry for a in c.objects]
        assert entries == sorted(set(entries))
        for a in c.objects:
            assert a.changes[0][0] == a.entry
            for (_, before), (frame, after) in zip(a.changes, a.changes[1:], strict=False):
                assert before != after
                assert a.at(frame - 1).colour == before
                assert a.at(frame).colour == after
            assert a.at(a.entry - 1) is None
        last = frame_labels(c, 15)
        assert set(range(len(c.objects))) <= set(last.owners.ravel().tolist())
        assert {"".join(CHARACTERS[i] for i in np.unique(last.characters) if i >= 0)} == {
            "".join(sorted(set(c.texts[-1][1]), key=CHARACTERS.index))
        }


def test_what_was_read_meanwhile_was_there_all_the_while(clips):
    asked = []
    for c in clips:
        try:
            asked.append((c, ask(c, 1, 1, "read_at")[0]))
        except ValueError:
            continue
    assert asked
    for c, q in asked:
        words = q.text.split()
        thing = next(a for a in c.objects if a.kind == words[-1])
        frames = [f for f in range(len(c.frames)) if (t := thing.at(f)) and t.colour == words[-4]]
        assert {" ".join(c.sign_at(f).text) for f in frames} == {q.answer}


def test_answers_about_clips_are_read_in_the_frames_that_are_named(clips):
    checked = Counter()
    for c in clips:
        for q in ask(c, c.seed, 20):
            at = film_pointers(c, q)
            words = q.answer.split()
            assert len(at) == len(words)
            for (lead, read), word in zip(at, words, strict=True):
                for owner, start, stop in (lead, read):
                    if owner < 0:
                        assert (q.type, q.answer) == ("appear", "no")
                    else:  # the token is there in some of these frames
                        assert any(owner in frame_labels(c, f).owners for f in range(start, stop)), q
                if q.type in ("order", "first", "last"):
                    assert c.objects[read[0]].kind == word
                elif q.type == "colour_at":
                    assert {c.objects[read[0]].at(f).colour for f in range(max(read[1], c.objects[read[0]].entry),
                                                                           read[2])} == {word}  # fmt: skip
                elif q.type == "read_at":  # at the thing, whose tokens know what the sign said
                    parts = spans(c.objects[read[0]].changes, len(c.frames))
                    assert (read[1] - 1, read[2]) in [p[:2] for p in parts if p[2] == q.text.split()[6]]
                    assert word in {ch for f in range(*read[1:]) for ch in c.sign_at(f).text}
                elif q.type == "count_events":  # at the end all is over
                    assert len(c.objects[read[0]].changes) - 1 == NUMBERS.index(word)
                    assert read[2] == len(c.frames)
                checked[q.type] += 1
    assert set(checked) == set(VIDEO_TYPES)


def test_bad_settings_of_clips_are_named():
    with pytest.raises(ValueError, match="frames is 16 to 32, not 8"):
        clip(0, frames=8)
    with pytest.raises(ValueError, match="only 6 fit"):
        clip(0, objects=(2, 7))


# -- scores ------------------------------------------------------------------------------------------------------------
def test_long_answers_are_scored_by_element():
    right = "red star blue ring green moon"
    assert score(right.upper(), right, "list") == (True, 1.0, 1.0)
    assert score("red star green moon", right, "list").elements == pytest.approx(2 / 3)
    assert score(right + " red bar", right, "list").elements == pytest.approx(3 / 4)
    swapped = score("blue ring red star green moon", right, "list")
    assert swapped.elements == pytest.approx(2 / 3)
    assert not swapped.exact
    assert score("", right, "list") == (False, 0.0, 0.0)
    assert score("k 7", "k 7 x", "read").elements == pytest.approx(2 / 3)
    assert elements("dots , red star , sign blue k 7", "describe") == ["dots", "red star", "sign blue k 7"]
    assert score("dots , red star , sign blue k 1", "dots , red star , sign blue k 7", "describe").elements == (
        pytest.approx(2 / 3)
    )
