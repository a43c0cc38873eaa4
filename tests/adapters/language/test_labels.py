"""Labels and logits of the whole prompt on a model that drops columns of it."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from vlms import IMAGE, VIDEO, VLMS, llava, prompts
from vlms_masked import close, dropped_by, hidden, layers_of

import tokenreduce as tr

cross_entropy = torch.nn.functional.cross_entropy
MIXED = "divprune:keep=0.5,positions=original+fastv:layer=2,keep=0.5"
STAGES = ("fastv:layer=2,keep=0.5", "divprune:keep=4", "divprune:keep=4,positions=original", "tome:r=2", MIXED)
ROWS = ((9, "i"), (6, "ii"))


def labelled(inputs):
    """Text is learned, images and padding are not."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return labels.masked_fill((labels == IMAGE) | (labels == VIDEO), -100)


def shifted(labels):
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()


def outside(logits, labels):
    """The loss as trainers compute it."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def fitting(name, stages=STAGES):
    """``stages`` without compact positions where a family has none."""
    flat = not name.startswith(("qwen", "gemma3")) and name not in ("llava_next_window", "paligemma2")
    return [s for s in stages if flat or s != "divprune:keep=4"]


def by_loop(rows, kept, labels):
    """The loss of ``labels`` (B,L), each predicted by the row, ``rows[b][column]``, of the last column before it that
    is kept; a label of a column that is not kept does not count."""
    losses = []
    for b, row in enumerate(labels.tolist()):
        for column, label in enumerate(row):
            before = [c for c in kept[b] if c < column]
            if label != -100 and column in kept[b] and before:
                losses.append(cross_entropy(rows[b][before[-1]].float()[None], torch.tensor([label])))
    return torch.stack(losses).mean()


def read(out):
    """``(rows, kept)`` of an output at the columns that are left."""
    columns, valid = tr.kept_columns(out)
    assert out.logits.shape[:2] == columns.shape == valid.shape
    kept = [c[v].tolist() for c, v in zip(columns, valid, strict=True)]
    assert all(k == sorted(set(k)) for k in kept)
    rows = [dict(zip(k, x[v], strict=True)) for k, x, v in zip(kept, out.logits, valid, strict=True)]
    return rows, kept


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("name", VLMS)
def test_losses_are_those_of_the_columns_that_are_left(name, pad):
    vlm = VLMS[name]
    inputs = prompts(vlm, ROWS, pad)
    labels = labelled(inputs)
    g = torch.Generator().manual_seed(3)
    for spec in fitting(name):
        with torch.no_grad(), tr.patched(vlm.model, spec):
            rows, kept = read(vlm.model(**inputs))
            out = vlm.model(**inputs, labels=labels)
            assert out.logits.shape[:2] == labels.shape
            close(out.loss, by_loop(rows, kept, labels))
            close(vlm.model(**inputs, labels=labels, shift_labels=shifted(labels)).loss, out.loss)
            close(outside(out.logits, labels), out.loss)
            for b, row in enumerate(rows):
                close(out.logits[b, kept[b]], torch.stack(list(row.values())))
            noise = torch.randint(1, 90, labels.shape, generator=g)
            gone = torch.tensor([[c not in k for c in range(labels.shape[1])] for k in kept])
            loud, given = torch.where(gone, noise, labels), torch.where(gone, noise, labels)
            assert torch.equal(vlm.model(**inputs, labels=loud).loss, out.loss), "labels of dropped tokens count"
            close(vlm.model(**inputs, labels=loud, shift_labels=shifted(loud)).loss, out.loss)
            assert torch.equal(loud, given), "the caller's labels were written to"


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("name", VLMS)
def test_losses_are_those_of_hidden_keys(name, pad):
    """The unpatched model with the dropped tokens hidden as keys predicts the same from every column that is left."""
    vlm = VLMS[name]
    inputs = prompts(vlm, ROWS, pad)
    labels = labelled(inputs)
    for spec, layer in (("fastv:layer=2,keep=0.5", 2), ("divprune:keep=0.5,positions=original", 0)):
        with torch.no_grad():
            with tr.patched(vlm.model, spec), tr.record(vlm.model) as trace:
                got = vlm.model(**inputs, labels=labels)
            dropped = dropped_by(trace, inputs)
            with hidden(layers_of(name, vlm.model), dropped, layer):
                want = vlm.model(**inputs).logits
        kept = [(~d).nonzero()[:, 0].tolist() for d in dropped]
        close(got.loss, by_loop(want, kept, labels))
        assert all((labels != -100).any(1)), "nothing is learned"


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


def picks(batch, length):
    """What may be given as ``logits_to_keep``."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[0, 3:9], mask[1, -5:] = True, True
    return {
        "last": 1, "some": 5, "image": 24, "all": length, "from": -4, "columns": torch.tensor([2, 0, 9, length - 1]),
        "flags": torch.arange(length) % 3 == 0, "per row": torch.tensor([[1, 5, 30], [8, 2, length - 1]]),
        "mask": mask,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "paligemma", "gemma3", "internvl"])
def test_logits_to_keep_names_columns_of_the_prompt(name):
    modeling = pytest.importorskip("transformers.modeling_utils")
    if not hasattr(modeling, "slice_logits_to_keep"):
        pytest.skip("this release of transformers slices in every model by itself")
    slice_logits_to_keep = modeling.slice_logits_to_keep

    vlm = VLMS[name]
    for pad in ("left", "right"):
        inputs = prompts(vlm, ROWS, pad)
        labels = labelled(inputs)
        for spec in fitting(name):
            with torch.no_grad(), tr.patched(vlm.model, spec):
                whole = vlm.model(**inputs, labels=labels).logits
                rows, kept = read(vlm.model(**inputs))
                for what, keep in picks(*labels.shape).items():
                    got = vlm.model(**inputs, logits_to_keep=keep).logits
                    close(got, slice_logits_to_keep(whole, keep))
                    if what == "last":
                        close(got[:, 0], torch.stack([list(r.values())[-1] for r in rows]))
                part = vlm.model(**inputs, labels=labels[:, -24:], logits_to_keep=24)
                close(part.loss, outside(whole[:, -24:], labels[:, -24:]))
                alone = [[c - (labels.shape[1] - 24) for c in k if c >= labels.shape[1] - 24] for k in kept]
                mine = [{c: whole[b, labels.shape[1] - 24 + c] for c in k} for b, k in enumerate(alone)]
                if all(k[0] == 0 for k in alone):  # else a dropped column of the part stands for one before it
                    close(part.loss, by_loop(mine, alone, labels[:, -24:]))
                after = shifted(labels)[:, -24:].contiguous()
                got = vlm.model(**inputs, labels=after, shift_labels=after, logits_to_keep=24).loss
                close(got, cross_entropy(whole[:, -24:].flatten(0, 1), after.flatten()))
                some = torch.tensor([20, 21, 22, labels.shape[1] - 1])
                got = vlm.model(**inputs, labels=labels[:, some], logits_to_keep=some).loss
                close(got, outside(whole[:, some], labels[:, some]))


def test_labels_of_other_columns_than_the_logits_are_refused():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((9, "i"), (6, "i")))
    labels = labelled(inputs)
    with torch.no_grad(), tr.patched(vlm.model, "divprune:keep=4"):
        for given, keep in ((labels, 2), (labels[:, -5:], 4), (labels[:, 1:], 0)):
            with pytest.raises(ValueError, match="logits_to_keep"):
                vlm.model(**inputs, labels=given, logits_to_keep=keep)
        assert vlm.model(**inputs).logits.shape[1] == 13, "a failed call speaks for the next one"


def test_what_asks_for_the_callers_columns():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((9, "i"), (6, "i")))
    length, settings = inputs["input_ids"].shape[1], dict(max_new_tokens=4, do_sample=False)
    labels = labelled(inputs)
    with torch.no_grad():
        with tr.patched(vlm.model, "divprune:keep=4"):
            assert vlm.model(**inputs).logits.shape[1] == 13
            assert vlm.model(**inputs, logits_to_keep=1).logits.shape[1] == 1
            want = vlm.model.generate(**inputs, **settings)
            whole = vlm.model(**inputs, labels=labels)
            tuples = vlm.model(**inputs, labels=labels, return_dict=False)
            assert torch.equal(tuples[0], whole.loss)
            assert torch.equal(tuples[1], whole.logits)
            names = list(inputs)  # in the order of LLaVA's forward: ids, pixels, mask
            assert names[:3] == ["input_ids", "attention_mask", "pixel_values"]
            by_place = (inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], None, None, None)
            at = vlm.model(*by_place, labels=labels)
            assert torch.equal(at.loss, whole.loss)
            vlm.model.train()
            try:
                assert vlm.model(**inputs).logits.shape[1] == length
                assert torch.equal(vlm.model.generate(**inputs, **settings), want)
            finally:
                vlm.model.eval()
        with tr.patched(vlm.model, "divprune:keep=4", logits="caller"):
            got = vlm.model(**inputs)
            assert torch.equal(got.logits, whole.logits)
            assert tr.kept_columns(got)[0].shape == (2, 13)
            assert torch.equal(vlm.model.generate(**inputs, **settings), want)
    with pytest.raises(ValueError, match="choose 'auto' or 'caller'"):
        tr.patch(vlm.model, "divprune:keep=4", logits="all")
    with pytest.raises(ValueError, match="language head"):
        tr.patch(vlm.model.model, "divprune:keep=4", logits="caller")
    with pytest.raises(ValueError, match="image/video language models"):
        tr.patch(vlm.model.model.vision_tower, "tome:r=2", logits="caller")


def test_copies_of_a_patched_model():
    model = llava()
    inputs = prompts(VLMS["llava"], ((9, "i"), (6, "i")))
    tr.patch(model, "divprune:keep=4", logits="caller")
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        want = model(**inputs)
        for twin in twins:
            assert torch.equal(twin(**inputs).logits, want.logits)
            assert torch.equal(tr.kept_columns(twin)[0], tr.kept_columns(want)[0])
            assert torch.equal(tr.unpatch(twin)(**inputs).logits, VLMS["llava"].model(**inputs).logits)


def test_rows_of_dropped_tokens_predict_what_follows_or_nothing():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((9, "i"), (6, "i")))
    with torch.no_grad(), tr.patched(vlm.model, "divprune:keep=4", logits="caller"):
        out = vlm.model(**inputs)
        columns, valid = tr.kept_columns(out)
    assert valid.all()
    for logits, kept, real in zip(out.logits, columns.tolist(), inputs["attention_mask"], strict=True):
        last = -1
        for column, row in enumerate(logits):
            last = column if column in kept else last
            if column in kept:
                assert float(row.abs().max()) > 0.1 or not real[column]
            elif column + 1 in kept:
                assert torch.equal(row, logits[last])
            else:
                assert not row.any()


def test_nothing_dropped_is_stock():
    for name in ("llava", "qwen2_5_vl", "paligemma", "gemma3", "internvl"):
        vlm = VLMS[name]
        for inputs in (prompts(vlm, ROWS), prompts(vlm, ROWS, "right"), prompts(vlm, ((9, ""), (6, "")))):
            labels = labelled(inputs)
            more = (
                {"labels": labels},
                {"labels": labels, "shift_labels": shifted(labels)},
                {"labels": labels[:, -6:], "logits_to_keep": 6},
                {"labels": labels, "num_items_in_batch": torch.tensor(7)},
                {"logits_to_keep": torch.tensor([1, 3])},
            )
            with torch.no_grad():
                want = [vlm.model(**inputs, **m) for m in more]
                for spec in ("divprune:keep=1.0", "fastv:keep=1.0"):
                    with tr.patched(vlm.model, spec, logits="caller"):
                        got = [vlm.model(**inputs, **m) for m in more]
                        columns, valid = tr.kept_columns(got[-1])
                        assert torch.equal(columns, torch.arange(labels.shape[1]).expand_as(columns))
                        assert valid.all()
                        assert torch.equal(tr.kept_columns(vlm.model)[0], columns)
                    for g, w in zip(got, want, strict=True):
                        assert torch.equal(g.logits, w.logits)
                        assert w.loss is None or torch.equal(g.loss, w.loss)


def test_the_sum_over_a_batch_of_batches():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((9, "i"), (6, "i")))
    labels = labelled(inputs)
    with torch.no_grad(), tr.patched(vlm.model, "divprune:keep=4"):
        mean = vlm.model(**inputs, labels=labels).loss
        count = (labels[:, 1:] != -100).sum()
        close(vlm.model(**inputs, labels=labels, num_items_in_batch=3 * count).loss, mean / 3)
        with pytest.warns(UserWarning, match="placeholders to -100"):
            vlm.model(**inputs, labels=inputs["input_ids"], num_items_in_batch=torch.tensor(20))


class Around(torch.nn.Module):
    """What PEFT does: it calls the forward of the model itself, by its hooks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_wrappers_that_pass_by_hooks(name):
    model = VLMS[name].model
    around = Around(model)
    inputs = prompts(VLMS[name], ROWS)
    labels = labelled(inputs)
    loud, some = inputs["input_ids"].clone(), torch.tensor([0, 7, 9, 20])
    more = (
        {"labels": labels}, {"labels": loud}, {"labels": loud, "shift_labels": shifted(loud)}, {"logits_to_keep": 9},
        {"labels": loud[:, -9:], "logits_to_keep": 9}, {"logits_to_keep": some}, {"logits_to_keep": 1}, {},
        {"num_items_in_batch": torch.tensor(9)},
    )  # fmt: skip
    for logits in ("auto", "caller"):
        with torch.no_grad(), tr.patched(model, MIXED, logits=logits):
            for given in more:
                want, got = model(**inputs, **given), around(**inputs, **given)
                assert torch.equal(got.logits, want.logits)
                assert want.loss is None or torch.equal(got.loss, want.loss)
                assert torch.equal(tr.kept_columns(around)[0], tr.kept_columns(want)[0])
            assert torch.equal(loud, inputs["input_ids"])
            around.train()
            try:
                assert around(**inputs).logits.shape[1] == labels.shape[1]
                assert model.model(**inputs).last_hidden_state.shape[1] < labels.shape[1], "nobody asked"
            finally:
                around.eval()


def test_unpatched_is_as_before():
    model = llava()
    inputs = prompts(VLMS["llava"], ((9, "i"), (6, "i")))
    with torch.no_grad():
        want = model(**inputs, labels=labelled(inputs))
        before = {n: set(m.__dict__) for n, m in model.named_modules()}
        with tr.patched(model, MIXED, logits="caller"):
            model(**inputs, labels=labelled(inputs))
            with pytest.raises(ValueError, match="Image features"):
                model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"][:1])
        got = model(**inputs, labels=labelled(inputs))
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.logits, want.logits)
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == before
    for m in (model, model.model):
        assert not m._forward_hooks
        assert not m._forward_pre_hooks
        assert not m._forward_hooks_always_called


def test_kept_columns():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ROWS)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), tr.patched(vlm.model, MIXED):
        with tr.record(vlm.model) as trace:
            out = vlm.model(**inputs)
        plan = trace.plans[0].then(trace.plans[1])
        stay = plan.sources() >= 0
        columns, valid = tr.kept_columns(out)
        assert not valid.all(), "samples keep different numbers"
        assert torch.equal(columns[valid], stay.nonzero()[:, 1])
        assert columns.dtype == torch.long
        done = vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        for source in (done, vlm.model, out):
            assert torch.equal(tr.kept_columns(source)[0][valid], columns[valid])
        text = prompts(vlm, ((9, ""), (6, "")))
        vlm.model.generate(**text, max_new_tokens=3, do_sample=False)
        assert tr.kept_columns(vlm.model)[0].shape == text["input_ids"].shape
        assert torch.equal(tr.kept_columns(out)[0], columns), "an output speaks for itself"
        seen = {}

        def work():
            try:
                tr.kept_columns(vlm.model)
            except ValueError as e:
                seen["first"] = str(e)
            with torch.no_grad():
                vlm.model(**prompts(vlm, ((7, "i"),)))
            seen["then"] = tr.kept_columns(vlm.model)[0].shape[0]

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert "in this thread" in seen["first"]
        assert seen["then"] == 1
        assert tr.kept_columns(vlm.model)[0].shape[0] == 2
        inner = vlm.model.model(**inputs)
        assert inner.last_hidden_state.shape[1] == tr.kept_columns(inner)[0].shape[1] < length
    with pytest.raises(ValueError, match="not patched"):
        tr.kept_columns(vlm.model)
    with pytest.raises(ValueError, match="does not say"):
        tr.kept_columns(vlm.model(**inputs))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_gradients_of_layers_that_run_again(name):
    """Gradient checkpointing changes no loss and no gradient; both losses have the same gradient."""
    model = copy.deepcopy(VLMS[name].model).train()
    inputs = prompts(VLMS[name], ROWS)
    labels, found = labelled(inputs), []
    tr.patch(model, "divprune:keep=0.5+fastv:layer=2,keep=0.5" if name == "llava" else MIXED)
    for again in (False, True):
        for computed in (False, True):
            if again:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            out = model(**inputs, labels=None if computed else labels, use_cache=False)
            loss = outside(out.logits, labels) if computed else out.loss
            loss.backward()
            found.append(
                (loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            )
    for loss, grads in found[1:]:
        close(loss, found[0][0])
        assert grads.keys() == found[0][1].keys()
        for n, g in grads.items():
            close(g, found[0][1][n])


def test_training_moves_what_is_left():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((9, "i"), (6, "i")))
    with tr.patched(vlm.model, "visionzip:keep=6+fastv:layer=2,keep=3"):
        vlm.model(**inputs, labels=labelled(inputs)).loss.backward()
    grads = [p.grad for p in vlm.model.model.vision_tower.parameters() if p.grad is not None]
    assert grads
    assert any(float(g.abs().sum()) > 0 for g in grads)
    vlm.model.zero_grad()
