"""The gradient search for DiffRate's rates, on a small random ViT."""

from __future__ import annotations

import copy

import pytest
import torch
from support import images, tiny_vit

import tokenreduce as tr
from tokenreduce.bench.costs import Costs
from tokenreduce.bench.rate_search import HIDDEN, _Masked, _Rates, _Soft, search_rates
from tokenreduce.core.plan import Merge
from tokenreduce.vision.encoder.diffrate import DiffRate

SMALL = Costs.vit(37, 32, 4, classes=7, mlp_ratio=2.0)
DENSE = SMALL.gmacs([37] * 6)


def separable(batches=2, batch=16, seed=0):
    """Images of seven classes that differ in their mean pattern."""
    g = torch.Generator().manual_seed(seed)
    patterns = torch.randn(7, 3, 24, 24, generator=g)
    out = []
    for _ in range(batches):
        labels = torch.randint(0, 7, (batch,), generator=g)
        out.append((patterns[labels] + 0.3 * torch.randn(batch, 3, 24, 24, generator=g), labels))
    return out


# -- what is learned ---------------------------------------------------------------------------------------------------
def test_distributions_as_in_the_card():
    """Kept numbers are rounded up means; rank t survives under the candidates above it; block 1 stays dense."""
    rates = _Rates(10, 3, 4, frozenset({1}))
    assert rates.candidates.tolist() == [10, 6, 2]
    with torch.no_grad():
        rates.logits[0] = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()
        rates.logits[1] = torch.tensor([[0.9, 0.1, 0.0], [0.0, 1.0, 0.0]]).clamp(min=1e-12).log()
    layers = rates()
    assert [(x.arrive, x.middle, x.left) for x in layers] == [(10, 8, 4), (4, 4, 4), (4, 4, 4)]  # 7.2, 3.2; 9.6, 6
    chance = [[1.0] * 2 + [0.8] * 4 + [0.5] * 4, [1.0] * 2 + [0.2] * 4 + [0.1] * 4]
    torch.testing.assert_close(layers[0].survive, torch.tensor(chance))
    assert layers[2].counts.tolist() == [10, 6]  # exactly 6: noise must not make it 7
    assert layers[1].counts is None


def test_costs_pull_at_both_numbers_of_a_layer_only():
    """The minimum hands its gradient to the layer's own numbers, also where neither is the smallest so far."""
    rates = _Rates(10, 3, 1, frozenset({0}))
    with torch.no_grad():  # candidates 10 ... 1: halfway between 4 and 3, then between 8 and 7
        rates.logits[0, :, 6:8] += 40.0
        rates.logits[1, :, 2:4] += 40.0
    layers = rates()
    assert (layers[1].left, layers[2].arrive, layers[2].left) == (4, 4, 4)
    left = rates.left(1)
    assert [float(n.detach()) for n in map(torch.as_tensor, left)] == [11, 5, 5]
    left[2].backward()
    assert rates.logits.grad[0].abs().sum() == 0
    p = rates.logits.detach()[1, 0].softmax(-1)
    want = p * (rates.candidates - p @ rates.candidates)  # derivative of a mean by its logits
    torch.testing.assert_close(rates.logits.grad[1], want.expand(2, -1))


def rotary(**changes):
    """A model whose tokens must keep their positions when they are sorted."""
    from timm.models.eva import Eva

    torch.manual_seed(0)
    return Eva(
        img_size=24, patch_size=4, embed_dim=32, depth=6, num_heads=2, num_classes=7, use_rot_pos_emb=True,
        head_init_scale=1.0, **changes,
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("build", "changes"),
    [(tiny_vit, {}), (tiny_vit, {"global_pool": "avg"}), (tiny_vit, {"reg_tokens": 3}), (rotary, {})],
)
def test_hiding_is_removing(build, changes):
    """With the same numbers the search's forward gives what the reducer that it returns gives."""
    model, x = build(**changes), images(3)
    rates = _Rates(36, 6, 1, frozenset({0}))
    numbers = torch.tensor([[33, 30], [27, 24], [20, 17], [12, 9], [6, 3]])
    with torch.no_grad():
        rates.logits.scatter_(2, (36 - numbers)[..., None], 40.0)
        layers = rates()
        assert [[a.middle, a.left] for a in layers[1:]] == numbers.tolist()
        with tr.patched(model, _Soft(rates)):
            hidden = model(x)
        with tr.patched(model, rates.reducer()), tr.record(model, flops=False) as trace:
            removed = model(x)
    assert trace.tokens == [model.num_prefix_tokens + a.left for a in layers]
    torch.testing.assert_close(hidden, removed, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(removed, model(x), rtol=0.01, atol=0.01)


def test_gradients_of_the_mask_are_those_of_masked_attention():
    """Through the logarithm of a hidden token's size comes the derivative of a softmax that is multiplied by the mask,
    at 0 as well: what revealing the token would change."""
    x, logits, v = torch.randn(1, 5, 3), torch.randn(5), torch.randn(5, 2)
    hard = torch.tensor([1.0, 1, 1, 0, 0])
    chance = torch.tensor([1.0, 1, 0.9, 0.4, 0.1], requires_grad=True)
    mask = torch.where(hard > 0, 1.0, HIDDEN) + chance - chance.detach()
    plan = _Masked(5, torch.arange(5).expand(1, -1), mask, None)
    size = plan.reduce_size(torch.tensor([[1.0, 2, 1, 3, 1]]))
    out = torch.softmax(logits + size[0].log(), 0) @ v
    (got,) = torch.autograd.grad(out.sum(), chance)
    m = hard.clone().requires_grad_()
    weight = logits.exp() * torch.tensor([1.0, 2, 1, 3, 1]) * m
    want = (weight / weight.sum()) @ v
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), m)[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(plan.reduce(x), x)


def test_masked_plan_updates_destinations_only():
    order = torch.tensor([[0, 3, 1, 2]])
    merge = Merge(4, torch.tensor([[0, 1]]), torch.tensor([[2]]), torch.tensor([[1]]),
                  size_scale=torch.tensor([[0.5]]), by_size=False)  # fmt: skip
    plan = _Masked(4, order, torch.tensor([1.0, 1, HIDDEN, HIDDEN]), merge)
    x = torch.tensor([[[1.0], [2], [3], [4]]])
    assert plan.reduce(x).tolist() == [[[1.0], [3], [2], [3]]]
    torch.testing.assert_close(plan.reduce_size(torch.tensor([[1.0, 2, 1, 1]])), torch.tensor([[1.0, 2, 2e-6, 1e-6]]))
    assert plan.sources().tolist() == [[0, 2, 3, 1]]


# -- the search --------------------------------------------------------------------------------------------------------
def test_reaches_the_target_and_leaves_the_weights():
    model = tiny_vit().train()
    model.blocks[2].eval()
    model.head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    target = 0.85 * DENSE
    seen = []
    found = search_rates(
        model,
        separable(),
        target_gmacs=target,
        steps=50,
        lr=0.1,
        lam=10 / target**2,
        granularity=3,
        on_step=seen.append,
    )
    assert isinstance(found, DiffRate)
    assert found.tokens == 37
    assert len(seen) == seen[-1].steps == 50
    assert all(abs(s.gmacs / target - 1) < 0.05 for s in seen[-5:])
    assert abs(seen[0].gmacs / target - 1) > 0.1
    # Weights, modes and flags are untouched, and no gradient was left behind.
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.grad is not None or not p.requires_grad] == [
        "head.weight"
    ]
    assert model.training
    assert not model.blocks[2].training
    assert tr.describe(model).active == ()
    # What torch counts for the patched model is the target too (ranking and matching included).
    model.eval()
    with torch.no_grad(), tr.patched(model, found), tr.record(model) as trace:
        model(images(1))
    assert trace.tokens[0] == 37
    assert trace.flops / 2e9 == pytest.approx(target, rel=0.08)


def test_the_task_is_heard():
    """Without the cost term the rates move to where the reduced model does the dense model's answers more justice."""
    model, x = tiny_vit(), images(16)
    with torch.no_grad():
        labels = model(x).argmax(1)
        dense = float(torch.nn.functional.cross_entropy(model(x), labels))
    seen = []
    with pytest.warns(UserWarning, match="raise steps or lam"):
        search_rates(
            model,
            [(x, labels)],
            target_gmacs=0.99 * DENSE,
            steps=25,
            lr=0.2,
            warmup=25,
            on_step=seen.append,
            costs=SMALL,
        )
    assert 0 < seen[-1].loss - dense < 0.5 * (seen[0].loss - dense)
    kept = seen[-1].rates.merge_kept_num
    assert kept[1] > 30 > kept[-1]  # early layers need their tokens, late ones do not


def test_layers_can_be_left_alone():
    found = search_rates(
        tiny_vit(global_pool="avg"),
        separable(1, 4),
        target_gmacs=0.7 * DENSE,
        steps=25,
        lr=0.1,
        lam=1e9,
        uncompressed=(0, -1),
    )
    assert found.prune_kept_num[0] == found.merge_kept_num[0] == 37
    assert found.prune_kept_num[-1] == found.merge_kept_num[-1] == found.merge_kept_num[-2] < 37


def test_loaders_and_hooks_of_all_kinds():
    """Rows of three, a loss and a forward of one's own, mixed precision; epochs count the loader's length."""
    calls, seen = [], []
    data = [(torch.arange(4), *pair) for pair in separable(2, 4)]

    def forward(model, x):
        calls.append(x)
        return {"out": model(x)}

    def loss(out, y):
        return torch.nn.functional.cross_entropy(out["out"].float(), y)

    with pytest.warns(UserWarning, match="GMACs"):
        search_rates(
            tiny_vit(), data, target_gmacs=0.9 * DENSE, epochs=2, lam=0.0, costs=SMALL, forward=forward, loss=loss,
            autocast=torch.bfloat16, device="cpu", on_step=seen.append,
        )  # fmt: skip
    assert [s.step for s in seen] == [0, 1, 2, 3]
    assert [torch.equal(x, data[i % 2][1]) for i, x in enumerate(calls)] == [True] * 4


def test_a_failing_search_leaves_the_model_as_it_was():
    model = tiny_vit().train()
    want = model.state_dict()

    def broken(out, y):
        return out.sum() * float("nan")

    with pytest.raises(FloatingPointError, match="step 0"):
        search_rates(model, separable(1, 4), target_gmacs=0.7 * DENSE, loss=broken)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert tr.describe(model).active == ()
    assert list(model.state_dict()) == list(want)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_gmacs": 2 * DENSE}, r"between .* and .*everything kept"),
        ({"target_gmacs": 0.01 * DENSE}, "between"),
        ({"granularity": 0}, "granularity"),
        ({"epochs": 0}, "epochs"),
        ({"steps": 0}, "steps"),
        ({"warmup": -1}, "warmup"),
        ({"uncompressed": (6,)}, "uncompressed names layer 6"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        search_rates(tiny_vit(), separable(1, 4), **{"target_gmacs": 0.7 * DENSE, "costs": SMALL, **settings})


def test_bad_loaders_and_models():
    goal = {"target_gmacs": 0.7 * DENSE, "costs": SMALL}
    with pytest.raises(ValueError, match="has no length; give steps"):
        search_rates(tiny_vit(), iter(separable(1, 4)), **goal)
    with pytest.raises(ValueError, match="yields no batch"):
        search_rates(tiny_vit(), iter(separable(1, 4)), steps=2, **goal)
    with pytest.raises(ValueError, match="length of the loader"):
        search_rates(tiny_vit(), [], **goal)
    with pytest.raises(ValueError, match="class token"):
        search_rates(tiny_vit(class_token=False, global_pool="avg"), separable(1, 4), **goal)
    with pytest.raises(ValueError, match="several towers"):
        search_rates(torch.nn.ModuleList([tiny_vit(), tiny_vit()]), separable(1, 4), **goal)
    sizes = [separable(1, 4)[0], (torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(ValueError, match="images of one size"):
        search_rates(tiny_vit(dynamic_img_size=True), sizes, steps=2, **goal)
