"""``tokenreduce models``: a table, JSON, or the page of the documents."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokenreduce.cli import app
from tokenreduce.cli.models import _measured
from tokenreduce.measure import census_language
from tokenreduce.measure.census import Row

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Two language models of transformers, and an encoder of timm."""
    rows = [
        Row("transformers", "SeeForConditionalGeneration", "discovered", ("projector",), "not inside: a | b"),
        Row("transformers", "ReadForConditionalGeneration", "refused", (), "an encoder-decoder"),
    ]

    def census(library):
        print("[ERROR] a library speaks while it is imported")
        return rows if library == "transformers" else []

    monkeypatch.setattr(census_language, "census_language", census)
    encoders = types.ModuleType("tokenreduce.measure.census_encoders")
    encoders.census_encoders = lambda library: [Row("timm", "vit", "table", ("encoder",), "")] * (library == "timm")
    monkeypatch.setitem(sys.modules, "tokenreduce.measure.census_encoders", encoders)


def run(*args):
    result = CliRunner().invoke(app, ["models", *args])
    assert "[ERROR]" not in result.stdout
    return result.exit_code, result.stdout if result.exit_code == 0 else result.output


def test_a_line_per_model():
    code, out = run()
    assert code == 0
    assert all(name in out for name in ("SeeFor", "ReadFor", "vit", "3 models"))
    assert "vit" not in run("--library", "transformers")[1]


def test_json():
    models = json.loads(run("--json")[1])["models"]
    assert [m["how"] for m in models] == ["discovered", "refused", "table"]
    assert models[0]["stages"] == ["projector"]


def test_the_page_of_the_documents(tmp_path):
    file = tmp_path / "measured.json"
    file.write_text(
        json.dumps(
            {
                "see": {
                    "class": "SeeFor",
                    "original": 5.2e-7,
                    "layers": [1, 2],
                    "inside": 1e-6,
                    "cache": 4e-7,
                    "encoder": 8e-7,
                },
                "two": {"class": "TwoWays", "masked": 3e-7, "no_encoder": "it has two"},
                "three": {"class": "ThreeWays", "masked": 3e-7},
                "bad": {"class": "Bad", "error": "it | fails"},
            }
        )
    )
    lines = run("--markdown", "--measured", str(file))[1].splitlines()
    assert "| `SeeForConditionalGeneration` | discovered | projector | not inside: a / b |" in lines
    assert "2 models: 1 discovered, 1 refused." in lines
    assert "## Encoders of timm" in lines
    assert "| `SeeFor` | 8e-07 | 5e-07 | none | 1, 2 | 1e-06 | 4e-07 |" in lines
    assert "| `TwoWays` | none | 3e-07 (hidden) | none | none | none | none |" in lines
    assert "| `ThreeWays` | not measured | 3e-07 (hidden) | none | none | none | none |" in lines
    assert "| `Bad` | it / fails |  |  |  |  |  |" in lines
    assert lines[-1] == "- `TwoWays`: it has two"


def test_the_page_has_the_stored_differences():
    """docs/models.md was made of docs/models.json as it is."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    stored = json.loads((ROOT / "docs" / "models.json").read_text(encoding="utf-8"))
    assert page.startswith("# Models\n")
    assert page.endswith("\n".join(_measured(stored)) + "\n"), "make it again with the command that it names"


@pytest.mark.parametrize(
    ("args", "message"),
    [(("--library", "jax"), "choose one of transformers"), (("--json", "--markdown"), "choose one")],
)
def test_bad_options(args, message):
    code, out = run(*args)
    assert code == 2
    assert message in " ".join(out.split())
