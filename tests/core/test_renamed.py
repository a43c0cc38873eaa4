"""Methods that answer to the old verbs, for one release."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import tokenreduce as tr
from tokenreduce.core.reducer import RENAMED
from tokenreduce.core.trace import Step


def test_old_verbs_of_a_plug_in_are_heard():
    with pytest.warns(DeprecationWarning, match="acts is acts_at now"):

        @dataclass(frozen=True)
        class Old(tr.Reducer):
            def acts(self, layer, depth):
                return layer == 1

    assert Old().acts_at(1, 4)
    assert not Old().acts_at(0, 4)


@pytest.mark.parametrize("old", ["gathers", "wishes", "looks", "site", "later"])
def test_old_verbs_may_be_asked(old):
    reducer = tr.get_method("visionzip")
    with pytest.warns(DeprecationWarning, match=f"{old} is {RENAMED[old]} now"):
        assert getattr(reducer, old)() == getattr(reducer, RENAMED[old])()


def test_a_setting_of_such_a_name_is_a_setting():
    @dataclass(frozen=True)
    class Marked(tr.Reducer):
        mark: int = 3

    assert Marked().mark == 3


def test_old_words_of_what_a_plug_in_needs_are_heard():
    with pytest.warns(DeprecationWarning, match="Shown needs 'frames' now, not 'films'"):

        @dataclass(frozen=True)
        class Shown(tr.Reducer, stage="language", needs=("attention", "films")):
            pass

    assert Shown().required() == ("attention", "frames")

    @dataclass(frozen=True)
    class Asking(tr.Reducer, stage="language"):
        def required(self):
            return ("films",)

    with pytest.warns(DeprecationWarning, match="Asking needs 'frames' now"):
        assert Asking().required() == ("frames",)


def test_what_outputs_take_was_called_hosts():
    step = Step("projector", 0, 4, slots=(torch.tensor([[1, 2]]),))
    with pytest.warns(DeprecationWarning, match="slots now"):
        assert step.hosts is step.slots
