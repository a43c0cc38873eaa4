"""One table that puts every registered projector-stage method through every invariant; a new method is in by itself."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from itertools import product

import pytest
import torch
from support import PAPER
from visual import ORIGINS, frames, visual

import tokenreduce as tr
from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.evidence import Evidence
from tokenreduce.core.plan import Chain, Plan
from tokenreduce.core.registry import get_class

METHODS = tr.list_methods(stage="projector")
#: What they keep depends on places alone.
BLIND = ("adaptvision", "pool", "resize", "uniform", "uniform-frames", "token-shuffle", "pool-frames")
TEMPORAL = [n for n in METHODS if get_class(n, "projector").temporal]
CASES = [
    (name, origin)
    for name in METHODS
    for origin in ("square", "wide", *(("frames", "film", "ticks") if name in TEMPORAL else ("large", "units")))
]
every = pytest.mark.parametrize("name", METHODS)
origins = pytest.mark.parametrize(("name", "origin"), CASES)


def with_keep(name, keep) -> Projector:
    return get_class(name, "projector")(keep=keep)


def there_of(plan) -> torch.Tensor:
    """(B,K): which slots hold a token."""
    valid = plan.validity()
    return torch.ones(plan.batch, plan.k, dtype=torch.bool) if valid is None else valid


@pytest.mark.parametrize("name", TEMPORAL)
def test_any_number_of_frames(name):
    """Fewer frames than a method's window, odd numbers, one: all defined."""
    for keep, count, n in product([0.5, 0.2, 3], [1, 2, 3, 4, 5, 8, 9, 17], [(3, 3), (1, 1)]):
        reducer = with_keep(name, keep)
        evidence = given(reducer, visual(frames(count, *n)))
        if not serves(reducer, evidence):
            pytest.skip(f"{name} needs {reducer.required()}")
        left = there_of(reducer.plan(evidence)).sum(1)
        assert (left == min(reducer.total(evidence.n), evidence.n)).all(), (keep, count, n)


@pytest.mark.parametrize("name", TEMPORAL)
def test_plans_of_videos_are_sparse(name):
    """No K x N numbers: a plan grows with its video and not with the square of it."""
    reducer = with_keep(name, 0.25)

    def numbers(count):
        plan = reducer.plan(given(reducer, visual(frames(count, 3, 3), batch=1)))
        parts = plan.plans if isinstance(plan, Chain) else (plan,)
        return sum(t.numel() for part in parts for t in part._tensors().values())

    assert numbers(96) <= 2.5 * numbers(48) <= 2.5 * 40 * 48 * 9


def plain(origin, **more) -> tr.Evidence:
    """What the adapter gives: evidence of the tokens that stand for patches, of one view unless a method takes all."""
    return visual(ORIGINS[origin], **more)


def given(reducer, evidence):
    return evidence.in_vision(reducer.with_class()) if reducer.space == "vision" else evidence


def serves(reducer, evidence) -> bool:
    """Some methods say that they need tiles, or a class token, and raise for a tower without."""
    needs = reducer.required()
    return not ("crops" in needs and evidence.crops is None) and not ("cls" in needs and not evidence.cls)


def fitting(name, keep, origin, **more):
    reducer = with_keep(name, keep)
    evidence = given(reducer, plain(origin, **more))
    if not serves(reducer, evidence):
        pytest.skip(f"{name} needs {reducer.required()}")
    return reducer, evidence


@origins
def test_keep_is_what_is_left(name, origin):
    served = 0
    for keep, cls in product([0.5, 0.3, 5, 1, 2], [True, False]):
        reducer, case = with_keep(name, keep), (keep, cls)
        evidence = given(reducer, plain(origin, cls=cls))
        if not serves(reducer, evidence):
            continue
        served += 1
        present, plan = evidence.n - evidence.prefix, reducer.plan(evidence)
        there = there_of(plan)
        assert (there.sum(1) == reducer.total(present)).all(), case
        assert reducer.fixed_count(present, evidence.frames) == reducer.total(present), case
        for b in range(plan.batch):
            left = plan.representatives()[b][there[b]].tolist()
            assert len(set(left)) == len(left), ("every output has a place of its own", case)
        out = plan.reduce(evidence.x)
        assert out.shape == (evidence.batch, plan.k, evidence.x.shape[2]), case
        assert torch.isfinite(out[there]).all(), case
        same = plan.untouched() & there
        assert torch.equal(out[same], plan.gather(evidence.x)[same]), ("what was not mixed is bit-identical", case)
    if not served:
        pytest.skip(f"{name} needs {with_keep(name, 1).required()}")


@pytest.mark.parametrize("spec", [*METHODS, "vcast:official_totals=true,keep=3", "dycoke:dycoke_k=0.3"])
def test_a_count_that_is_said_beforehand_is_the_one_that_is_left(spec):
    """Engines make a prompt of it before they encode; a method that does not know says so."""
    reducer = tr.get_method(spec, "projector")
    for origin in ("frames", "ticks") if reducer.temporal else ("square", "large"):
        evidence = given(reducer, plain(origin))
        said = reducer.fixed_count(evidence.n - evidence.prefix, evidence.frames)
        assert said is not None or reducer.keep is None
        if said is not None and serves(reducer, evidence):
            plan = reducer.plan(evidence)
            assert said == (evidence.n - evidence.prefix if plan.is_identity else plan.k)


@origins
def test_keep_everything_is_the_identity(name, origin):
    for keep in (1.0, 1000):
        reducer, evidence = fitting(name, keep, origin)
        assert reducer.plan(evidence).is_identity


@origins
def test_a_sample_is_treated_alone_and_in_a_batch_alike(name, origin):
    reducer, together = fitting(name, 0.4, origin, batch=3)
    plan = reducer.plan(together)
    for b in range(3):
        alone = given(reducer, plain(origin, batch=3, rows=slice(b, b + 1)))
        mine = reducer.plan(alone)
        assert torch.equal(mine.representatives()[0], plan.representatives()[b])
        torch.testing.assert_close(mine.reduce(alone.x)[0], plan.reduce(together.x)[b])


@every
def test_plans_survive_safetensors(name, tmp_path):
    reducer, evidence = fitting(name, 0.5, "square")
    plan = reducer.plan(evidence)
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors") == plan


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_half_precision_out(name, dtype):
    reducer, e = fitting(name, 0.5, "square")
    e = copy.copy(e)
    for key in ("x", "_features", "own", "text"):
        if getattr(e, key) is not None:
            setattr(e, key, getattr(e, key).to(dtype))
    e._clip = None if e._clip is None else tuple(t.to(dtype) for t in e._clip)
    e.blocks = {
        i: Evidence(b.x.to(dtype), b.keys.to(dtype), b.queries.to(dtype), protected=b.prefix, cls=b.cls)
        for i, b in e.blocks.items()
    }
    out = reducer.plan(e).reduce(e.x)
    assert out.dtype == dtype
    assert torch.isfinite(out.float()).all()


@every
def test_text_and_json_round_trips(name):
    kind = get_class(name, "projector")
    for reducer in (kind(), with_keep(name, 0.25), with_keep(name, 7)):
        assert tr.get_method(reducer.spec()) == reducer
        assert tr.get_method(reducer.spec(), "projector") == reducer
        assert tr.Reducer.from_json(reducer.to_json()) == reducer
        assert hash(reducer) == hash(copy.deepcopy(reducer))
        assert pickle.loads(pickle.dumps(reducer)) == reducer


@every
def test_bad_settings_are_refused(name):
    for bad in (0, 1.5, -3, 0.0, True, "many"):
        with pytest.raises(ValueError, match="keep"):
            with_keep(name, bad)
    kind = get_class(name, "projector")
    known = {f.name for f in dataclasses.fields(kind)}
    for field, bad in {"positions": "short", "newlines": "some", "layer": "top", "score": 1}.items():
        if field in known:
            with pytest.raises(ValueError, match=field):
                kind(**{field: bad})


@every
def test_unknown_settings_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"It takes: .*keep"):
        tr.get_method(f"{name}@projector:no_such_setting=1")


@every
def test_nan_is_an_error_and_not_a_silent_choice(name):
    reducer, evidence = fitting(name, 0.5, "square")
    before = reducer.plan(evidence)
    seen = [t for b in evidence.blocks.values() for t in (b.attention.k, b.attention.q)]
    tensors = [evidence.x, evidence.features, evidence.projected, *seen]
    for t in tensors:
        t[0, ..., 3, :] = float("nan")
    if name in BLIND:
        assert torch.equal(reducer.plan(evidence).representatives(), before.representatives())
        return
    with pytest.raises(ValueError, match="NaN"):
        reducer.plan(evidence)


@origins
def test_identical_tokens_and_zero_tokens_still_give_a_plan(name, origin):
    """Flat images: every score ties, and no similarity divides by zero."""
    reducer, evidence = fitting(name, 0.4, origin)
    for t in (
        evidence.x,
        evidence.features,
        *[t for b in evidence.blocks.values() for t in (b.attention.k, b.attention.q)],
    ):
        t.zero_()
    plan = reducer.plan(evidence)
    assert plan.k == reducer.total(evidence.n - evidence.prefix)
    assert torch.isfinite(plan.reduce(evidence.x)).all()


@every
def test_documented(name):
    kind = get_class(name, "projector")
    assert kind.__doc__
    assert not kind.__doc__.startswith(kind.__name__ + "(")
    assert kind.title
    assert re.fullmatch(PAPER, kind.paper)
    assert "Raises ``ValueError``" in kind.__doc__


@pytest.mark.parametrize("name", TEMPORAL)
def test_temporal_methods_refuse_masks_of_single_tokens(name):
    """They would tear frames apart."""
    reducer = with_keep(name, 0.5)
    x = torch.randn(1, 12, 4)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, 3] = True
    with pytest.raises(ValueError, match="whole frames"):
        reducer.plan(tr.Evidence(x, grid=(3, 2, 2), protected=mask))
    with pytest.raises(ValueError, match="whole frames"):
        reducer.plan(tr.Evidence(x, grid=(3, 2, 2), valid=~mask))
