"""Labels of the whole prompt on a model that drops columns of it."""

from __future__ import annotations

import pytest
import torch
from vlms import IMAGE, VLMS, encodes_before, prompts
from vlms_masked import close, dropped_by, hidden, layers_of

import tokenreduce as tr


def labelled(inputs):
    """Text is learned, images and padding are not."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return labels.masked_fill((labels == IMAGE) | (labels == 98), -100)


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("name", VLMS)
def test_the_loss_is_that_of_the_columns_that_are_left(name, pad):
    vlm = VLMS[name]
    inputs = prompts(vlm, ((9, "i"), (6, "i")), pad)
    labels = labelled(inputs)
    if name.startswith("gemma3") and not encodes_before():
        with tr.patched(vlm.model, tr.FastV()), pytest.raises(ValueError, match="computes its loss itself"):
            vlm.model(**inputs, labels=labels)
        return
    spec = "divprune:keep=0.5,positions=original+fastv:layer=2,keep=0.5"
    with torch.no_grad():
        with tr.patched(vlm.model, spec), tr.record(vlm.model) as trace:
            out = vlm.model(**inputs, labels=labels)
        plan = trace.plans[0].then(trace.plans[1])
        kept, there = plan.representatives(), plan.validity()
        left = labels.gather(1, kept)
        left = left if there is None else left.masked_fill(~there, -100)
        flat = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1).float(), left[:, 1:].flatten(), ignore_index=-100
        )
        torch.testing.assert_close(out.loss, flat)
        assert (left[:, 1:] != -100).sum() == (labels[:, 1:] != -100).sum(), "every word is still learned"
        full = vlm.model(**inputs, labels=labels).loss
    assert float((full - out.loss).abs()) > 1e-3


def test_words_that_follow_words_are_learned_as_with_masked_keys():
    """Where no word follows a dropped token, the loss is that of the unpatched model with hidden keys."""
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((9, "i"), (6, "i")))
    labels = labelled(inputs)
    first = (inputs["input_ids"] == IMAGE).long().cumsum(1).argmax(1) + 1
    labels[torch.arange(2), first] = -100  # predicted from the image's last token
    with torch.no_grad():
        with tr.patched(vlm.model, "divprune:keep=0.5,positions=original"), tr.record(vlm.model) as trace:
            got = vlm.model(**inputs, labels=labels).loss
        with hidden(layers_of("llava", vlm.model), dropped_by(trace, inputs), 0):
            want = vlm.model(**inputs, labels=labels).loss
    close(got, want)


def test_nothing_dropped_is_the_stock_loss():
    vlm = VLMS["llava"]
    for inputs in (prompts(vlm, ((9, "i"), (6, "i"))), prompts(vlm, ((9, ""), (6, "")))):
        with torch.no_grad():
            want = vlm.model(**inputs, labels=labelled(inputs))
            with tr.patched(vlm.model, "divprune:keep=1.0"):
                got = vlm.model(**inputs, labels=labelled(inputs))
        assert torch.equal(got.loss, want.loss)
        assert torch.equal(got.logits, want.logits)


def test_training_moves_what_is_left():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((9, "i"), (6, "i")))
    with tr.patched(vlm.model, "visionzip:keep=6+fastv:layer=2,keep=3"):
        vlm.model(**inputs, labels=labelled(inputs)).loss.backward()
    grads = [p.grad for p in vlm.model.model.vision_tower.parameters() if p.grad is not None]
    assert grads
    assert any(float(g.abs().sum()) > 0 for g in grads)
    vlm.model.zero_grad()


def test_logits_of_some_columns_are_refused():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((9, "i"), (6, "i")))
    with (
        torch.no_grad(),
        tr.patched(vlm.model, "divprune:keep=4"),
        pytest.raises(ValueError, match="logits_to_keep at 0"),
    ):
        vlm.model(**inputs, labels=labelled(inputs), logits_to_keep=2)
