"""FoPru against the formulas of its card, on whole maps."""

from __future__ import annotations

import pytest
import torch
from visual import ORIGINS, noise, patches_of, visual

import tokenreduce as tr
from tokenreduce.vision.projector import fopru


def means(e, look=None, b=0, logits=False):
    """Attention that the patches of one image receive and give, float64, from the whole map."""
    q, k = patches_of(e, look, b)
    a = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    p = e.tower(look).patches.prefix
    a = (a if logits else a.softmax(-1)).mean(0)[p:, p:]
    n = len(a)
    received = torch.tensor([sum(float(a[i, j]) for i in range(n)) / n for j in range(n)])
    given = torch.tensor([sum(float(a[i, j]) for j in range(n)) / n for i in range(n)])
    return received, given


def choice(received, given, direction="auto"):
    if direction != "auto":
        return received if direction == "received" else given
    return received if received.double().var() > given.double().var() else given


def best(s, k):
    return sorted(sorted(range(len(s)), key=lambda i: (-float(s[i]), i))[:k])


@pytest.mark.parametrize("origin", ["square", "wide", "large"])
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("direction", ["auto", "received", "given"])
def test_is_the_card(origin, cls, logits, direction):
    e = visual(ORIGINS[origin], cls=cls)
    method = tr.get_method(f"fopru:keep=0.3,direction={direction},score_input={'logits' if logits else 'softmax'}")
    plan, scores = method.plan(e), method.significance(e)
    for b in range(2):
        s = choice(*means(e, b=b, logits=logits), direction)
        torch.testing.assert_close(scores[b], s.float())
        if s.std() > 1e-6:  # without a class token every patch gives the same, and rounding decides
            assert plan.keep[b].tolist() == best(s, int(0.3 * e.n + 0.5))


def test_the_direction_is_the_one_that_varies_more_for_every_image_alone():
    """Maps (queries, keys): in the first image columns differ, in the second rows."""
    columns = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(4, 4)
    rows = torch.tensor([[0.4], [0.1], [0.3], [0.2]]).expand(4, 4)
    e = tr.Evidence(noise(2, 4, 3), attention=torch.stack([columns, rows])[:, None])
    method = tr.get_method("fopru:keep=2")
    assert method.plan(e).keep.tolist() == [[2, 3], [0, 2]]
    torch.testing.assert_close(method.significance(e), torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.3, 0.2]]))
    # Equal variance takes what is given.
    tie = torch.tensor([[2.0, 0, 0, 0], [4.0, 0, 0, 0], [0, 0, 0, 0], [0, 2.0, 0, 0]])
    tie = (tie - tie.T)[None, None]  # received is minus given
    received, given = best(tie[0, 0].mean(0), 2), best(tie[0, 0].mean(1), 2)
    assert received != given
    assert method.plan(tr.Evidence(noise(1, 4, 3), attention=tie)).keep.tolist() == [given]


def test_with_logits_the_test_is_a_real_choice():
    """Two heads of keys near zero and wide queries, and the other way round."""
    wide, narrow = noise(1, 2, 16, 8) * 5 + 3, noise(1, 2, 16, 8, seed=1) * 0.1 + 1
    for q, k in ((wide, narrow), (narrow, wide)):
        e = visual(ORIGINS["square"], batch=1, cls=False, queries=q, keys=k)
        received, given = means(e, logits=True)
        assert (received.var() > given.var()) == (k is wide)
        plan = tr.get_method("fopru:keep=5,score_input=logits").plan(e)
        assert plan.keep[0].tolist() == best(received if k is wide else given, 5)


def test_class_token_is_left_out_without_normalising_again():
    """Query 0 and key 0 draw nearly everything: what patches give to each other then varies."""
    e = visual(ORIGINS["square"], batch=1)
    given = means(e)[1]
    assert float(given.max()) < 1 / 16
    got = tr.get_method("fopru:keep=4,direction=given").significance(e)
    torch.testing.assert_close(got[0], given.float())


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
def test_queries_in_chunks(monkeypatch, chunk):
    e = visual(ORIGINS["square"])
    want = tr.get_method("fopru:keep=4").significance(e)
    monkeypatch.setattr(fopru, "CHUNK", chunk)
    torch.testing.assert_close(tr.get_method("fopru:keep=4").significance(e), want)


@pytest.mark.parametrize(
    ("origin", "keep", "rows"),
    [("square", 8, 2), ("square", 11, 2), ("square", 3, 1), ("wide", 13, 1), ("wide", 14, 2), ("large", 0.25, 3)],
)
def test_whole_rows(origin, keep, rows):
    e = visual(ORIGINS[origin])
    h, w = e.shape
    plan = tr.get_method(f"fopru:keep={keep},strategy=row").plan(e)
    assert plan.k == rows * w
    for b in range(2):
        s = choice(*means(e, b=b)).view(h, w)
        chosen = best(s.sum(1), rows)
        assert plan.keep[b].tolist() == [r * w + c for r in chosen for c in range(w)]


def test_rows_where_padding_was_cut_off():
    crop = visual(ORIGINS["anyres"]).parts()[1][1]  # rows 1 and 2 of 4 are left
    plan = tr.get_method("fopru:keep=6,strategy=row").plan(crop)
    kept = crop.origin.index[:, 0]
    for b in range(2):
        s = choice(*means(crop, b=b))[kept].view(2, 4)
        assert plan.keep[b].tolist() == [r * 4 + c for r in best(s.sum(1), 1) for c in range(4)]


def test_a_single_row_stays_and_ragged_rows_are_refused():
    e = tr.Evidence(noise(1, 5, 3), noise(1, 1, 5, 4), noise(1, 1, 5, 4, seed=1), grid=(1, 5))
    assert tr.get_method("fopru:keep=2,strategy=row").plan(e).is_identity
    short = visual(ORIGINS["square"].take(torch.arange(14)))
    with pytest.raises(ValueError, match="strategy='rank'"):
        tr.get_method("fopru:keep=5,strategy=row").plan(short)


def test_flat_attention_takes_the_lowest_indices():
    e = tr.Evidence(noise(1, 16, 3), attention=torch.full((1, 1, 16, 16), 1 / 16))
    assert tr.get_method("fopru:keep=3").plan(e).keep.tolist() == [[0, 1, 2]]
    assert tr.get_method("fopru:keep=8,strategy=row").plan(e).keep.tolist() == [list(range(8))]


def test_plain_evidence():
    q, k, x = noise(2, 2, 10, 8), noise(2, 2, 10, 8, seed=1), noise(2, 10, 4)
    plan = tr.get_method("fopru:keep=4").plan(tr.Evidence(x, keys=k, queries=q, protected=1))
    maps = (q.double() @ k.double().transpose(2, 3) / 8**0.5).softmax(-1)
    given = tr.get_method("fopru:keep=4").plan(tr.Evidence(x, attention=maps, protected=1))
    for b in range(2):
        a = maps[b].mean(0)[1:, 1:]
        want = [0, *(i + 1 for i in best(choice(a.mean(0), a.mean(1)), 4))]
        assert plan.keep[b].tolist() == given.keep[b].tolist() == want
    rows = tr.Evidence(x, attention=maps[:, :, :1].float(), protected=1)
    for b in range(2):
        want = [0, *(i + 1 for i in best(maps[b, :, 0, 1:].mean(0), 4))]
        assert tr.get_method("fopru:keep=4").plan(rows).keep[b].tolist() == want
    with pytest.raises(ValueError, match="direction='given' needs the attention of all 10 tokens"):
        tr.get_method("fopru:keep=4,direction=given").plan(rows)
    with pytest.raises(ValueError, match="queries"):
        tr.get_method("fopru:keep=4,score_input=logits").plan(rows)


@pytest.mark.parametrize("score_input", ["softmax", "logits"])
def test_patches_that_are_not_there_take_no_part(score_input):
    """A block whose last 4 patches are padding sees what a block of 12 patches sees."""
    from tokenreduce.core.evidence import TowerEvidence

    q, k, x = noise(1, 2, 17, 8), noise(1, 2, 17, 8, seed=1), noise(1, 17, 4)
    valid = (torch.arange(17) < 13)[None]
    method = tr.get_method(f"fopru:keep=4,score_input={score_input}")
    padded = tr.Evidence(x, k, q, protected=1, valid=valid)
    short = tr.Evidence(x[:, :13], k[:, :, :13], q[:, :, :13], protected=1)
    origin = ORIGINS["square"].take(torch.arange(12))
    seen = [method.significance(TowerEvidence(p, origin, x[:, 1:13])) for p in (padded, short)]
    torch.testing.assert_close(*seen)


def test_merged_patches_take_their_mean():
    e = visual(ORIGINS["units"], cls=False)
    plan = tr.get_method("fopru:keep=7").plan(e)
    for b in range(2):
        s = choice(*(m[e.origin.index].mean(1) for m in means(e, b=b)))
        assert plan.keep[b].tolist() == best(s, 7)


def test_other_block_and_headline():
    e = visual(ORIGINS["square"])
    assert tr.get_method("fopru:layer=0").plan(e).keep[0].tolist() == best(choice(*means(e, 0)), 4)
    assert tr.get_method("fopru").plan(tr.Evidence(noise(1, 576, 3), attention=noise(1, 1, 1, 576))).k == 144


@pytest.mark.parametrize(
    ("bad", "name"), [("strategy=all", "strategy"), ("direction=both", "direction"), ("score_input=raw", "score_input")]
)
def test_bad_settings(bad, name):
    with pytest.raises(ValueError, match=name):
        tr.get_method(f"fopru:{bad}")
