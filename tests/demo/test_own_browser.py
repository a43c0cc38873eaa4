"""The tab "Your model" in headless Chromium."""

from __future__ import annotations

import csv
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
def url() -> Iterator[str]:
    """A page with a small classifier of the user's own, with random weights."""
    pytest.importorskip("timm")
    from tokenreduce.demo.app import launch
    from tokenreduce.demo.store import Store

    page, address = launch(Store("vit_tiny_patch16_224?pretrained=false&img_size=96&depth=4"), wait=False)
    yield address
    page.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uploads")
    random = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(random.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:400])
    return folder


def opened(page: Page) -> None:
    page.tab("Your model")
    page.until(lambda: "tome" in page.text("own-methods"), "its methods")


def keep_one_budget(page: Page) -> None:
    for label in page.every("own-budgets", "label"):
        if label.text.strip() in ("75 %", "35 %"):
            label.click()


@pytest.mark.parametrize(("width", "height"), [(1280, 1500), (400, 2600)])
def test_a_sweep_on_photographs_stops_goes_on_and_is_taken_away(url, shots, files, tmp_path, width, height) -> None:
    with visit(url, shots, tmp_path, width=width, height=height, theme="light" if width > 640 else "dark") as page:
        opened(page)
        assert page.text("own-lead").startswith("timm:vit_tiny_patch16_224")
        assert len(page.every("own-pictures", "button.thumbnail-item")) == 12
        keep_one_budget(page)
        page.find("own-run").click()
        page.until(lambda: re.match(r"[2-9] of \d+ rows", page.text("own-state")), "two rows")
        page.find("own-stop").click()
        page.until(lambda: page.text("own-state").startswith("Stopped"), "the stop")
        done, total = map(int, re.search(r"(\d+) of (\d+) rows", page.text("own-state")).groups())
        assert 2 <= done < total == 6
        page.until(lambda: "agree %" in page.text("own-rows"), "the rows so far")
        page.shot("own_stopped")
        page.until(lambda: page.find("own-run").is_enabled(), "the button")
        page.find("own-run").click()
        page.until(lambda: page.text("own-state").startswith("Done: 6 rows"), "the rest")
        page.until(lambda: page.find("own-plot", ".main-svg") and page.find("own-csv").is_enabled(), "plot and CSV")
        page.find("own-csv").click()
        file = page.until(lambda: next(iter(page.downloads.glob("*.csv")), None), "the downloaded CSV")
        rows = list(csv.DictReader(file.open(encoding="utf-8")))
        assert {row["method"] for row in rows} == {"unreduced", "random", "uniform", "resize", "tome", "evit"}
        assert {row["images"] for row in rows} == {"8"}
        assert all(0 <= float(row["agreement"]) <= 1 and float(row["flops"]) > 0 for row in rows)
        page.shot("own_done")
        page.upload("own-upload", files / "a.png", files / "broken.png")
        page.until(lambda: "broken.png cannot be read as an image" in page.text("own-message"), "the broken file")
        assert page.find("own-csv").is_enabled(), "nothing is lost"
        assert page.every("own-plot", ".main-svg")
        page.upload("own-upload", files / "a.png", files / "b.png", files / "c.png")
        page.until(lambda: "3 pictures of yours" in page.text("own-about"), "the uploads")
        assert page.text("own-message") == ""
        assert len(page.every("own-pictures", "button.thumbnail-item")) == 3
        assert page.fits()
        page.shot("own_upload")
        page.find("own-back").click()
        page.until(lambda: len(page.every("own-pictures", "button.thumbnail-item")) == 12, "the photographs")


def test_sweeps_of_two_tabs_and_visitors_stand_in_one_line(url, shots, tmp_path) -> None:
    with visit(url, shots, tmp_path) as first, visit(url, shots, tmp_path, width=400, height=2600) as second:
        first.tab("Measure")
        first.until(lambda: "tome" in first.text("trade-methods"), "methods")
        first.find("trade-run").click()
        first.until(lambda: re.match(r"\d+ of \d+ rows", first.text("trade-state")), "a sweep")
        opened(second)
        second.find("own-run").click()
        second.until(lambda: "1 sweep is before yours, it is number 2" in second.text("own-state"), "its place")
        second.shot("own_queue")
        first.find("trade-stop").click()
        second.until(lambda: re.match(r"[1-9]\d* of \d+ rows", second.text("own-state")), "its turn")
        second.find("own-stop").click()
        second.until(lambda: second.text("own-state").startswith("Stopped"), "the stop")
