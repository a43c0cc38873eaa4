"""Expected Attention against a plain loop with complex rotations."""

from __future__ import annotations

import pytest
import torch
from cached import DIM, LAYOUTS, cached, contents, half_up, image, kept, marks, real, tables, top

import tokenreduce as tr
from tokenreduce.core.evidence import Rotary

ANGLES = 0.3 ** torch.arange(DIM // 2, dtype=torch.float64)


def matrix(positions, r, paired, factor=1.0):
    """(d,d) mean over positions of the rotation of the first r channels, entry by entry."""
    out = torch.eye(DIM, dtype=torch.float64)
    for pair in range(r // 2):
        a, b = (2 * pair, 2 * pair + 1) if paired else (pair, pair + r // 2)
        turn = [torch.polar(torch.tensor(factor, dtype=torch.float64), ANGLES[pair] * p) for p in positions]
        mean = sum(turn) / len(turn)
        out[a, a] = out[b, b] = mean.real
        out[a, b], out[b, a] = -mean.imag, mean.imag
    return out


def build(r=DIM, paired=False, factor=1.0, groups=2, positions=None, after=None):
    """Evidence whose queries are rotated from plain ones; and those, as {row: {slot: (G,d)}}."""
    evidence = cached(groups=groups)
    valid = marks(LAYOUTS, "tv")
    if positions is None:
        positions, after = (valid.long().cumsum(1) - 1).clamp(min=0), valid.sum(1)
    wide = lambda p: tuple(factor * t for t in tables(p, r, paired))
    rotary = Rotary(*wide(positions), lambda f: wide(after[:, None] + torch.arange(f)), paired)
    plain, queries = {}, torch.full_like(evidence.keys.unsqueeze(1).expand(-1, groups, -1, -1), float("nan"))
    for i, there in enumerate(real(evidence)):
        b, h = divmod(i, 2)
        made = contents(LAYOUTS[b], b, groups=groups)[2][h].double()
        plain[i] = {j: made[:, n] for n, j in enumerate(there)}
        for j in there:
            turn = matrix([int(positions[b, j])], r, paired, factor)
            queries[i, :, j] = (plain[i][j] @ turn.T).float()
    given = tr.CacheEvidence(
        evidence.keys, evidence.values, queries=queries, kv_heads=2, visual=marks(LAYOUTS, "v"), valid=valid,
        rotary=rotary,
    )  # fmt: skip
    return given, plain, after


def expected(evidence, plain, i, first, turn, *, sinks=4, covariance=True, vnorm=True, epsilon=0.0, text=False):
    """{slot: score} of the keys behind the sinks."""
    there, visual = real(evidence)[i], image(evidence)[i]
    behind = there[sinks:]
    used = [j for j in behind if not (text and j in visual)]
    keys, scores = evidence.keys[i].double(), dict.fromkeys(behind, 0.0)
    groups = evidence.groups
    for g in range(groups):
        some = torch.stack([plain[j][g] for j in used])
        mean = some.mean(0)
        spread = sum(torch.outer(q - mean, q - mean) for q in some) / len(used)
        mean, spread = turn @ mean, turn @ spread @ turn.T
        second = [covariance * float(keys[j] @ spread @ keys[j]) / (2 * DIM) for j in behind]
        logits = [float(mean @ keys[j]) / DIM**0.5 + more for j, more in zip(behind, second, strict=True)]
        for j, share in zip(behind, torch.tensor(logits, dtype=torch.float64).softmax(0).tolist(), strict=True):
            scores[j] += share / groups
    if vnorm:
        scores = {j: (s + epsilon) * float(evidence.values[i, j].double().norm()) for j, s in scores.items()}
    return scores


def same(got, scores):
    want = torch.tensor(list(scores.values()), dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("layout", [(DIM, False, 1.0), (DIM, True, 1.0), (4, False, 1.3), (6, True, 1.0)])
def test_scores_and_plan(layout, groups):
    r, paired, factor = layout
    evidence, plain, after = build(r, paired, factor, groups)
    got = tr.ExpectedAttention(n_future_positions=16).importance(evidence)
    rows = kept(tr.ExpectedAttention(n_future_positions=16, keep=0.5).plan(evidence))
    for i, (there, visual) in enumerate(zip(real(evidence), image(evidence), strict=True)):
        start = int(after[i // 2])
        scores = expected(evidence, plain[i], i, start, matrix(range(start, start + 16), r, paired, factor))
        same(got[i, list(scores)], scores)
        sinks = [j for j in visual if j in there[:4]]
        best = top(scores, [j for j in visual if j not in sinks], half_up(0.5, len(visual)) - len(sinks))
        assert rows[i] == sorted({*(set(there) - set(visual)), *sinks, *best})


@pytest.mark.parametrize(
    ("settings", "plainly"),
    [
        (dict(n_sink=0), dict(sinks=0)),
        (dict(use_covariance=False), dict(covariance=False)),
        (dict(use_vnorm=False), dict(vnorm=False)),
        (dict(epsilon=0.02), dict(epsilon=0.02)),
        (dict(statistics="text"), dict(text=True)),
    ],
)
def test_options(settings, plainly):
    evidence, plain, after = build()
    got = tr.ExpectedAttention(**settings).importance(evidence)
    rows = kept(tr.ExpectedAttention(**settings, keep=0.5, what="all").plan(evidence))
    sinks = plainly.get("sinks", 4)
    for i, there in enumerate(real(evidence)):
        start = int(after[i // 2])
        scores = expected(evidence, plain[i], i, start, matrix(range(start, start + 512), DIM, False), **plainly)
        same(got[i, there[sinks:]], scores)
        best = top(scores, there[sinks:], half_up(0.5, len(there)) - sinks)
        assert rows[i] == sorted({*there[:sinks], *best})


def test_positions_that_are_not_places():
    """As with M-RoPE, where an image takes fewer positions than slots, and what comes follows the largest one."""
    positions = torch.arange(21).expand(4, -1) // 2 + 3
    evidence, plain, after = build(positions=positions, after=positions[:, -1] + 1)
    got = tr.ExpectedAttention(n_future_positions=8).importance(evidence)
    for i, there in enumerate(real(evidence)):
        start = int(after[i // 2])
        scores = expected(evidence, plain[i], i, start, matrix(range(start, start + 8), DIM, False))
        same(got[i, there[4:]], scores)


def test_bad_input():
    evidence, _, _ = build()
    bare = dict(kv_heads=2, visual=marks(LAYOUTS, "v"), valid=marks(LAYOUTS, "tv"))
    with pytest.raises(ValueError, match="rotary"):
        tr.ExpectedAttention().plan(tr.CacheEvidence(evidence.keys, evidence.values, queries=evidence.queries, **bare))
    with pytest.raises(ValueError, match="queries"):
        tr.ExpectedAttention().plan(
            tr.CacheEvidence(evidence.keys, evidence.values, evidence.rows(), rotary=evidence.rotary, **bare)
        )
    with pytest.raises(ValueError, match="no query"):
        tr.ExpectedAttention(statistics="text").plan(cached(("tttt" + "v" * 9,)))
    with pytest.raises(ValueError, match="always stay"):
        tr.ExpectedAttention(keep=3, what="all").plan(evidence)
    for settings, message in (
        (dict(n_future_positions=0), "n_future_positions is an int >= 1"),
        (dict(n_sink=-1), "n_sink is an int >= 0"),
        (dict(epsilon=-0.1), "epsilon is a number >= 0"),
        (dict(statistics="some"), "statistics"),
    ):
        with pytest.raises(ValueError, match=message):
            tr.ExpectedAttention(**settings)
