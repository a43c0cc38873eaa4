from __future__ import annotations

import pytest
import torch
from cache_cases import LAYOUTS, Plain, case, half_up, kept, top

import tokenreduce as tr


def stays(s, hh, rec, text, scores):
    """The card's steps 2 to 4 for one head."""
    if s.n <= hh + rec or not s.visual:
        return list(range(s.n))
    window = list(range(s.n - rec, s.n))
    words = [i for i in s.text if i < s.n - rec]
    seen = [i for i in s.visual if i < s.n - rec]
    chosen = words if text == "keep" else top(scores, words, hh)
    return sorted(window + chosen + top(scores, seen, hh - len(words)))


def merged(keys, values, stay, how, good=None):
    """(K,d) keys and values of one head behind the merge, and who went where."""
    gone = [i for i in range(len(keys)) if i not in stay]
    cos = {(i, c): float(keys[i] @ keys[c] / (keys[i].norm() * keys[c].norm())) for i in gone for c in stay}
    into = {i: max(stay, key=lambda c: (cos[i, c], -c)) for i in gone}
    if good is not None:
        into = {i: into[i] for i in gone if good[gone.index(i)]}
    out = []
    for x in (keys, values):
        rows = []
        for c in stay:
            members = [i for i in into if into[i] == c]
            m = len(members)
            if how == "pivot":
                row = (x[c] + sum((x[i] + x[c]) / 2 for i in members)) / (1 + m)
            elif how == "average":
                row = (x[c] + sum(x[i] for i in members)) / (1 + m)
            else:
                row = (x[c] + sum(cos[i, c] * x[i] for i in members)) / (1 + m)
            rows.append(row)
        out.append(torch.stack(rows))
    return out


def compare(method, ev, stay_of, how, alike=False):
    plan = method.plan(ev)
    keys, values = plan.reduce(ev.keys), plan.reduce(ev.values)
    order = kept(plan)
    for b in range(ev.batch):
        s = Plain(ev, b)
        stay = [stay_of(s, s.a[h].sum((0, 1)) / s.a.shape[1]) for h in range(s.heads)]
        good = None
        if alike:
            best = []
            for h in range(s.heads):
                unit = s.keys[h] / s.keys[h].norm(dim=1, keepdim=True)
                best.append([max(float(unit[i] @ unit[c]) for c in stay[h]) for i in range(s.n) if i not in stay[h]])
            table = torch.tensor(best, dtype=torch.double)
            good = (table.mean(0) >= table.mean()).tolist()
        for h in range(s.heads):
            row = b * s.heads + h
            assert [int(s.real[i]) for i in stay[h]] == order[row]
            want = merged(s.keys[h], s.values[h], stay[h], how, good)
            for got, right in zip((keys, values), want, strict=True):
                torch.testing.assert_close(got[row, -len(right) :].double(), right, rtol=1e-5, atol=1e-5)
    return plan


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("how", ["pivot", "average", "weighted"])
@pytest.mark.parametrize("text", ["keep", "budget"])
def test_all_keys(groups, how, text):
    ev = case(groups=groups, given="attention" if groups == 2 else "queries", seed=groups)
    method = tr.LookM(what="all", hh_ratio=0.3, recent_ratio=0.2, text=text, merge=how)

    def stay_of(s, scores):
        return stays(s, int(0.3 * s.n), int(0.2 * s.n), text, scores)

    compare(method, ev, stay_of, how)


@pytest.mark.parametrize("keep", [3, 0.3])
@pytest.mark.parametrize("how", ["pivot", "weighted"])
def test_visual_keys(keep, how):
    def stay_of(s, scores):
        count = min(keep, len(s.visual)) if isinstance(keep, int) else half_up(keep, len(s.visual))
        return sorted(s.text + top(scores, s.visual, count))

    plan = compare(tr.LookM(keep=keep, merge=how), case(heads=3), stay_of, how)
    assert isinstance(plan, tr.Merge if how == "pivot" else tr.Mix)


def test_samples_without_padding_that_merge_unequal_numbers():
    """Rows of fewer members are filled, and the fill changes nothing."""
    layouts = ("ttttttttvvttt", "tvvvvvvvvvvtt", "ttttttttttttt")

    def stay_of(s, scores):
        return sorted(s.text + top(scores, s.visual, 1)) if s.visual else list(range(s.n))

    for how in ("pivot", "average", "weighted"):
        ev = case(layouts)
        plan = compare(tr.LookM(keep=1, merge=how), ev, stay_of, how)
        assert torch.equal(plan.reduce(ev.values)[4:, -13:], ev.values[4:])
        sizes = plan.reduce_size(None)
        assert plan.sources()[4:].tolist() == [list(range(13))] * 2
        if how != "weighted":
            assert sizes.sum(1).tolist() == [13.0] * 6


def test_filter_drops_what_is_least_alike():
    def stay_of(s, scores):
        return sorted(s.text + top(scores, s.visual, 3))

    compare(tr.LookM(keep=3, merge="weighted", alike=True), case(heads=3), stay_of, "weighted", alike=True)


def test_none_drops_and_text_only_and_keep_all_stay():
    ev = case()
    plain, merge = tr.LookM(keep=3, merge="none").plan(ev), tr.LookM(keep=3).plan(ev)
    assert isinstance(plain, tr.Prune)
    assert kept(plain) == kept(merge)
    for method in (tr.LookM(keep=1.0), tr.LookM(keep=1.0, what="all"), tr.LookM(keep=100, what="all")):
        assert method.plan(ev).is_identity
    assert tr.LookM(keep=2, what="all").plan(case(("t" * 9, "..ttttttt"))).is_identity


def test_ties_go_to_the_lower_slot():
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    rows = torch.full((1, 1, 5, 5), 0.2)
    visual = torch.tensor([[True, True, True, True, False]])
    ev = tr.CacheEvidence(keys, keys.clone(), attention=rows, kv_heads=1, visual=visual)
    plan = tr.LookM(keep=2).plan(ev)
    assert kept(plan) == [[0, 1, 4]]
    assert plan.sources().tolist() == [[0, 1, 2, 0, 2]]


def test_keys_of_mrope_are_not_merged():
    assert tr.LookM().merges_keys(case())
    assert not tr.LookM().merges_keys(case(mrope=True))
    assert tr.LookM(merge_keys=True).merges_keys(case(mrope=True))
    assert not tr.LookM(merge_keys=False).merges_keys(case())


def test_halves_of_a_count_and_bad_settings():
    rows = kept(tr.LookM(keep=11, what="all", text="budget").plan(case(LAYOUTS)))
    assert {len(r) for r in rows} == {11}
    for bad, says in (
        (dict(merge="mean"), "pivot"), (dict(text="drop"), "budget"), (dict(hh_ratio=0.1), "what=all"),
        (dict(what="all", recent_ratio=2.0), "from 0 to 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            tr.LookM(**bad)
