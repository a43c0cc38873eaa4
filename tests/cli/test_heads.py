"""``tokenreduce heads`` on a saved model."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from typer.testing import CliRunner
from vlm_folders import save_llava

import tokenreduce as tr
from tokenreduce.algorithms.head_table import FILE, load_table
from tokenreduce.cli import app

SMALL = ("--tokens", "9", "--repeats", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_llava(path)
    return path


def run(*args):
    return CliRunner().invoke(app, ["heads", *map(str, args)])


def test_the_table_lies_beside_the_model(folder):
    result = run(folder, *SMALL)
    assert result.exit_code == 0, result.output
    assert "LlavaForConditionalGeneration: 4 layers of 2 KV heads, 9 random tokens 3 times" in result.output
    table = load_table(folder)
    assert set(table.scores) == {"echo", "induction", "on_the_fly"}
    for name in table.scores:
        best = ", ".join(f"{layer}.{head}" for _, (layer, head) in table.ranked(name))
        assert best in result.output
    specs = result.output.splitlines()[-1].split("use it as ")[1].split(" or ")
    assert [tr.get_method(spec).table for spec in specs] == [str(folder / FILE)] * 2
    assert tr.get_method(f"duoattention:table={folder}").whole_heads()


def test_texts_and_json(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("What is in this image? The dog sits near the table.")
    result = run(folder, *SMALL, "--text", text, "--text", text, "--out", tmp_path / "t.json", "--json")
    assert result.exit_code == 0, result.output
    shown, plain = json.loads(result.stdout), tmp_path / "plain.json"
    assert run(folder, *SMALL, "--out", plain).exit_code == 0
    table = load_table(tmp_path / "t.json")
    assert shown["file"] == str(tmp_path / "t.json")
    assert shown["scores"]["echo"] == [list(row) for row in table.scores["echo"]]
    assert len(table.probe["texts"]) == 2
    assert table.scores["on_the_fly"] != load_table(plain).scores["on_the_fly"]
    assert table.scores["echo"] == load_table(plain).scores["echo"]


def test_bad_input(folder, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    for args, message in (
        ((tmp_path / "none",), "no folder"), ((folder, "--repeats", "1"), "repeats"),
        ((folder, "--tokens", "9000"), "too long"), ((folder, "--text", tmp_path / "no.txt"), "no.txt"),
        ((folder, "--text", binary), "no text in UTF-8"), ((folder, *SMALL, "--text", empty), "holds no text"),
        ((folder, "--device", "tpu"), "device"),
    ):  # fmt: skip
        result = run(*args)
        assert result.exit_code == 2
        assert message in result.output.replace("\n", " ")
