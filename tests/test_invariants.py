"""One table that puts every registered encoder method through every invariant; a new method is in it by itself."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from support import ENCODER_METHODS, PAPER, acting_layer, evidence, images, tiny_vit, with_keep
from threads import mixed_up

import tokenreduce as tr
from tokenreduce.core.plan import Identity, Merge, Plan
from tokenreduce.core.registry import get_class

every = pytest.mark.parametrize("name", ENCODER_METHODS)
SIZES = [(2, 1), (3, 1), (4, 1), (5, 0), (2, 0), (17, 1), (16, 0), (18, 2), (21, 5), (37, 1), (38, 1)]


def plan_of(reducer, **settings) -> tuple[Plan, tr.Evidence]:
    e = evidence(layer=acting_layer(reducer), **settings)
    return reducer.plan(e), e


def valid_of(plan: Plan) -> torch.Tensor:
    valid = plan.validity()
    return torch.ones(plan.batch, plan.k, dtype=torch.bool) if valid is None else valid


@every
@pytest.mark.parametrize(("n", "prefix"), SIZES)
@pytest.mark.parametrize("keep", [0.5, 1])
def test_plans_are_well_formed(name, n, prefix, keep):
    """Outputs have sources, representatives map to themselves, the prefix stays in place and untouched."""
    plan, e = plan_of(with_keep(name, keep), n=n, prefix=prefix)
    source, valid, keepers = plan.sources(), valid_of(plan), plan.representatives()
    assert source.shape == (2, n)
    assert int(source.min()) >= -1
    assert int(source.max()) < plan.k <= n
    assert plan.k > prefix, "at least one patch token stays"
    for b in range(2):
        for k in range(plan.k):
            if valid[b, k]:
                assert (source[b] == k).any()
                if not isinstance(plan, tr.Pool):
                    assert source[b, keepers[b, k]] == k
    assert source[:, :prefix].tolist() == [list(range(prefix))] * 2
    x = plan.reduce(e.x, e.size)
    assert torch.equal(x[:, :prefix], e.x[:, :prefix])
    assert torch.isfinite(x[valid]).all()


@every
def test_keep_everything_is_the_identity(name):
    reducer = with_keep(name, 1.0)
    for layer in range(6):
        for n, prefix in SIZES:
            assert reducer.plan(evidence(n=n, prefix=prefix, layer=layer)).is_identity


@every
def test_sizes_are_conserved(name):
    """What is merged keeps its mass; what is dropped takes its mass along; nothing is invented."""
    plan, e = plan_of(with_keep(name, 0.5), size=torch.rand(2, 17) * 3 + 1)
    got = plan.reduce_size(e.size)
    kept = torch.where(plan.sources() >= 0, e.size, 0.0).sum(1)
    if isinstance(plan, Merge) and plan.size_scale is not None:
        assert (got.sum(1) <= kept + 1e-4).all()  # damped on purpose, never more than what was there
        assert (got > 0).all()
    else:
        torch.testing.assert_close(got.sum(1), kept)


@every
def test_a_sample_is_treated_alone_and_in_a_batch_alike(name):
    reducer = with_keep(name, 0.4)
    layer = acting_layer(reducer)
    together = reducer.plan(evidence(batch=3, layer=layer))
    for i in range(3):
        alone = reducer.plan(evidence(batch=3, layer=layer, rows=slice(i, i + 1)))
        assert torch.equal(alone.sources()[0], together.sources()[i])
        e, whole = evidence(batch=3, layer=layer, rows=slice(i, i + 1)), evidence(batch=3, layer=layer)
        got, want = alone.reduce(e.x)[0], together.reduce(whole.x)[i]
        torch.testing.assert_close(got, want[: len(got)])


@every
def test_expand_then_reduce_gives_back_what_was_there(name):
    plan, _ = plan_of(with_keep(name, 0.5))
    if isinstance(plan, Merge) and plan.mode == "sum":
        plan = Merge(plan.n, plan.keep, plan.src, plan.dst)
    if isinstance(plan, tr.Pool):
        flat = torch.full((2, plan.k, 4), 3.0)
        torch.testing.assert_close(plan.reduce(plan.expand(flat)), flat)
        return
    y = torch.randn(2, plan.k, 4)
    valid = valid_of(plan)
    torch.testing.assert_close(plan.reduce(plan.expand(y))[valid], y[valid])


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_half_precision_out(name, dtype):
    plan, e = plan_of(with_keep(name, 0.5), dtype=dtype)
    out = plan.reduce(e.x)
    assert out.dtype == dtype
    assert torch.isfinite(out.float()).all()


@every
def test_autocast_changes_no_decision(name):
    for seed in range(5):
        plan, _ = plan_of(with_keep(name, 0.5), seed=seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again, _ = plan_of(with_keep(name, 0.5), seed=seed)
        assert torch.equal(again.sources(), plan.sources())


@every
def test_plans_survive_safetensors(name, tmp_path):
    plan, _ = plan_of(with_keep(name, 0.5))
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors") == plan


@every
def test_text_and_json_round_trips(name):
    for reducer in (with_keep(name, 0.25), with_keep(name, 7)):
        assert tr.get_method(reducer.spec()) == reducer
        assert tr.Reducer.from_json(reducer.to_json()) == reducer
        assert hash(reducer) == hash(copy.deepcopy(reducer))
        assert pickle.loads(pickle.dumps(reducer)) == reducer


@every
@pytest.mark.parametrize("bad", [0, 1.5, -3, 0.0, True])
def test_bad_budgets_are_refused(name, bad):
    with pytest.raises(ValueError, match="keep"):
        with_keep(name, bad)


@every
def test_unknown_settings_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"It takes: .*keep"):
        tr.get_method(f"{name}:no_such_setting=1")


@every
def test_nan_features_are_an_error_and_not_a_silent_choice(name):
    reducer = with_keep(name, 0.5)
    if name in ("resize", "uniform", "pixel-diff", "t2t-pool"):
        return  # these look at no feature, the last one at none of a single image
    e = evidence(layer=acting_layer(reducer))
    for tensor in (e.x, e.attention.k, e.attention.q, e.attention.v, e._before):
        tensor[0, ..., 3, :] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        reducer.plan(e)


@every
def test_documented(name):
    kind = get_class(name)
    assert kind.__doc__
    assert not kind.__doc__.startswith(kind.__name__ + "(")
    assert kind.title
    assert re.fullmatch(PAPER, kind.paper)


# -- in a model ------------------------------------------------------------------------------------------------------
@every
def test_in_a_model_keep_all_and_unpatch_are_bit_identical(name):
    model, x = tiny_vit(), images()
    with torch.no_grad():
        want, keys = model(x), list(model.state_dict())
        with tr.patched(model, with_keep(name, 1.0)):
            assert torch.equal(model(x), want)
        with tr.patched(model, with_keep(name, 0.3)), tr.record(model, flops=False) as trace:
            got = model(x)
        assert torch.equal(model(x), want)
    assert not torch.equal(got, want)
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert trace.tokens[-1] < 37
    assert list(model.state_dict()) == keys
    assert not [k for m in model.modules() for k in vars(m) if "tokenreduce" in k]


@every
def test_in_a_model_keep_is_what_is_left(name):
    for keep, want in ((0.5, 18), (9, 9)):
        model = tiny_vit()
        with tr.patched(model, with_keep(name, keep)), torch.no_grad(), tr.record(model, flops=False) as trace:
            model(images())
        left = trace.tokens[-1] - 1
        if name in ("ats", "resize"):  # adaptive; whole rows and columns
            assert left <= want + 2
        else:
            assert left == want


@every
def test_in_a_model_batches_do_not_mix(name):
    model, x = tiny_vit(), images(4)
    with torch.no_grad(), tr.patched(model, with_keep(name, 0.4)):
        together = model(x)
        alone = torch.cat([model(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@every
def test_in_a_model_gradients_flow_and_checkpointing_changes_nothing(name):
    grads = []
    for checkpointing in (False, True):
        model = tiny_vit().train()
        model.set_grad_checkpointing(checkpointing)
        x = images().requires_grad_()
        with tr.patched(model, with_keep(name, 0.5)):
            model(x).square().sum().backward()
        assert torch.isfinite(x.grad).all()
        assert x.grad.abs().sum() > 0
        grads.append((x.grad, model.blocks[0].attn.qkv.weight.grad))
    for plain, replayed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, replayed)


@every
def test_in_a_model_copies_are_independent(name):
    model, x = tiny_vit(), images()
    with torch.no_grad():
        stock = model(x)
        tr.patch(model, with_keep(name, 0.5))
        want = model(x)
        again = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        tr.unpatch(model)
        for other in again:
            assert torch.equal(other(x), want)
            assert torch.equal(tr.unpatch(other)(x), stock)


@every
def test_in_a_model_threads_do_not_mix(name):
    model = tiny_vit()
    inputs = [images(1 + i) for i in range(3)]
    with tr.patched(model, with_keep(name, 0.5)):
        assert mixed_up(model, inputs, 8) == []


@pytest.mark.slow
@every
def test_in_a_model_compiles_to_one_graph(name):
    torch.compiler.reset()
    model, x = tiny_vit(), images()
    with torch.no_grad(), tr.patched(model, with_keep(name, 0.5)):
        want = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want)


@every
def test_in_a_model_dense_outputs_have_the_full_grid(name):
    model = tiny_vit()
    reducer = with_keep(name, 0.5)
    grid = reducer.grid((6, 6)) if name == "resize" else (6, 6)  # a smaller image has a smaller grid
    with torch.no_grad(), tr.patched(model, reducer):
        final, maps = model.forward_intermediates(images(), [4, 1], output_fmt="NCHW")
    assert [m.shape for m in maps] == [(2, 32, *grid)] * 2
    assert final.shape[1] < 37 or reducer.rebuilds


def test_the_identity_is_free():
    x = torch.randn(1, 4, 2)
    same = Identity.like(x)
    assert same.reduce(x) is x
    assert same.is_identity
