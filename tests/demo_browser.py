"""Chromium without a window, and how to find things on the page."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Seconds that anything on the page may take; machines that test are slow and busy.
PATIENCE = float(os.environ.get("TOKENREDUCE_DEMO_PATIENCE", "240"))


def missing() -> str:
    """Why no browser test can run here, "" when they can."""
    for library in ("gradio", "plotly", "selenium"):
        with contextlib.suppress(ImportError):
            __import__(library)
            continue
        return f"{library} is not installed"
    if _chromium() is None or shutil.which("chromedriver") is None:
        return "chromium and chromedriver are not installed"
    return ""


def shots(tmp_path_factory: Any) -> Path:
    """Where screenshots go: TOKENREDUCE_DEMO_SHOTS, to be looked at, or a folder that is thrown away."""
    folder = Path(os.environ.get("TOKENREDUCE_DEMO_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _chromium() -> str | None:
    return next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


class Page:
    """One visitor. ``shots`` is where screenshots go."""

    def __init__(
        self, url: str, shots: Path, downloads: Path, width: int = 1280, height: int = 1700, theme: str = "light"
    ) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = str(_chromium())
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        self.browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.browser.set_page_load_timeout(PATIENCE)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.browser.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)}
        )
        self.shots, self.downloads, self.width = shots, downloads, width
        self.browser.get(f"{url}?__theme={theme}")

    def find(self, name: str, inside: str = "") -> Any:
        """The element of an id, or one inside it by its selector."""
        return self.browser.find_element("css selector", ", ".join(f"#{name} {part}" for part in inside.split(",")))

    def every(self, name: str, inside: str) -> list[Any]:
        """All elements inside the one of an id."""
        return list(self.browser.find_elements("css selector", f"#{name} {inside}"))

    def text(self, name: str) -> str:
        return str(self.find(name).text)

    def until(self, true: Callable[[], Any], what: str) -> Any:
        """Wait for a true value; the message of the failure is a screenshot and ``what``."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(WebDriverException):  # pages redraw while one looks
                if value := true():
                    return value
            time.sleep(0.3)
        self.shot("failed")
        raise AssertionError(f"not within {PATIENCE:g} s: {what}; see {self.shots}")

    def shot(self, name: str) -> None:
        self.browser.save_screenshot(str(self.shots / f"{name}_{self.width}.png"))

    def tab(self, name: str) -> None:
        def opened() -> bool:
            tabs = self.browser.find_elements("css selector", "button[role=tab]")
            found = next((t for t in tabs if t.text == name), None)
            if found is not None:
                found.click()  # raises while Gradio's sign of loading lies over the page
            return found is not None

        self.until(opened, f"the tab {name}")

    def upload(self, name: str, *files: Path) -> None:
        """Give files to an upload button, as the dialogue of the browser would."""
        # The hidden input stands beside the button or around it, depending on the version of Gradio.
        script = (
            "const b = document.getElementById(arguments[0]);"
            "return b.querySelector('input[type=file]') || b.parentElement.querySelector('input[type=file]');"
        )
        field = self.browser.execute_script(script, name)
        self.browser.execute_script("arguments[0].value = ''", field)  # one for many files would add to those before
        field.send_keys("\n".join(str(f) for f in files))

    def number(self, name: str, value: int, pause: float = 0.0) -> None:
        """Type ``value`` into the number of a slider, with ``pause`` seconds behind each digit."""
        from selenium.webdriver.common.keys import Keys

        field = self.find(name, "input[type=number]")
        field.send_keys(Keys.CONTROL, "a")
        for digit in str(value):
            field.send_keys(digit)
            time.sleep(pause)
        field.send_keys(Keys.ENTER)

    def choose(self, name: str, value: str) -> None:
        """Pick the option of a dropdown that is ``value``, or else begins with it."""
        self.find(name, "input").click()

        def option() -> Any:
            options = self.browser.find_elements("css selector", "ul[role=listbox] li")
            named = [(o.text.strip().lstrip("✓ "), o) for o in options]
            exact = next((o for text, o in named if text == value), None)
            return exact or next((o for text, o in named if text.startswith(value)), None)

        self.until(option, f"option {value} of {name}").click()

    def pixels(self, name: str, inside: str) -> Any:
        """What an element looks like, as grey values (H,W) from 0 to 255."""
        import numpy as np
        from PIL import Image

        shot = self.find(name, inside).screenshot_as_png
        return np.asarray(Image.open(io.BytesIO(shot)).convert("L"))

    def boxes(self, name: str, inside: str) -> list[dict[str, float]]:
        """Where on the page the visible elements inside the one of an id are: left, right, top, bottom."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect())"
            ".filter(b => b.width).map(({left, right, top, bottom}) => ({left, right, top, bottom}));"
        )
        return list(self.browser.execute_script(script, f"#{name} {inside}"))

    def write(self, name: str, text: str) -> Any:
        """Type ``text`` into an empty field; what is typed goes on from there."""
        from selenium.webdriver.common.keys import Keys

        field = self.find(name, "textarea, input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.BACKSPACE)
        field.send_keys(text)
        return field

    def fits(self) -> bool:
        """Whether nothing of the page stands out of the window at its side."""
        wide, room = self.browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        return bool(wide <= room)

    def picture(self, name: str) -> str:
        """The address of the picture that a component shows, which changes with it."""
        return str(self.find(name, "img").get_attribute("src"))


@contextlib.contextmanager
def visit(url: str, shots: Path, downloads: Path, **how: Any) -> Iterator[Page]:
    page = Page(url, shots, downloads, **how)
    try:
        yield page
    finally:
        page.browser.quit()
