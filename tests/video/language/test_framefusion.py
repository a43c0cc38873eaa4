"""FrameFusion against the card, step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from decode_reference import Entries
from mixed import marks, mixed, seen_by
from vlms import VLMS, prompts
from vlms_masked import close

import tokenreduce as tr
from tokenreduce import FrameFusion

FRAMES, PLACES = 4, 3
LAYOUT = "tt" + "v" * (FRAMES * PLACES) + "ttt"


def evidence(x=None, layer=0, history=None, depth=8, layout=LAYOUT, places=PLACES, **more):
    e = mixed((layout,), layer=layer, depth=depth, **more)
    number = (marks((layout,), "v").long().cumsum(1) - 1)[0]
    film = torch.stack([torch.zeros_like(number), number // places, number // places, number % places], -1)
    e._frame_of = torch.where(marks((layout,), "v")[0][:, None], film, -1)[None]
    e.history = None if history is None else torch.tensor([history])
    if x is not None:
        e.x = e.x.clone()
        e.x[0, marks((layout,), "v")[0]] = x
    return e


def chain(reducer, e):
    """Steps 2, 4 and 5 in loops: members of every surviving token, by index."""
    x, film, visual = e.x[0], e.frame_of[0], e.visual[0].tolist()
    groups = {i: [i] for i, v in enumerate(visual) if v}
    order = sorted(groups, key=lambda i: (int(film[i, 3]), int(film[i, 1])))
    last, head = {}, {}
    for i in order:
        place = int(film[i, 3])
        j = last.get(place)
        if j is not None and torch.cosine_similarity(x[i], x[j], dim=0) >= reducer.similarity_lower_bound:
            head[i] = head.get(j, j)
            groups[head[i]].append(i)
            del groups[i]
        last[place] = i
    return groups


def alike(seed=0):
    """Places 0 and 1 drift slowly from frame 1 on, place 2 jumps."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(FRAMES, PLACES, 12, generator=g)
    for t in range(2, FRAMES):
        x[t, :2] = x[t - 1, :2] + 0.2 * torch.randn(2, 12, generator=g)
    return x.flatten(0, 1)


def test_runs_collapse_into_the_token_before_them():
    reducer = FrameFusion(keep=1)
    e = evidence(alike())
    plan = reducer.plan(e)
    want = chain(reducer, e)
    assert any(len(m) == 3 for m in want.values())
    kept = [i for i in plan.representatives()[0].tolist() if e.visual[0, i]]
    assert kept == sorted(want)
    out = plan.reduce(e.x)[0]
    for slot, i in enumerate(plan.representatives()[0].tolist()):
        torch.testing.assert_close(out[slot], torch.stack([e.x[0, m] for m in want.get(i, [i])]).mean(0))


def test_where_candidates_are_enough_only_the_most_similar_merge():
    e = evidence(alike())
    every = FRAMES * PLACES - len(chain(FrameFusion(keep=1), e))
    reducer = FrameFusion(keep=FRAMES * PLACES - every + 1)
    plan = reducer.plan(e)
    assert plan.k == len(LAYOUT) - every + 1
    similar = {}
    for i in range(2 + PLACES, 2 + FRAMES * PLACES):
        similar[i] = float(torch.cosine_similarity(e.x[0, i], e.x[0, i - PLACES], dim=0))
    gone = set(range(len(LAYOUT))) - set(plan.representatives()[0].tolist())
    assert gone == set(sorted(similar, key=lambda i: -similar[i])[: every - 1])


def test_the_ratio_that_is_still_needed():
    """Step 3 by hand, 8 layers at 30 %: first, behind a call that left half, and one that left a third."""
    reducer = FrameFusion()
    assert reducer._ratio([12], None, 8) == pytest.approx(0.7)
    assert reducer._ratio([12, 6], None, 8) == pytest.approx(1 - (2.4 - 0.5) / (7 * 0.5))
    assert reducer._ratio([12, 6, 4], None, 8) == pytest.approx(1 - (2.4 - 1 / 2 - 1 / 3) / (6 / 3))
    assert FrameFusion(cost=1.0)._ratio([12], None, 8) == 0
    assert FrameFusion(cost=0.1)._ratio([12, 12], None, 8) == 1.0


def test_phases_follow_from_what_was_left():
    reducer = FrameFusion(cost=0.3)
    assert reducer._state([100], None, 28)[0] == "merge"
    assert reducer._state([100, 60], None, 28)[0] == "merge"
    assert reducer._state([100, 60, 55], None, 28)[0] == "prune", "5 of 60 are below a tenth"
    assert reducer._state([100, 60, 55, 20], None, 28)[0] == "done"
    assert reducer._state([100, 30], None, 28)[0] == "done", "70 % were wanted and came at once"
    assert reducer._state([0], None, 28) == ("merge", 0.0)


def test_pruning_by_the_last_row():
    e = evidence(layer=1, history=[13, 12])
    reducer = FrameFusion(keep=5)
    plan = reducer.plan(e)
    scores = seen_by(e, 0, len(LAYOUT) - 1)
    want = sorted(sorted((i for i in range(len(LAYOUT)) if e.visual[0, i]), key=lambda i: -float(scores[i]))[:5])
    assert [i for i in plan.representatives()[0].tolist() if e.visual[0, i]] == want
    four = FrameFusion(keep=5, queries=3).plan(e)
    scores = sum(seen_by(e, 0, len(LAYOUT) - 1 - i) for i in range(3))
    want = sorted(sorted((i for i in range(len(LAYOUT)) if e.visual[0, i]), key=lambda i: -float(scores[i]))[:5])
    assert [i for i in four.representatives()[0].tolist() if e.visual[0, i]] == want


def test_first_frames_and_pictures_have_none_before():
    x = torch.ones(FRAMES * PLACES, 12)
    e = evidence(x)
    plan = FrameFusion(keep=1).plan(e)
    assert [i for i in plan.representatives()[0].tolist() if e.visual[0, i]] == [2, 3, 4], "one of every place is left"
    e._frame_of = torch.full_like(e._frame_of, -1)
    assert FrameFusion(keep=1).plan(e).is_identity


def test_zero_and_nan():
    assert FrameFusion(keep=4).plan(evidence(torch.zeros(FRAMES * PLACES, 12))).is_identity
    x = torch.randn(FRAMES * PLACES, 12)
    x[4, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        FrameFusion(keep=4).plan(evidence(x))


@pytest.mark.parametrize(
    ("field", "bad"),
    [("cost", 0), ("cost", 1.5), ("keep", 0), ("similarity_lower_bound", 2), ("ratio_lower_bound", -1), ("queries", 0)],
)
def test_bad_settings(field, bad):
    with pytest.raises(ValueError, match=field):
        FrameFusion(**{field: bad})


class Spy(FrameFusion):
    """Counts the visual tokens that each call leaves."""

    def plan(self, evidence):
        plan = super().plan(evidence)
        COUNTS.append(plan.gather(evidence.visual).sum(1).tolist())
        return plan


COUNTS: list[list[int]] = []


def left_in(family, *reducers):
    vlm = VLMS[family]
    inputs = prompts(vlm, ((9, "v" if vlm.video else "iii"), (5, "v" if vlm.video else "iii")))
    COUNTS.clear()
    with torch.no_grad(), tr.patched(vlm.model, *reducers):
        assert torch.isfinite(vlm.model(**inputs).logits).all()
    visual = (inputs["input_ids"] == 98) | (inputs["input_ids"] == 99)
    return int(visual[0].sum())


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_keep_is_what_is_left_in_models(family):
    for keep in (4, 0.5):
        n = left_in(family, Spy(keep=keep))
        assert len(COUNTS) == 4
        last = [c for c in COUNTS[-1]]
        assert min(last) == (4 if keep == 4 else (n + 1) // 2)


def by_hand(model, inputs, entries, steps):
    """Logits of the last token when every plan of ``steps`` acts between attention and MLP of the layer before its own,
    or at the entry; one sample, no padding."""
    text = model.model.language_model
    x, *tables = entries.calls[0]
    plans = {s.layer: s.plan for s in steps if s.plan is not None}

    def left(x, tables, plan):
        place = plan.representatives()[0]
        order = place.argsort()
        return plan.reduce(x)[:, order], [t[..., place[order], :] for t in tables]

    if 0 in plans:
        x, tables = left(x, tables, plans[0])
    for i, layer in enumerate(text.layers):
        y = layer.self_attn(
            hidden_states=layer.input_layernorm(x), position_embeddings=tuple(tables), attention_mask=None
        )
        x = x + y[0]
        if i + 1 in plans:
            x, tables = left(x, tables, plans[i + 1])
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(text.norm(x))[:, -1]


@pytest.mark.parametrize(
    "spec", ["framefusion:keep=0.4,similarity_lower_bound=0.999", "framefusion:keep=3,ratio_lower_bound=0.0"]
)
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl"])
def test_calls_stand_between_attention_and_mlp(family, spec):
    vlm = VLMS[family]
    film = "v" if vlm.video else "iii"
    alone = prompts(vlm, ((9, film),))
    text = vlm.model.model.language_model
    with torch.no_grad():
        with tr.patched(vlm.model, spec), Entries(text.layers) as entries:
            with tr.record(vlm.model, flops=False) as trace:
                got = vlm.model(**alone).logits[:, -1]
            steps = [s for s in trace.steps if s.stage == "language"]
            # Rows of a padded batch are what they are alone.
            both = prompts(vlm, ((9, film), (5, film)))
            close(vlm.model(**both).logits[:1, -1], got)
        assert any(s.plan is not None and s.layer > 0 for s in steps), "calls in the middle of layers"
        close(got, by_hand(vlm.model, alone, entries, steps))
        assert torch.equal(vlm.model(**alone).logits, vlm.model(**alone).logits)


def test_gradients_and_checkpointing():
    vlm = VLMS["llava"]
    model = copy.deepcopy(vlm.model).train()
    inputs = prompts(vlm, ((9, "iii"),))

    def gradient():
        model.zero_grad()
        model(**inputs).logits[:, -1].square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.model.language_model.parameters() if p.grad is not None])

    with tr.patched(model, "framefusion:keep=0.4"):
        want = gradient()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        got = gradient()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(RuntimeError, match="'use_reentrant': False"):
            gradient()
        with torch.no_grad():  # nothing to lose
            assert torch.isfinite(model(**inputs).logits).all()
    assert want.abs().sum() > 0
    torch.testing.assert_close(got, want)


def test_cost_is_the_mean_over_layers():
    n = left_in("llava", Spy(cost=0.6))
    mean = sum(c[0] for c in COUNTS) / 4 / n
    assert mean == pytest.approx(0.6, abs=0.03)


def test_behind_a_method_at_the_projector():
    left_in("llava_onevision", tr.EVS(keep=6), Spy(keep=3))
    assert min(COUNTS[-1]) == 3, "the row end is one of them"
