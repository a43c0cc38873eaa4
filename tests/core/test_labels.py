from __future__ import annotations

import dataclasses

import pytest

import tokenreduce as tr
from tokenreduce.core.labels import label_of
from tokenreduce.core.registry import get_class, list_methods


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("evs", "evs:keep=0.25"), ("random@projector", "random@projector:keep=0.25"), ("tome", "tome:r=0"),
        ("tome:r=4", "tome:r=4"), ("fastv:layer=3", "fastv:layer=3,keep=0.5"), ("evit", "evit:base_keep_rate=0.7"),
        ("prumerge", "prumerge:keep=none"), ("visionzip:keep=64+fastv", "visionzip:keep=64+fastv:keep=0.5"),
    ],
)  # fmt: skip
def test_a_label_has_the_budget(spec: str, label: str) -> None:
    assert label_of(tr.parse(spec)) == label


def test_names_may_be_given() -> None:
    assert label_of(tr.parse("random:keep=0.5+fastv"), ["random@encoder", "f"]) == "random@encoder:keep=0.5+f:keep=0.5"


@pytest.mark.parametrize("name", list_methods())
def test_every_method_has_a_label_that_reads_back(name: str) -> None:
    kind = get_class(name)
    missing = dataclasses.MISSING
    if any(f.default is missing and f.default_factory is missing for f in dataclasses.fields(kind)):
        pytest.skip("it has a setting without a default")
    reducer = kind()
    label = label_of(reducer)
    assert ":" in label or "keep" not in {f.name for f in dataclasses.fields(kind)}
    assert tr.parse(label) == (reducer,)
