"""DivPrune against the steps of its card, token by token in plain loops."""

from __future__ import annotations

import pytest
import torch

import tokenreduce as tr
from tokenreduce.core.plan import Prune


def greedy(x, keep):
    """The card's steps on one image (N,C), in float64: indices in the order in which they are chosen."""
    rows = [r / max(float(r.norm()), 1e-12) for r in x.double()]
    n = len(rows)
    distance = [[max(0.0, 1 - float(a @ b)) for b in rows] for a in rows]
    nearest = [min((distance[i][j] for j in range(n) if j != i), default=0.0) for i in range(n)]
    chosen = [max(range(n), key=lambda i: (nearest[i], -i))]
    while len(chosen) < keep:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(distance[i][j] for j in chosen), -i)))
    return chosen


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compass(*degrees):
    angle = torch.tensor(degrees) * torch.pi / 180
    return torch.stack([angle.cos(), angle.sin()], -1)[None]


@pytest.mark.parametrize("n", [2, 3, 5, 16, 33])
@pytest.mark.parametrize("keep", [1, 2, 0.3, 0.5, 0.9])
def test_is_the_greedy_choice_of_the_card(n, keep):
    x = noise(2, n, 6, seed=n)
    e, method = tr.Evidence(x), tr.DivPrune(keep=keep)
    want = keep if isinstance(keep, int) else max(1, int(keep * n + 0.5))
    plan = method.plan(e)
    if want >= n:
        assert plan.is_identity
        return
    for b in range(2):
        chosen = greedy(x[b], want)
        assert method.order(e)[b].tolist() == chosen
        assert plan.keep[b].tolist() == sorted(chosen)
        alone = method.plan(tr.Evidence(x[b : b + 1]))
        assert torch.equal(alone.keep[0], plan.keep[b])


def test_worked_example():
    """On a circle: 180 is the most isolated (60 away from the next), then 0 is farthest from it, then 90."""
    x = compass(0.0, 10.0, 90.0, 120.0, 180.0, 350.0)
    order = tr.DivPrune(keep=4).order(tr.Evidence(x))
    assert order.tolist() == [[4, 0, 2, 3]]
    longer = tr.Evidence(x * torch.tensor([3.0, 0.1, 7.0, 1.0, 2.0, 5.0])[:, None])
    assert tr.DivPrune(keep=4).order(longer).tolist() == [[4, 0, 2, 3]], "length does not matter"
    assert tr.DivPrune(keep=2).order(tr.Evidence(x)).tolist() == [[4, 0]], "a prefix of the order"


def test_rounding_is_half_up():
    assert tr.DivPrune(keep=0.5).plan(tr.Evidence(noise(1, 33, 4))).k == 17
    assert tr.DivPrune().plan(tr.Evidence(noise(1, 576, 4))).k == 56
    assert tr.DivPrune(keep=0.001).plan(tr.Evidence(noise(1, 9, 4))).k == 1


def test_ties_go_to_the_lower_index():
    x = torch.eye(4)[None]  # all as far from each other
    assert tr.DivPrune(keep=3).order(tr.Evidence(x)).tolist() == [[0, 1, 2]]


def test_duplicates_are_chosen_once():
    x = noise(1, 5, 8).repeat(1, 4, 1)
    order = tr.DivPrune(keep=10).order(tr.Evidence(x))[0].tolist()
    assert len(set(order)) == 10
    assert {i % 5 for i in order[:5]} == {0, 1, 2, 3, 4}


def test_zero_vectors_and_nan():
    x = noise(1, 6, 4)
    x[0, 2] = 0
    order = tr.DivPrune(keep=4).order(tr.Evidence(x))[0].tolist()
    assert order == greedy(x[0], 4)
    x[0, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        tr.DivPrune(keep=4).plan(tr.Evidence(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_do_not_change_the_choice(dtype):
    x = noise(1, 40, 16).to(dtype)
    want = tr.DivPrune(keep=0.5).plan(tr.Evidence(x.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tr.DivPrune(keep=0.5).plan(tr.Evidence(x)) == want


def test_protected_tokens_stay_and_take_no_part():
    x = noise(2, 12, 6)
    ends = torch.zeros(2, 12, dtype=torch.bool)
    ends[:, [3, 7, 11]] = True
    plan = tr.DivPrune(keep=4).plan(tr.Evidence(x, protected=ends, cls=False))
    patches = [i for i in range(12) if i not in (3, 7, 11)]
    for b in range(2):
        want = [patches[i] for i in greedy(x[b, patches], 4)]
        assert plan.keep[b].tolist() == sorted([*want, 3, 7, 11])
    assert plan.valid is None
    prefix = tr.DivPrune(keep=4).plan(tr.Evidence(x, protected=3))
    assert prefix.keep[0].tolist() == [0, 1, 2, *sorted(3 + i for i in greedy(x[0, 3:], 4))]
    assert tr.DivPrune(keep=9).plan(tr.Evidence(x, protected=3)).is_identity


def test_samples_with_fewer_tokens():
    x = noise(2, 10, 6)
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, 6:] = False
    plan = tr.DivPrune(keep=0.5).plan(tr.Evidence(x, valid=valid))
    assert isinstance(plan, Prune)
    assert (plan.sources()[0] >= 0).nonzero().flatten().tolist() == sorted(greedy(x[0], 5))
    assert (plan.sources()[1] >= 0).nonzero().flatten().tolist() == sorted(greedy(x[1, :6], 3))


def test_one_token_and_keep_all():
    assert tr.DivPrune(keep=0.01).plan(tr.Evidence(noise(2, 1, 4))).is_identity
    assert tr.DivPrune(keep=1.0).plan(tr.Evidence(noise(2, 7, 4))).is_identity
    assert tr.DivPrune(keep=64).plan(tr.Evidence(noise(2, 7, 4))).is_identity


def test_one_graph():
    method = tr.DivPrune(keep=0.5)
    choice = torch.compile(lambda x: method.plan(tr.Evidence(x)).keep, fullgraph=True, backend="eager")
    x = noise(2, 9, 4)
    assert torch.equal(choice(x), method.plan(tr.Evidence(x)).keep)


def test_settings():
    method = tr.get_method("divprune:keep=64,positions=original,newlines=rank")
    assert method == tr.DivPrune(keep=64, positions="original", newlines="rank")
    assert tr.get_method(method.spec()) == method
    assert tr.Reducer.from_json(method.to_json()) == method
    assert "divprune" in tr.list_methods(stage="projector")
    for bad, message in [
        ({"keep": 0}, "keep is a number of tokens"),
        ({"keep": None}, "keep is a number of tokens"),
        ({"keep": 1.5}, "keep is a number of tokens"),
        ({"positions": "short"}, r"positions is one of \('compact', 'original'\) or None"),
        ({"newlines": "some"}, r"newlines is one of \('keep', 'drop', 'rank'\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            tr.DivPrune(**bad)
