"""Positions of shortened prompts with M-RoPE: arithmetic on ids, against the whole prompt."""

from __future__ import annotations

import pytest
import torch

from tokenreduce.integrations.vllm.positions import (
    COLUMNS,
    Run,
    ahead,
    arrived,
    extent,
    packed,
    placed,
    places_in,
    unpacked,
    waiting,
    whole_prompt,
)

IMAGE, VIDEO = 99, 98
MEDIA = torch.tensor([VIDEO, IMAGE])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_travel_exactly_in_every_precision(dtype):
    places = torch.tensor([[0, 0, 0], [1, 255, 256], [1001, 257, 65535]])
    rows = torch.randn(3, 4).to(dtype)
    sent = packed(rows, places)
    assert sent.shape == (3, 4 + COLUMNS)
    assert sent.dtype == dtype
    x, back = unpacked(sent)
    assert torch.equal(x, rows)
    assert torch.equal(back, places)
    with pytest.raises(ValueError, match="places of visual tokens"):
        packed(rows, places + 1)


def test_runs_grow_back_and_columns_are_those_of_the_short_prompt():
    tokens = [5, 6, IMAGE, IMAGE, 7, 8, VIDEO, 9]
    whole = whole_prompt(tokens, [Run(6, 1, 3), Run(2, 2, 4)], {IMAGE, VIDEO})
    assert whole.tokens == [5, 6, *[IMAGE] * 4, 7, 8, *[VIDEO] * 3, 9]
    assert [whole.tokens[c] for c in whole.columns] == tokens
    assert whole.runs == [Run(2, 4, 4), Run(8, 3, 3)]
    with pytest.raises(ValueError, match="have no placeholder"):
        whole_prompt(tokens, [Run(0, 2, 4)], {IMAGE, VIDEO})


def test_marks_around_a_run_stay_around_it():
    whole = whole_prompt([1, 50, IMAGE, 51, 2], [Run(1, 3, 3)], {IMAGE})
    assert whole.tokens == [1, 50, IMAGE, IMAGE, IMAGE, 51, 2]
    assert whole.columns == [0, 1, 2, 5, 6]


def grid(t, h, w):
    return torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w))


def prompt():
    """A prompt with a picture and a film, whole: ids, (3,L) positions as in Qwen's rule, and the places in both."""
    picture, film = grid(1, 3, 4), grid(4, 2, 2)
    parts, at = [torch.arange(3).expand(3, -1)], 3
    parts.append(at + picture.T)
    at += 4
    parts.append((at + torch.arange(2)).expand(3, -1))
    at += 2
    parts.append(at + film.T)
    at += 2  # behind max(h, w), as transformers counts, although the film is longer
    parts.append((at + torch.arange(3)).expand(3, -1))
    ids = [1, 2, 3, *[IMAGE] * 12, 4, 5, *[VIDEO] * 16, 6, 7, 8]
    return torch.tensor(ids), torch.cat(parts, 1), picture, film


@pytest.mark.parametrize("cut", [None, 4, 8, 11])
def test_written_positions_are_those_of_the_kept_tokens(cut):
    """Whatever stays, and wherever a chunk ends, in an image too."""
    ids, whole, picture, film = prompt()
    g = torch.Generator().manual_seed(0)
    kept = [torch.randperm(len(p), generator=g)[:k].sort().values for p, k in ((picture, 5), (film, 6))]
    columns = torch.cat([torch.arange(3), 3 + kept[0], torch.tensor([15, 16]), 17 + kept[1], torch.arange(33, 36)])
    short, want = ids[columns], whole[:, columns]
    start = whole[:, columns].clone()
    media = torch.isin(short, MEDIA)
    start[:, media] = -1  # what vLLM does not know yet
    rows = [packed(torch.randn(len(k), 2), p[k]) for k, p in zip(kept, (picture, film), strict=True)]
    if cut is None:
        clean, got = placed(short, rows, start, 0, MEDIA)
        assert [len(x) for x in clean] == [5, 6]
        assert clean[0].shape[1] == 2
    else:
        before = int(media[:cut].sum())
        flat = torch.cat(rows)
        _, got = placed(short, [flat[:before]] if before else [], start, 0, MEDIA)
        _, got = placed(short, [flat[before:]], got, cut, MEDIA)
    assert torch.equal(got, want)
    assert (start[:, media] == -1).all(), "what was given is not changed"
    assert ahead(got) == int(want[:, -1].max()) + 1 - want.shape[1]


OPEN, CLOSE = 97, 96


def film(times: list[list[int]], per_frame: list[int]) -> list[int]:
    """A film in a prompt of Qwen3-VL: the time of every frame as text, and its tokens between two marks."""
    return [t for time, n in zip(times, per_frame, strict=True) for t in (*time, OPEN, *[VIDEO] * n, CLOSE)]


@pytest.mark.parametrize("cut", [None, 3, 6, 9, 12, 16, 20])
def test_positions_with_text_between_frames_are_those_of_the_library(cut):
    """Whatever stays of an image and of the frames of a film (of one nothing), wherever a chunk ends."""
    pytest.importorskip("transformers")
    from vlms import VLMS

    rows, columns, times = 3, 5, [[11], [12, 13], [14]]
    picture, whole_film = [IMAGE] * 6, film(times, [15] * 3)
    text = [[1, 2, OPEN], [CLOSE, 3, OPEN], [CLOSE, 4, 5]]
    whole = torch.tensor([*text[0], *picture, *text[1], *whole_film, *text[2]])
    kinds = (whole == IMAGE).int() + 2 * (whole == VIDEO).int()
    want, _ = VLMS["qwen3_vl"].model.model.get_rope_index(
        whole[None], kinds[None], image_grid_thw=torch.tensor([[1, 4, 6]]),
        video_grid_thw=torch.tensor([[3, 2 * rows, 2 * columns]]),
    )  # fmt: skip

    visual = torch.tensor(whole_film) == VIDEO
    stay = ~visual
    stay[visual.nonzero().flatten()[[0, 7, 14, 44]]] = True  # the second frame loses all
    left = torch.tensor([1, 2, 5])
    column = torch.cat([
        torch.arange(3), 3 + left, 9 + torch.arange(3), 12 + stay.nonzero().flatten(),
        torch.arange(len(whole) - 3, len(whole)),
    ])  # fmt: skip
    runs = [(9, int(stay.sum()), extent(10, 3, rows, columns)), (3, 3, extent(0, 1, 2, 3))]
    start = waiting(len(column), runs)
    assert torch.equal(start[:, start[0] >= 0], want[:, 0, column][:, start[0] >= 0])
    bring = [places_in(torch.ones(6, dtype=torch.bool), 2, 3)[left], places_in(visual, rows, columns)[stay]]
    flat = torch.cat([packed(torch.zeros(len(p), 2), p) for p in bring])
    if cut is None:
        clean, got = arrived([flat[:3], flat[3:]], start, 0)
        assert [x.shape for x in clean] == [(3, 2), (len(flat) - 3, 2)]
    else:
        before = int((start[0, :cut] < 0).sum())
        _, got = arrived([flat[:before]] if before else [], start, 0)
        _, got = arrived([flat[before:]], got, cut)
    assert torch.equal(got, want[:, 0, column])
    assert int(start.min()) < 0, "what was given is not changed"
    assert ahead(got) == int(want.max()) + 1 - len(column)


def test_what_a_cache_brought_stays_waiting():
    start = waiting(8, [(2, 4, 6)])
    assert start[0].tolist() == [0, 1, -3, -3, -3, -3, 8, 9]
    clean, got = arrived([packed(torch.zeros(2, 2), torch.tensor([[0, 1, 0], [5, 5, 5]]))], start, 4)
    assert got[:, :4].equal(start[:, :4])
    assert got[:, 4].tolist() == [2, 3, 2]
    assert got[:, 5].tolist() == [7, 7, 7]
    assert clean[0].shape == (2, 2)
