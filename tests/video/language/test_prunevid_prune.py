"""PruneVid's pruning inside the language model against the card."""

from __future__ import annotations

import pytest
import torch
from mixed import mixed
from vlms import VLMS, prompts

import tokenreduce as tr
from tokenreduce import PruneVidPrune
from tokenreduce.core.evidence import Evidence


def by_head(e, b, row):
    """(heads,N) attention of one row."""
    out = []
    for h in range(4):
        keys, queries = e.keys[:, h // 2 : h // 2 + 1], e.queries[:, h : h + 1]
        one = Evidence(e.x, keys, queries, visual=e.visual, valid=e.valid, cls=False, causal=True)
        out.append(one.attention(torch.tensor([row]))[b, 0, 0])
    return torch.stack(out)


def literal(e, b, alpha):
    """Step 9: max over heads, max over the rows behind the last visual token, best int(n * alpha) of every group."""
    visual = [i for i in range(e.n) if e.visual[b, i]]
    rows = [i for i in range(visual[-1] + 1, e.n) if e.valid is None or e.valid[b, i]]
    score = torch.stack([by_head(e, b, r).amax(0) for r in rows]).amax(0)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in visual:
        film, first, last, _ = e.frame_of[b, i].tolist()
        groups.setdefault((film, first, last), []).append(i)
    kept = []
    for members in groups.values():
        kept += sorted(members, key=lambda i: -float(score[i]))[: int(len(members) * alpha)]
    return sorted(kept)


@pytest.mark.parametrize("alpha", [0.4, 0.7, 1.0])
def test_groups_of_frames_and_of_static_tokens(alpha):
    e = mixed(layer=2)
    e._frame_of = e._frame_of.clone()
    e._frame_of[0, 2:6, 1], e._frame_of[0, 2:6, 2] = 0, 2  # four tokens that stand for frames 0 to 2
    plan = PruneVidPrune(alpha=alpha).plan(e)
    there = plan.validity()
    for b in range(2):
        got = [
            i for s, i in enumerate(plan.representatives()[b].tolist())
            if e.visual[b, i] and (there is None or there[b, s])
        ]  # fmt: skip
        assert got == literal(e, b, alpha)


def test_a_group_may_vanish():
    e = mixed(("ttvvvvvvttt",), layer=2)  # frames of three tokens
    assert PruneVidPrune(alpha=0.3).plan(e).k == 5
    assert PruneVidPrune(keep=1).plan(e).k == 5 + 1


def test_the_layer_is_as_deep_as_in_the_paper():
    assert [i for i in range(32) if PruneVidPrune().acts_at(i, 32)] == [11]
    with pytest.raises(ValueError, match="layers 0 to 3"):
        PruneVidPrune(layer=9).acts_at(0, 4)


@pytest.mark.parametrize(("field", "bad"), [("layer", 0), ("keep", 0), ("alpha", 0.0), ("alpha", 2)])
def test_bad_settings(field, bad):
    with pytest.raises(ValueError, match=field):
        PruneVidPrune(**{field: bad})


def test_without_question_the_last_token_asks():
    e = mixed(("tvvvvvv",), layer=2)
    plan = PruneVidPrune(keep=2).plan(e)
    want = by_head(e, 0, 6).amax(0)
    best = sorted(range(1, 7), key=lambda i: -float(want[i]))[:2]
    assert plan.representatives()[0].tolist() == [0, *sorted(best)]


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_static_tokens_of_the_projector_are_groups(family):
    """What the projector's plan made of several frames is told apart from single frames' tokens."""
    vlm, seen = VLMS[family], []
    inputs = prompts(vlm, ((9, "v" if vlm.video else "iii"),))

    class Spy(PruneVidPrune):
        def plan(self, evidence):
            seen.append(evidence.frame_of.clone())
            return super().plan(evidence)

    with torch.no_grad(), tr.patched(vlm.model, "prunevid:tau=-1.0", Spy(alpha=0.5)):
        vlm.model(**inputs)
    film = seen[0][0]
    film = film[film[:, 0] >= 0]
    assert (film[:, 2] >= film[:, 1]).all()
    assert (film[:, 2] > film[:, 1]).any(), "at a threshold of -1 everything is static"
