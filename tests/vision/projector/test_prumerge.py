"""PruMerge and PruMerge+ against the steps of their card, sample by sample in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from visual import ORIGINS, noise, visual

import tokenreduce as tr
from tokenreduce.algorithms.scoring import descending
from tokenreduce.core.plan import Pool
from tokenreduce.vision.projector.prumerge import PruMerge, PruMergePlus


def wide(t):
    """(H,N,d) to (N,H*d) float64: heads side by side."""
    return torch.cat([head.double() for head in t], 1)


def class_attention(q, k):
    """Step 1 on one image: one head of full width, class column dropped after the softmax."""
    q, k = wide(q), wide(k)
    return (q[0] @ k.T * q.shape[1] ** -0.5).softmax(0)[1:]


def percentile(values, q):
    """Linear interpolation between the sorted values."""
    s = sorted(float(v) for v in values)
    at = q * (len(s) - 1)
    low = math.floor(at)
    return s[low] + (at - low) * (s[min(low + 1, len(s) - 1)] - s[low])


def outliers(a):
    """Step 3 on one image, with a floor of one."""
    low, high = percentile(a, 0.25), percentile(a, 0.75)
    return max(1, sum(float(v) > high + 1.5 * (high - low) for v in a))


def ranking(a):
    return sorted(range(len(a)), key=lambda j: (-float(a[j]), j))


def kept_tokens(a, plus):
    """Steps 4 and 5: the kept tokens of the adaptive mode, in order."""
    n, number = len(a), outliers(a)
    chosen = ranking(a)[:number]
    if plus:
        stride = max(1, (n // number) // 3)
        chosen += [j for j in range(0, n - 1, stride) if j not in chosen]
    return chosen


def outputs(x, a, keys, chosen, extra=True, neighbours=32):
    """Steps 6 and 7 on one image: patches x (N,C), a (N,), keys (N,C)."""
    x, n = x.double(), len(a)
    unit = [k / max(float(k.norm()), 1e-12) for k in keys.double()]
    rows = []
    for i in chosen:
        others = sorted((j for j in range(n) if j != i), key=lambda j: (-float(unit[i] @ unit[j]), j))
        rows.append(x[i] + sum((a[j] * x[j] for j in others[:neighbours]), torch.zeros_like(x[i])))
    rest = [j for j in range(n) if j not in chosen]
    if extra and rest:
        rows.append(sum(a[j] * x[j] for j in rest))
    return torch.stack(rows)


def clip(n, batch=3, seed=0, heads=3, dim=4, sharp=3.0):
    """Features, queries and keys of a tower with class token on ``n`` patches; ``sharp`` attention has outliers."""
    x, q, k = noise(batch, n + 1, 6, seed=seed), *(noise(batch, heads, n + 1, dim, seed=seed + s) for s in (1, 2))
    return x, q * sharp, k


@pytest.mark.parametrize("kind", [PruMerge, PruMergePlus])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 33, 40, 97])
def test_adaptive_is_the_card(kind, n):
    x, q, k = clip(n, seed=n)
    plan = kind().plan(tr.Evidence(x, k, q, protected=1))
    assert isinstance(plan, Pool)
    assert not plan.normalised
    there = plan.validity()
    there = torch.ones(3, plan.k, dtype=torch.bool) if there is None else there
    assert there.all(1).any(), "no slot is empty in every sample"
    assert (there.long().diff(dim=1) >= 0).all(), "empty slots come first, so that the last token stays last"
    for b in range(3):
        a = class_attention(q[b], k[b])
        chosen = kept_tokens(a, kind is PruMergePlus)
        left = plan.representatives()[b][there[b]].tolist()
        assert left[0] == 0, "the class token of plain evidence stays in front"
        assert left[1 : 1 + len(chosen)] == [1 + i for i in chosen]
        others = [j for j in ranking(a) if j not in chosen]
        assert left[1 + len(chosen) :] == [1 + j for j in others[:1]], (
            "the extra token is hosted by the best of the rest"
        )
        want = outputs(x[b, 1:], a, wide(k[b])[1:], chosen)
        got = plan.reduce(x)[b]
        torch.testing.assert_close(got[there[b]][1:].double(), want, atol=1e-5, rtol=1e-5)
        assert torch.equal(got[there[b]][0], x[b, 0])
        assert not got[~there[b]].any()
        alone = kind().plan(tr.Evidence(x[b : b + 1], k[b : b + 1], q[b : b + 1], protected=1))
        assert alone.validity() is None
        assert torch.equal(alone.representatives()[0], plan.representatives()[b][there[b]])


def test_samples_differ_in_number():
    x, q, k = clip(97, seed=1)
    q[1] = 0
    plan = PruMerge().plan(tr.Evidence(x, k, q, protected=1))
    assert plan.validity() is not None
    counts = plan.validity().sum(1).tolist()
    assert counts == [outliers(class_attention(q[b], k[b])) + 2 for b in range(3)]
    assert counts[1] == 3, "no outlier: one token is kept all the same, beside the class token and the extra one"


@pytest.mark.parametrize("n", [3, 5, 16, 40])
@pytest.mark.parametrize("keep", [1, 2, 3, 8, 0.5])
def test_explicit_keep_is_the_number_of_outputs(n, keep):
    x, q, k = clip(n, seed=n)
    want = keep if isinstance(keep, int) else int(keep * n + 0.5)
    plan = PruMerge(keep=keep).plan(tr.Evidence(x, k, q, protected=1))
    if want >= n:
        assert plan.is_identity
        return
    assert plan.k == want + 1
    assert plan.validity() is None
    for b in range(3):
        a = class_attention(q[b], k[b])
        chosen = ranking(a)[: max(want - 1, 1)]
        rows = outputs(x[b, 1:], a, wide(k[b])[1:], chosen, extra=want > 1)
        torch.testing.assert_close(plan.reduce(x)[b, 1:].double(), rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [4, 5, 16, 41])
@pytest.mark.parametrize("keep", [1, 2, 3, 4, 7, 0.8])
def test_plus_with_a_budget_is_half_by_attention_and_half_spaced(n, keep):
    x, q, k = clip(n, seed=n)
    want = keep if isinstance(keep, int) else int(keep * n + 0.5)
    plan = PruMergePlus(keep=keep).plan(tr.Evidence(x, k, q, protected=1))
    if want >= n:
        assert plan.is_identity
        return
    assert plan.k == want + 1
    kept = max(want - 1, 1)
    for b in range(3):
        a = class_attention(q[b], k[b])
        best = ranking(a)[: (kept + 1) // 2]
        rest, spaced = [j for j in range(n) if j not in best], kept // 2
        chosen = best + [rest[math.floor((i + 0.5) * len(rest) / spaced)] for i in range(spaced)]
        assert len(set(chosen)) == kept
        assert plan.representatives()[b, 1 : 1 + kept].tolist() == [1 + j for j in chosen]
        rows = outputs(x[b, 1:], a, wide(k[b])[1:], chosen, extra=want > 1)
        torch.testing.assert_close(plan.reduce(x)[b, 1:].double(), rows, atol=1e-5, rtol=1e-5)


def example():
    """Eight patches, attention peaks at 5 and 2; keys in two directions: even patches, odd patches."""
    attention = torch.tensor([0.1, 0.02, 0.03, 0.25, 0.03, 0.01, 0.5, 0.03, 0.03])[None, None, None]
    keys = torch.tensor([[9.0, 9.0]] + [[1.0, 0.1 * i] if i % 2 == 0 else [0.1 * i, 1.0] for i in range(8)])[None, None]
    x = torch.tensor([1000.0, 1, 2, 4, 8, 16, 32, 64, 128])[None, :, None]
    return tr.Evidence(x, keys, attention=attention, protected=1), x


def test_worked_example():
    """Quartiles 0.0275 and 0.085 (bound 0.17125): patches 5 and 2. By key 5 is next to 7 and 3, 2 to 4 and 0."""
    e, x = example()
    plan = PruMerge(neighbours=2).plan(e)
    assert plan.representatives().tolist() == [[0, 6, 3, 2]]
    rest = 0.02 * 1 + 0.03 * 2 + 0.03 * 8 + 0.01 * 16 + 0.03 * 64 + 0.03 * 128
    want = torch.tensor([1000, 32 + 0.03 * 128 + 0.03 * 8, 4 + 0.01 * 16 + 0.02 * 1, rest])
    torch.testing.assert_close(plan.reduce(x).flatten(), want)
    assert plan.untouched().tolist() == [[True, False, False, False]]


def test_weights_are_attention_and_not_normalised():
    e, _ = example()
    weights = PruMerge(keep=3, neighbours=7).plan(e).weights[0]
    torch.testing.assert_close(weights[1].sum(), torch.tensor(1 + 0.9 - 0.5)), "all but its own and the class token's"
    torch.testing.assert_close(weights[3].sum(), torch.tensor(0.9 - 0.5 - 0.25))
    assert weights[1, 3] == 0.25, "kept tokens are neighbours too"


def test_one_full_width_head_is_not_the_mean_of_heads():
    """The first head alone would keep patch 0; side by side the logits add up, and patch 1 wins."""
    q = torch.ones(1, 2, 4, 1)
    k = torch.tensor([[0.0, 5.0, 4.0, 0.0], [0.0, -4.0, 0.0, 0.0]])[None, :, :, None]
    plan = PruMerge(keep=1).plan(tr.Evidence(noise(1, 4, 5), k, q, protected=1))
    assert plan.representatives().tolist() == [[0, 2]]
    mean = torch.stack([k[0, h, :, 0].softmax(0) for h in range(2)]).mean(0)
    assert mean[1:].argmax() == 0


@pytest.mark.parametrize(("number", "stride"), [(1, 192), (2, 96), (4, 48), (30, 6), (72, 2), (144, 1), (100, 1)])
def test_spatial_samples(number, stride):
    """576 patches with the first ``number`` above the bound; the last patch is never a sample."""
    a = torch.full((1, 576), 0.001)
    a[:, :number] = 0.01
    method = PruMergePlus()
    if number < 144:
        assert method.outliers(a).item() == number
    order, count = method.spread(descending(a), torch.tensor([[number]]))
    spaced = [j for j in range(0, 575, stride) if j >= number]
    assert order[0, : count.item()].tolist() == [*range(number), *spaced]


@pytest.mark.parametrize("number", range(1, 144))
def test_the_count_of_outliers_is_not_truncated_twice(number):
    """int(576 * (number / 576)) is one less for some numbers in floating point."""
    a = torch.full((2, 576), 0.001)
    a[0, 5 : 5 + number] = 0.5
    assert PruMerge().outliers(a).tolist() == [[number], [1]]


def test_percentiles_are_of_every_image_alone():
    x, q, k = clip(64, batch=2)
    q[1] *= 20
    e = tr.Evidence(x, k, q, protected=1)
    plan = PruMerge().plan(e)
    for b in range(2):
        alone = PruMerge().plan(tr.Evidence(x[b : b + 1], k[b : b + 1], q[b : b + 1], protected=1))
        there = slice(None) if plan.valid is None else plan.valid[b]
        assert torch.equal(alone.keep[0], plan.keep[b][there])


def test_iqr_factor_and_neighbours():
    x, q, k = clip(97, batch=1)
    e = tr.Evidence(x, k, q, protected=1)
    assert PruMerge(iqr_factor=1e9).plan(e).k == 3
    assert PruMerge(iqr_factor=0).plan(e).k == 2 + 24, "what lies above the third quartile"
    assert PruMerge(neighbours=0).plan(e).untouched()[0, :-1].all()
    rows = PruMerge(neighbours=5).plan(e).weights[0, 1:-1]
    assert ((rows != 0).sum(1) == 6).all()


@pytest.mark.parametrize("kind", [PruMerge, PruMergePlus])
def test_attention_of_the_last_block_features_that_enter_the_projector(kind):
    assert kind().tower_blocks() == (-1,)
    e = visual(ORIGINS["large"], queries=4 * noise(2, 2, 145, 8)).in_vision(kind().with_class())
    assert e.prefix == 0
    plan = kind().plan(e)
    block = e.tower(-1).patches
    assert block is not e.tower().patches
    for b in range(2):
        a = class_attention(block.queries[b], block.keys[b])
        chosen = kept_tokens(a, kind is PruMergePlus)
        want = outputs(e.features[b], a, wide(block.keys[b])[1:], chosen)
        there = slice(None) if plan.valid is None else plan.valid[b]
        torch.testing.assert_close(plan.reduce(e.features)[b][there].double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("origin", ["wide", "units"])
def test_tower_without_class_token_ranks_by_attention_received(origin):
    """One head of full width all the same; scores and keys averaged over the patches of a token."""
    e = visual(ORIGINS[origin], cls=False, queries=4 * noise(2, 2, ORIGINS[origin].patches, 8)).in_vision(False)
    plan = PruMerge(keep=6).plan(e)
    block, index = e.tower(-1).patches, e.origin.index
    for b in range(2):
        q, k = wide(block.queries[b]), wide(block.keys[b])
        a = (q @ k.T / q.shape[1] ** 0.5).softmax(1).mean(0)[index].mean(1)
        chosen = ranking(a)[:5]
        want = outputs(e.x[b], a, k[index].mean(1), chosen)
        torch.testing.assert_close(plan.reduce(e.x)[b].double(), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no class token"):
        PruMerge(score="cls").plan(e)


def test_ties_go_to_the_lower_index():
    x = noise(1, 9, 4)
    e = tr.Evidence(x, torch.ones(1, 1, 9, 2), torch.ones(1, 1, 9, 2), protected=1)
    plan = PruMerge(keep=3, neighbours=2).plan(e)
    assert plan.representatives().tolist() == [[0, 1, 2, 3]]
    assert [row.nonzero().flatten().tolist() for row in plan.weights[0, 1:3]] == [[1, 2, 3], [1, 2, 3]]
    assert PruMerge(neighbours=2).plan(e).representatives().tolist() == [[0, 1, 2]]


def test_zero_keys_and_nan():
    x, q, k = clip(40, batch=1)
    k[0, :, 7:20] = 0
    e = tr.Evidence(x, k, q, protected=1)
    a = class_attention(q[0], k[0])
    want = outputs(x[0, 1:], a, wide(k[0])[1:], ranking(a)[:9])
    torch.testing.assert_close(PruMerge(keep=10).plan(e).reduce(x)[0, 1:].double(), want, atol=1e-5, rtol=1e-5)
    k[0, 0, 7] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        PruMerge().plan(tr.Evidence(x, k, q, protected=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [PruMerge, PruMergePlus])
def test_half_precision_and_autocast_do_not_change_the_choice(kind, dtype):
    x, q, k = (t.to(dtype) for t in clip(60))
    want = kind().plan(tr.Evidence(x, k.float(), q.float(), protected=1)).representatives()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = kind().plan(tr.Evidence(x, k, q, protected=1))
    assert torch.equal(plan.representatives(), want)
    assert plan.reduce(x).dtype == dtype


@pytest.mark.parametrize("kind", [PruMerge, PruMergePlus])
def test_ragged_plans_survive_safetensors(kind, tmp_path):
    x, q, k = clip(97)
    q[1] = 0
    plan = kind().plan(tr.Evidence(x, k, q, protected=1))
    assert plan.validity() is not None
    plan.save(tmp_path / "plan.safetensors")
    assert tr.Plan.load(tmp_path / "plan.safetensors") == plan


def test_grouped_keys_are_repeated_for_their_queries():
    x, q, k = clip(20, heads=4)
    few = k[:, :2]
    grouped = tr.Evidence(x, few, q, protected=1).attention.joined()("cls")
    repeated = tr.Evidence(x, few.repeat_interleave(2, 1), q, protected=1).attention.joined()("cls")
    assert torch.equal(grouped, repeated)
    torch.testing.assert_close(grouped[0, 0, 0, 1:].double(), class_attention(q[0], few[0].repeat_interleave(2, 0)))


@pytest.mark.parametrize("kind", [PruMerge, PruMergePlus])
def test_settings(kind):
    assert kind().keep is None
    assert kind().total(576) == 576
    assert kind(keep=0.125).total(576) == 72
    method = tr.get_method(f"{kind.name}:keep=40,neighbours=16,iqr_factor=2.0,layer=-2")
    assert method == kind(keep=40, neighbours=16, iqr_factor=2.0, layer=-2)
    assert method.at(7) == kind(keep=7, neighbours=16, iqr_factor=2.0, layer=-2)
    assert tr.get_method(f"{kind.name}:keep=none") == kind()
    for reducer in (kind(), method):
        assert tr.get_method(reducer.spec()) == reducer
        assert tr.Reducer.from_json(reducer.to_json()) == reducer
    for bad, message in [
        ({"keep": 0}, "keep is a number of tokens"),
        ({"keep": 1.5}, "keep is a number of tokens"),
        ({"neighbours": -1}, "neighbours is an int >= 0"),
        ({"neighbours": 2.5}, "neighbours is an int >= 0"),
        ({"iqr_factor": -0.1}, "iqr_factor is a finite number >= 0"),
        ({"iqr_factor": float("nan")}, "iqr_factor is a finite number >= 0"),
        ({"iqr_factor": "wide"}, "iqr_factor is a finite number >= 0"),
        ({"layer": "top"}, "layer is a 0-based block"),
        ({"score": "cosine"}, "score is one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            kind(**bad)


def test_only_adaptive_methods_take_no_budget():
    with pytest.raises(ValueError, match="not None"):
        tr.DivPrune(keep=None)
