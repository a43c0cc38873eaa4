"""Settings of a wrong kind are refused by name, for every method, however it is made."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch

import tokenreduce as tr
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import load_all
from tokenreduce.core.settings import describe, fit, fits, hints
from tokenreduce.core.specs import format_spec, parse_spec

FIELDS = [(name, f.name, str(f.type)) for name, kind in load_all().items() for f in fields(kind)]
every = pytest.mark.parametrize("name", load_all())

#: Values of one kind each, and what an annotation must have for the kind to be right.
KINDS = {
    "int": (3, r"\b(int|float)\b"),
    "float": (0.5, r"\bfloat\b"),
    "nan": (float("nan"), None),
    "inf": (float("inf"), None),
    "bool": (True, r"\bbool\b"),
    "text": ("sixteen", r"\bstr\b"),
    "none": (None, r"\bNone\b"),
    "list": ([2, 1], r"(tuple|Sequence)\["),
    "texts": (["a", "b"], r"(tuple|Sequence)\[str"),
    "nested": ([[1], [2]], r"tuple\[tuple\["),
    "object": (object(), None),
    "mapping": ({"a": 1}, None),
    "bytes": (b"3", None),
    "complex": (1j, None),
    "array": (np.arange(3), None),
}


def outer(note: str) -> str:
    """An annotation without what is inside brackets: list items do not count for a value alone."""
    while note != (note := re.sub(r"\[[^][]*\]", "[", note)):
        pass
    return note


def wrong(note: str) -> dict[str, object]:
    out = {}
    for kind, (value, needs) in KINDS.items():
        seen = note if needs and "[" in needs else outer(note)
        if needs is None or not re.search(needs, seen):
            out[kind] = value
    return out


def refuse_wrong_kinds(kind, name: str, field: str, note: str) -> None:
    bad = wrong(note)
    assert len(bad) >= 8
    for what, value in bad.items():
        with pytest.raises(ValueError, match=rf"^{name}: {field} is ") as error:
            kind(**{field: value})
        assert repr(value) in str(error.value), what
        assert describe(hints(kind)[field]) in str(error.value)
        if what in ("int", "float", "nan", "inf", "bool", "text", "none", "list", "texts", "nested", "mapping"):
            with pytest.raises(ValueError, match=rf"^{name}: {field} is "):
                Reducer.from_json(json.dumps({"method": name, field: value}))
        text = {"int": "3", "float": "0.5", "nan": "nan", "inf": "-inf", "bool": "true", "none": "none", "text": "abc"}
        # A word is text to a setting that is text, and "none" may be one of its words.
        if what in text and not re.search(r"\bstr\b", note) and not (what == "none" and "none" in note):
            with pytest.raises(ValueError, match=rf"^{name}: {field} is "):
                tr.get_method(f"{name}:{field}={text[what]}")


@every
def test_a_wrong_kind_is_refused_by_method_setting_value_and_what_fits(name):
    kind = load_all()[name]
    for f in fields(kind):
        refuse_wrong_kinds(kind, name, f.name, str(f.type))


@every
def test_every_annotation_is_understood_and_its_default_fits(name):
    kind = load_all()[name]
    for f in fields(kind):
        hint = hints(kind)[f.name]
        assert "anything" not in describe(hint), f.name
        assert "values)" not in describe(hint), f.name
        assert fits(fit(f.default, hint)), f.name


#: Texts that are names of a folder, a model or a file.
NAMES = ("clip", "prior", "table", "score_name")


@every
def test_words_of_a_choice_are_checked_too(name):
    kind = load_all()[name]
    for f in fields(kind):
        if re.search(r"\bstr\b", str(f.type)) and f.name not in NAMES:
            with pytest.raises(ValueError, match=f.name):
                kind(**{f.name: "no-such-word"})


@pytest.mark.parametrize(
    ("word", "value"),
    [("yes", True), ("on", True), ("true", True), ("no", False), ("off", False), ("false", False), ("No", False),
     ("OFF", False), ("True", True), ("FALSE", False)],
)  # fmt: skip
def test_words_for_bools_in_text(word, value):
    for name, field, note in FIELDS:
        if note == "bool":
            beside = ",grid_rows=4" if field == "adaptive_pooling" else ""
            assert getattr(tr.get_method(f"{name}:{field}={word}{beside}"), field) is value
    with pytest.raises(ValueError, match="prop_attn is true or false"):
        tr.ToMe(prop_attn=word)  # in Python and JSON a bool is a bool
    with pytest.raises(ValueError, match="prop_attn is true or false"):
        Reducer.from_json({"method": "tome", "prop_attn": word})


@pytest.mark.parametrize("word", ["maybe", "1", "0", "none", "[true]", "''", "t"])
def test_other_words_are_no_bools(word):
    with pytest.raises(ValueError, match="tome: prop_attn is true or false"):
        tr.get_method(f"tome:prop_attn={word}")


def test_messages_say_what_fits():
    with pytest.raises(
        ValueError, match=r"^tome: r is an int or a list of ints or .*, not 'sixteen' \(r is an int >= 0"
    ):
        tr.get_method("tome:r=sixteen")
    with pytest.raises(ValueError, match=r"^mctf: r is an int or a float, not 'abc'"):
        tr.get_method("mctf:r=abc")
    with pytest.raises(ValueError, match=r"^ats: num_tokens is an int or a list of \(ints or none\) or none, not"):
        tr.get_method("ats:num_tokens=[3,x]")
    with pytest.raises(
        ValueError, match=r"^dycoke: dycoke_k is a number, not 'half' \(dycoke_k is a number in \[0, 1\]\)$"
    ):
        tr.DyCoke(dycoke_k="half")
    with pytest.raises(
        ValueError, match=r"^fastv: keep is .*, not nan; numbers are finite \(keep is a number of tokens"
    ):
        tr.parse("tome:r=3+fastv:keep=nan")


def test_numbers_of_numpy_and_torch_become_pythons():
    reducer = tr.ToMe(r=np.int64(3), prop_attn=np.bool_(False))
    assert reducer == tr.ToMe(r=3, prop_attn=False)
    assert type(reducer.r) is int
    for half in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5), np.array(0.5)):
        assert type(tr.FastV(keep=half).keep) is float
        assert json.loads(tr.FastV(keep=half).to_json())["keep"] == 0.5
    assert type(tr.FastV(keep=np.int32(64)).keep) is int
    assert tr.ToMe(r=[np.int64(2), 1]).r == (2, 1)
    for bad in (np.float32("nan"), np.float64("inf"), np.bool_(True), np.array([0.5]), torch.tensor(True), 10**400):
        with pytest.raises(ValueError, match="tau_sim is a number, not "):
            tr.MCTF(tau_sim=bad)


def test_lists_become_tuples_and_a_pair_of_r_and_inflection_is_read():
    assert tr.ToMe(r=[3, 4]) == tr.ToMe(r=(3, 4)) == tr.get_method("tome:r=[3,4]")
    assert tr.ToMe(r=(13, -1.0)) == tr.ToMe(r=13, inflect=-1.0) == tr.get_method("tome:r=[13,-1.0]")
    hash(tr.DiffRate(prune_kept_num=[20, 10], merge_kept_num=[18, 9]))


@dataclass(frozen=True)
class Wordy(Reducer, stage="encoder"):
    """As a plug-in would write it: no check of its own, and a name that only a type checker knows."""

    word: str = "a"
    maybe: str | None = None
    both: int | str = 0
    flag: bool | str = "auto"
    words: tuple[str, ...] = ()
    count: int = 1
    unknown: NotThere = None  # noqa: F821


Wordy.name = "wordy"  # not registered: other tests go through all methods that are
ODD = [
    "a",
    "3",
    "1e3",
    "true",
    "None",
    "nan",
    "a,b",
    "a+b",
    "[x",
    "it's",
    ' "x" ',
    "",
    " ",
    "a=b",
    "'",
    "C:\\x",
    "'a",
    "a'",
]


@pytest.mark.parametrize("word", ODD)
def test_text_settings_round_trip(word):
    for settings in ({"word": word}, {"maybe": word}, {"both": word}, {"words": (word, "b")}):
        reducer = Wordy(**settings)
        name, got = parse_spec(reducer.spec(), Wordy)
        assert (name, Wordy(**got)) == ("wordy", reducer)
        assert pickle.loads(pickle.dumps(reducer)) == reducer
        assert f"{reducer.spec()}+tome".count("+") == reducer.spec().count("+") + 1


def test_a_method_without_a_check_of_its_own_is_checked():
    assert parse_spec("wordy:word=3,both=3,maybe=off,flag=no,count=4,unknown=x", Wordy)[1] == {
        "word": "3", "both": 3, "maybe": "off", "flag": False, "count": 4, "unknown": "x",
    }  # fmt: skip
    assert Wordy(unknown={}).unknown == {}
    for field, value in [("count", "x"), ("word", 3), ("words", "abc"), ("count", 2.0), ("both", 0.5), ("flag", 1)]:
        with pytest.raises(ValueError, match=f"wordy: {field} is "):
            Wordy(**{field: value})


def test_a_setting_given_twice_is_an_error():
    with pytest.raises(ValueError, match="gives r twice"):
        tr.get_method("tome:r=3,r=4")


def test_quotes_only_where_needed():
    assert format_spec("a", {"s": "word", "t": "/x/y-z.pt", "n": "3"}) == "a:s=word,t=/x/y-z.pt,n='3'"
    assert parse_spec("a:s=it's,t=2") == ("a", {"s": "it's", "t": 2}), "an apostrophe within a word is no quote"


@pytest.mark.parametrize("text", ["[1]", "3", '{"method": 3}', '{"r": 1}', '{"method": null}'])
def test_json_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="key 'method'"):
        Reducer.from_json(text)
