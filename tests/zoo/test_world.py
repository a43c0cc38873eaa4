from __future__ import annotations

import colorsys
import hashlib
import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from tokenreduce.zoo import world
from tokenreduce.zoo.world import (
    COLOURS,
    IMAGE_TYPES,
    KINDS,
    MOTIONS,
    NUMBERS,
    SPLITS,
    TEXTURES,
    TWO_HOP,
    TYPES,
    VIDEO_TYPES,
    WORDS,
    ask,
    clip,
    scene,
)
from tokenreduce.zoo.world.drawing import ANGLES, BOX, SIZES, Draw, background, mask, reach

HALF = BOX // 2


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


# --- an oracle that reads the question text and the objects, written without the generator's helpers


def only(things, **wanted):
    found = [t for t in things if all(getattr(t, key) == value for key, value in wanted.items())]
    assert len(found) == 1, f"{wanted} names {len(found)} things"
    return found[0]


def truth(text: str, what) -> str:
    things, words = what.objects, text.split()
    end = words[-1]
    if text.startswith("what color is the "):
        return only(things, kind=end).colour
    if text.startswith("what thing is ") and end in COLOURS:
        return only(things, colour=end).kind
    if text.startswith(("is there a ", "did appear a ")):
        return "yes" if any(t.colour == words[-2] and t.kind == end for t in things) else "no"
    if text == "how many things are there":
        return NUMBERS[len(things)]
    if text.startswith("how many things are "):
        return NUMBERS[sum(t.colour == end for t in things)]
    if text.startswith("left or right "):
        return "left" if only(things, kind=end).x < 56 else "right"
    if text.startswith("top or bottom "):
        return "top" if only(things, kind=end).y < 56 else "bottom"
    if words[0] == "is":
        a, b = only(things, kind=words[2]), only(things, kind=end)
        holds = {"left": a.x <= b.x - 9, "right": a.x >= b.x + 9, "above": a.y <= b.y - 9, "below": a.y >= b.y + 9}
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[words[3]]
        assert holds[words[3]] or holds[opposite], "too close to tell"
        return "yes" if holds[words[3]] else "no"
    if " is at the " in text:
        inside = [t for t in things if (t.x < 56) == (end == "left") and (t.y < 56) == (words[-2] == "top")]
        assert len(inside) == 1
        assert min(abs(inside[0].x - 56), abs(inside[0].y - 56)) >= 4
        return inside[0].colour if words[1] == "color" else inside[0].kind
    if text == "what is the background":
        return what.background
    if text.startswith("what other thing shares "):
        named = only(things, kind=end)
        (other,) = (t for t in things if t is not named and t.colour == named.colour)
        return other.kind
    if text.startswith("how many things shares "):
        named = only(things, kind=end)
        return NUMBERS[sum(t.colour == named.colour for t in things) - 1]
    if text.startswith("which way "):
        mover = only(things, kind=end)
        (x0, y0), (x1, y1) = mover.at(mover.entry), mover.at(len(what.frames) - 1)
        step = (np.sign(x1 - x0), np.sign(y1 - y0))
        return {(-1, 0): "left", (1, 0): "right", (0, -1): "up", (0, 1): "down", (0, 0): "still"}[step]
    if text.startswith("what thing comes "):
        entries = sorted((t.entry, t.kind) for t in things)
        pair = entries[:2] if end == "first" else entries[-2:]
        assert pair[0][0] < pair[1][0], "a tie"
        return entries[0 if end == "first" else -1][1]
    raise AssertionError(f"no rule for {text!r}")


@pytest.fixture(scope="module")
def scene_questions():
    """Questions by type over 2,500 scenes, every answer checked against the oracle."""
    by_type = defaultdict(list)
    for seed in range(2500):
        what = scene(seed, copy_colour=(0.25, 0.45)[seed % 2])
        questions = ask(what, seed, 8)
        assert len({q.text for q in questions}) == 8
        for q in questions:
            assert q.answer == truth(q.text, what), (seed, q)
            by_type[q.type].append(q)
    return by_type


@pytest.fixture(scope="module")
def clip_questions():
    """The same over 700 clips of two or three things."""
    by_type = defaultdict(list)
    for seed in range(700):
        what = clip(seed, objects=(2, 3))
        questions = ask(what, seed, 8)
        assert len({q.text for q in questions}) == 8
        for q in questions:
            assert q.answer == truth(q.text, what), (seed, q)
            by_type[q.type].append(q)
    return by_type


def shares(questions) -> dict[str, float]:
    counts = Counter(q.answer for q in questions)
    return {answer: n / len(questions) for answer, n in counts.items()}


def near_equal(questions, answers, tolerance=0.35):
    """Every answer occurs, as often as the others up to ``tolerance`` and five standard errors."""
    found, even = shares(questions), 1 / len(answers)
    assert set(found) == set(answers)
    slack = tolerance * even + 5 * math.sqrt(even * (1 - even) / len(questions))
    assert all(abs(share - even) < slack for share in found.values()), found


@pytest.mark.slow
def test_scene_answers_are_balanced(scene_questions):
    assert set(scene_questions) == {*IMAGE_TYPES, *TWO_HOP}
    for kind in ("exist", "relation"):
        assert 0.46 < shares(scene_questions[kind])["yes"] < 0.54
    for kind in ("kind_of", "at_kind", "other_kind"):
        near_equal(scene_questions[kind], KINDS)
    for kind in ("colour_of", "at_colour"):
        near_equal(scene_questions[kind], COLOURS, 0.2)
    near_equal(scene_questions["background"], TEXTURES, 0.2)
    near_equal(scene_questions["count_all"], NUMBERS[2:], 0.3)
    near_equal(scene_questions["side"], ("left", "right", "top", "bottom"), 0.15)
    for kind in ("count_colour", "other_count"):  # small counts are more frequent, but never a majority
        found = shares(scene_questions[kind])
        assert max(found.values()) < 0.5
        assert {"zero", "one", "two", "three"} <= set(found) <= set(NUMBERS)


@pytest.mark.slow
def test_clip_answers_are_balanced(clip_questions):
    assert set(clip_questions) == set(VIDEO_TYPES)
    assert 0.45 < shares(clip_questions["appear"])["yes"] < 0.55
    near_equal(clip_questions["direction"], MOTIONS, 0.2)
    for kind in ("first", "last", "kind_of"):
        near_equal(clip_questions[kind], KINDS, 0.5)
    near_equal(clip_questions["colour_of"], COLOURS)


def test_most_no_answers_name_what_is_there_in_another_combination(scene_questions):
    hard = total = 0
    for seed in range(600):
        what = scene(seed)
        (q,) = ask(what, seed, 1, "exist")
        *_, colour, kind = q.text.split()
        if q.answer == "no":
            total += 1
            hard += any(t.colour == colour for t in what.objects) and any(t.kind == kind for t in what.objects)
    assert total > 200
    assert 0.5 < hard / total < 0.7


def test_every_word_is_in_the_vocabulary_and_the_argument_comes_last(scene_questions, clip_questions):
    used = set()
    for q in (q for part in (scene_questions, clip_questions) for questions in part.values() for q in questions):
        used |= {*q.text.split(), q.answer}
        assert len(q.text.split()) <= 9
    assert used <= set(WORDS)
    assert len(set(WORDS)) == len(WORDS)
    assert all(word == word.lower() and " " not in word for word in WORDS)
    assert not set(KINDS) & set(NUMBERS)
    for q in scene_questions["colour_of"] + scene_questions["side"] + clip_questions["direction"]:
        assert q.text.split()[-1] in KINDS


# --- labels and pixels


def painted(things, canvas=112):
    """Labels by painting every thing on a full canvas and counting its pixels patch by patch."""
    cells = canvas // 8
    kinds, colours = np.full((cells, cells), -1), np.full((cells, cells), -1)
    most = np.full((cells, cells), 8.0)
    for thing, x, y in things:
        page = np.zeros((canvas, canvas))
        page[y - HALF : y + HALF, x - HALF : x + HALF] = mask(thing.kind, thing.size, thing.angle) / 255
        for row in range(cells):
            for column in range(cells):
                covered = page[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].sum()
                if covered > most[row, column] + 1e-9:
                    most[row, column] = covered
                    kinds[row, column] = KINDS.index(thing.kind)
                    colours[row, column] = COLOURS.index(thing.colour)
    return kinds, colours


@pytest.mark.parametrize("settings", [{}, {"objects": (8, 12)}, {"canvas": 64, "objects": (1, 3)}])
def test_scene_labels_are_those_of_the_painted_pixels(settings):
    for seed in range(40):
        s = scene(seed, **settings)
        kinds, colours = painted([(t, t.x, t.y) for t in s.objects], s.image.shape[0])
        np.testing.assert_array_equal(s.kinds, kinds)
        np.testing.assert_array_equal(s.colours, colours)
        assert s.kinds.dtype == s.colours.dtype == np.int8


def test_clip_labels_are_those_of_the_painted_pixels():
    for seed in range(12):
        c = clip(seed)
        for t in range(len(c.frames)):
            kinds, colours = painted([(m, *m.at(t)) for m in c.objects if m.entry <= t])
            np.testing.assert_array_equal(c.kinds[t], kinds)
            np.testing.assert_array_equal(c.colours[t], colours)


def test_every_thing_owns_a_patch_wherever_it_lies():
    for kind in KINDS:
        for size in SIZES:
            for angle in ANGLES:
                shape = mask(kind, size, angle)
                inner = slice(HALF - reach(size), HALF + reach(size))
                assert shape.sum() == shape[inner, inner].sum()
                assert max(shape[0].max(), shape[-1].max(), shape[:, 0].max(), shape[:, -1].max()) < 255  # not cut off
                for dx in (0, 4):
                    for dy in (0, 4):
                        page = np.zeros((32, 32))
                        page[2 + dy : 2 + dy + BOX, 2 + dx : 2 + dx + BOX] = shape
                        assert page.reshape(4, 8, 4, 8).sum((1, 3)).max() > 8 * 255


def test_masks_differ_between_kinds():
    for size in SIZES:
        for i, first in enumerate(KINDS):
            for second in KINDS[i + 1 :]:
                a, b = mask(first, size, 0) / 255, mask(second, size, 0) / 255
                assert np.minimum(a, b).sum() / np.maximum(a, b).sum() < 0.85, (first, second, size)


def test_the_picture_shows_each_thing_in_its_colour_on_a_dark_background():
    hues = {"red": 0, "orange": 32, "yellow": 53, "green": 126, "cyan": 185, "blue": 229, "purple": 281}  # degrees
    for seed in range(150):
        s = scene(seed)
        rest = np.ones((112, 112), dtype=bool)
        for t in s.objects:
            window = (slice(t.y - HALF, t.y + HALF), slice(t.x - HALF, t.x + HALF))
            alpha = mask(t.kind, t.size, t.angle)
            rgb = s.image[window][alpha == 255].mean(0)
            hue, saturation, _ = colorsys.rgb_to_hsv(*rgb / 255)
            away = {c: abs((360 * hue - h + 180) % 360 - 180) for c, h in hues.items()}
            assert ("white" if saturation < 0.25 else min(away, key=away.__getitem__)) == t.colour
            rest[window] &= alpha == 0
        assert 15 < s.image[rest].mean() < 85
        assert s.image[rest].std() < 30


def test_textures_have_their_amplitude_and_noise_its_spread():
    for i, texture in enumerate(TEXTURES):
        for seed in range(20):
            base = background(texture, Draw(7 + i, seed), 112)
            swing = np.ptp(base.astype(int), axis=(0, 1))
            assert (swing >= 10).all()
            assert (swing <= 36).all()
    noise = Draw(5, 0).noise(112, 112)
    assert abs(noise.mean()) < 0.2
    assert 4.7 < noise.std() < 5.3
    with pytest.raises(ValueError, match="unknown texture 'sand'; choose from plain"):
        background("sand", Draw(0, 0), 112)


def apart(a, xa, ya, b, xb, yb) -> bool:
    return max(abs(xa - xb), abs(ya - yb)) >= reach(a.size) + reach(b.size)


@pytest.mark.parametrize("objects", [(2, 6), (10, 16), (25, 25)])
def test_things_never_overlap_and_stay_inside(objects):
    sizes = set()
    for seed in range(60):
        things = scene(seed, objects=objects).objects
        sizes.add(len(things))
        for i, a in enumerate(things):
            assert HALF <= a.x <= 112 - HALF
            assert HALF <= a.y <= 112 - HALF
            assert a.x % 4 == a.y % 4 == 0
            assert all(apart(a, a.x, a.y, b, b.x, b.y) for b in things[:i])
    assert sizes == set(range(objects[0], objects[1] + 1))


def test_a_share_of_things_copies_a_colour():
    def repeated(share):
        things = [[t.colour for t in scene(seed, objects=(4, 4), copy_colour=share).objects] for seed in range(300)]
        return sum(len(c) - len(set(c)) for c in things) / (3 * len(things))

    assert repeated(1.0) == 1.0
    assert repeated(0.0) < repeated(0.25) < repeated(0.45) < 0.75


# --- clips


@pytest.mark.parametrize(
    ("frames", "objects"), [(8, (1, 3)), (8, (5, 5)), (3, (1, 1)), (5, (3, 3)), (20, (2, 5)), (40, (3, 3))]
)
def test_clips_enter_one_by_one_move_and_never_overlap(frames, objects):
    for seed in range(40):
        c = clip(seed, frames=frames, objects=objects)
        assert c.frames.shape == (frames, 112, 112, 3)
        assert c.kinds.shape == c.colours.shape == (frames, 14, 14)
        assert objects[0] <= len(c.objects) <= objects[1]
        entries = [m.entry for m in c.objects]
        assert len(set(entries)) == len(entries)
        assert max(entries) <= frames - 3
        for t in range(frames):
            seen = [(m, *m.at(t)) for m in c.objects if m.at(t)]
            assert len(seen) == sum(e <= t for e in entries)
            for i, (a, xa, ya) in enumerate(seen):
                assert 12 <= xa <= 100
                assert 12 <= ya <= 100
                assert all(apart(a, xa, ya, b, xb, yb) for b, xb, yb in seen[:i])
        for m in c.objects:
            (xa, ya), (xb, yb) = m.at(m.entry), m.at(m.entry + 2)
            assert abs(xa - xb) + abs(ya - yb) == (0 if m.motion == "still" else 2 * m.speed)
            assert (m.motion == "still") == (m.speed == 0)


def test_the_background_stands_still_under_new_noise():
    c = clip(0, objects=(1, 1))
    rest = (c.kinds[0] == -1) & (c.kinds[1] == -1)
    difference = c.frames[1].astype(int) - c.frames[0]
    patches = difference.reshape(14, 8, 14, 8, 3).transpose(0, 2, 1, 3, 4)[rest]
    patches = patches[np.abs(patches).max((1, 2, 3)) < 45]  # the faint rim of the thing
    assert len(patches) > 150
    assert abs(patches.mean()) < 0.3
    assert 6 < patches.std() < 8  # two independent noises of 5


# --- seeds


#: Without digits, whose pixels depend on the FreeType version; the first seeds with several things.
SHAPES_SCENE, SHAPES_CLIP = 1, 25


def test_seeds_reproduce_bytes():
    s, c = scene(SHAPES_SCENE), clip(SHAPES_CLIP)
    assert not {t.kind for t in s.objects + c.objects} & set("0123456789")
    assert digest(s.image, s.kinds, s.colours) == "97bfa99105dfba32"
    assert digest(c.frames, c.kinds, c.colours) == "b03c406470ecf6d3"
    texts = "|".join(f"{q.text}:{q.answer}" for q in ask(s, 0, 8) + ask(c, 0, 4))
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "273232119eb1754e"


def test_seeds_are_independent_of_order_caches_and_global_state():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = {seed: (digest(scene(seed).image), digest(clip(seed).frames), ask(scene(seed), 1, 6)) for seed in range(8)}
    mask.cache_clear()
    for seed in reversed(range(8)):
        s = scene(seed)
        s.kinds[:] = 7  # a caller may write into what he got
        assert (digest(scene(seed).image), digest(clip(seed).frames), ask(scene(seed), 1, 6)) == first[seed]
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert len({row[0] for row in first.values()}) == 8
    assert scene(np.int64(3)).objects == scene(3).objects


def test_splits_are_disjoint_and_as_documented():
    assert list(SPLITS) == ["train", "validation", "test"]
    ranges = sorted(SPLITS.values(), key=lambda r: r.start)
    assert all(len(r) >= 100_000 and r.step == 1 for r in ranges)
    assert all(a.stop <= b.start for a, b in pairwise(ranges))
    assert scene(SPLITS["test"][0]).objects != scene(SPLITS["train"][0]).objects


# --- what is asked


def test_types_and_weights_are_respected():
    s = scene(1, objects=(5, 6))
    assert {q.type for q in ask(s, 0, 6, ["side", "exist"])} == {"side", "exist"}
    assert {q.type for q in ask(s, 0, 6, "exist")} == {"exist"}
    counts = Counter(
        q.type for seed in range(300) for q in ask(scene(seed), seed, 1, {"exist": 3.0, "count_all": 1.0, "side": 0.0})
    )
    assert set(counts) == {"exist", "count_all"}
    assert 2 < counts["exist"] / counts["count_all"] < 4.5
    assert set(world.MIX) == set(TYPES) == {*IMAGE_TYPES, *TWO_HOP, *VIDEO_TYPES}
    assert ask(s, 0, 0) == []


def test_many_questions_come_to_an_end():
    s = scene(0, objects=(1, 1))
    pairs = len(KINDS) * len(COLOURS)
    everything = ask(s, 0, pairs, "exist")
    assert len({q.text for q in everything}) == pairs
    with pytest.raises(ValueError, match=f"has only {pairs} of {pairs + 1} different questions of type exist"):
        ask(s, 0, pairs + 1, "exist")


@pytest.mark.parametrize("kind", ["relation", "other_kind", "direction"])
def test_a_type_without_instances_is_an_error_alone_and_passed_over_in_a_mix(kind):
    s = scene(2, objects=(1, 1))
    with pytest.raises(ValueError, match=f"the scene of seed 2 has only 0 of 1 different questions of type {kind}"):
        ask(s, 0, 1, kind)
    assert {q.type for q in ask(s, 0, 4, [kind, "exist"])} == {"exist"}


def test_first_and_last_need_two_things():
    with pytest.raises(ValueError, match="the clip of seed 0 has only 0 of 1 different questions of type first"):
        ask(clip(0, objects=(1, 1)), 0, 1, "first")


def test_counts_beyond_the_number_words_are_not_asked():
    s = scene(0, objects=(9, 9))
    with pytest.raises(ValueError, match="only 0 of 1 different questions of type count_all"):
        ask(s, 0, 1, "count_all")


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"objects=\(2, 26\): only 25 fit into 112 x 112 pixels"):
        scene(0, objects=(2, 26))
    with pytest.raises(ValueError, match="only 1 fit into 24 x 24"):
        scene(0, canvas=24)
    with pytest.raises(ValueError, match="only 5 fit into a clip of 8 frames"):
        clip(0, objects=(1, 6))
    with pytest.raises(ValueError, match="only 2 fit into a clip of 4 frames"):
        clip(0, frames=4)
    with pytest.raises(ValueError, match="1 <= least <= most"):
        scene(0, objects=(3, 2))
    with pytest.raises(ValueError, match="1 <= least <= most"):
        clip(0, objects=(0, 2))
    with pytest.raises(ValueError, match="multiple of 8"):
        scene(0, canvas=100)
    with pytest.raises(ValueError, match="copy_colour must be in"):
        scene(0, copy_colour=1.5)
    with pytest.raises(ValueError, match="frames must be at least 3, not 2"):
        clip(0, frames=2)
    for seed in (-1, 1.5, "a"):
        with pytest.raises(ValueError, match="seed must be a non-negative integer"):
            scene(seed)
    with pytest.raises(ValueError, match="unknown question type 'colour'; choose from colour_of"):
        ask(scene(0), 0, 1, ["colour"])
    with pytest.raises(ValueError, match="must not be negative"):
        ask(scene(0), 0, 1, {"exist": -1.0})
