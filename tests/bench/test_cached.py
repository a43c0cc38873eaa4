"""Bytes of the cache against long answers, on the embedded model."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("transformers")

import tokenreduce as tr
from tokenreduce.bench.asking.forced import forced_scores
from tokenreduce.bench.cached import CacheTask


@pytest.fixture(scope="module")
def task():
    made = CacheTask(limit=4, repeats=0, batch=4, answer_tokens=12)
    made.prepare()
    return made


def test_the_unreduced_model_says_what_it_says(task):
    row = task.measure(())
    assert row["forced_agreement"] == 1
    assert row["kv_share"] == 1
    assert row["perplexity"] > 1


def test_fewer_keys_say_it_worse_and_hold_less(task):
    rows = [task.measure((tr.get_method(f"knorm:keep={keep}", "cache"),)) for keep in (1.0, 0.5, 0.05)]
    assert rows[0]["forced_agreement"] == 1
    assert [r["kv_share"] for r in rows] == sorted((r["kv_share"] for r in rows), reverse=True)
    assert rows[2]["kv_share"] < 0.15
    assert rows[2]["perplexity"] > rows[1]["perplexity"] > rows[0]["perplexity"]
    assert task.spent((tr.get_method("knorm:keep=0.05", "cache"),)) == rows[2]["cache_bytes"]


def test_methods_of_the_cache_alone(task):
    assert {"knorm", "snapkv"} <= set(task.methods())
    assert all(tr.get_method(name, "cache").stage == "cache" for name in task.methods())


def test_scores_of_forced_answers():
    got = forced_scores([1.0, 0.5], [math.log(0.5), math.log(0.25)])
    assert got["forced_agreement"] == 0.75
    assert got["perplexity"] == pytest.approx(8**0.5)
    assert got["forced_agreement_stderr"] == pytest.approx(0.25)
