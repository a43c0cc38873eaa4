"""Two specs side by side on the ask tab, in headless Chromium: pictures and clips of the visitor's own, and others who
ask at the same time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
def served() -> Iterator[tuple[Any, str]]:
    """The models and the address of a page."""
    from tokenreduce.demo.app import launch
    from tokenreduce.demo.store import Store

    store = Store()
    page, address = launch(store, wait=False)
    yield store, address
    page.close()
    # A thread that computes while the interpreter ends would take it down.
    store.turn.join().wait(60)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A picture, a clip, and a broken picture."""
    pytest.importorskip("av")
    import films

    folder = tmp_path_factory.mktemp("uploads")
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    (folder / "broken.png").write_bytes((folder / "noise.png").read_bytes()[:400])
    films.film(folder / "clip.mp4", 24)
    return folder


def answered(page: Page) -> bool:
    return "KV cache" in page.text("ask-answers") and bool(page.every("ask-kept-B", "img"))


def opened(page: Page, model: str = "world-llava-2") -> None:
    page.tab("Ask")
    page.until(lambda: answered(page), "the first answer, without a click")
    if model != "world-llava-2":
        page.choose("ask-model", model)
        page.until(lambda: "mean of 6 layers" in page.text("ask-answers"), f"the first answer of {model}")


def heads(page: Page) -> list[str]:
    return [cell.text for cell in page.every("ask-answers", "th")]


@pytest.mark.parametrize(("width", "height"), [(1280, 1900), (400, 3800)])
def test_two_specs_side_by_side_and_what_is_wrong_is_told(served, shots, files, tmp_path, width, height) -> None:
    with visit(served[1], shots, tmp_path, width=width, height=height) as page:
        opened(page)
        assert re.search(r"[AB] is cheaper: A takes \d+ % of the FLOPs", page.text("ask-answers"))
        assert "FLOPs of encoder and prefill" in page.text("ask-answers")
        assert page.picture("ask-kept-A") != page.picture("ask-kept-B")
        page.shot("compare")
        page.write("ask-A-spec", "tome:r=8+divprune:keep=64").send_keys("\n")
        page.until(lambda: "A: tome:r=8+divprune:keep=64" in heads(page), "the text in place of the lists")
        page.until(lambda: not page.every("ask-A-projector", "input"), "no lists beside it")
        assert page.find("ask-B-language").is_displayed()
        page.shot("compare_text")
        for text, words in (("divprun:keep=64", "did you mean divprune"), ("divprune:kep=64", "did you mean keep")):
            page.write("ask-A-spec", text).send_keys("\n")
            page.until(lambda words=words: words in page.text("ask-message"), words)
            assert page.text("ask-message").startswith("⚠ reduction A: ")
        page.shot("compare_wrong_spec")
        page.write("ask-A-spec", "divprune:keep=64")
        page.write("ask-question", "what colour is the cat").send_keys("\n")
        page.until(lambda: "does not know: colour, cat" in page.text("ask-message"), "the words")
        assert page.find("ask-A-spec", "textarea, input").get_attribute("value") == "divprune:keep=64"
        page.upload("ask-upload", files / "broken.png")
        page.until(lambda: "broken.png cannot be read as an image" in page.text("ask-message"), "the broken file")
        before = page.picture("ask-shown")
        page.shot("compare_broken")
        page.write("ask-question", "what is the background").send_keys("\n")
        page.until(lambda: answered(page) and "Asked: what is the background" in page.text("ask-answers"), "it goes on")
        page.upload("ask-upload", files / "noise.png")
        page.until(lambda: page.picture("ask-shown") != before, "the upload")
        page.find("ask-go").click()
        page.until(lambda: answered(page), "answers about the upload")
        assert page.text("ask-message") == ""
        assert "right answer" not in page.text("ask-answers")
        assert page.fits()
        page.shot("compare_upload")


def test_an_uploaded_clip_is_asked_about_in_both_worlds(served, shots, files, tmp_path) -> None:
    with visit(served[1], shots, tmp_path, height=1900) as page:
        opened(page)
        before = page.picture("ask-shown")
        page.upload("ask-upload", files / "clip.mp4")
        page.until(lambda: page.picture("ask-shown") != before, "the frames")
        page.find("ask-go").click()
        page.until(lambda: "3,136" in page.text("ask-answers") or page.text("ask-message"), "16 frames of 196 tokens")
        shown = page.picture("ask-shown")
        page.choose("ask-model", "world-llava")
        page.until(lambda: "mean of 6 layers" in page.text("ask-answers") or page.text("ask-message"), "its answer")
        page.write("ask-question", "what color is the star").send_keys("\n")
        page.until(lambda: "Asked: what color is the star" in page.text("ask-answers"), "answers about the clip")
        assert page.picture("ask-shown") == shown, "an upload stays when the model changes"
        assert "392" in page.text("ask-answers"), "8 frames of 49 tokens"
        page.shot("compare_clip")


def test_the_keyboard_is_enough(served, shots, tmp_path) -> None:
    """From the tab to another question and its answers without a click."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    with visit(served[1], shots, tmp_path, height=1900) as page:

        def focused() -> str:
            script = (
                "let e = document.activeElement; while (e && !(e.id || '').match(/^(ask|own)-/)) e = e.parentElement;"
                "return e ? e.id : document.activeElement.textContent.trim();"
            )
            return str(page.browser.execute_script(script))

        def press(*keys: str) -> None:
            ActionChains(page.browser).send_keys(*keys).perform()

        def walk(to: str) -> None:
            for _ in range(60):
                if focused() == to:
                    return
                press(Keys.TAB)
            raise AssertionError(f"the tabulator does not come to {to}; it is at {focused()}")

        page.until(lambda: page.browser.find_elements("css selector", "button[role=tab]"), "the page")
        walk("Trade-off")
        for name in ("Image", "Ask"):
            press(Keys.TAB if focused() != name else "")
            walk(name)
        press(Keys.ENTER)
        page.until(lambda: answered(page), "the first answer")
        walk("ask-question")
        ActionChains(page.browser).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).perform()
        press("is there a star", Keys.ENTER)
        page.until(lambda: "Asked: is there a star" in page.text("ask-answers"), "the answer")
        walk("ask-A-spec")
        press("divprune:keep=32", Keys.ENTER)
        page.until(lambda: "A: divprune:keep=32" in heads(page), "the spec")
        walk("ask-go")
        page.shot("compare_keyboard")


@pytest.mark.parametrize(("width", "height"), [(1280, 1900), (400, 3800)])
def test_visitors_see_how_many_are_before_them(served, shots, tmp_path, width, height) -> None:
    store, url = served
    with visit(url, shots, tmp_path, width=width, height=height) as first:
        opened(first, "world-llava")
        with visit(url, shots, tmp_path, width=width, height=height) as second:
            opened(second, "world-llava")
            with store.turn:  # somebody computes
                first.find("ask-go").click()
                first.until(lambda: "waiting for the machine: 1 before you" in first.text("ask-message"), "its place")
                second.find("ask-go").click()
                second.until(lambda: "waiting for the machine: 2 before you" in second.text("ask-message"), "its place")
                assert not second.text("ask-answers"), "what was answered before is not an answer to this"
                first.shot("queue_first")
                second.shot("queue_second")
            first.until(lambda: answered(first) and not first.text("ask-message"), "the first")
            second.until(lambda: answered(second) and not second.text("ask-message"), "the second")
            with store.turn:
                second.find("ask-go").click()
                second.until(lambda: "1 before you" in second.text("ask-message"), "its place")
                second.browser.get("about:blank")  # leaves while it waits
            first.find("ask-go").click()
            first.until(lambda: answered(first) and not first.text("ask-message"), "the line goes on")
        first.until(lambda: store.turn.waiting == 0, "nobody is left in the line")
