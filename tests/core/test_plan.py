"""Plans against plain references: loops over tokens, no vectorised trick shared with the code under test."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenreduce.core.plan import Chain, Identity, Merge, Mix, Plan, Pool, Prune

FEW = settings(max_examples=40, deadline=None)


def random_merge(n: int, k: int, seed: int, drop: int = 0, **kwargs) -> tuple[Merge, torch.Tensor]:
    """A merge of n tokens into k groups with ``drop`` dropped, and its assignment (2,N)."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(2):
        order = torch.randperm(n, generator=g)
        assign = torch.full((n,), -1)
        assign[order[:k]] = torch.arange(k)
        rest = order[k : n - drop]
        assign[rest] = torch.randint(0, k, (len(rest),), generator=g)
        rows.append(assign)
    assign = torch.stack(rows)
    return Merge.from_assignment(assign, k, **kwargs), assign


def plain_merge(x, assign, k, weight):
    """Weighted mean of every group, one token at a time, in float64."""
    b, _, c = x.shape
    out = torch.zeros(b, k, c, dtype=torch.float64)
    for i in range(b):
        for j in range(k):
            members = [t for t in range(x.shape[1]) if assign[i, t] == j]
            total = sum(float(weight[i, t]) for t in members)
            out[i, j] = sum(x[i, t].double() * float(weight[i, t]) for t in members) / total
    return out


shapes = st.integers(2, 14).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(0, 10**6)))


@FEW
@given(shapes)
def test_merge_is_the_size_weighted_mean(shape):
    n, k, seed = shape
    g = torch.Generator().manual_seed(seed)
    plan, assign = random_merge(n, k, seed, drop=min(2, n - k))
    x, size = torch.randn(2, n, 3, generator=g), torch.randint(1, 5, (2, n), generator=g).float()
    torch.testing.assert_close(plan.reduce(x, size).double(), plain_merge(x, assign, k, size), rtol=1e-5, atol=1e-5)
    ones = torch.ones(2, n)
    torch.testing.assert_close(plan.reduce(x).double(), plain_merge(x, assign, k, ones), rtol=1e-5, atol=1e-5)
    assert torch.equal(plan.sources(), assign)
    want = torch.stack([torch.stack([size[i][assign[i] == j].sum() for j in range(k)]) for i in range(2)])
    torch.testing.assert_close(plan.reduce_size(size), want)


def test_merge_modes_weights_and_damped_sizes():
    keep, src, dst = torch.tensor([[0, 2]]), torch.tensor([[1, 3]]), torch.tensor([[0, 0]])
    x = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [5.0, 5.0], [2.0, -1.0]]])
    size = torch.tensor([[1.0, 2.0, 7.0, 1.0]])
    equal = Merge(4, keep, src, dst, by_size=False)
    torch.testing.assert_close(equal.reduce(x, size)[0, 0], torch.tensor([2.0, 1 / 3]))
    weights = torch.tensor([[1.0, 0.5, 1.0, 0.25]])
    summed = Merge(4, keep, src, dst, weights=weights, mode="sum", by_size=False)
    torch.testing.assert_close(summed.reduce(x)[0, 0], torch.tensor([1 + 1.5 + 0.5, 1 - 0.25]))
    largest = Merge(4, keep, src, dst, mode="max")
    assert largest.reduce(x)[0].tolist() == [[3.0, 2.0], [5.0, 5.0]]
    damped = Merge(4, keep, src, dst, size_scale=torch.tensor([[0.5, 0.1]]))
    torch.testing.assert_close(damped.reduce_size(size), torch.tensor([[1 + 1.0 + 0.1, 7.0]]))


def test_mlerp_keeps_the_largest_norm_and_untouched_tokens():
    keep, src, dst = torch.tensor([[0, 2]]), torch.tensor([[1]]), torch.tensor([[0]])
    x = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [0.3, 0.7]]])
    out = Merge(3, keep, src, dst, by_size=False, norm="max").reduce(x)
    torch.testing.assert_close(out[0, 0], torch.tensor([1.5, 2.0]) / 2.5 * 4.0)
    assert torch.equal(out[0, 1], x[0, 2])
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]]])
    assert torch.equal(Merge(3, keep, src, dst, by_size=False, norm="max").reduce(opposite)[0, 0], torch.zeros(2))


def test_outputs_without_sources_are_bit_identical():
    plan, _ = random_merge(9, 6, 3)
    x, size = torch.randn(2, 9, 5), torch.rand(2, 9) * 7 + 1
    alone = [(i, j) for i in range(2) for j in range(6) if not (plan.dst[i] == j).any()]
    out = plan.reduce(x, size)
    assert alone
    assert all(torch.equal(out[i, j], x[i, plan.keep[i, j]]) for i, j in alone)


@FEW
@given(shapes)
def test_prune_gathers_and_expands(shape):
    n, k, seed = shape
    g = torch.Generator().manual_seed(seed)
    keep = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(2)])
    plan, x = Prune(n, keep), torch.randn(2, n, 3, generator=g)
    out = plan.reduce(x)
    assert all(torch.equal(out[i, j], x[i, keep[i, j]]) for i in range(2) for j in range(k))
    back = plan.expand(out, fill=-7.0)
    for i in range(2):
        for t in range(n):
            want = x[i, t] if t in keep[i].tolist() else torch.full((3,), -7.0)
            assert torch.equal(back[i, t], want)


def test_ragged_prune_marks_padding():
    plan = Prune(5, torch.tensor([[0, 3, 4], [1, 0, 0]]), torch.tensor([[True, True, True], [True, False, False]]))
    assert plan.sources().tolist() == [[0, -1, -1, 1, 2], [-1, 0, -1, -1, -1]]
    assert plan.reduce_size(None).tolist() == [[1, 1, 1], [1, 0, 0]]
    shorter = plan.then(Prune(3, torch.tensor([[1, 2], [0, 1]])))
    assert shorter.sources().tolist() == [[-1, -1, -1, 0, 1], [-1, 0, -1, -1, -1]]


@FEW
@given(shapes)
def test_composition_is_one_after_the_other(shape):
    n, k, seed = shape
    g = torch.Generator().manual_seed(seed)
    first, _ = random_merge(n, k, seed, drop=min(1, n - k))
    second = Prune(k, torch.stack([torch.randperm(k, generator=g)[: max(1, k - 1)] for _ in range(2)]))
    both = first.then(second)
    x, size = torch.randn(2, n, 3, generator=g), torch.rand(2, n, generator=g) + 1
    torch.testing.assert_close(both.reduce(x, size), second.reduce(first.reduce(x, size), first.reduce_size(size)))
    y = torch.randn(2, second.k, 3, generator=g)
    for i in range(2):
        for t in range(n):
            middle = int(first.sources()[i, t])
            last = int(second.sources()[i, middle]) if middle >= 0 else -1
            assert int(both.sources()[i, t]) == last
            assert torch.equal(both.expand(y)[i, t], y[i, last] if last >= 0 else torch.zeros(3))
    position = torch.arange(n).expand(2, -1)
    assert torch.equal(both.gather(position), second.gather(first.gather(position)))


def test_composing_wrong_lengths_names_both():
    with pytest.raises(ValueError, match="leaves 2 tokens, the second expects 5"):
        Prune(4, torch.tensor([[0, 1]])).then(Prune(5, torch.tensor([[0]])))


def test_two_prunes_make_one_and_identity_disappears():
    one, two = Prune(6, torch.tensor([[0, 2, 4]])), Prune(3, torch.tensor([[0, 2]]))
    assert one.then(two) == Prune(6, torch.tensor([[0, 4]]))
    x = torch.randn(1, 6, 2)
    same = Identity.like(x)
    assert same.then(one) is one
    assert one.then(Identity(3, 1)) is one
    assert same.reduce(x) is x
    assert same.expand(x) is x


def test_pool_normalises_and_shares_sizes():
    weights = torch.tensor([[[2.0, 2.0, 0.0], [0.0, 1.0, 3.0]]])
    plan, x = Pool(3, weights), torch.tensor([[[1.0], [3.0], [5.0]]])
    torch.testing.assert_close(plan.reduce(x), torch.tensor([[[2.0], [4.5]]]))
    torch.testing.assert_close(Pool(3, weights, normalised=False).reduce(x), torch.tensor([[[8.0], [18.0]]]))
    assert float(plan.reduce_size(None).sum()) == pytest.approx(3.0)
    torch.testing.assert_close(plan.expand(torch.tensor([[[6.0], [9.0]]])), torch.tensor([[[6.0], [7.0], [9.0]]]))


def test_reduce_attention_sums_columns_and_averages_rows():
    plan, assign = random_merge(7, 4, 11)
    a, size = torch.randn(2, 3, 7, 7).softmax(-1), torch.rand(2, 7) + 0.5
    got = plan.reduce_attention(a, size)
    want = torch.zeros(2, 3, 4, 4)
    for i in range(2):
        for h in range(3):
            summed = torch.stack([a[i, h][:, assign[i] == j].sum(1) for j in range(4)], 1)  # (7,4)
            for j in range(4):
                w = size[i][assign[i] == j]
                want[i, h, j] = (summed[assign[i] == j] * w[:, None]).sum(0) / w.sum()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    "plan",
    [
        Prune(5, torch.tensor([[0, 3], [4, 1]]), torch.tensor([[True, True], [True, False]])),
        random_merge(6, 3, 5, norm="max", by_size=False)[0],
        Pool(3, torch.rand(2, 2, 3)),
        Mix.from_samples(3, [(torch.tensor([1]), torch.tensor([1, 2]), torch.tensor([0, 0]), torch.rand(2))] * 2),
        Identity(4, 2),
        random_merge(6, 3, 5)[0].then(Prune(3, torch.tensor([[0], [2]]))),
    ],
    ids=lambda p: type(p).__name__,
)
def test_plans_survive_safetensors(plan, tmp_path):
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert again == plan
    assert type(again) is type(plan)
    assert again != Prune(9, torch.zeros(1, 1, dtype=torch.long))
    assert repr(plan) in (repr(again),)


def test_loading_something_else_says_so(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="holds no plan"):
        Plan.load(tmp_path / "other.safetensors")


def test_from_assignment_refuses_gaps_and_unequal_drops():
    with pytest.raises(ValueError, match="no member"):
        Merge.from_assignment(torch.tensor([[0, 0, 2]]), 3)
    with pytest.raises(ValueError, match="different numbers"):
        Merge.from_assignment(torch.tensor([[0, 1, 1], [0, 1, -1]]), 2)


def test_matrix_is_reduce():
    plan, _ = random_merge(6, 3, 2)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(plan.matrix() @ x, plan.reduce(x), rtol=1e-6, atol=1e-6)


def test_chain_equality_and_device_move():
    a = random_merge(6, 3, 5, norm="max")[0].then(Prune(3, torch.tensor([[0], [2]])))
    assert isinstance(a, Chain)
    assert a == a.to("cpu")
    assert a.validity() is None


def test_slots_that_are_not_there_may_name_any_token():
    """Sample 1 keeps one output fewer: its empty slot names a token that went elsewhere, or that stays."""
    for named in (0, 2):
        plan = Merge(
            4, torch.tensor([[0, 1, 3], [named, 0, 3]]), torch.tensor([[2], [2]]), torch.tensor([[1], [1]]),
            valid=torch.tensor([[True, True, True], [False, True, True]]),
        )  # fmt: skip
        assert plan.sources().tolist() == [[0, 1, 1, 2], [1, -1, 1, 2]]


def mix():
    """Two samples: one with three outputs, one with two; token 1 of the first feeds two outputs."""
    one = (torch.tensor([0, 3, 4]), torch.tensor([0, 1, 3, 1, 4]), torch.tensor([0, 0, 1, 1, 2]))
    two = (torch.tensor([2, 1]), torch.tensor([2, 1, 0]), torch.tensor([0, 1, 1]))
    weights = torch.tensor([0.5, 0.5, 0.75, 0.25, 1.0]), torch.tensor([1.0, 0.5, 0.5])
    return Mix.from_samples(5, [(*one, weights[0]), (*two, weights[1])])


def test_a_mix_is_its_weights():
    plan, x = mix(), torch.randn(2, 5, 3)
    assert plan.validity().tolist() == [[True, True, True], [False, True, True]]
    out = plan.reduce(x)
    want = [0.5 * x[0, 0] + 0.5 * x[0, 1], 0.75 * x[0, 3] + 0.25 * x[0, 1], x[0, 4]]
    torch.testing.assert_close(out[0], torch.stack(want))
    torch.testing.assert_close(out[1, 1:], torch.stack([x[1, 2], 0.5 * x[1, 1] + 0.5 * x[1, 0]]))
    assert plan.untouched().tolist() == [[False, False, True], [True, True, False]]
    assert torch.equal(out[0, 2], x[0, 4])
    assert torch.equal(out[1, 1], x[1, 2])
    assert plan.sources().tolist() == [[0, 0, -1, 1, 2], [2, 2, 1, -1, -1]]


def test_a_mix_shares_sizes_out():
    plan = mix()
    size = torch.tensor([[1.0, 3.0, 9.0, 1.0, 1.0], [1.0, 1.0, 4.0, 9.0, 9.0]])
    out = plan.reduce_size(size)
    torch.testing.assert_close(out, torch.tensor([[1 + 2.0, 1 + 1.0, 1.0], [0.0, 4.0, 2.0]]))
    torch.testing.assert_close(plan.reduce_size(None), torch.tensor([[1 + 2 / 3, 1 + 1 / 3, 1.0], [0.0, 1.0, 2.0]]))


def test_a_mix_has_gradients_and_half_precision():
    plan, x = mix(), torch.randn(2, 5, 3, requires_grad=True)
    plan.reduce(x).sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0], torch.tensor([0.5, 0.75, 0.0, 0.75, 1.0]))
    half = plan.reduce(x.detach().half())
    assert half.dtype == torch.float16
    assert torch.equal(half[0, 2], x.detach().half()[0, 4])


def test_places_are_the_tokens_behind_real_outputs():
    plan = Prune(5, torch.tensor([[0, 2, 3], [1, 0, 0]]), torch.tensor([[True, True, True], [True, False, False]]))
    want = [[True, False, True, True, False], [False, True, False, False, False]]
    assert plan.places().tolist() == want
    again = Chain(5, (plan, Prune(3, torch.tensor([[1, 2], [0, 1]]), torch.tensor([[True, True], [True, False]]))))
    assert again.places().tolist() == [[False, False, True, True, False], want[1]]
    assert bool(Identity(3, 2).places().all())


def test_a_chain_with_pools_expands_with_what_was_there_before():
    """Two pools: token 0 is split, and a part of it is dropped later; token 3 is dropped."""
    first = Pool(4, torch.tensor([[[1.0, 0, 0, 0], [0.5, 1, 0, 0], [0.5, 0, 1, 0]]]))
    chain = first.then(Prune(3, torch.tensor([[0, 1]])))
    y, before = torch.tensor([[[2.0], [6.0]]]), torch.tensor([[[10.0], [11.0], [12.0], [13.0]]])
    got = chain.expand(y, before)
    # 0 fed outputs 0 (1), 1 (1/2) and 2 (1/2), of which two are left; 2 fed the one that is gone.
    assert got.flatten().tolist() == pytest.approx([(2 + 6 / 2) / 1.5, 6.0, 12.0, 13.0])
    assert chain.expand(y, 7.0).flatten().tolist() == pytest.approx([(2 + 3 + 3.5) / 2, 6.0, 7.0, 7.0])
