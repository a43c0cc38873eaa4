"""The work of the ask tab, without a page."""

from __future__ import annotations

import html
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("transformers")

from tokenreduce.core.registry import parse
from tokenreduce.demo.answers import answers, put, reducers_from, verdict
from tokenreduce.demo.ask import EMBEDDED, STAGES, answer, examples_of, frames_from, longest_of
from tokenreduce.demo.store import Store
from tokenreduce.measure.comparison import Comparison, Side
from tokenreduce.measure.question import Question
from tokenreduce.measure.timing import Timing


@pytest.fixture(scope="module")
def answered():
    example = examples_of("world-llava")[0]
    question, truth = example.questions[0]
    several = reducers_from(["none", 5, "visionzip", 50, "none", 5, "none", 5, "none", 5, "fastv", 25], [*STAGES])
    store = Store()
    loaded = store.copy("world-llava")
    made = answer(loaded, [example.image], False, f"  {question} ", several, 1)
    return store, made, question, truth


def test_a_question_is_answered_whole_and_with_each_reduction(answered) -> None:
    _, made, question, truth = answered
    assert made.question == question
    assert [r.spec for r in made.results] == ["visionzip:keep=0.5", "fastv:keep=0.25"]
    assert [r.stock.answer for r in made.results] == [truth] * 2
    assert len(made.pictures) == 2
    assert list(made.layers) == ["unreduced", "A: visionzip:keep=0.5", "B: fastv:keep=0.25"]
    whole, a, b = made.layers.values()
    assert a[0] < whole[0] == b[0]
    assert b[-1] < whole[-1]


def test_the_model_of_the_page_stays_whole(answered) -> None:
    store, *_ = answered
    assert "visionzip" not in repr(store.language("world-llava").model)


def test_the_table_names_its_question_literally(answered) -> None:
    _, made, *_ = answered
    text = answers(made.results, "<b>", "is <image> *red*")
    assert "Asked: is &lt;image&gt; *red*" in text
    assert "&lt;b&gt;" in text
    assert "Asked" not in answers(made.results)


def test_an_upload_is_an_image_or_frames(tmp_path: Path) -> None:
    Image.new("RGB", (9, 5), "red").save(tmp_path / "a.png")
    frames, video = frames_from(tmp_path / "a.png")
    assert ([f.size for f in frames], video) == ([(9, 5)], False)
    (tmp_path / "a.mp4").write_text("no video " * 50)
    with pytest.raises(ValueError, match=r"a\.mp4"):
        frames_from(tmp_path / "a.mp4")


def test_an_uploaded_clip_is_shown_as_a_model_was_taught(answered, tmp_path: Path) -> None:
    pytest.importorskip("av")
    from films import film

    film(tmp_path / "a.mp4", 40, rate=8, shades=[i / 40 for i in range(40)])
    frames, video = frames_from(tmp_path / "a.mp4")
    assert (len(frames), video) == (16, True)
    store, *_ = answered
    for name, tokens, notes in (
        ("world-llava-2", 16 * 196, ()), ("world-llava", 8 * 49, ("world-llava is shown 8 of the 16 frames",)),
    ):  # fmt: skip
        made = answer(store.copy(name), frames, video, "is there a star", [parse("divprune:keep=0.5")], 1)
        assert made.results[0].stock.layers[0] == tokens
        assert made.notes == notes
    made = answer(store.copy("world-llava-2"), frames[:5], video, "is there a star", [parse("divprune:keep=0.5")], 1)
    assert made.results[0].stock.layers[0] == 5 * 196
    assert made.notes == ("world-llava-2 was taught with clips of 16 frames, this one is shown as 5",)
    with pytest.raises(ValueError, match="no picture yet"):
        answer(store.copy("world-llava-2"), [], True, "is there a star", [parse("divprune:keep=0.5")], 1)


def test_flops_are_those_of_the_meter(answered) -> None:
    """Of vision encoder and prefill, counted here as benchmarks count them."""
    from tokenreduce.core.trace import record
    from tokenreduce.measure.generation import greedy
    from tokenreduce.patching import patched

    store, made, question, _ = answered
    loaded = store.copy("world-llava")
    example = examples_of("world-llava")[0]
    inputs = put(loaded, [example.image], False, question)[0].inputs
    for spec, side in (("", made.results[0].stock), ("visionzip:keep=0.5", made.results[0].reduced)):
        with patched(loaded.model, spec) if spec else nullcontext(), record(loaded.model) as trace:
            greedy(loaded.model, inputs, 1)
        assert side.flops == trace.flops
    shown = answers(made.results)
    assert "FLOPs of encoder and prefill" in shown
    assert made.results[0].ratios()["flops"] == pytest.approx(
        made.results[0].stock.flops / made.results[0].reduced.flops
    )


def side(flops: int, cache: int, ids: tuple[int, ...]) -> Side:
    clock = Timing("t", (1.0,))
    return Side("said", ids, None, (8,), clock, None, cache, cache, cache, flops)


def against(flops: int, cache: int, ids: tuple[int, ...]) -> Comparison:
    asked = Question("what", (), "what", {})
    return Comparison(asked, parse("visionzip:keep=0.5"), side(100, 100, (1, 2)), side(flops, cache, ids), (), 1)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (
            (50, 20, (1, 2)),
            (60, 30, (1, 2)),
            "A is cheaper: A takes 50 % of the FLOPs and 20 % of the KV cache, B 60 %",
        ),
        ((60, 30, (1, 2)), (60, 20, (1, 2)), "B is cheaper"),
        (
            (60, 30, (1, 2)),
            (50, 40, (1, 2)),
            "B takes fewer FLOPs (50 % against 60 %), A a smaller KV cache (30 % against",
        ),
        (
            (50, 40, (1, 2)),
            (60, 30, (1, 2)),
            "A takes fewer FLOPs (50 % against 60 %), B a smaller KV cache (30 % against",
        ),
        ((50, 40, (1, 2)), (50, 40, (1, 2)), "A and B cost the same: 50 % of the FLOPs and 40 %"),
        ((50, 40, (1, 2)), (60, 40, (1, 2)), "Both give the unreduced model's answer."),
        ((50, 40, (1, 2)), (60, 40, (1,)), "A gives the unreduced model's answer, B another one."),
        ((50, 40, (1,)), (60, 40, (1, 2)), "B gives the unreduced model's answer, A another one."),
        ((50, 40, (3,)), (60, 40, (3,)), "Neither gives the unreduced model's answer; they give the same one."),
        ((50, 40, (3,)), (60, 40, (4,)), "they give two different ones."),
    ],
)
def test_a_sentence_says_which_is_cheaper_and_who_agrees(a, b, words: str) -> None:
    assert words in verdict(against(*a), against(*b))
    assert html.escape(words) in answers([against(*a), against(*b)])


LISTS = ["none", 5, "visionzip", 50, "none", 5, "none", 5, "none", 5, "fastv", 25]


def test_a_text_stands_in_place_of_the_lists() -> None:
    a, b = reducers_from(LISTS, [*STAGES], [" tome:r=2 + divprune:keep=64+snapkv:keep=0.5 ", ""])
    assert [r.spec() for r in a] == ["tome:r=2", "divprune:keep=64", "snapkv:keep=0.5"]
    assert [r.spec() for r in b] == ["fastv:keep=0.25"]
    assert reducers_from(LISTS, [*STAGES], [None, "auto:flops=0.5"])[1] == ("auto:flops=0.5",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("visionzp:keep=0.2", "reduction B: unknown method 'visionzp'; did you mean visionzip"),
        ("visionzip:kep=0.2", "reduction B: visionzip has no setting 'kep'; did you mean keep"),
        ("visionzip:keep=2.5", r"reduction B: keep is a number of tokens \(int >= 1\)"),
        ("auto:speed=2", "reduction B: "),
        ("<b>" * 200, "reduction B has 600 characters; at most 300"),
        ("+", "reduction B names no method"),
    ],
)
def test_a_wrong_text_is_told_with_its_column(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        reducers_from(LISTS, [*STAGES], ["", text])
    assert len(str(caught.value)) < 400


def test_words_that_an_embedded_model_does_not_know_are_refused(answered) -> None:
    store, *_ = answered
    example = examples_of("world-llava")[0]
    with pytest.raises(ValueError, match=r"does not know: colour, zorblax \(for colour perhaps color") as caught:
        answer(store.copy("world-llava"), [example.image], False, "what colour is the zorblax", [parse("fastv")], 1)
    assert "what, which, how" in str(caught.value)
    clip = next(e for e in examples_of("world-llava") if e.frames)
    with pytest.raises(ValueError, match="does not know: zorblax"):
        answer(store.copy("world-llava"), clip.frames, True, "is there a zorblax", [parse("fastv")], 1)


@pytest.mark.parametrize(("name", "tokens"), [("world-llava", 8 * 49), ("world-llava-2", 16 * 196)])
def test_a_clip_is_compared(answered, name, tokens) -> None:
    store, *_ = answered
    clip = next(e for e in examples_of(name) if e.frames)
    question, right = clip.questions[0]
    several = [parse("visionzip:keep=0.5"), parse("tome:r=2+fastv:keep=0.5")]
    made = answer(store.copy(name), clip.frames, True, question, several, 1)
    assert [r.spec for r in made.results] == ["visionzip:keep=0.5", "tome:r=2+fastv:keep=0.5"]
    assert all(0 < r.reduced.flops < r.stock.flops for r in made.results)
    assert made.results[0].stock.layers[0] == tokens
    assert not made.notes
    assert made.results[0].stock.answer == right


def test_examples_are_of_the_world_of_a_model() -> None:
    assert {e.image.size for e in examples_of("world-llava-2")} == {(224, 224)}
    assert [len(e.frames) for e in examples_of("world-llava-2")] == [0, 0, 0, 0, 0, 16]
    assert any(e.frames for e in examples_of("world-llava"))
    assert longest_of("world-llava") == 1 < longest_of("my/model")
    own = examples_of("my/model")
    assert any(e.frames for e in own)
    assert own[0].questions
    assert not set(EMBEDDED) - {"world-llava", "world-llava-2"}
