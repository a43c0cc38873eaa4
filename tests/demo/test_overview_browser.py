"""The first tab in headless Chromium, on made-up rows of quick models."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import demo_browser
import pytest
import stored_rows
from demo_browser import Page, visit

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(demo_browser.missing()), reason=demo_browser.missing())]


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Path:
    return demo_browser.shots(tmp_path_factory)


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    from tokenreduce.demo import stored
    from tokenreduce.demo.app import launch
    from tokenreduce.demo.store import Store

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "FOLDER", stored_rows.write(tmp_path_factory.mktemp("stored")))
        patch.setattr(stored, "ORDER", ("digits-vit", "world-llava"))
        page, address = launch(Store(), wait=False)
    yield address
    page.close()


@pytest.fixture(scope="module")
def visitor(url, shots, tmp_path_factory) -> Iterator[Page]:
    with visit(url, shots, tmp_path_factory.mktemp("downloads")) as made:
        yield made


@pytest.fixture
def page(url, visitor) -> Page:
    """The page as it opens, in one browser for all tests."""
    return opened(visitor, url)


def opened(page: Page, address: str) -> Page:
    page.browser.get(address)
    page.until(lambda: computed(page), "the picture and its answers")
    return page


def computed(page: Page) -> bool:
    return "time of one image" in page.text("overview-answers") and bool(page.every("overview-after", "img"))


def linked(page: Page) -> dict[str, str]:
    return dict(parse_qsl(page.find("overview-link", "textarea, input").get_attribute("value").partition("?")[2]))


def code(page: Page, name: str) -> str:
    return " ".join(page.find(name, ".cm-content").text.split())


def test_the_page_opens_on_the_trade_off_without_a_click(page) -> None:
    assert page.text("overview-headline").startswith("50 % of the FLOPs: evit keeps 95.0 of 98.0 %")
    assert page.every("overview-plot", ".main-svg")
    assert "evit" in page.text("overview-rows")
    assert "label)" in page.text("overview-answers")
    assert linked(page) == {"run": "digits-vit", "budget": "0.5", "method": "evit", "picture": "0"}
    page.shot("overview_made_up")


def test_the_slider_changes_sentence_plot_picture_and_link(url, page) -> None:
    from selenium.webdriver.common.keys import Keys

    before = page.picture("overview-after")
    page.number("overview-budget", 35)
    page.until(lambda: page.text("overview-headline").startswith("35"), "the sentence")
    assert "tome keeps 90.0 of 98.0" in page.text("overview-headline")
    page.until(lambda: linked(page)["budget"] == "0.35", "the link")
    assert linked(page)["method"] == "tome", "the best there"
    page.until(lambda: page.picture("overview-after") != before and computed(page), "the picture")
    link = page.find("overview-link", "textarea, input").get_attribute("value")
    page.until(lambda: page.browser.current_url == link, "the address")
    assert link.startswith(f"{url}?run=")
    page.number("overview-budget", 68)
    page.until(lambda: page.text("overview-headline").startswith("75"), "the nearest budget")
    field = page.find("overview-budget", "input[type=number]")
    assert field.get_attribute("value") == "68", "what is typed stays while it is"
    field.send_keys(Keys.TAB)
    page.until(lambda: field.get_attribute("value") == "75", "the slider")


def test_arrow_keys_move_the_slider(page) -> None:
    from selenium.webdriver.common.keys import Keys

    slider = page.find("overview-budget", "input[type=range]")
    for key, times, budget in ((Keys.ARROW_LEFT, 2, "35"), (Keys.ARROW_RIGHT, 7, "75")):
        slider.send_keys(key * times)
        page.until(lambda budget=budget: page.text("overview-headline").startswith(budget), f"{budget} %")


def test_a_row_of_the_table_becomes_lines_to_copy(page) -> None:
    assert code(page, "overview-python") == 'tr.patch(model, "evit:keep=0.35")'
    cells = page.every("overview-rows", "td, #overview-rows [role=gridcell]")
    next(c for c in cells if c.text.strip() == "tome").click()
    page.until(lambda: code(page, "overview-python") == 'tr.patch(model, "tome:keep=0.35")', "the line of Python")
    assert code(page, "overview-shell") == "tokenreduce show digits-vit IMAGE.png --reduce tome:keep=0.35"
    assert linked(page)["method"] == "tome"
    page.until(lambda: "tome:keep=0.35" in page.text("overview-answers"), "the answers of tome")


def test_a_point_of_the_plot_is_its_budget_and_method(page) -> None:
    script = (
        "const plot = document.querySelector('#overview-plot .js-plotly-plot');"
        "const trace = plot.data.findIndex(t => t.name === 'tome');"
        "plot.emit('plotly_click', {points: [{customdata: plot.data[trace].customdata[2]}]});"
    )
    page.until(lambda: page.find("overview-plot", ".js-plotly-plot").get_attribute("data-told"), "the listener")
    page.browser.execute_script(script)
    page.until(lambda: linked(page)["budget"] == "0.75" and linked(page)["method"] == "tome", "tome at 75 %")
    page.until(lambda: page.text("overview-headline").startswith("75"), "the sentence")


def test_a_method_that_is_not_at_a_budget_gives_way(page) -> None:
    page.choose("overview-method", "pitome")
    page.until(lambda: linked(page)["method"] == "pitome", "pitome")
    page.number("overview-budget", 35)
    page.until(lambda: "pitome has no row at 35 %" in page.text("overview-message"), "what is said")
    page.until(lambda: linked(page)["method"] == "tome", "the best")


def test_a_link_restores_what_was_seen(url, visitor) -> None:
    page = opened(visitor, f"{url}?run=digits-vit&budget=0.35&method=random&picture=3")
    assert page.text("overview-headline").startswith("35")
    assert page.text("overview-message") == ""
    assert code(page, "overview-python") == 'tr.patch(model, "random:keep=0.2")'
    assert "In the picture: 3." in page.text("overview-about")
    assert linked(page) == {"run": "digits-vit", "budget": "0.35", "method": "random", "picture": "3"}


def test_a_wrong_link_says_what_there_is(url, visitor, shots) -> None:
    page = opened(visitor, f"{url}?run=<b>x&budget=0.4&method=none&picture=99")
    told = page.text("overview-message")
    assert "run=<b>x, which is not there; there are: digits-vit, world-llava" in told
    assert "there are: 0.75, 0.5, 0.35" in told
    assert "there are: best, evit, tome, random, pitome" in told
    assert "there are: 0, 1, 2, 3, 4, 5" in told
    assert linked(page) == {"run": "digits-vit", "budget": "0.5", "method": "evit", "picture": "0"}
    page.shot("overview_wrong")


def test_another_picture_and_another_model(page) -> None:
    before = page.picture("overview-before")
    page.every("overview-pictures", "button.thumbnail-item")[4].click()
    page.until(lambda: page.picture("overview-before") != before, "the picture")
    page.until(lambda: "In the picture: 4." in page.text("overview-about") and computed(page), "what is in it")
    assert linked(page)["picture"] == "4"
    page.choose("overview-run", "world-llava")
    page.until(lambda: "KV cache" in page.text("overview-answers"), "answers of the language model")
    assert "visionzip keeps" in page.text("overview-headline")
    assert "tokenreduce generate world-llava" in code(page, "overview-shell")
    assert linked(page)["question"] == "0"
    asked = page.text("overview-about")
    page.find("overview-question", "input").click()
    options = page.until(lambda: page.browser.find_elements("css selector", "ul[role=listbox] li"), "questions")
    options[1].click()
    page.until(lambda: "Asked: " in page.text("overview-about") and page.text("overview-about") != asked, "the second")
    assert linked(page)["question"] == "1"
    page.shot("overview_questions")


def test_two_visitors_see_each_their_own(url, page, shots, tmp_path) -> None:
    with visit(url, shots, tmp_path) as second:
        second.until(lambda: computed(second), "the page of the second")
        page.number("overview-budget", 75)
        second.number("overview-budget", 35)
        page.until(lambda: linked(page)["budget"] == "0.75" and computed(page), "the first")
        second.until(lambda: linked(second)["budget"] == "0.35" and computed(second), "the second")
        second.until(lambda: "keep=0.2" in second.text("overview-answers"), "its answers")
        page.until(lambda: "keep=0.5" in page.text("overview-answers"), "those of the first")


def test_the_plot_can_be_read_in_the_dark(url, shots, tmp_path) -> None:
    with visit(url, shots, tmp_path, theme="dark") as dark:
        dark.until(lambda: computed(dark) and dark.every("overview-plot", ".main-svg"), "the page")
        colours = dark.browser.execute_script(
            "return [...document.querySelectorAll('#overview-plot .infolayer text, .headline, #overview-answers td')]"
            ".map(e => { const s = getComputedStyle(e); return e.tagName === 'text' ? s.fill : s.color; });"
        )
        assert len(colours) > 10
        for colour in colours:
            assert sum(float(v) for v in re.findall(r"[\d.]+", colour)[:3]) > 450
        dark.shot("overview_dark")


def test_a_narrow_page_fits(url, shots, tmp_path) -> None:
    with visit(url, shots, tmp_path, width=400, height=3000) as phone:
        phone.until(lambda: computed(phone) and phone.every("overview-plot", ".main-svg"), "the page")
        wide, room = phone.browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= room
        boxes = [place(phone, name) for name in ("plot", "before", "after", "python", "shell", "link")]
        boxes += [box for name in ("headline", "answers") for box in phone.boxes(f"overview-{name}", "*")]
        assert all(box["left"] >= 0 and box["right"] <= 400 for box in boxes)
        phone.number("overview-budget", 35)
        phone.until(lambda: phone.text("overview-headline").startswith("35"), "the slider")
        time.sleep(1)
        phone.shot("overview_narrow")


def place(page: Page, name: str) -> dict[str, Any]:
    box = page.find(f"overview-{name}").rect
    return {"left": box["x"], "right": box["x"] + box["width"]}
