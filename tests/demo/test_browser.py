"""The page in headless Chromium, as a visitor uses it. Screenshots go to the folder that the environment variable
TOKENREDUCE_DEMO_SHOTS names, or to pytest's."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path

import demo_browser
import numpy as np
import pytest
from demo_browser import Page, visit
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(demo_browser.missing()), reason=demo_browser.missing())]


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("TOKENREDUCE_DEMO_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    """The page on the embedded models and a language model with random weights."""
    from vlm_folders import save_llava

    from tokenreduce.demo.app import launch
    from tokenreduce.demo.store import Store

    store = Store(str(save_llava(tmp_path_factory.mktemp("vlm") / "llava")))
    page, address = launch(store, wait=False)
    yield address
    page.close()


@pytest.fixture(scope="module")
def page(url, shots, tmp_path_factory) -> Iterator[Page]:
    with visit(url, shots, tmp_path_factory.mktemp("downloads")) as made:
        yield made


def timed(page: Page) -> bool:
    return bool(re.search(r"x (faster|slower)", page.text("image-facts")))


def tokens(page: Page) -> int:
    """Tokens after the last layer with the reduction."""
    return int(re.search(r"last layer\s+\d+\s+(\d+)", page.text("image-facts"))[1])


@pytest.fixture
def image_tab(page) -> Page:
    page.tab("Image")
    page.until(lambda: timed(page), "the first picture, with its time")
    return page


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uploads")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    (folder / "broken.png").write_bytes((folder / "noise.png").read_bytes()[:400])
    Image.new("1", (9000, 9000)).save(folder / "huge.png")
    (folder / "text.mp4").write_text("this is no video " * 50)
    (folder / "rows.jsonl").write_text("this is no row\n" * 3)
    return folder


def test_the_first_page_shows_the_trade_without_a_click(image_tab) -> None:
    assert image_tab.picture("image-before") != image_tab.picture("image-after")
    assert "FLOPs of one image" in image_tab.text("image-facts")
    assert "100%" in image_tab.text("image-reduced")
    image_tab.until(lambda: image_tab.find("image-plot", ".main-svg"), "the plot")
    image_tab.shot("image")


def test_method_and_slider_change_picture_and_numbers(image_tab) -> None:
    before, count = image_tab.picture("image-after"), tokens(image_tab)
    image_tab.number("image-keep", 15)
    image_tab.until(lambda: tokens(image_tab) < count and timed(image_tab), "fewer tokens")
    strong = image_tab.picture("image-after")
    assert strong != before
    assert "merged into" in image_tab.text("image-caption")
    image_tab.choose("image-method", "evit")
    image_tab.until(lambda: "dropped" in image_tab.text("image-caption") and timed(image_tab), "EViT drops")
    assert image_tab.picture("image-after") != strong
    image_tab.shot("image_evit")


def test_the_layer_slider_shows_earlier_layers(image_tab) -> None:
    last = image_tab.text("image-caption"), image_tab.picture("image-after")
    image_tab.number("image-layer", 1)
    image_tab.until(lambda: image_tab.text("image-caption").startswith("After layer 1:"), "layer 1")
    image_tab.until(lambda: image_tab.picture("image-after") != last[1], "its picture")
    image_tab.number("image-layer", 6)
    image_tab.until(lambda: image_tab.text("image-caption") == last[0], "the last layer again")


def test_an_upload_is_shown_and_bad_ones_are_told(image_tab, files) -> None:
    example = image_tab.picture("image-before")
    for name, words in (("broken.png", "cannot be read as an image"), ("huge.png", "million are read")):
        image_tab.upload("image-upload", files / name)
        image_tab.until(lambda words=words: words in image_tab.text("image-message"), f"a message about {name}")
        assert image_tab.picture("image-before") == example
    image_tab.shot("image_bad")
    image_tab.upload("image-upload", files / "noise.png")
    image_tab.until(lambda: image_tab.picture("image-before") != example and timed(image_tab), "the upload")
    assert image_tab.text("image-message") == ""
    image_tab.shot("image_upload")


def test_another_model_brings_its_examples(image_tab) -> None:
    image_tab.choose("image-model", "digits-vit")
    image_tab.until(lambda: " 50 " in image_tab.text("image-facts") and timed(image_tab), "tokens of the digits")
    assert image_tab.text("image-stock").splitlines()[1:2] == ["0"] or "\n0\n" in image_tab.text("image-stock")
    image_tab.every("image-examples", "button.thumbnail-item")[1].click()
    image_tab.until(lambda: "In the picture: 1" in image_tab.text("image-caption"), "the digit 1")
    image_tab.shot("image_digit")


def test_a_question_is_answered_three_times(page, files) -> None:
    page.tab("Ask")
    page.until(lambda: page.find("ask-go").is_displayed() and not page.text("ask-message"), "the ask tab")
    page.until(lambda: page.find("ask-shown", "img"), "an example")
    page.find("ask-go").click()
    page.until(lambda: "KV cache" in page.text("ask-answers"), "answers")
    answers = page.text("ask-answers")
    assert "A: visionzip:keep=0.2" in answers
    assert "B: fastv:keep=0.2" in answers
    page.until(lambda: page.picture("ask-kept-A") != page.picture("ask-kept-B"), "two pictures of kept tokens")
    page.shot("ask")
    page.number("ask-A-projector-keep", 50)
    page.find("ask-go").click()
    page.until(lambda: "A: visionzip:keep=0.5" in page.text("ask-answers"), "another budget")

    field = page.find("ask-question", "textarea, input")
    field.clear()
    field.send_keys(" ")
    page.find("ask-go").click()
    page.until(lambda: "empty" in page.text("ask-message"), "a message about the empty question")
    page.upload("ask-upload", files / "text.mp4")
    page.until(lambda: "text.mp4" in page.text("ask-message"), "a message about the text called video")
    page.shot("ask_bad")
    field.send_keys("what is this")
    page.find("ask-go").click()
    page.until(lambda: page.text("ask-message") == "", "the page goes on")


def test_the_embedded_model_answers_right(page) -> None:
    page.tab("Ask")
    page.choose("ask-model", "world-llava")
    page.until(lambda: page.find("ask-go").is_displayed() and not page.text("ask-message"), "the embedded model")
    field = page.find("ask-question", "textarea, input")
    field.clear()
    field.send_keys("what color is at the top right")  # of the first example
    page.find("ask-go").click()
    page.until(lambda: "mean of 6 layers" in page.text("ask-answers"), "answers")
    rows = page.text("ask-answers").splitlines()
    said = next(line for line in rows if line.startswith("answer")).split()[1:]
    right = next(line for line in rows if line.startswith("right answer")).split()[-1]
    assert said == [right] * 3, "unreduced, A and B"
    page.shot("ask_world")


def test_a_small_sweep_runs_stops_and_comes_out_as_csv(page, files) -> None:
    page.tab("Trade-off")
    page.until(lambda: page.find("trade-run").is_displayed(), "the trade-off tab")
    page.choose("trade-bench", "digits-vit")
    page.until(lambda: "tome" in page.text("trade-methods"), "methods")
    page.number("trade-inputs", 50)
    for label in page.every("trade-budgets", "label"):
        if label.text.strip() in ("75 %", "35 %"):
            label.click()  # one budget is left
    page.find("trade-run").click()
    page.until(lambda: re.match(r"[2-9] of \d+ rows", page.text("trade-state")), "two rows")
    page.find("trade-stop").click()
    page.until(lambda: page.text("trade-state").startswith("Stopped"), "the stop")
    done, total = map(int, re.search(r"(\d+) of (\d+) rows", page.text("trade-state")).groups())
    assert 2 <= done < total
    page.until(lambda: page.find("trade-run").is_enabled(), "the button")
    page.find("trade-run").click()
    page.until(lambda: page.text("trade-state").startswith(f"Done: {total} rows"), "the rest of the rows")
    page.until(lambda: page.find("trade-plot", ".main-svg"), "the plot")
    page.shot("trade")
    page.until(lambda: page.find("trade-csv").is_enabled(), "the CSV")
    page.find("trade-csv").click()
    file = page.until(lambda: next(iter(page.downloads.glob("*.csv")), None), "the downloaded CSV")
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert len(rows) == total == 6
    assert {"unreduced", "random", "resize", "uniform", "tome", "evit"} <= {row["method"] for row in rows}
    assert all(0 <= float(row["top1"]) <= 1 for row in rows)
    page.upload("trade-load", files / "rows.jsonl")
    page.until(lambda: "rows.jsonl" in page.text("trade-message"), "a message about the file")


def test_a_narrow_page_fits(url, shots, tmp_path) -> None:
    with visit(url, shots, tmp_path, width=400, height=2400) as phone:
        phone.until(lambda: timed(phone), "the first picture")
        for tab, first in (("Image", "image-model"), ("Ask", "ask-go"), ("Trade-off", "trade-run")):
            phone.tab(tab)
            phone.until(lambda first=first: phone.find(first).is_displayed(), tab)
            wide, room = phone.browser.execute_script(
                "return [document.documentElement.scrollWidth, window.innerWidth]"
            )
            assert wide <= room
            phone.shot(tab.lower())
