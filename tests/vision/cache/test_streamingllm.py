"""StreamingLLM and the baseline of the last keys."""

from __future__ import annotations

import pytest
from cached import LAYOUTS, against, cached, half_up, image, kept, real

import tokenreduce as tr


def first_and_last(columns, start, total):
    return columns if len(columns) <= total else [*columns[:start], *columns[len(columns) - total + start :]]


@pytest.mark.parametrize("keep", [4, 7, 0.5])
@pytest.mark.parametrize("groups", [1, 7])
def test_visual_keys_among_the_first_tokens_and_the_last_ones(keep, groups):
    layouts = ("vvvvvvvvvvttttt", "ttttvvvvvvvvvtt", "...tvvvvvvvvvvt")
    evidence = cached(layouts, groups=groups)
    rows = kept(tr.StreamingLLM(keep=keep).plan(evidence))
    last = kept(tr.Recent(keep=keep).plan(evidence))
    for i, (there, visual) in enumerate(zip(real(evidence), image(evidence), strict=True)):
        text, wanted = set(there) - set(visual), half_up(keep, len(visual))
        sinks = [j for j in there[:4] if j in visual]
        rest = [j for j in visual if j not in sinks]
        assert rows[i] == sorted({*text, *sinks, *rest[len(rest) - wanted + len(sinks) :]})
        assert last[i] == sorted({*text, *visual[len(visual) - wanted :]})


@pytest.mark.parametrize(("start", "recent"), [(4, 8), (0, 5), (3, 0), (1, 19)])
def test_sizes_over_all_keys(start, recent):
    evidence = cached()
    rows = kept(tr.StreamingLLM(start_size=start, recent_size=recent, what="all").plan(evidence))
    assert rows == [first_and_last(there, start, start + recent) for there in real(evidence)]


@pytest.mark.parametrize("interval", [1, 7])
@pytest.mark.parametrize(
    ("method", "total"),
    [
        (dict(start_size=4, recent_size=6), lambda n: 10),
        (dict(start_size=4, recent_size=40), lambda n: 44),
        (dict(keep=0.5), lambda n: int(n * 0.5 + 0.5)),
        (dict(keep=9), lambda n: 9),
    ],
)
def test_decode(method, total, interval):
    reducer = tr.StreamingLLM(**method, what="all", interval=interval)
    against(reducer, lambda columns, scores, last, n: first_and_last(columns, 4, total(n)), interval=interval)


def test_decode_of_the_baseline_and_without_cuts():
    against(tr.Recent(keep=6, what="all"), lambda columns, scores, last, n: columns[-6:])
    assert tr.Recent(keep=6).every() == 0
    assert tr.Recent(keep=6, what="all", interval=None).every() == 0
    assert tr.StreamingLLM(what="all", interval=5).every() == 5


def test_everything_stays_in_decode_where_everything_may():
    def whole(columns, scores, last, n):
        return columns

    against(tr.Recent(keep=1.0, what="all"), whole, steps=5)
    against(tr.Recent(keep=1000, what="all"), whole, steps=5)


def test_a_ratio_in_decode_needs_the_length_of_the_prompt():
    with pytest.raises(ValueError, match="prompt_slots"):
        tr.Recent(keep=0.5, what="all").plan(cached(step=1))


def test_bad_settings():
    for settings, message in (
        (dict(start_size=-1), "start_size is an int >= 0"),
        (dict(recent_size=5), "what=all"),
        (dict(start_size=0, recent_size=0, what="all"), "leave nothing"),
        (dict(interval=0), "interval is an int >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            tr.StreamingLLM(**settings)
    with pytest.raises(ValueError, match="always stay"):
        tr.StreamingLLM(keep=3, what="all").plan(cached(LAYOUTS))
