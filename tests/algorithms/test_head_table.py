"""Tables of KV heads: files, other models, and what is ranked."""

from __future__ import annotations

import json
import os

import pytest

from tokenreduce.algorithms.head_table import FILE, HeadTable, load_table

SCORES = {"echo": ((0.1, 0.2), None, (0.3, 0.2)), "induction": ((0.5, 0.1), (0.2, 0.5), (0.4, 0.5))}


def table(**changes):
    settings = dict(model="Toy", layers=3, kv_heads=2, scores=SCORES, probe={"tokens": 20})
    return HeadTable(**{**settings, **changes})


def test_round_trip(tmp_path):
    path = table().save(tmp_path / "heads.json")
    assert load_table(path) == load_table(str(path)) == table()


def test_a_folder_has_its_table(tmp_path):
    table().save(tmp_path / FILE)
    assert load_table(tmp_path) == table()


def test_a_file_that_was_written_anew_is_read_anew(tmp_path):
    path = tmp_path / "heads.json"
    table().save(path)
    assert load_table(path).model == "Toy"
    table(model="Other").save(path)
    os.utime(path, ns=(1, 1))
    assert load_table(path).model == "Other"


def test_ranked():
    assert table().ranked("echo") == [(0.3, (2, 0)), (0.2, (0, 1)), (0.2, (2, 1)), (0.1, (0, 0))]
    with pytest.raises(ValueError, match="no scores 'gate'; it has echo, induction"):
        table().ranked("gate")


@pytest.mark.parametrize(("layers", "heads", "model"), [(4, 2, None), (3, 1, None), (3, 2, "Llava"), (4, 2, "Toy")])
def test_another_model(layers, heads, model):
    with pytest.raises(ValueError, match="the head table is of"):
        table().check(layers, heads, model)
    table().check(3, 2, "Toy")
    table().check(3, 2)


def test_damaged_files(tmp_path):
    path = tmp_path / "heads.json"
    with pytest.raises(ValueError, match="there is no head table"):
        load_table(path)
    with pytest.raises(ValueError, match="there is no head table"):
        load_table(tmp_path)
    whole = json.loads(table().save(path).read_text())
    short = {**whole, "scores": {"echo": [[1.0]]}}
    wrong = {**whole, "scores": {"echo": [["x", 1], None, [1, 1]]}}
    for text, message in (
        ("{", "no JSON"), ("[]", "no head table"), (json.dumps({"model": "x"}), "no head table"),
        (json.dumps({k: v for k, v in whole.items() if k != "layers"}), "damaged"), (json.dumps(wrong), "damaged"),
        (json.dumps(short), "3 rows of 2"), (json.dumps({**whole, "scores": []}), "damaged"),
        (json.dumps(whole).replace("0.3", "NaN"), "not finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            HeadTable.from_json(text)
