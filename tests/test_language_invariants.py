"""One table that puts every registered language-stage method through every invariant; a new method is in by itself."""

from __future__ import annotations

import copy
import pickle
import re
from itertools import product

import pytest
import torch
from mixed import LAYOUTS, RIGHT, kept_of, marks, mixed
from support import PAPER
from threads import mixed_up
from vlms import batch, llava

import tokenreduce as tr
from tokenreduce.core.plan import Plan
from tokenreduce.core.registry import get_class

METHODS = tr.list_methods(stage="language")
#: They put tokens into the places of others.
MOVING = ("apet-llm",)
#: Their ``keep`` is the mean over layers; `vtw` leaves no visual token in the end.
MEAN = ("v2drop", "vtw")
every = pytest.mark.parametrize("name", METHODS)
SHAPES = [
    LAYOUTS, RIGHT, ("vt", "vt"), ("v", "v"), ("tv", ".v"), ("vvvvvvv", "ttttttt"),
    ("tvvvvvvvvvvvvt", "tvtvtvtttttttt"), ("...tvvt", "tvvvvvt", "vvvvttt"),
]  # fmt: skip


def with_keep(name, keep):
    return get_class(name, "language")(keep=keep)


def acting_layers(reducer, depth=4):
    return [i for i in range(depth) if reducer.acts_at(i, depth)]


def there_of(plan):
    valid = plan.validity()
    return torch.ones(plan.batch, plan.k, dtype=torch.bool) if valid is None else valid


def check_well_formed(reducer, layouts):
    name = reducer.name
    for layer in acting_layers(reducer):
        evidence = mixed(layouts, layer=layer)
        plan = reducer.plan(evidence)
        out, there, sources = plan.reduce(evidence.x), there_of(plan), plan.sources()
        visual = marks(layouts, "v")
        for b, layout in enumerate(layouts):
            kept = kept_of(plan, b)
            assert kept == sorted(set(kept))
            assert [i for i in kept if layout[i] != "v"] == [i for i, c in enumerate(layout) if c != "v"]
            assert any(layout[i] == "v" for i in kept) == ("v" in layout) or name == "vtw"
            assert there[b].tolist() == sorted(there[b].tolist())
            slots = there[b].nonzero().flatten().tolist()
            if name not in MOVING:
                assert sources[b, kept].tolist() == slots
                assert set(sources[b].tolist()) - {-1} == set(slots)
            for slot, i in zip(slots, kept, strict=True):
                if layout[i] != "v":
                    assert torch.equal(out[b, slot], evidence.x[b, i])
            assert (sources[b][~visual[b]] >= 0).all()
        assert torch.isfinite(out[there]).all()


@every
def test_plans_are_well_formed(name):
    """Text and padding stay untouched, the order stays, some visual tokens stay, every output has a source, slots that
    are not there come first."""
    for keep, layouts in product([0.5, 1, 3], SHAPES):
        check_well_formed(with_keep(name, keep), layouts)


@every
def test_keep_everything_is_the_identity(name):
    for keep in (1.0, 1000):
        reducer = with_keep(name, keep)
        for layer in acting_layers(reducer):
            for layouts in SHAPES:
                assert reducer.plan(mixed(layouts, layer=layer)).is_identity


@pytest.mark.parametrize("name", [n for n in METHODS if n not in MEAN])
def test_the_last_layer_leaves_what_keep_says(name):
    for keep, want in ((0.5, (5, 5)), (4, (4, 4)), (9, (9, 9)), (1, (1, 1)), (0.25, (3, 2))):
        reducer = with_keep(name, keep)
        plan = reducer.plan(mixed(layer=acting_layers(reducer)[-1]))  # of 10 and 9 visual tokens
        assert tuple(len([i for i in kept_of(plan, b) if LAYOUTS[b][i] == "v"]) for b in range(2)) == want


@every
@pytest.mark.parametrize("layouts", SHAPES, ids=str)
def test_a_sample_is_treated_alone_and_in_a_batch_alike(name, layouts):
    reducer = with_keep(name, 0.4)
    for layer in acting_layers(reducer):
        evidence = mixed(layouts, layer=layer)
        together = reducer.plan(evidence)
        for b in range(len(layouts)):
            alone = reducer.plan(mixed(layouts, layer=layer, rows=slice(b, b + 1)))
            assert kept_of(alone, 0) == kept_of(together, b)
            first = int((~there_of(together)[b]).sum())
            want = torch.where(together.sources()[b] < 0, -1, together.sources()[b] - first)
            assert torch.equal(alone.sources()[0], want)
            x = evidence.x[b : b + 1]
            torch.testing.assert_close(alone.reduce(x)[0], together.reduce(evidence.x)[b, first:])


@every
def test_padding_does_not_matter(name):
    """The same sample with padding on either side, which holds large numbers."""
    reducer = with_keep(name, 0.4)
    row = "ttvvvvvvvvvvvvtvvttt"
    n = len(row)
    for layer in acting_layers(reducer):
        plain = mixed((row,), layer=layer)
        want = kept_of(reducer.plan(plain), 0)
        for left, right in ((3, 0), (0, 2), (1, 4)):

            def pad(t, dim, left=left, right=right):
                shape = list(t.shape)
                parts = []
                for width in (left, right):
                    shape[dim] = width
                    parts.append(torch.full(shape, 50.0))
                return torch.cat([parts[0], t, parts[1]], dim)

            layout = "." * left + row + "." * right
            padded = mixed(
                (layout,), layer=layer, keys=pad(plain.keys, 2), queries=pad(plain.queries, 2),
                values=pad(plain.values, 2), norm=plain._norm, before=pad(plain.before, 1),
            )  # fmt: skip
            padded.x = pad(plain.x, 1)
            padded.prompt = type(plain.prompt)(padded.visual, padded.valid, pad(plain.prompt.x, 1))
            got = [i - left for i in kept_of(reducer.plan(padded), 0)]
            assert [i for i in got if 0 <= i < n] == want


@every
def test_plans_survive_safetensors(name, tmp_path):
    reducer = with_keep(name, 0.5)
    plan = reducer.plan(mixed(layer=acting_layers(reducer)[-1]))
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors") == plan


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_half_precision_out(name, dtype):
    reducer = with_keep(name, 0.5)
    e = mixed(layer=acting_layers(reducer)[0])
    prompt = type(e.prompt)(e.prompt.visual, e.prompt.valid, e.prompt.x.to(dtype))
    x = e.x.to(dtype)
    e = mixed(
        layer=e.layer, keys=e.keys.to(dtype), queries=e.queries.to(dtype), values=e.values.to(dtype), prompt=LAYOUTS,
        norm=e._norm,
    )  # fmt: skip
    e.x, e.prompt = x, prompt
    out = reducer.plan(e).reduce(x)
    assert out.dtype == dtype
    assert torch.isfinite(out.float()).all()


@every
def test_text_and_json_round_trips(name):
    for reducer in (get_class(name, "language")(), with_keep(name, 0.25), with_keep(name, 7)):
        assert tr.get_method(reducer.spec()) == reducer
        assert tr.Reducer.from_json(reducer.to_json()) == reducer
        assert hash(reducer) == hash(copy.deepcopy(reducer))
        assert pickle.loads(pickle.dumps(reducer)) == reducer


@every
def test_bad_budgets_are_refused(name):
    for bad in (0, 1.5, -3, 0.0, True):
        with pytest.raises(ValueError, match="keep"):
            with_keep(name, bad)


@every
def test_unknown_settings_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"It takes: .*keep"):
        tr.get_method(f"{name}:no_such_setting=1", "language")


@every
def test_nan_features_are_an_error_and_not_a_silent_choice(name):
    reducer = with_keep(name, 0.5)
    evidence = mixed(layer=acting_layers(reducer)[0])
    for tensor in (evidence.x, evidence.keys, evidence.queries, evidence.values, evidence.prompt.x):
        tensor[0, ..., 3, :] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        reducer.plan(evidence)


@every
def test_evidence_without_visual_tokens_marked(name):
    reducer = with_keep(name, 0.5)
    with pytest.raises(ValueError, match="marks no visual tokens"):
        reducer.plan(mixed(layer=acting_layers(reducer)[0], visual=None, prompt=LAYOUTS))


@every
def test_documented(name):
    kind = get_class(name, "language")
    assert kind.__doc__
    assert not kind.__doc__.startswith(kind.__name__ + "(")
    assert kind.title
    assert re.fullmatch(PAPER, kind.paper)
    assert "Raises ``ValueError``" in kind.__doc__


# -- in a model ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    return llava()


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@every
def test_in_a_model_keep_is_what_is_left(name, model):
    inputs = batch("left", ((9, 1), (9, 1)))
    for keep, want in ((0.5, 8), (5, 5)):
        with tr.patched(model, with_keep(name, keep)), tr.record(model, flops=False) as trace:
            logits = logits_of(model, inputs)
        if name in MEAN:
            left = [16] * 4
            for step in trace.steps:
                left[step.layer :] = [step.tokens - 9] * (4 - step.layer)
            assert abs(sum(left) / 4 - want) <= 2, "half a layer"
            continue
        assert trace.tokens[-1] == 9 + want
        assert logits.shape[1] == 9 + want


@every
def test_in_a_model_no_image_is_no_reduction(name, model):
    inputs = batch("left", ((6, 0), (4, 0)))
    want = logits_of(model, inputs)
    with tr.patched(model, with_keep(name, 0.3)):
        assert torch.equal(logits_of(model, inputs), want)


@every
def test_in_a_model_threads_do_not_mix(name, model):
    inputs = [batch("left", rows) for rows in (((9, 1), (5, 2)), ((6, 1), (8, 2)), ((4, 1),))]
    with tr.patched(model, with_keep(name, 0.3)):
        assert mixed_up(lambda i: logits_of(model, i), inputs) == []


@every
def test_in_a_model_half_precision_is_finite(name, model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs = batch("left", ((9, 1), (5, 2)))
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with tr.patched(half, with_keep(name, 0.3)):
        assert torch.isfinite(logits_of(half, inputs)).all()
