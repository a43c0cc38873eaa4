"""DART against the steps of its card in plain loops."""

from __future__ import annotations

import pytest
import torch
from mixed import LAYOUTS, RIGHT, kept_of, mixed

from tokenreduce.vision.language.dart import DART


def reference(evidence, layout, b, p_img, p_txt, wanted, each=None):
    """The card's steps on one sample; the rest of the budget by the smallest highest cosine."""
    h = evidence.normed[b].double()
    h = [r / r.norm() for r in h]

    def cosine(i, j):
        return float(h[i] @ h[j])

    def largest(places, k):
        return sorted(places, key=lambda i: (-norm[i], i))[:k]

    norm = {i: float(evidence.keys[b, :, i].double().abs().sum()) for i in range(len(layout))}
    images = [i for i, c in enumerate(layout) if c == "v"]
    texts = [i for i, c in enumerate(layout) if c == "t" and i > max(images)]
    if wanted >= len(images):
        return [i for i in range(len(layout))]
    mine = largest(images, min(p_img, wanted))
    pivots = mine + largest(texts, p_txt)
    chosen, free = set(mine), [i for i in images if i not in mine]
    each = (wanted - len(mine)) // len(pivots) if each is None else each
    for pivot in pivots:
        taken = sorted(free, key=lambda i: (cosine(pivot, i), i))[:each]
        chosen |= set(taken)
        free = [i for i in free if i not in taken]
    rest = sorted(free, key=lambda i: (max(cosine(p, i) for p in pivots), i))
    chosen |= set(rest[: wanted - len(chosen)])
    assert len(chosen) == wanted
    return [i for i, c in enumerate(layout) if c != "v" or i in chosen]


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT, ("t" + "v" * 40 + "t" * 9, "v" * 33 + "t" * 17)], ids=str)
@pytest.mark.parametrize("pivots", [(4, 4), (2, 1), (0, 3), (3, 0), (1, 20)], ids=str)
@pytest.mark.parametrize("keep", [1, 3, 0.5, 8])
def test_worked_example(layouts, pivots, keep):
    evidence = mixed(layouts)
    plan = DART(keep=keep, pivot_image_token=pivots[0], pivot_text_token=pivots[1]).plan(evidence)
    for b, layout in enumerate(layouts):
        n = layout.count("v")
        wanted = min(keep, n) if isinstance(keep, int) else int(keep * n + 0.5)
        assert kept_of(plan, b) == reference(evidence, layout, b, *pivots, wanted)


@pytest.mark.parametrize(
    ("rule", "each", "total"),
    [
        (dict(max_num_trunction=128), 16, 132),
        (dict(reduction_ratio=0.7778), 15, 124),
        (dict(reduction_ratio=1.0), 0, 4),
        (dict(reduction_ratio=1), 0, 4),
    ],
    ids=str,
)
def test_published_counts_of_576(rule, each, total):
    layouts = ("t" * 5 + "v" * 576 + "t" * 12,)
    evidence = mixed(layouts)
    plan = DART(**rule).plan(evidence)
    assert plan.k == total + 17
    assert kept_of(plan, 0) == reference(evidence, layouts[0], 0, 4, 4, total, each)


def test_keep_is_exact_where_shares_are_not():
    layouts = ("t" * 5 + "v" * 576 + "t" * 12,)
    assert DART(keep=128).plan(mixed(layouts)).k == 128 + 17
    assert DART().plan(mixed(layouts)).k == 128 + 17


def test_published_rules_fill_their_budget_where_text_is_short():
    evidence = mixed(("tvvvvvvvvvvvvvvvvvvvvvvvvt",))  # 24 visual tokens, one text token behind them
    plan = DART(max_num_trunction=8).plan(evidence)
    assert plan.k == 4 + 8 + 2
    assert kept_of(plan, 0) == reference(evidence, "t" + "v" * 24 + "t", 0, 4, 4, 12, 1)
    assert DART(reduction_ratio=0.0).plan(evidence).is_identity
    assert DART(max_num_trunction=800).plan(evidence).is_identity


def test_no_text_behind_and_no_visual_pivot():
    plan = DART(keep=3, pivot_image_token=0).plan(mixed(("ttvvvvv",)))
    assert plan.k == 5


def test_pivots_and_turns_by_hand():
    """Keys mark token 1 and text 6 as pivots; the first takes the opposite of it, the second the opposite of that."""
    x = torch.tensor([[[1.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [0, 1], [1, 0]]])
    keys = torch.zeros(1, 1, 8, 2)
    keys[0, 0, 1], keys[0, 0, 6] = torch.tensor([3.0, -4]), torch.tensor([-9.0, 1])
    evidence = mixed(("tvvvvvtt",), keys=keys, norm=lambda h: h)
    evidence.x = x
    plan = DART(keep=3, pivot_image_token=1, pivot_text_token=1).plan(evidence)
    assert plan.representatives().tolist() == [[0, 1, 2, 4, 6, 7]]
    # Norms are those of all keys behind the rotary embedding: L1 7 against 10, where L2 would say 5 against 9.
    both = DART(keep=1, pivot_image_token=1, pivot_text_token=0).plan(evidence)
    assert both.representatives().tolist() == [[0, 1, 6, 7]]


def test_earlier_pivots_take_candidates_away():
    """Both pivots like token 3 least; the visual pivot comes first, the text pivot gets its second choice."""
    x = torch.tensor([[[1.0, 0], [0.9, 0.1], [-1, 0], [0.2, 1], [1.0, 0.05]]])
    keys = torch.zeros(1, 1, 5, 2)
    keys[0, 0, 0], keys[0, 0, 4] = 1.0, 2.0
    evidence = mixed(("vvvvt",), keys=keys, norm=lambda h: h)
    evidence.x = x
    plan = DART(keep=3, pivot_image_token=1, pivot_text_token=1).plan(evidence)
    assert plan.representatives().tolist() == [[0, 2, 3, 4]]


def test_ties_go_to_the_lower_index():
    evidence = mixed(("tvvvvvvt",), norm=torch.ones_like)
    evidence.keys.fill_(1.0)
    plan = DART(keep=3, pivot_image_token=1, pivot_text_token=1).plan(evidence)
    assert plan.representatives().tolist() == [[0, 1, 2, 3, 7]]


def test_the_final_norm_is_needed():
    with pytest.raises(ValueError, match="needs norm"):
        DART(keep=2).plan(mixed(norm=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(layer=0), "layer is an int >= 1"),
        (dict(pivot_image_token=0, pivot_text_token=0), "at least one pivot"),
        (dict(pivot_text_token=-1), "pivot_text_token is an int >= 0"),
        (dict(max_num_trunction=0), "max_num_trunction is an int >= 1"),
        (dict(reduction_ratio=1.5), "share to drop"),
        (dict(reduction_ratio=0.5, keep=3), "give one of"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DART(**settings)


def test_where_it_acts():
    assert [DART().acts_at(i, 4) for i in range(4)] == [False, False, True, False]
    with pytest.raises(ValueError, match="layers 0 to 1"):
        DART().acts_at(0, 2)
