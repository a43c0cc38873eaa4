"""H2O against a plain loop."""

from __future__ import annotations

import pytest
import torch
from cached import LAYOUTS, Decode, against, cached, half_up, image, kept, plain_rows, real, tied, top

import tokenreduce as tr


def sums(rows):
    """(B*Hkv,N) column sums of (B*Hkv,G,R,N), averaged over query heads, entry by entry."""
    out = torch.zeros(rows.shape[0], rows.shape[3], dtype=torch.float64)
    for row in rows.unbind(2):
        for head in row.unbind(1):
            out += head / rows.shape[1]
    return out


def heavy(columns, scores, hh, recent):
    if len(columns) <= hh + recent:
        return columns
    edge = len(columns) - recent
    return top(scores, columns[:edge], hh) + columns[edge:]


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("keep", [3, 0.5])
def test_visual_keys_with_the_largest_sums(groups, keep):
    for evidence, rows in ((e := cached(groups=groups), plain_rows(e)), tied(groups=groups)):
        scores = sums(rows)
        torch.testing.assert_close(
            tr.H2O().score(evidence).double()[evidence.there], scores[evidence.there], rtol=1e-5, atol=1e-6
        )
        got = kept(tr.H2O(keep=keep).plan(evidence))
        for i, (there, visual) in enumerate(zip(real(evidence), image(evidence), strict=True)):
            text = set(there) - set(visual)
            assert got[i] == sorted(text | set(top(scores[i], visual, half_up(keep, len(visual)))))


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        (dict(hh_size=4, recent_size=5), lambda n: (4, 5)),
        (dict(hh_size=0, recent_size=5), lambda n: (0, 5)),
        (dict(hh_size=5, recent_size=0), lambda n: (5, 0)),
        (dict(hh_size=10, recent_size=8), lambda n: (10, 8)),
        (dict(keep=0.4), lambda n: (t := int(0.4 * n + 0.5)) and (t - t // 2, t // 2)),
        (dict(keep=9, recent_share=0.25), lambda n: (7, 2)),
        (dict(keep=9, recent_size=3), lambda n: (6, 3)),
        (dict(heavy_ratio=0.29, recent_ratio=0.13), lambda n: (int(0.29 * n), int(0.13 * n))),
        (dict(heavy_ratio=0.0, recent_ratio=0.3), lambda n: (0, int(0.3 * n))),
    ],
)
def test_all_keys_have_a_recent_window(groups, settings, sizes):
    for evidence, rows in ((e := cached(groups=groups), plain_rows(e)), tied(groups=groups)):
        scores = sums(rows)
        got = kept(tr.H2O(**settings, what="all").plan(evidence))
        assert got == [heavy(there, scores[i], *sizes(len(there))) for i, there in enumerate(real(evidence))]


def add(scores, rows, columns, evidence, i):
    for column, value in zip(columns, rows.mean(0).sum(0).tolist(), strict=True):
        scores[column] = scores.get(column, 0.0) + value


@pytest.mark.parametrize(("groups", "interval"), [(1, 1), (2, 1), (7, 1), (2, 5)])
@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        (dict(hh_size=4, recent_size=5), lambda n: (4, 5)),
        (dict(hh_size=20, recent_size=20), lambda n: (20, 20)),
        (dict(keep=0.4), lambda n: (t := int(0.4 * n + 0.5)) and (t - t // 2, t // 2)),
        (dict(keep=0.4, recent_size=3), lambda n: (int(0.4 * n + 0.5) - 3, 3)),
        (dict(heavy_ratio=0.3, recent_ratio=0.3), lambda n: (int(0.3 * n), int(0.3 * n))),
        (dict(heavy_ratio=0.5, recent_ratio=0.5), lambda n: (int(0.5 * n), int(0.5 * n))),
    ],
)
def test_decode(groups, interval, settings, sizes):
    method = tr.H2O(**settings, what="all", interval=interval)

    def cut(columns, scores, last, n):
        return heavy(columns, scores, *sizes(n))

    against(method, cut, add, groups=groups, interval=interval)


def test_scores_do_not_depend_on_padding_and_start_at_nothing_for_a_new_key():
    run = Decode(tr.H2O(hh_size=4, recent_size=5, what="all"))
    before = run.scores.clone()
    evidence = run.go()
    row = evidence.rows()[:, :, 0].mean(1)
    want = torch.cat([before, torch.zeros(len(before), 1)], 1) + row
    torch.testing.assert_close(tr.H2O(what="all").score(evidence), want.masked_fill(~evidence.there, 0.0))


def test_several_tokens_at_once_add_all_their_rows():
    """As in a later turn."""
    evidence = cached(LAYOUTS[:1], rows=5)
    old = torch.rand(2, evidence.n, generator=torch.Generator().manual_seed(0))
    given = cached(LAYOUTS[:1], rows=5, scores=old, step=3)
    torch.testing.assert_close(tr.H2O().score(given), old + sums(plain_rows(evidence)).float())


@pytest.mark.parametrize("groups", [1, 2, 7])
def test_sums_by_the_number_of_queries_that_see_a_key(groups):
    method = tr.H2O(normalise=True, what="all", keep=0.5)
    assert method.every() == 0
    for evidence, rows in ((e := cached(groups=groups), plain_rows(e)), tied(groups=groups)):
        scores, got = sums(rows), kept(method.plan(evidence))
        for i, there in enumerate(real(evidence)):
            for place, j in enumerate(there):
                scores[i, j] /= len(there) - place
            assert got[i] == top(scores[i].float(), there, int(0.5 * len(there) + 0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(recent_share=1.5), "recent_share is a number in"),
        (dict(hh_size=4, what="all"), "given together"),
        (dict(heavy_ratio=0.1, what="all"), "given together"),
        (dict(heavy_ratio=0.7, recent_ratio=0.7, what="all"), "at most 1"),
        (dict(heavy_ratio=-0.1, recent_ratio=0.7, what="all"), "share of the prompt"),
        (dict(heavy_ratio=0.1, recent_ratio=0.1), "what=all"),
        (dict(heavy_ratio=0.1, recent_ratio=0.1, recent_size=4, what="all"), "not both"),
        (dict(heavy_ratio=0.1, recent_ratio=0.1, normalise=True, what="all"), "no recent window"),
        (dict(hh_size=0, recent_size=0, what="all"), "at least one key"),
        (dict(hh_size=4, recent_size=4), "what=all"),
        (dict(recent_size=-1, what="all"), "recent_size is an int >= 0"),
        (dict(recent_size=4, what="all", normalise=True), "no recent window"),
        (dict(interval=0), "interval is an int >= 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tr.H2O(**settings)


def test_bad_input():
    with pytest.raises(ValueError, match="always stay"):
        tr.H2O(keep=4, recent_size=5, what="all").plan(cached())
    with pytest.raises(ValueError, match="needs attention"):
        tr.H2O().plan(tr.CacheEvidence(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8), kv_heads=2, visual=torch.ones(1, 4)))
