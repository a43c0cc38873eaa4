"""Random pruning inside a language model."""

from __future__ import annotations

import math

import pytest
import torch
from mixed import LAYOUTS, kept_of, marks, mixed
from vlms import batch, llava

import tokenreduce as tr
from tokenreduce.vision.language.random_drop import RandomVisual


def visual_kept(reducer, layouts=LAYOUTS, **more):
    """Which visual tokens of every sample stay, numbered among themselves."""
    plan = reducer.plan(mixed(layouts, **more))
    out = []
    for b, row in enumerate(layouts[more.get("rows", slice(None))]):
        places = [i for i, c in enumerate(row) if c == "v"]
        out.append([places.index(i) for i in kept_of(plan, b) if row[i] == "v"])
    return out


def test_another_seed_layer_or_sample_is_another_draw():
    rows = ("t" + "v" * 40 + "tt",) * 3
    first = visual_kept(RandomVisual(), rows)
    assert first == visual_kept(RandomVisual(), rows)
    assert len({tuple(r) for r in first}) == 3
    assert first != visual_kept(RandomVisual(seed=1), rows)
    assert first != visual_kept(RandomVisual(layer=1), rows, layer=1)
    for b in range(3):
        assert visual_kept(RandomVisual(), rows, rows=slice(b, b + 1))[0] == first[b]


def test_only_the_visual_tokens_count():
    """Text before, between and behind them, its content, and padding change nothing."""
    g = torch.Generator().manual_seed(3)
    seen = torch.randn(1, 12, 12, generator=g)
    want = None
    for layout in ("v" * 12, "t" * 5 + "v" * 12 + "tt", "...tvvvvvttvvvvvvvt..", "tv" * 12):
        evidence = mixed((layout,))
        evidence.x = torch.randn(1, len(layout), 12, generator=g) * 30
        evidence.x[marks((layout,), "v")] = seen[0]
        plan = RandomVisual(keep=5).plan(evidence)
        places = [i for i, c in enumerate(layout) if c == "v"]
        got = [places.index(i) for i in kept_of(plan, 0) if layout[i] == "v"]
        assert len(got) == 5
        want = got if want is None else want
        assert got == want, layout


def test_every_token_is_as_likely():
    n, samples = 8, 4000
    layout = "t" + "v" * n + "t"
    x = torch.randn(samples, n + 2, 8, generator=torch.Generator().manual_seed(0))
    visual = marks((layout,), "v").expand(samples, -1)
    plan = RandomVisual(keep=2).plan(tr.Evidence(x, visual=visual, layer=2, depth=4))
    stays = (plan.sources()[:, 1:-1] >= 0).double()
    assert (stays.sum(1) == 2).all()
    # Each stays with probability 1/4; five standard errors of slack.
    assert (stays.mean(0) - 0.25).abs().max() < 5 * math.sqrt(3 / 16 / samples)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_in_a_model_at_any_layer(layer):
    """Layer 0 as well: nothing but the embeddings is looked at."""
    model, inputs = llava(), batch("left", ((9, 1), (5, 2)))
    with tr.patched(model, RandomVisual(layer=layer, keep=5)), tr.record(model, flops=False) as trace, torch.no_grad():
        model(**inputs)
    valid = trace.plans[-1].validity()
    left = trace.plans[-1].representatives()
    visual = torch.isin(inputs["input_ids"], torch.tensor(model.config.image_token_id)).gather(1, left)
    there = visual if valid is None else visual & valid
    assert there.sum(1).tolist() == [5, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(layer=-1), "layer is an int >= 0"), (dict(seed=-1), "seed is an int >= 0"), (dict(keep=None), "keep")],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        RandomVisual(**settings)


def test_bad_depth_and_names():
    with pytest.raises(ValueError, match="layer=4: the language model has layers 0 to 3"):
        RandomVisual(layer=4).acts_at(0, 4)
    assert tr.get_method("random:keep=7", "language") == RandomVisual(keep=7)
    assert RandomVisual(keep=7).spec() == "random@language:keep=7"
