"""DSTP: FastV in prefill, a plain rule in decode, and swaps in models against a plain decoder."""

from __future__ import annotations

import pytest
import torch
from decode_reference import Entries, decode
from mixed import kept_of, mixed
from vlms import VLMS, prompts
from vlms_masked import close, layers_of

import tokenreduce as tr
from tokenreduce.core.evidence import Earlier

STEPS = 7


def test_the_prefill_is_fastv():
    assert tr.DSTP(keep=4).plan(mixed()) == tr.FastV(keep=4).plan(mixed())
    assert tr.DSTP(keep=1.0).plan(mixed()).is_identity
    assert [i for i in range(4) if tr.DSTP(layer=3).acts_at(i, 4)] == [3]


def step(held, row, earlier=None, row_before=None, **settings):
    n = len(held)
    e = tr.Evidence(
        torch.zeros(1, n, 0), attention=torch.tensor(row)[None, None, None], visual=torch.ones(1, n, dtype=torch.bool),
        held=torch.tensor([held]) > 0, layer=2, depth=4,
        earlier=None if earlier is None else Earlier(torch.tensor([row_before]), torch.tensor([earlier]) > 0),
    )  # fmt: skip
    e.visual[0, -1] = False
    return kept_of(tr.DSTP(**settings).plan(e), 0)[:-1]


def test_a_shift_is_too_little_agreement():
    held, far, near = (
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [0.0, 0.1, 0, 0, 0.9, 0.8, 0.7, 0, 0],
        [0.5] * 3 + [0.0, 0.9] + [0.0] * 4,
    )
    assert step(held, far) == [1, 4, 5, 6], "1 of 4 agrees"
    assert step(held, near) == [0, 1, 2, 3], "3 of 4 agree"
    assert step(held, near, overlap=0.8) == [0, 1, 2, 4]
    assert step(held, far, overlap=0.0) == [0, 1, 2, 3]
    assert step(held, far, overlap=0.25) == [0, 1, 2, 3], "less than a quarter is asked for"
    assert step(held, [0.0] * 9) == [0, 1, 2, 3], "ties go to the lower index"


def test_patience_waits_for_a_second_step():
    held, far = [1, 1, 1, 1, 0, 0, 0, 0, 0], [0.0, 0.1, 0, 0, 0.9, 0.8, 0.7, 0, 0]
    near = [0.9, 0.8, 0.7, 0.6, 0, 0, 0, 0, 0.0]
    assert step(held, far, patience=2) == [0, 1, 2, 3]
    assert step(held, far, held, near, patience=2) == [0, 1, 2, 3]
    assert step(held, far, held, far, patience=2) == [1, 4, 5, 6]


def plain(keep, overlap, visual, patience=1):
    def choose(layer, row, memory):
        among = [c for c in row if c < len(visual) and visual[c]]
        text = set(row) - set(among)
        many = len(memory["set"]) if "set" in memory else max(1, int(len(among) * keep + 0.5)) if among else 0
        asked = set(sorted(among, key=lambda c: (-row[c], c))[:many])
        low = "set" in memory and len(asked & memory["set"]) < overlap * max(many, 1)
        memory["swaps"] = memory.get("swaps", 0)
        if "set" not in memory or (low and (patience == 1 or memory.get("low"))):
            memory["swaps"] += "set" in memory
            memory["set"], low = asked, False
        memory["low"] = low
        return text | memory["set"]

    return choose


def generate(model, inputs):
    with torch.no_grad(), tr.record(model, flops=False) as trace:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1), trace


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(("overlap", "patience"), [(0.9, 1), (1.0, 2), (0.5, 1)])
def test_swaps_are_those_of_a_plain_decoder(name, overlap, patience):
    vlm = VLMS[name]
    inputs = prompts(vlm, ((9, "i"), (5, "ii")))
    with (
        tr.patched(vlm.model, tr.DSTP(keep=0.3, overlap=overlap, patience=patience)),
        Entries(layers_of(name, vlm.model)) as entries,
    ):
        _, logits, trace = generate(vlm.model, inputs)
    swaps = 0
    for b in range(2):
        real = inputs["attention_mask"][b].bool()
        visual = (inputs["input_ids"][b] == 99) & real
        how = dict(bounds=(2,), choose=plain(0.3, overlap, visual, patience), revive=True, prunes=True)
        want, decoder = decode(vlm.model, entries, b, real, visual, **how)
        close(logits[b], want)
        swaps += decoder.memory[2]["swaps"]
    if overlap == 0.9:
        assert swaps
    for one in trace.decode:
        present = (inputs["input_ids"] == 99).sum(1)
        assert (one.seen.sum(1) == (present * 0.3 + 0.5).long()).all(), "as many are seen in every step"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_without_a_shift_it_is_fastv_to_the_bit(name):
    vlm = VLMS[name]
    inputs = prompts(vlm, ((9, "i"), (5, "ii")))
    with tr.patched(vlm.model, "dstp:keep=0.3,overlap=0.0"):
        got = generate(vlm.model, inputs)
    with tr.patched(vlm.model, "fastv:keep=0.3"):
        want = generate(vlm.model, inputs)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("bad", [{"overlap": 1.5}, {"patience": 3}, {"layer": 0}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        tr.DSTP(**bad)
