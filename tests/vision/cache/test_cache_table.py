"""One table that puts every method that thins caches through every invariant; a new method is in by itself."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from cached import LAYOUTS, cached, half_up, image, kept, real
from support import PAPER

import tokenreduce as tr
from tokenreduce.core.registry import get_class

#: They look at the frames of a stream, which these prompts have not, or keep everything in some heads and places in the
#: others; they have tests of their own.
APART = {"infinipot-v", "streammem", "razorattention", "duoattention"}
THIN = [name for name in tr.list_methods(stage="cache") if issubclass(get_class(name, "cache"), tr.CacheReducer)]
#: Those that only decode steps make thin something have tests of their own.
METHODS = [
    name for name in THIN if name not in APART
    if get_class(name, "cache")().moment() != "never" and not get_class(name, "cache")().temporary()
]  # fmt: skip
every = pytest.mark.parametrize("name", METHODS)
#: They look at places alone, not at what keys hold.
BLIND = {"recent", "streamingllm"}
#: Settings that fit the short prompts here, where defaults do not.
SMALL = {"window_size": 4, "base": "snapkv:window_size=4"}
#: They judge by the text behind the last image, and refuse prompts that end in one.
ASKED = {"tgv-kv"}


def layouts_of(name):
    return tuple(row.replace("tvvvv", "vvvvt") if name in ASKED else row for row in LAYOUTS)


def prompt(name, **more):
    return cached(layouts_of(name), **more)


def method(name, **settings):
    kind = get_class(name, "cache")
    fields = kind.__dataclass_fields__
    return kind(**{**{k: v for k, v in SMALL.items() if k in fields}, **settings})


def of_keep(name):
    if "keep" not in get_class(name, "cache").__dataclass_fields__:
        pytest.skip("it has no setting keep")


def one_layer(reducer, evidence):
    """The plan of a layer that the method acts in, as its only one."""
    evidence.layer = next(i for i in range(evidence.depth) if reducer.acts_at(i, evidence.depth))
    return reducer.plan(evidence)


@every
@pytest.mark.parametrize("keep", [5, 0.4, 0.75])
@pytest.mark.parametrize("groups", [1, 2, 7])
def test_text_stays_and_every_head_is_within_its_budget(name, keep, groups):
    of_keep(name)
    evidence = prompt(name, groups=groups)
    reducer = method(name, keep=keep)
    evidences = [prompt(name, groups=groups, layer=i) for i in range(4) if reducer.acts_at(i, 4)]
    plans = reducer.plans(evidences)
    assert len(plans) == len(evidences)
    total = 0
    for plan in plans:
        assert plan.n == evidence.n
        assert plan.batch == len(LAYOUTS) * 2
        for row, there, visual in zip(kept(plan), real(evidence), image(evidence), strict=True):
            assert set(there) - set(visual) <= set(row)
            if not plan.is_identity:
                assert set(row) <= set(there)
            total += len(set(row) & set(visual))
    # Budgets may be shared among layers and heads, never exceeded on the whole (rounding aside).
    asked = sum(half_up(keep, len(v)) for v in image(evidence)) * len(plans)
    assert 0 < total <= asked + len(plans) * plans[0].batch


@every
def test_keep_everything_is_the_identity(name):
    of_keep(name)
    for settings in (dict(keep=1.0), dict(keep=100), dict(keep=1.0, what="all")):
        if "what" in settings and "what" not in get_class(name, "cache").__dataclass_fields__:
            continue
        reducer = method(name, **settings)
        for layer in range(4):
            if reducer.acts_at(layer, 4):
                assert reducer.plan(prompt(name, layer=layer)).is_identity


@every
@pytest.mark.parametrize("what", ["visual", "all"])
def test_a_sample_is_treated_alone_and_in_a_batch_alike(name, what):
    """Padding holds NaN, so that whoever looks at it shows."""
    of_keep(name)
    if what == "all" and "what" not in get_class(name, "cache").__dataclass_fields__:
        pytest.skip("it counts visual keys")
    settings = dict(keep=0.6) if what == "visual" else dict(keep=0.6, what="all")
    together = one_layer(method(name, **settings), prompt(name, layer=2))
    rows = kept(together)
    for b, layout in enumerate(layouts_of(name)):
        bare = layout.lstrip(".")
        alone = one_layer(method(name, **settings), cached((bare,), samples=[b], layer=2))
        shift = len(layout) - len(bare)
        for h in range(2):
            mine = [j - shift for j in rows[2 * b + h] if j >= shift]
            assert kept(alone)[h] == mine, (b, h)
            outputs = [numbered(p.sources()[i, j:]) for p, i, j in ((together, 2 * b + h, shift), (alone, h, 0))]
            assert torch.equal(*outputs), (b, h)


def numbered(sources):
    """Outputs from 0 on, whatever the row is filled up with."""
    there = sources >= 0
    return torch.where(there, sources - sources[there].min(), -1)


@every
def test_text_and_json_round_trips_and_bad_settings(name):
    of_keep(name)
    for reducer in (method(name), method(name, keep=0.125), method(name, keep=7)):
        assert tr.get_method(reducer.spec(), "cache") == reducer
        assert tr.Reducer.from_json(reducer.to_json()) == reducer
        assert pickle.loads(pickle.dumps(reducer)) == reducer
        assert hash(reducer) == hash(tr.get_method(reducer.spec(), "cache"))
    for bad in (0, 1.5, -3, 0.0, True, "much"):
        with pytest.raises(ValueError, match="keep"):
            method(name, keep=bad)
    if "what" in get_class(name, "cache").__dataclass_fields__:
        with pytest.raises(ValueError, match="what='some'"):
            method(name, what="some")
    with pytest.raises(ValueError, match=r"It takes: .*keep"):
        tr.get_method(f"{get_class(name, 'cache').name}:no_such_setting=1")


@every
def test_nan_is_an_error(name):
    of_keep(name)
    if name in BLIND:
        pytest.skip("it decides by place alone")
    evidence = cached(LAYOUTS[:1])
    evidence.keys[0, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        one_layer(method(name, keep=3 if name != "expected-attention" else 4), evidence)


@every
def test_evidence_must_mark_visual_keys(name):
    of_keep(name)
    whole = cached(LAYOUTS[:1])
    blank = tr.CacheEvidence(
        whole.keys, whole.values, queries=whole.queries, kv_heads=2, layer=2, depth=4, rotary=whole.rotary
    )
    with pytest.raises(ValueError, match="visual"):
        one_layer(method(name, keep=5), blank)


@every
def test_evidence_is_only_read(name):
    of_keep(name)
    evidence = prompt(name, layer=2, pad=0.0)
    before = [t.clone() for t in (evidence.keys, evidence.values, evidence.queries)]
    reducer = method(name, keep=5)
    first = one_layer(reducer, evidence)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (evidence.keys, evidence.values, evidence.queries), strict=True)
    )
    assert first == one_layer(reducer, evidence)
    state = torch.get_rng_state()
    assert first == one_layer(reducer, prompt(name, layer=evidence.layer, pad=0.0))
    assert torch.equal(state, torch.get_rng_state())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decides_and_reduces(name, dtype):
    of_keep(name)
    evidence = prompt(name, layer=2, pad=0.0)
    half = tr.CacheEvidence(
        evidence.keys.to(dtype), evidence.values.to(dtype), queries=evidence.queries.to(dtype), kv_heads=2,
        visual=evidence.visual[::2], valid=evidence.there[::2], layer=2, depth=4, rotary=evidence.rotary,
        frame_of=torch.where(evidence.visual[::2], 0, -1),
    )  # fmt: skip
    plan = one_layer(method(name, keep=0.5), half)
    out = plan.reduce(half.values)
    assert out.dtype == dtype
    valid = plan.validity()
    assert torch.isfinite(out if valid is None else out[valid]).all()


@every
def test_documented(name):
    kind = get_class(name, "cache")
    assert kind.__doc__
    assert kind.title
    assert re.fullmatch(PAPER, kind.paper)
    assert "Raises ``ValueError``" in kind.__doc__
    assert kind().moment() in ("layer", "prompt", "never")
    assert kind().every() >= 0
