"""The page in headless Chromium, as a visitor uses it. Screenshots go to the folder that the environment variable
TOKENREDUCE_DEMO_SHOTS names, or to pytest's."""

from __future__ import annotations

import csv
import json
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
    return demo_browser.shots(tmp_path_factory)


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


#: What must be shown letter by letter.
ODD = "<image> *a* _b_ `c` ${1+1} {{value}}"


def assert_nothing_answered(page: Page, tab: str) -> None:
    """No table, no picture of tokens, no plot of an input before."""
    table, pictures, plot = {
        "image": ("image-facts", ["image-after"], "image-plot"),
        "ask": ("ask-answers", ["ask-kept-A", "ask-kept-B"], "ask-plot"),
    }[tab]
    page.until(lambda: page.text(table) == "", "no table")
    for name in pictures:
        page.until(lambda name=name: not page.every(name, "img"), "no picture")
    page.until(lambda: not page.every(plot, ".main-svg"), "no plot")


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


def test_the_image_tab_shows_the_trade_without_a_click(image_tab) -> None:
    assert image_tab.picture("image-before") != image_tab.picture("image-after")
    assert "FLOPs of one image" in image_tab.text("image-facts")
    assert "100%" in image_tab.text("image-reduced")
    image_tab.until(lambda: image_tab.find("image-plot", ".main-svg"), "the plot")
    image_tab.shot("image")


def test_method_and_slider_change_picture_and_numbers(image_tab) -> None:
    before, count = image_tab.picture("image-after"), tokens(image_tab)
    image_tab.number("image-keep", 15, pause=0.3)  # what a slow typist has at 1 is below the smallest budget
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
        assert_nothing_answered(image_tab, "image")
    image_tab.shot("image_bad")
    image_tab.upload("image-upload", files / "noise.png")
    image_tab.until(lambda: image_tab.picture("image-before") != example and timed(image_tab), "the upload")
    assert image_tab.text("image-message") == ""
    image_tab.shot("image_upload")


def test_another_model_brings_its_examples(image_tab) -> None:
    image_tab.choose("image-model", "digits-vit")
    image_tab.until(lambda: " 50 " in image_tab.text("image-facts") and timed(image_tab), "tokens of the digits")
    image_tab.until(lambda: "\n0\n" in image_tab.text("image-stock"), "the prediction")
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
    assert_nothing_answered(page, "ask")
    page.upload("ask-upload", files / "text.mp4")
    page.until(lambda: "text.mp4" in page.text("ask-message"), "a message about the text called video")
    page.shot("ask_bad")
    field.send_keys("what is this")
    page.find("ask-go").click()
    page.until(lambda: "KV cache" in page.text("ask-answers"), "the page goes on")
    assert page.text("ask-message") == ""
    assert "Asked: what is this" in page.text("ask-answers")
    page.upload("ask-upload", files / "noise.png")
    assert_nothing_answered(page, "ask")
    page.find("ask-go").click()
    page.until(lambda: "KV cache" in page.text("ask-answers"), "answers about the upload")
    field.send_keys("?")
    assert_nothing_answered(page, "ask")


def test_a_question_is_shown_as_it_was_typed(page) -> None:
    """A placeholder of images in the text is refused by the processor or answered, and either is said literally."""
    page.tab("Ask")
    field = page.find("ask-question", "textarea, input")
    field.clear()
    field.send_keys(ODD)
    page.find("ask-go").click()
    page.until(lambda: "<image>" in page.text("ask-message") + page.text("ask-answers"), "an answer or a message")
    page.shot("ask_odd")


def test_the_embedded_model_answers_right(page) -> None:
    page.tab("Ask")
    page.choose("ask-model", "world-llava")
    # The odd question about the upload stays, and is told to have words that this model does not know.
    page.until(lambda: "world-llava knows the words" in page.text("ask-question"), "the embedded model")
    before = page.picture("ask-shown")
    page.every("ask-examples", "button.thumbnail-item")[0].click()
    page.until(lambda: page.picture("ask-shown") != before, "the first example")
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
    page.tab("Measure")
    page.until(lambda: page.find("trade-run").is_displayed(), "the tab Measure")
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
    page.until(lambda: not page.every("trade-plot", ".main-svg"), "no plot")
    assert not page.find("trade-csv").is_enabled()
    assert not page.text("trade-state")


def test_an_earlier_run_is_shown_literally_and_goes_with_the_benchmark(url, shots, tmp_path) -> None:
    rows = [
        {"id": "unreduced", "method": "unreduced", "spec": "", "budget": 1.0, "top1": 0.9, "share": 1.0, "notes": []},
        {"id": "a", "method": "<b>tome</b>", "spec": ODD, "budget": 0.5, "top1": 0.8, "share": 0.5},
        {"id": "e", "method": "evit", "spec": "evit", "budget": 0.5, "error": f"ValueError: {ODD}"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    axis = {"key": "share", "title": "<b>axis</b>", "label": "axis"}
    info = {"task": "vision", "metric": "top1", "settings": {"model": ODD, "data": "_d_"}, "axis": axis}
    (tmp_path / "run.json").write_text(json.dumps(info))
    with visit(url, shots, tmp_path) as page:
        page.tab("Measure")
        page.upload("trade-load", tmp_path / "rows.jsonl", tmp_path / "run.json")
        page.until(lambda: page.text("trade-state") == f"{ODD} on _d_: 2 rows, 1 failed", "what it says itself")
        page.until(
            lambda: ODD in page.text("trade-rows") and f"ValueError: {ODD}" in page.text("trade-rows"), "its rows"
        )
        page.until(lambda: "<b>tome</b>" in page.text("trade-plot"), "the plot")
        page.shot("trade_earlier")
        page.choose("trade-bench", "digits-vit")
        page.until(lambda: not page.every("trade-plot", ".main-svg") and not page.text("trade-state"), "no plot")
        assert not page.every("trade-rows", "td")


def test_a_second_visitor_is_told_the_place_in_the_queue(url, shots, tmp_path) -> None:
    with visit(url, shots, tmp_path) as first, visit(url, shots, tmp_path) as second:
        for visitor in (first, second):
            visitor.tab("Measure")
            visitor.until(lambda visitor=visitor: visitor.find("trade-run").is_displayed(), "the tab Measure")
            visitor.until(lambda visitor=visitor: "tome" in visitor.text("trade-methods"), "methods")
        first.find("trade-run").click()
        first.until(lambda: re.match(r"\d+ of \d+ rows", first.text("trade-state")), "a sweep")
        second.find("trade-run").click()
        second.until(lambda: "it is number 2" in second.text("trade-state"), "the place in the queue")
        assert not second.find("trade-bench", "input").is_enabled()
        second.shot("trade_queue")
        second.find("trade-stop").click()
        second.until(lambda: second.text("trade-state").startswith("Stopped"), "out of the queue")
        second.until(lambda: second.find("trade-run").is_enabled(), "the button")
        assert re.match(r"\d+ of \d+ rows", first.text("trade-state")), "the sweep of the first goes on"
        second.find("trade-run").click()
        second.until(lambda: "it is number 2" in second.text("trade-state"), "the queue again")
        first.browser.get("about:blank")
        second.until(lambda: re.match(r"[1-9]\d* of \d+ rows", second.text("trade-state")), "the first has left")
        second.find("trade-stop").click()
        second.until(lambda: second.text("trade-state").startswith("Stopped"), "the stop")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_plots_and_hints_can_be_read_in(theme: str, url, shots, tmp_path) -> None:
    with visit(url, shots, tmp_path, theme=theme) as visitor:
        visitor.tab("Image")
        visitor.until(lambda: timed(visitor) and visitor.every("image-plot", ".main-svg"), "the first picture")
        visitor.shot(f"image_{theme}")
        grey = visitor.pixels("image-plot", ".js-plotly-plot").astype(int)
        behind = int(np.median(grey))
        assert behind < 60 if theme == "dark" else behind > 200
        # Titles and numbers: enough of the plot is far from its background.
        assert (np.abs(grey - behind) > 130).mean() > 0.003
        colours = visitor.browser.execute_script(
            "return [...document.querySelectorAll('.hint p, .hint, #image-plot .infolayer text')]"
            ".map(e => { const s = getComputedStyle(e); return e.tagName === 'text' ? s.fill : s.color; });"
        )
        assert len(colours) > 3
        for colour in colours:
            light = np.mean([float(v) for v in re.findall(r"[\d.]+", colour)[:3]])
            assert light > 150 if theme == "dark" else light < 130


def test_a_narrow_page_fits(url, shots, tmp_path) -> None:
    with visit(url, shots, tmp_path, width=400, height=2400) as phone:
        phone.tab("Image")
        phone.until(lambda: timed(phone), "the first picture")
        for tab, first in (("Image", "image-model"), ("Ask", "ask-go"), ("Measure", "trade-run")):
            phone.tab(tab)
            phone.until(lambda first=first: phone.find(first).is_displayed(), tab)
            wide, room = phone.browser.execute_script(
                "return [document.documentElement.scrollWidth, window.innerWidth]"
            )
            assert wide <= room
            phone.shot(tab.lower())


def test_a_narrow_page_shows_both_reductions_and_titles_apart(url, shots, tmp_path) -> None:
    with visit(url, shots, tmp_path, width=400, height=3600) as phone:
        phone.tab("Image")
        phone.until(lambda: timed(phone) and phone.every("image-plot", ".main-svg"), "the first picture")
        titles = phone.boxes("image-plot", ".infolayer .annotation-text, #image-plot .infolayer .annotation text")
        titles = list({(b["left"], b["top"]): b for b in titles}.values())
        assert len(titles) == 2
        a, b = titles
        assert a["bottom"] <= b["top"] or b["bottom"] <= a["top"] or a["right"] <= b["left"] or b["right"] <= a["left"]
        assert all(t["left"] >= 0 and t["right"] <= 400 for t in titles)
        phone.tab("Ask")
        phone.until(lambda: phone.find("ask-go").is_displayed() and not phone.text("ask-message"), "the ask tab")
        phone.until(lambda: phone.find("ask-shown", "img"), "an example")
        phone.find("ask-go").click()
        phone.until(lambda: "KV cache" in phone.text("ask-answers"), "answers")
        cells = phone.boxes("ask-answers", ":is(td, th)")
        assert len(cells) > 20
        assert all(c["left"] >= 0 and c["right"] <= 400 for c in cells)
        assert "B: fastv:keep=0.2" in phone.text("ask-answers")
        phone.shot("ask_answers")
