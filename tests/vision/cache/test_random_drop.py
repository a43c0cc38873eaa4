"""Random eviction from the cache."""

from __future__ import annotations

import math

import pytest
import torch
from cached import cached, image, kept, marks, real

import tokenreduce as tr


def test_another_seed_layer_head_or_sample_is_another_draw():
    layouts = ("t" + "v" * 40 + "tt",) * 2
    first = kept(tr.RandomKeys().plan(cached(layouts)))
    assert first == kept(tr.RandomKeys().plan(cached(layouts)))
    assert len({tuple(row) for row in first}) == 4
    assert first != kept(tr.RandomKeys(seed=1).plan(cached(layouts)))
    assert first != kept(tr.RandomKeys().plan(cached(layouts, layer=2)))


def test_text_competes_where_all_keys_count():
    evidence = cached()
    rows = kept(tr.RandomKeys(keep=0.5, what="all").plan(evidence))
    assert [len(row) for row in rows] == [int(len(there) * 0.5 + 0.5) for there in real(evidence)]
    text = [set(there) - set(visual) for there, visual in zip(real(evidence), image(evidence), strict=True)]
    assert any(words - set(row) for words, row in zip(text, rows, strict=True))


def test_every_key_is_as_likely():
    n, samples = 8, 4000
    layout = "t" + "v" * n + "t"
    keys = torch.randn(samples, n + 2, 8, generator=torch.Generator().manual_seed(0))
    evidence = tr.CacheEvidence(keys, keys, kv_heads=2, visual=marks((layout,), "v").expand(samples // 2, -1))
    stays = (tr.RandomKeys(keep=2).plan(evidence).sources()[:, 1:-1] >= 0).double()
    assert (stays.sum(1) == 2).all()
    # Each stays with probability 1/4; five standard errors of slack.
    assert (stays.mean(0) - 0.25).abs().max() < 5 * math.sqrt(3 / 16 / samples)


def test_names_and_bad_settings():
    assert tr.get_method("random:keep=7", "cache") == tr.RandomKeys(keep=7)
    assert tr.RandomKeys(keep=7).spec() == "random@cache:keep=7"
    with pytest.raises(ValueError, match="seed is an int >= 0"):
        tr.RandomKeys(seed=-1)
