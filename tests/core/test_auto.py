"""The text ``auto:...``, and who says what it stood for."""

from __future__ import annotations

import logging

import pytest

import tokenreduce as tr
from tokenreduce.core.auto import Chosen, auto_of, is_auto, tell


def test_a_target_is_read():
    found = auto_of(" auto:flops=0.5")
    assert (found.kind, found.share, found.stages, found.on) == ("flops", 0.5, (), "h100")
    found = auto_of("auto:ttft=1,on=l4,stages=[projector,language]")
    assert (found.kind, found.share, found.stages, found.on) == ("ttft", 1.0, ("projector", "language"), "l4")
    assert auto_of("auto:tokens=0.25,stages=projector").stages == ("projector",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("auto", "'auto' gives none"),
        ("auto:speed=2", "auto:kv=SHARE, auto:tokens=SHARE, and stages=, on=; there is no 'speed'"),
        ("auto:flops=0.5,kv=0.5", "gives several"),
        ("auto:flops=0", r"flops is a share of the unreduced FLOPs up to the first token in \(0, 1\], not 0"),
        ("auto:kv=1.5", r"kv is a share .* in \(0, 1\], not 1.5"),
        ("auto:flops=half", "not 'half'"),
        ("auto:flops=true", "not True"),
        ("auto:flops=0.5,stages=tower", "stages= lists some of encoder, projector, language, cache"),
        ("auto:flops=0.5,on=l4", "on= names the device that auto:ttft= is estimated on"),
        ("auto:flops=0.5+tome:r=4", "give it alone"),
        ("tome:r=4+auto:flops=0.5", "give it alone"),
    ],
)
def test_bad_targets(text, said):
    assert is_auto(text)
    with pytest.raises(ValueError, match=said):
        auto_of(text)


def test_other_texts_are_none_of_it():
    assert not any(map(is_auto, ("tome:r=4", "autotome:r=4", "a.json", None, tr.ToMe(r=4))))
    with pytest.raises(ValueError, match=r"is chosen for a model: tr.patch\(model, 'auto:flops=0.5'\)"):
        tr.parse("auto:flops=0.5")
    with pytest.raises(ValueError, match="not 2"):
        tr.reduce_tokens("auto:flops=2")


def test_what_was_chosen_is_logged_or_printed(capsys, caplog):
    made = Chosen("auto:flops=0.5", tr.parse("tome:keep=0.5", "random@projector:keep=0.25"), 0.5, "it is so")
    assert made.spec == "tome@encoder:keep=0.5+random@projector:keep=0.25"
    assert tr.parse(made.spec) == made.reducers
    tell(made)
    assert capsys.readouterr().err == f"{made}\n"
    with caplog.at_level(logging.INFO, "tokenreduce"):
        tell(made)
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [("tokenreduce", "INFO", str(made))]
    assert capsys.readouterr().err == ""
