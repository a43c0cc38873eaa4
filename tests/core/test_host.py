"""What numpy works out on the CPU is what torch works out elsewhere, to the last bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support import ENCODER_METHODS, acting_layer, evidence, images, tiny_vit, with_keep

import tokenreduce as tr
from tokenreduce.algorithms import baseline, matching, scoring, sequence
from tokenreduce.core import host
from tokenreduce.core.plan import Merge, merge, prune
from tokenreduce.vision.encoder import pitome

USERS = (baseline, matching, merge, pitome, scoring)


@pytest.fixture
def nowhere(monkeypatch):
    """A switch: from its call on nothing is done on the host."""

    def off() -> None:
        for module in USERS:
            monkeypatch.setattr(module, "on_host", lambda *_: False)

    return off


def padded(n: int) -> torch.Tensor:
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, -3:] = False
    return valid


CASES = {
    "prefix": dict(n=17, prefix=1),
    "no prefix": dict(n=16, prefix=0),
    "two of them": dict(n=18, prefix=2),
    "one sample": dict(n=21, prefix=1, batch=1),
    "padded": dict(n=17, prefix=1, valid=padded(17)),
    "sizes": dict(n=17, prefix=1, size=torch.arange(1.0, 35.0).view(2, 17)),
}


@pytest.mark.parametrize("name", ENCODER_METHODS)
@pytest.mark.parametrize("case", CASES)
def test_plans_are_those_of_torch(name, case, nowhere):
    settings = dict(CASES[case])
    reducer = with_keep(name, 0.5)
    e = evidence(layer=acting_layer(reducer), **settings)
    mine = reducer.plan(e)
    got, size = mine.reduce_both(e.x, e.size)
    nowhere()
    theirs = reducer.plan(e)
    want, its = theirs.reduce_both(e.x, e.size)
    assert mine == theirs
    assert torch.equal(got, want)
    assert (size is None) == (its is None)
    assert size is None or torch.equal(size, its)
    assert torch.equal(mine.reduce(e.x, e.size), theirs.reduce(e.x, e.size))


@pytest.mark.parametrize("settings", [
    dict(), dict(by_size=False), dict(norm="max"), dict(weights=True), dict(weights=True, norm="max", by_size=False),
    dict(size_scale=True), dict(size_scale=True, valid=True, by_size=False),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merges_of_every_kind_are_those_of_torch(settings, dtype, nowhere):
    g = torch.Generator().manual_seed(0)
    keep, src = torch.tensor([[0, 2, 3, 6], [1, 2, 0, 5]]), torch.tensor([[1, 4, 5], [3, 4, 6]])
    dst = torch.tensor([[1, 1, 3], [0, 2, 2]])
    tensors = dict(
        weights=torch.rand(2, 7, generator=g).round(decimals=1), size_scale=torch.rand(2, 3, generator=g),
        valid=torch.tensor([[True] * 4, [True, True, False, True]]),
    )  # fmt: skip
    plan = Merge(7, keep, src, dst, **{k: tensors[k] if v is True and k in tensors else v for k, v in settings.items()})
    x = torch.randn(2, 7, 5, generator=g).to(dtype)
    x[0, 0] = 0
    sizes = [None, torch.rand(2, 7, generator=g) + 0.5]
    got = [plan.reduce_both(x, size) for size in sizes]
    nowhere()
    for (mine, size), given in zip(got, sizes, strict=True):
        want, its = plan.reduce_both(x, given)
        assert torch.equal(mine, want)
        assert torch.equal(size, its)


@pytest.mark.parametrize("spec", ["tome:r=4", "pitome:ratio=0.8", "tofu:r=4", "diffrate:keep=0.4", "random:r=4"])
def test_forwards_with_gradients_are_those_without(spec):
    model, x = tr.patch(tiny_vit(), spec), images(3)
    with_them = model(x.clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(model(x), with_them.detach(), rtol=0, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), with_them.detach(), rtol=0, atol=1e-5)


def test_a_plan_of_arrays_is_a_plan():
    e = evidence()
    plan = tr.ToMe(r=3).plan(e)
    others = [copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), plan.to("cpu")]
    want = plan.reduce_both(e.x, e.size)
    assert all(other == plan for other in others)
    assert all(torch.equal(other.reduce_both(e.x, e.size)[0], want[0]) for other in others)
    one = plan.rows_at(torch.tensor([1]))
    assert torch.equal(one.reduce(e.x[1:], None)[0], want[0][1])


def ranked(scores, among, wanted):
    """The same by two stable sorts, row by row."""
    out = torch.zeros_like(among)
    for row, (s, a, w) in enumerate(zip(scores.tolist(), among.tolist(), wanted[:, 0].tolist(), strict=True)):
        order = sorted((i for i in range(len(s)) if a[i]), key=lambda i: -s[i])  # Python's sort is stable
        out[row, order[: max(w, 0)]] = True
    return out


@pytest.mark.parametrize("seed", range(8))
def test_the_best_are_those_of_a_stable_sort(seed, monkeypatch):
    gen = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (6, 13), generator=gen).float()  # many ties
    scores[0, ::2], scores[1] = float("-inf"), float("inf")
    among = torch.rand(6, 13, generator=gen) < 0.7
    among[2] = False
    wanted = torch.tensor([[9], [3], [2], [0], [99], [-1]])
    want = ranked(scores, among, wanted)
    assert torch.equal(sequence.best(scores, among, wanted), want)
    alike = torch.full_like(wanted, 4)
    assert torch.equal(sequence.best(scores, among, alike), ranked(scores, among, alike))
    monkeypatch.setattr(sequence, "on_host", lambda *_: False)
    assert torch.equal(sequence.best(scores, among, wanted), want)


def test_what_is_not_a_number_is_found_in_any_place():
    for values in ([1.0, float("nan")], [float("inf"), -float("inf"), float("nan")], [float("nan")] * 2):
        assert host.not_a_number(torch.tensor([values]).numpy())
    for values in ([], [float("inf"), -float("inf")], [3e38, -3e38], [0.0]):
        assert not host.not_a_number(torch.tensor([values]).numpy())
    assert host.best_among(*(t.numpy() for t in (torch.tensor([[float("nan"), 1.0]]), torch.tensor([[True, True]]),
                                                 torch.tensor([[1]])))) is None  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_places_of_marks_are_those_of_a_sort(seed, monkeypatch):
    gen = torch.Generator().manual_seed(seed)
    stay = torch.rand(5, 11, generator=gen).argsort(1) < 4
    mine = tr.Prune.from_mask(stay)
    monkeypatch.setattr(prune, "on_host", lambda *_: False)
    assert mine == tr.Prune.from_mask(stay)
    keys, values = torch.randn(2, 5, 11, 3, generator=gen)
    for made, whole in zip(mine.reduce_alike(keys, values), (keys, values), strict=True):
        assert torch.equal(made, mine.reduce(whole))


def test_a_plan_of_arrays_makes_its_tensors_when_asked():
    plan = tr.ToMe(r=3).plan(evidence())
    assert not {"keep", "src", "dst"} & {*vars(plan)}
    assert plan.keep is plan.keep
    assert plan.keep.dtype == torch.long
    with pytest.raises(AttributeError, match="Merge has no attribute 'kept'"):
        _ = plan.kept


def test_not_where_something_is_traced():
    t = torch.ones(2)
    assert host.on_host(t, None)
    assert not host.on_host(torch.nn.Parameter(t))
    assert not host.on_host(t.to("meta"))
    seen = []
    torch.func.vmap(lambda one: (seen.append(host.on_host(one)), one)[1])(t)
    torch.fx.experimental.proxy_tensor.make_fx(lambda one: (seen.append(host.on_host(torch.ones(1))), one)[1])(t)
    torch.jit.trace(lambda one: (seen.append(host.on_host(one)), one * 2)[1], (t,), check_trace=False)
    assert seen
    assert not any(seen)
