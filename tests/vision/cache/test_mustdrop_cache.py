"""MustDrop's third phase against its card in plain loops: layers of different lengths, padded samples."""

from __future__ import annotations

import pytest
import torch
from kv_cases import kept_of, marks

import tokenreduce as tr
from tokenreduce.vision.cache.mustdrop_cache import MustDropCache

LAYOUTS = ("tvvvvvvtvvvvvtt", "..tvvvvvvvvvttt")
#: The columns of every sample that the layers of a model with cuts before layers 2 and 4 hold.
HELD = (
    (list(range(15)), list(range(2, 15))),
    (list(range(15)), list(range(2, 15))),
    ([0, 2, 3, 5, 7, 8, 10, 12, 13, 14], [2, 3, 5, 8, 9, 11, 12, 13, 14]),
    ([0, 2, 3, 5, 7, 8, 10, 12, 13, 14], [2, 3, 5, 8, 9, 11, 12, 13, 14]),
    ([0, 3, 7, 8, 13, 14], [2, 5, 9, 11, 12, 13, 14]),
    ([0, 3, 7, 8, 13, 14], [2, 5, 9, 11, 12, 13, 14]),
)


def layers(kv_heads=2, held=HELD, located=True):
    """Evidence of every layer; samples with fewer slots are filled on the left."""
    out = []
    for layer, samples in enumerate(held):
        n = max(map(len, samples))
        columns = torch.tensor([[0] * (n - len(s)) + s for s in samples])
        valid = torch.tensor([[False] * (n - len(s)) + [True] * len(s) for s in samples])
        g = torch.Generator().manual_seed(layer)
        keys, values = (torch.randn(len(samples) * kv_heads, n, 4, generator=g) for _ in range(2))
        out.append(
            tr.CacheEvidence(
                keys, values, kv_heads=kv_heads, visual=marks(LAYOUTS, "v").gather(1, columns), valid=valid,
                layer=layer, depth=len(held), columns=columns if located else None,
            )
        )  # fmt: skip
    return out


def columns_left(plan, evidence, row):
    return [int(evidence.columns[row, i]) for i in kept_of(plan, row) if bool(evidence.there[row, i])]


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_layers_between_the_cuts_keep_the_survivors_of_the_last(first, kv_heads):
    evidences = layers(kv_heads)
    plans = MustDropCache(pruning_layers=(first, 4)).plans(evidences)
    for layer, (plan, evidence) in enumerate(zip(plans, evidences, strict=True)):
        for row in range(2 * kv_heads):
            b = row // kv_heads
            before = HELD[layer][b]
            after = [c for c in before if layer < first or LAYOUTS[b][c] != "v" or c in HELD[-1][b]]
            assert columns_left(plan, evidence, row) == after
    assert all(plan.is_identity for plan in plans[:first])
    assert plans[4].is_identity
    assert plans[5].is_identity


def test_default_layers_are_those_of_the_card():
    """Of 32 layers, 2 is the first whose cache is thinned."""
    samples = (list(range(15)), list(range(2, 15)))
    few = ([0, 3, 7, 8, 13, 14], [2, 5, 9, 11, 12, 13, 14])
    plans = MustDropCache().plans(layers(held=(samples,) * 15 + (few,) * 17))
    assert [not plan.is_identity for plan in plans] == [False] * 2 + [True] * 13 + [False] * 17


def test_a_token_survives_where_any_head_of_the_last_layer_holds_it():
    keys = torch.zeros(2, 4, 4)
    columns = torch.tensor([[0, 1, 2, 5], [0, 2, 3, 5]])
    visual = torch.tensor([[False, True, True, False], [False, True, True, False]])
    first = tr.CacheEvidence(
        torch.zeros(2, 6, 4), torch.zeros(2, 6, 4), kv_heads=2, columns=torch.arange(6).expand(2, -1), depth=2,
        visual=torch.tensor([[False, True, True, True, True, False]]),
    )  # fmt: skip
    last = tr.CacheEvidence(keys, keys, kv_heads=2, columns=columns, visual=visual, layer=1, depth=2)
    plans = MustDropCache().plans([first, last])
    assert kept_of(plans[0], 0) == kept_of(plans[0], 1) == [0, 1, 2, 3, 5]
    assert plans[1].is_identity


def test_without_a_cut_nothing_happens():
    evidences = layers(held=HELD[:1] * 4)
    assert all(plan.is_identity for plan in MustDropCache().plans(evidences))
    assert MustDropCache().plan(evidences[0]).is_identity
    assert all(plan.is_identity for plan in MustDropCache().plans(layers(held=HELD[:1] * 4, located=False)))


def test_bad_input():
    with pytest.raises(ValueError, match="columns"):
        MustDropCache().plans(layers(located=False))
    with pytest.raises(ValueError, match="pruning_layers"):
        MustDropCache(pruning_layers=(3, 1))
    with pytest.raises(ValueError, match="layers 0 to 5"):
        MustDropCache(pruning_layers=(9,)).plans(layers())


def test_spec():
    assert MustDropCache().moment() == "prompt"
    assert tr.get_method("mustdrop-cache:pruning_layers=[1,3]") == MustDropCache(pruning_layers=(1, 3))
