from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from typer.testing import CliRunner

from tokenreduce.cli import app


def call(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["demo", *words])


def test_help_names_the_options_and_the_safe_defaults() -> None:
    text = call("--help").stdout
    for word in ("--model", "--port", "--host", "127.0.0.1", "--share", "--data", "safetensors"):
        assert word in text


def test_a_missing_library_names_the_extra(monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else found(name, *a))
    result = call()
    assert result.exit_code == 2
    assert "pip install 'tokenreduce[demo]'" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"), [(("--model", "no-such-model"), "unknown model"), (("--device", "abacus"), "abacus")]
)
def test_bad_options_end_before_anything_is_served(words: tuple[str, ...], said: str) -> None:
    pytest.importorskip("gradio")
    result = call(*words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_the_page_is_served_only_where_asked(monkeypatch) -> None:
    pytest.importorskip("gradio")
    import tokenreduce.demo.app as page

    seen: dict[str, Any] = {}
    monkeypatch.setattr(page, "launch", lambda store, **given: seen.update(given, store=store))
    assert call("--port", "7999").exit_code == 0
    assert (seen["host"], seen["port"], seen["share"]) == ("127.0.0.1", 7999, False)
    assert "digits-vit" in seen["store"].images
