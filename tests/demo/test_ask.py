"""The work of the ask tab, without a page."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("transformers")

from tokenreduce.demo.answers import answers, reducers_from
from tokenreduce.demo.ask import EMBEDDED, STAGES, answer, examples_of, frames_from
from tokenreduce.demo.store import Store


@pytest.fixture(scope="module")
def answered():
    example = examples_of()[0]
    question, truth = example.questions[0]
    several = reducers_from(["none", 5, "visionzip", 50, "none", 5, "none", 5, "none", 5, "fastv", 25], [*STAGES])
    store = Store()
    loaded = store.copy(EMBEDDED)
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
    assert "visionzip" not in repr(store.language(EMBEDDED).model)


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
