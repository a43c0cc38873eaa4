"""PyramidKV against a plain loop: counts of the layers in both codes, and the choice in each layer."""

from __future__ import annotations

import warnings

import pytest
import torch
from cached import LAYOUTS, cached, image, kept, plain_rows, real, tied, top

import tokenreduce as tr


def official(n, window, capacity, beta, depth):
    base = capacity - window
    low = base // beta
    high = base * 2 - low
    if high >= n - window:
        high = n - window
        low = base * 2 - high
    step = (high - low) // (depth - 1)
    if n < capacity:
        return [n] * depth
    if n < base * 2:
        return [capacity] * depth
    return [high - layer * step + window for layer in range(depth)]


def kvpress(n, window, ratio, beta, depth):
    size = window + n * ratio
    low = (size - window) / beta
    high = (size - window) * 2 - low
    if high >= n - window:
        high = n - window
        low = (size - window) * 2 - high
    if not n >= high >= low >= window:
        return [round(n * ratio)] * depth
    step = (high - low) / (depth - 1)
    return [round(high - layer * step) for layer in range(depth)]


def test_counts_of_the_card():
    method = tr.PyramidKV(max_capacity_prompt=64, what="all", window_size=8)
    assert method.counts(400, 4) == [118, 82, 46, 10]
    assert sum(method.counts(400, 32)) == 2288
    assert sum(method.counts(400, 1)) == 64


@pytest.mark.parametrize("n", [20, 64, 90, 112, 113, 400, 1000])
@pytest.mark.parametrize(("window", "capacity"), [(8, 64), (32, 128), (1, 20)])
@pytest.mark.parametrize("beta", [1, 3, 20])
@pytest.mark.parametrize("depth", [2, 4, 28])
def test_counts_of_the_official_code(n, window, capacity, beta, depth):
    method = tr.PyramidKV(max_capacity_prompt=capacity, what="all", window_size=window, beta=beta)
    counts = method.counts(n, depth)
    assert counts == official(n, window, capacity, beta, depth)
    exact = tr.PyramidKV(max_capacity_prompt=capacity, what="all", window_size=window, beta=beta, exact=True)
    total = n if n < capacity else capacity
    assert sum(exact.counts(n, depth)) == total * depth
    assert exact.counts(n, depth) == sorted(exact.counts(n, depth), reverse=True)


@pytest.mark.filterwarnings("ignore:pyramidkv")
@pytest.mark.parametrize("n", [20, 101, 400, 5000])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("window", "beta"), [(1, 20), (8, 5), (64, 20), (4, 1)])
def test_counts_of_kvpress(n, ratio, window, beta):
    method = tr.PyramidKV(keep=ratio, what="all", window_size=window, beta=beta)
    for depth in (2, 4, 28):
        assert method.counts(n, depth) == kvpress(n, window, ratio, beta, depth)
        exact = tr.PyramidKV(keep=ratio, what="all", window_size=window, beta=beta, exact=True).counts(n, depth)
        assert sum(exact) == int(n * ratio * depth + 0.5 + 1e-9)
        visual = tr.PyramidKV(keep=ratio, window_size=window, beta=beta).counts(n, depth)
        assert visual == [max(1, c) for c in kvpress(n, 0, ratio, beta, depth)]
        assert visual == sorted(visual, reverse=True)


def test_the_fallback_is_told_of():
    with pytest.warns(UserWarning, match="every layer keeps the same"):
        assert tr.PyramidKV(keep=0.25, what="all", window_size=64).counts(1000, 4) == [250] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tr.PyramidKV(keep=0.25).counts(1000, 4) == kvpress(1000, 0, 0.25, 20, 4)
        assert tr.PyramidKV(keep=1.0, what="all").counts(1000, 4) == [1000] * 4


def pooled(scores, slots, kernel, kind):
    """Scores of ``slots`` over all N slots, smoothed; slots that take no part are zeros."""
    n, half = len(scores), kernel // 2
    base = [float(scores[j]) if j in slots else 0.0 for j in range(n)]
    out = []
    for j in range(n):
        around = [base[i] if 0 <= i < n else 0.0 for i in range(j - half, j + half + 1)]
        out.append(sum(around) / kernel if kind == "avgpool" else max(around))
    return out


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("agg", ["mean", "max", "sum"])
@pytest.mark.parametrize("pooling", ["avgpool", "maxpool"])
def test_choice_in_every_layer(groups, agg, pooling):
    window, group = 4, {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0), "sum": lambda x: x.sum(0)}[agg]
    settings = dict(window_size=window, kernel_size=3, pooling=pooling, gqa_score_agg=agg, beta=4)
    for layer in range(4):
        evidence = cached(groups=groups, layer=layer)
        rows = plain_rows(evidence)[:, :, -window:]
        whole = kept(tr.PyramidKV(max_capacity_prompt=9, what="all", **settings).plan(evidence))
        shared = kept(tr.PyramidKV(keep=0.4, **settings).plan(evidence))
        for i, (there, visual) in enumerate(zip(real(evidence), image(evidence), strict=True)):
            scores = group(rows[i].sum(1))
            front, fixed = there[:-window], there[-window:]
            smooth = torch.tensor(pooled(scores, front, 3, pooling)).float()
            count = official(len(there), window, 9, 4, 4)[layer]
            assert whole[i] == top(smooth, front, count - window) + fixed
            smooth = torch.tensor(pooled(scores, there, 3, pooling)).float()
            count = max(1, kvpress(len(visual), 0, 0.4, 4, 4)[layer]) if visual else 0
            assert shared[i] == sorted({*(set(there) - set(visual)), *top(smooth, visual, count)})


def test_ties_go_to_the_lower_slot():
    evidence, rows = tied(rows=4, layer=0)
    got = kept(tr.PyramidKV(keep=0.3, window_size=4, kernel_size=1).plan(evidence))
    for i, (there, visual) in enumerate(zip(real(evidence), image(evidence), strict=True)):
        count = max(1, kvpress(len(visual), 0, 0.3, 20, 4)[0]) if visual else 0
        assert got[i] == sorted({*(set(there) - set(visual)), *top(rows[i].sum(1).mean(0), visual, count)})


def test_earlier_layers_keep_more_and_the_mean_is_what_was_asked():
    layouts = ("ttt" + "v" * 100 + "tt",)
    counts = [len(kept(tr.PyramidKV(keep=0.25).plan(cached(layouts, layer=i)))[0]) - 5 for i in range(4)]
    assert counts == [49, 33, 17, 1]


def test_bad_settings():
    for settings, message in (
        (dict(beta=0), "beta is an int >= 1"),
        (dict(gqa_score_agg="median"), "gqa_score_agg"),
        (dict(max_capacity_prompt=64), "what=all"),
        (dict(max_capacity_prompt=32, what="all"), "not larger than window_size"),
        (dict(kernel_size=4), "odd"),
    ):
        with pytest.raises(ValueError, match=message):
            tr.PyramidKV(**settings)
    with pytest.warns(UserWarning, match="pyramidkv"), pytest.raises(ValueError, match="always stay"):
        tr.PyramidKV(keep=0.3, what="all", window_size=12).plan(cached(LAYOUTS))
