"""Keyformer against a plain loop; its noise is taken as it is, and looked at by itself."""

from __future__ import annotations

import math

import pytest
import torch
from cached import LAYOUTS, Decode, against, cached, half_up, image, kept, plain_rows, real, top

import tokenreduce as tr


def noisy(rows, noise, tau):
    """Softmax of (log rows + noise) / tau, row by row over the keys that a row sees."""
    out = torch.zeros_like(rows)
    for index in torch.cartesian_prod(*map(torch.arange, rows.shape[:-1])).tolist():
        row, more = rows[tuple(index)], noise[tuple(index)]
        sees = (row > 0).nonzero().flatten()
        if len(sees):
            out[(*index, sees)] = ((row[sees].log() + more[sees].double()) / tau).softmax(0)
    return out


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("what", ["visual", "all"])
def test_plan_and_score(groups, what):
    method = tr.Keyformer(keep=0.5, tau_init=1.3, what=what, recent=40.0, seed=3)
    evidence = cached(groups=groups)
    scores = noisy(plain_rows(evidence), method._noise(evidence, 0, evidence.n), 1.3).sum(2).mean(1)
    there = evidence.there
    torch.testing.assert_close(method.score(evidence).double()[there], scores[there], rtol=1e-5, atol=1e-6)
    got = kept(method.plan(evidence))
    for i, (columns, visual) in enumerate(zip(real(evidence), image(evidence), strict=True)):
        if what == "visual":
            text = set(columns) - set(visual)
            assert got[i] == sorted(text | set(top(scores[i], visual, half_up(0.5, len(visual)))))
        else:
            total = half_up(0.5, len(columns))
            assert got[i] == paper(columns, scores[i], total, int(total * 0.4))


def paper(columns, scores, total, recent):
    if len(columns) <= total:
        return columns
    edge = len(columns) - recent
    return top(scores, columns[:edge], total - recent) + columns[edge:]


def updates(method, steps):
    def update(scores, rows, columns, evidence, i):
        tau = method.tau_init + min(evidence.step, steps) * (method.tau_end - method.tau_init) / steps
        slots = real(evidence)[i]
        noise = method._noise(evidence, 0, evidence.rows_given)[i][:, :, slots]
        if evidence.step == 0:
            noise = noise[:, slots]
        for column, value in zip(columns, noisy(rows, noise, tau).sum(1).mean(0).tolist(), strict=True):
            scores[column] = scores.get(column, 0.0) + value

    return update


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("settings", [dict(kv_cache=60.0), dict(keep=0.6), dict(keep=9)])
def test_decode(groups, settings):
    method = tr.Keyformer(**settings, what="all", max_new_tokens=50)

    def cut(columns, scores, last, n):
        total = {"kv_cache": n * 60 // 100, "keep": half_up(0.6, n)}[next(iter(settings))]
        total = 9 if settings == dict(keep=9) else total
        return paper(columns, scores, total, total * 30 // 100)

    against(method, cut, updates(method, 50), steps=80, groups=groups)


def test_decode_of_the_code_masks_by_its_own_rule():
    """Columns are never taken out there: a mask over all of them, with one slot more for the coming token."""
    method = tr.Keyformer(kv_cache=60.0, what="all", compete=False, max_new_tokens=50)
    run = Decode(method)
    update = updates(method, 50)
    rows, scores, masks = plain_rows(run.evidence), [], []
    keys = [dict(enumerate(k.double())) for k in run.evidence.keys]
    lengths = [len(there) for there in real(run.evidence)]
    for i, there in enumerate(real(run.evidence)):
        scores.append(dict.fromkeys(there, 0.0))
        update(scores[i], rows[i][:, :, there][:, there], there, run.evidence, i)
        masks.append(code(there, scores[i], set(there), lengths[i]))
    for step in range(60):
        assert [set(held) for held in run.held()] == masks, step
        new = run.next
        evidence = run.go()
        for i in range(len(masks)):
            keys[i][new] = evidence.keys[i, -1].double()
            seen = sorted({*masks[i], new})
            logits = evidence.queries[i].double() @ torch.stack([keys[i][c] for c in seen]).T * evidence.scale
            scores[i] = {c: scores[i][c] if c in masks[i] else 0.0 for c in scores[i]}
            update(scores[i], logits.softmax(-1), seen, evidence, i)
            masks[i] = code(sorted(scores[i]), scores[i], {*masks[i], new}, lengths[i])
    for held, n in zip(run.held(), lengths, strict=True):
        total = n * 60 // 100
        assert len(held) == total - 1
        # Key tokens are the prompt's for good.
        assert sum(c < run.evidence.n for c in held) == total - total * 30 // 100


def code(columns, scores, mask, n):
    """The mask for the next step: the last ``recent`` on an axis with a slot more, key tokens in front of them."""
    total = n * 60 // 100
    recent = total * 30 // 100
    edge = len(columns) - recent
    return ({*top(scores, columns[:edge], total - recent), *columns[edge + 1 :]}) & mask


def test_noise_is_gumbel():
    evidence = cached(("v" * 150,), groups=2)
    noise = tr.Keyformer()._noise(evidence, 0, 150).double()
    n = noise.numel()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / n)
    assert abs(noise.var() - math.pi**2 / 6) < 0.05
    flat = noise.flatten()
    for shift in (1, 150, 150 * 150):  # the next key, query, head
        a, b = flat[:-shift] - flat.mean(), flat[shift:] - flat.mean()
        assert abs((a * b).mean() / flat.var()) < 5 / math.sqrt(n)
    assert noise.flatten().unique().numel() > 0.99 * n


def test_noise_follows_seed_layer_and_step_and_nothing_else():
    evidence = cached()
    first = tr.Keyformer()._noise(evidence, 0, evidence.n)
    assert not torch.equal(first, tr.Keyformer(seed=1)._noise(evidence, 0, evidence.n))
    assert not torch.equal(first, tr.Keyformer()._noise(cached(layer=2), 0, evidence.n))
    assert not torch.equal(first, tr.Keyformer()._noise(cached(step=1), 0, evidence.n))
    assert torch.equal(first[:, :, 5:9], tr.Keyformer()._noise(evidence, 5, 9))
    for b, layout in enumerate(LAYOUTS):
        bare = cached((layout.lstrip("."),), samples=[b])
        shift = evidence.n - bare.n
        assert torch.equal(tr.Keyformer()._noise(bare, 0, bare.n), first[2 * b : 2 * b + 2, :, shift:, shift:])


def test_blocks_of_rows_are_one():
    layouts = ("t" + "v" * 520 + "tt",)
    evidence = cached(layouts, kv_heads=1, groups=1)
    method = tr.Keyformer()
    logits = evidence.logits(0, evidence.n)
    want = (logits + method._noise(evidence, 0, evidence.n)).softmax(-1).sum(2).mean(1)
    torch.testing.assert_close(method.score(evidence), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(recent=101.0), "recent is percent"),
        (dict(tau_init=0.0), "tau_init is a number above 0"),
        (dict(tau_end=-1.0), "tau_end is a number above 0"),
        (dict(max_new_tokens=0), "max_new_tokens is an int >= 1"),
        (dict(seed=-1), "seed is an int >= 0"),
        (dict(kv_cache=60.0), "what=all"),
        (dict(kv_cache=0.0, what="all"), "percent of the prompt"),
        (dict(compete=False, what="all"), "kv_cache"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tr.Keyformer(**settings)


def test_budgets_at_the_ends():
    assert tr.Keyformer(kv_cache=100.0, what="all").plan(cached()).is_identity
    assert tr.Keyformer(kv_cache=100.0, what="all", compete=False).plan(cached()).is_identity
    assert all(len(row) == 1 for row in kept(tr.Keyformer(kv_cache=1.0, what="all").plan(cached())))
    with pytest.raises(ValueError, match="none of 1"):
        tr.Keyformer(kv_cache=1.0, what="all", compete=False).plan(cached())
