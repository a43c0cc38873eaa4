from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tokenreduce.cli import app

pytest.importorskip("transformers")


def run(*args: str):
    return CliRunner().invoke(app, list(args))


def test_a_table_and_an_object():
    shown = run("estimate", "world-llava", "--reduce", "divprune:keep=49", "--device", "l4", "--batch", "2")
    assert shown.exit_code == 0, shown.output
    assert "world-llava (1.73 million parameters) on l4, bf16, batch 2" in shown.output
    made = json.loads(run("estimate", "world-llava", "--reduce", "divprune:keep=49", "--json").output)
    assert made["reduced"]["parts"][2]["tokens"] == 49 + 64
    assert made["speedup"] > 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["world-llava", "--device", "h10"], "unknown device 'h10'; known: h100, a100"),
        (["world-llava", "--image", "big"], "--image is WIDTHxHEIGHT in pixels"),
        (["world-llava", "--image", "0x12"], "--image is WIDTHxHEIGHT in pixels"),
        (["world-llava", "--reduce", "nothing"], "unknown method"),
        (["world-llava", "--dtype", "int4"], "dtype is one of"),
    ],
)
def test_bad_input_is_one_message(args, said):
    made = run("estimate", *args)
    assert made.exit_code == 2
    assert said in " ".join(made.output.split())


def test_calibrating_stores_what_measured_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENREDUCE_CACHE", str(tmp_path))
    monkeypatch.setattr("tokenreduce.estimation.calibrate.ROWS", (1, 8))
    monkeypatch.setattr("tokenreduce.estimation.calibrate.WEIGHTS", ((16, 16), (16, 32)))
    monkeypatch.setattr("tokenreduce.estimation.calibrate.KEYS", (8, 16))
    monkeypatch.setattr("tokenreduce.estimation.calibrate.ELEMENTS", (2**10, 2**12))
    missing = run("estimate", "world-llava", "--device", "measured", "--dtype", "fp32")
    assert missing.exit_code == 2
    assert "run tokenreduce calibrate --dtype fp32 first" in " ".join(missing.output.split())
    assert run("calibrate", "--seconds", "1").exit_code == 0
    found = run("estimate", "world-llava", "--device", "measured", "--dtype", "fp32", "--json")
    assert json.loads(found.output)["device"] == "measured"
