"""Streaming memories: any cut of the stream gives the same memory, of a fixed size, that survives a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

import tokenreduce as tr
from tokenreduce.core.registry import get_class
from tokenreduce.video.clip_memory import ClipMemory
from tokenreduce.video.memory import StreamingMemory
from tokenreduce.video.pyramid_memory import PyramidMemory


def stream(frames, h=4, w=4, c=3, seed=0, dtype=torch.float32):
    return torch.randn(frames, h, w, c, generator=torch.Generator().manual_seed(seed)).to(dtype)


MEMORIES = {
    "pyramid": lambda **more: PyramidMemory((2, 3, 4), **more),
    "official": lambda **more: PyramidMemory((2, 3, 4), cascade=False, order="list", **more),
    "clips": lambda **more: ClipMemory("pool-frames:keep=5", clip=4, select=2, spread=1, capacity=5, **more),
    "prompted": lambda **more: ClipMemory("ppllava:keep=0.25", clip=3, select=1, spread=2, capacity=3, **more),
}
every = pytest.mark.parametrize("name", MEMORIES)


def same(a, b):
    for field in ("x", "frames", "times", "spans"):
        one, two = getattr(a, field), getattr(b, field)
        assert one.dtype == two.dtype
        assert torch.equal(one, two), field
    assert a.lengths == b.lengths


# -- what goes for all -------------------------------------------------------------------------------------------------
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("total", [1, 2, 7, 30, 83])
def test_how_the_stream_is_cut_changes_nothing(name, total, dtype):
    film, times = stream(total, dtype=dtype), torch.arange(total) * 0.5 + 3
    ask = torch.tensor([1.0, -1.0, 0.5])
    whole = MEMORIES[name]()
    whole.push(film, times)
    for cut in (1, 3, 8):
        parts = MEMORIES[name](chunk=cut + 1)
        for start in range(0, total, cut):
            parts.push(film[start : start + cut], times[start : start + cut])
            parts.tokens(ask)  # asking changes nothing
        same(parts.tokens(), whole.tokens())
        same(parts.tokens(ask), whole.tokens(ask))
        assert parts.seen == whole.seen == total


@every
def test_tokens_are_in_order_and_within_the_budget(name):
    memory, film = MEMORIES[name](), stream(61)
    for i in range(61):
        memory.push(film[i : i + 1], [i * 2.0])
        for ask in (None, torch.ones(3), torch.eye(3)[:2]):
            out = memory.tokens(ask)
            assert 1 <= len(out.x) <= memory.budget
            assert len(out.x) == len(out.frames) == len(out.times) == sum(out.lengths)
            assert len(out.spans) == len(out.lengths)
            assert torch.equal(out.times, out.frames * 2.0)
            assert int(out.frames.max()) <= i
            piece = torch.arange(len(out.lengths)).repeat_interleave(torch.tensor(out.lengths))
            assert bool((out.times >= out.spans[piece, 0]).all())
            assert bool((out.times <= out.spans[piece, 1]).all())
            assert bool((out.spans[1:, 0] > out.spans[:-1, 1]).all()), "pieces follow each other"


@every
@pytest.mark.parametrize("at", [1, 11, 40])
def test_a_checkpoint_goes_on_bit_for_bit(name, at, tmp_path):
    film, ask = stream(70), torch.tensor([0.2, 1.0, -0.4])
    memory = MEMORIES[name]()
    memory.push(film[:at])
    memory.save(tmp_path / "memory.safetensors")
    loaded = StreamingMemory.load(tmp_path / "memory.safetensors")
    assert type(loaded) is type(memory)
    assert loaded.settings() == memory.settings()
    other = MEMORIES[name]()
    other.push(stream(5, seed=9))
    other.load_state_dict(memory.state_dict())
    for m in (memory, loaded, other):
        m.push(film[at:])
    for m in (loaded, other):
        same(m.tokens(), memory.tokens())
        same(m.tokens(ask), memory.tokens(ask))


@every
def test_an_empty_memory_can_be_saved_and_cleared(name, tmp_path):
    memory = MEMORIES[name]()
    memory.save(tmp_path / "empty.safetensors")
    loaded = StreamingMemory.load(tmp_path / "empty.safetensors")
    for m in (memory, loaded):
        with pytest.raises(ValueError, match="no frame yet"):
            m.tokens()
        with pytest.raises(ValueError, match="no frame yet"):
            _ = m.budget
    memory.push(stream(9))
    memory.clear()
    assert memory.stored == 0
    memory.push(stream(9, h=2, w=3, c=5))
    loaded.push(stream(9, h=2, w=3, c=5))
    same(memory.tokens(), loaded.tokens())


@every
def test_frames_are_encoded_in_chunks(name):
    sizes = []

    def encode(pixels):
        sizes.append(len(pixels))
        return pixels.float().view(len(pixels), 4, 2, 4, 2, 3).mean((2, 4))

    pixels = (stream(21, 8, 8) * 50).byte()
    memory = MEMORIES[name](encode=encode, chunk=8)
    memory.push(pixels)
    assert sizes == [8, 8, 5]
    plain = MEMORIES[name]()
    plain.push(torch.cat([encode(pixels[i : i + 1]) for i in range(21)]))
    same(memory.tokens(), plain.tokens())


@every
def test_what_was_pushed_is_not_kept_alive_nor_its_graph(name):
    film = stream(40).requires_grad_()
    memory = MEMORIES[name]()
    memory.push(film)
    before = memory.tokens().x.clone()
    with torch.no_grad():
        film.zero_()
    assert torch.equal(memory.tokens().x, before)
    state = memory.state_dict()
    assert not any(t.requires_grad for t in state.values())
    assert not memory.tokens().x.requires_grad


@every
def test_bad_frames_and_times_are_refused_and_change_nothing(name):
    memory = MEMORIES[name]()
    memory.push(stream(6), torch.arange(6) + 10.0)
    before = memory.tokens()
    nan = stream(2)
    nan[1, 0, 0, 0] = float("nan")
    for frames, times, message in [
        (stream(2), [16.0], "times are 2 finite seconds"),
        (stream(2), [17.0, 16.0], "never run backwards"),
        (stream(2), [3.0, 4.0], "from 15.0 on"),
        (stream(2), [16.0, float("nan")], "finite seconds"),
        (stream(2, h=5), [16.0, 17.0], "all frames of a stream are"),
        (stream(2, dtype=torch.float64), [16.0, 17.0], "all frames of a stream are"),
        (stream(2)[0], [16.0] * 4, "name a function in encode"),
        (stream(2).byte(), [16.0, 17.0], "name a function in encode"),
        (list(stream(2)), [16.0, 17.0], "name a function in encode"),
        (nan, [16.0, 17.0], "NaN or infinity"),
    ]:
        with pytest.raises(ValueError, match=message):
            memory.push(frames, times)
        same(memory.tokens(), before)
    memory.push(stream(0), [])
    assert memory.seen == 6


@every
def test_states_of_other_settings_are_refused(name, tmp_path):
    memory = MEMORIES[name]()
    memory.push(stream(50))
    smaller = PyramidMemory((1, 1, 1)) if "clip" not in memory.settings() else ClipMemory(
        "pool-frames:keep=5", clip=2, select=1, spread=0, capacity=1
    )  # fmt: skip
    with pytest.raises(ValueError, match="this state is not of a"):
        smaller.load_state_dict(memory.state_dict())
    assert smaller.stored == smaller.seen == 0
    with pytest.raises(ValueError, match="this state is not of a"):
        smaller.load_state_dict({"stream.seen": torch.tensor(3)})
    tr.get_method("uniform@projector:keep=2").plan(tr.Evidence(stream(1).flatten(1, 2))).save(tmp_path / "plan")
    with pytest.raises(ValueError, match="holds no memory"):
        StreamingMemory.load(tmp_path / "plan")


@every
def test_chunk_is_checked(name):
    with pytest.raises(ValueError, match="chunk is an int >= 1"):
        MEMORIES[name](chunk=0)


# -- an hour -----------------------------------------------------------------------------------------------------------
def hour(memory, size):
    """An hour at one frame a second: 3600 frames of 14 x 14, 705 600 tokens, made as they are needed; floats held."""
    held, generator = [], torch.Generator().manual_seed(0)
    for _ in range(3600 // size):
        memory.push(torch.randn(size, 14, 14, 2, generator=generator))
        held.append(memory.stored)
    return held


def test_an_hour_in_a_pyramid_takes_constant_memory():
    memory = PyramidMemory((16, 16, 32))
    held = hour(memory, 24)
    budget = 16 * 196 + 16 * 49 + 32 * 9
    assert memory.budget == budget
    assert set(held[30:]) == {budget * 2 + 64 * 2}, "all levels full: maps and their means"
    out = memory.tokens()
    assert len(out.x) == budget
    assert out.spans[-1, 1] == 3599


def test_an_hour_in_clips_takes_constant_memory():
    memory = ClipMemory("pool-frames:keep=64", clip=16, select=4, spread=2, capacity=30)
    held = hour(memory, 48)
    full = 30 * (64 * 2 + 2) + 16 * 196 * 2
    assert set(held[10:]) == {full}, "compressed clips, and room for the one that is open"
    memory.push(torch.zeros(15, 14, 14, 2))
    assert memory.stored == full
    assert memory.budget == 6 * 64
    assert len(memory.tokens(torch.tensor([1.0, 0.0])).x) <= 6 * 64


# -- pyramid -----------------------------------------------------------------------------------------------------------
def cosine(a, b):
    a, b = a.double().mean((0, 1)), b.double().mean((0, 1))
    return float(a @ b / (a.norm() * b.norm()))


def smaller(map, side, how):
    picture = map.permute(2, 0, 1)[None]
    out = adaptive_avg_pool2d(picture, side) if how == "pool" else interpolate(picture, side, mode="bilinear")
    return out[0].permute(1, 2, 0)


def bank(film, capacities, cascade=True, by_time=True):
    """The card's steps, frame by frame: lists of (number, map) per level."""
    levels = [[] for _ in capacities]
    side = film.shape[1]

    def leave(i):
        pairs = [cosine(levels[i][n][1], levels[i][n + 1][1]) for n in range(len(levels[i]) - 1)]
        return levels[i].pop(pairs.index(max(pairs)) if pairs else 0)

    def down(frame, i):
        if i == len(levels):
            return
        if len(levels[i]) == capacities[i]:
            lost = leave(i)
            if cascade:
                down(lost, i + 1)
        number, map = frame
        levels[i].append((number, smaller(map, (side // 2**i,) * 2, "resize")))
        if by_time:
            levels[i].sort(key=lambda f: f[0])

    for number, map in enumerate(film):
        i = 0 if number % 8 == 0 else 1 if number % 4 == 0 else 2
        if len(levels[i]) == capacities[i]:
            down(leave(i), i + 1)
        levels[i].append((number, map if i == 0 else smaller(map, (side // 2**i,) * 2, "pool")))
    return levels


@pytest.mark.parametrize("capacities", [(2, 2, 12), (1, 1, 1), (3, 1, 2), (1, 4, 3), (64, 64, 64)])
@pytest.mark.parametrize(("cascade", "order"), [(True, "time"), (False, "list"), (True, "list"), (False, "time")])
@pytest.mark.parametrize("total", [1, 9, 75])
def test_pyramid_is_the_bank_of_the_card(capacities, cascade, order, total):
    film = stream(total, 8, 8, 5, seed=total)
    memory = PyramidMemory(capacities, cascade=cascade, order=order)
    memory.push(film)
    want = bank(film, capacities, cascade, order == "time")
    assert memory.levels() == [[n for n, _ in level] for level in want]
    frames = sorted(((n, map) for level in want for n, map in level), key=lambda f: f[0])
    out = memory.tokens()
    torch.testing.assert_close(out.x, torch.cat([map.flatten(0, 1) for _, map in frames]))
    assert out.lengths == tuple(map.shape[0] * map.shape[1] for _, map in frames)
    assert out.frames.unique().tolist() == [n for n, _ in frames]


def test_pattern_is_that_of_the_stream_and_not_of_the_chunk():
    memory = PyramidMemory()
    for size in (3, 7, 6, 4):
        memory.push(stream(size))
    assert memory.levels() == [[0, 8, 16], [4, 12], [i for i in range(20) if i % 4]]
    assert memory.tokens().lengths == tuple(16 if i % 8 == 0 else 4 if i % 4 == 0 else 1 for i in range(20))


def test_of_the_most_similar_pair_the_earlier_leaves_and_ties_go_to_the_first():
    film = torch.eye(4)[[0, 1, 1, 2, 2, 3]][:, None, None].expand(-1, 2, 2, -1)
    memory = PyramidMemory((4,), pattern=(1,), pooling=(1,))
    memory.push(film[:5])
    assert memory.levels() == [[0, 2, 3, 4]]
    memory.push(film[5:])
    assert memory.levels() == [[0, 2, 4, 5]]
    flat = PyramidMemory((3,), pattern=(1,), pooling=(1,))
    flat.push(torch.zeros(6, 2, 2, 4))
    assert flat.levels() == [[3, 4, 5]], "all alike, and zero vectors: the first pair's earlier frame"


def test_a_frame_pushed_down_pushes_on_only_in_a_cascade():
    """Pitfall: a second eviction has no next level in the official code."""
    for cascade in (True, False):
        memory = PyramidMemory((1, 1, 9), cascade=cascade)
        memory.push(stream(9))
        # 0 enters the first level and 4 the second; 8 pushes 0 down, and 0 pushes 4 on.
        below = [1, 2, 3, 4, 5, 6, 7] if cascade else [1, 2, 3, 5, 6, 7]
        assert memory.levels() == [[8], [0], below]


def test_odd_sides_are_rounded_down_and_never_vanish():
    memory = PyramidMemory()
    memory.push(stream(9, 7, 3))
    assert memory.tokens().lengths == (21, 1, 1, 1, 3, 1, 1, 1, 21)
    tiny = PyramidMemory((1, 1, 2))
    tiny.push(stream(20, 1, 1))
    assert tiny.budget == 4


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"capacities": (4, 0, 4)}, "capacities is an int >= 1"), ({"capacities": ()}, "capacities has one number"),
     ({"pattern": (8, 4)}, "pattern has one number for every level"), ({"pattern": (8, 4, 2)}, "pattern ends with 1"),
     ({"pooling": (1, 2, 0)}, "pooling is an int >= 1"), ({"order": "age"}, "order is one of")],
)  # fmt: skip
def test_pyramid_refuses_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        PyramidMemory(**bad)


# -- clips -------------------------------------------------------------------------------------------------------------
def scenes(directions, frames=4):
    """A clip for every direction in the plane (degrees), of frames that differ a little."""
    angle = torch.tensor(directions) * torch.pi / 180
    base = torch.stack([angle.cos(), angle.sin()], -1).repeat_interleave(frames, 0)
    return base[:, None, None].expand(-1, 2, 2, -1) + 0.001 * stream(len(base), 2, 2, 2)


def pieces(out, frames=4):
    """Which clips were given."""
    return (out.spans[:, 1] // frames).long().tolist()


def east():
    return torch.tensor([1.0, 0.0])


def test_top_clips_and_spread_ones_in_the_order_of_time():
    film = scenes([90.0, 10.0, 180.0, 270.0, 5.0, 90.0, 200.0])
    both = ClipMemory("pool-frames:keep=4", clip=4, select=2, spread=2)
    both.push(film)
    assert pieces(both.tokens(east())) == [1, 2, 4, 5], "1 and 4 are near; of 0, 2, 3, 5, 6 those at 1 and 3"
    assert pieces(both.tokens(-east())) == [1, 2, 4, 6]
    only = ClipMemory("pool-frames:keep=4", clip=4, select=3, spread=0)
    only.push(film)
    assert len(pieces(only.tokens(east()))) == 3
    assert {1, 4} < set(pieces(only.tokens(east())))
    for nothing in (None, torch.zeros(2), torch.zeros(3, 2)):
        assert pieces(both.tokens(nothing)) == [0, 2, 4, 6]
    few = ClipMemory("pool-frames:keep=4", clip=4, select=4, spread=2)
    few.push(film[:12])
    assert pieces(few.tokens(east())) == [0, 1, 2], "fewer clips than asked for: all"


def test_ties_go_to_the_earlier_clip_and_words_count_alike():
    memory = ClipMemory("pool-frames:keep=4", clip=1, select=2, spread=0)
    memory.push(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])[:, None, None].expand(-1, 2, 2, -1))
    assert pieces(memory.tokens(east()), 1) == [1, 2]
    assert pieces(memory.tokens(torch.tensor([[9.0, 0.0], [0.0, 1.0], [0.0, 1.0]])), 1) == [0, 1]


@pytest.mark.parametrize("spec", ["pool-frames:keep=6", "ppllava:keep=0.3", "token-shuffle:m=4"])
def test_a_clip_is_what_its_reducer_gives_for_a_video(spec):
    method = tr.get_method(spec)
    film = stream(12)
    memory = ClipMemory(spec, clip=4, select=3, spread=0)
    memory.push(film)
    out = memory.tokens(torch.ones(3))
    for i in range(3):
        x = film[4 * i : 4 * i + 4].reshape(1, -1, 3)
        plan = method.plan(tr.Evidence(x, grid=(4, 4, 4)))
        k = out.lengths[i]
        at = slice(i * k, (i + 1) * k)
        assert torch.equal(out.x[at], plan.reduce(x)[0])
        assert out.frames[at].tolist() == (plan.representatives()[0] // 16 + 4 * i).tolist()


def test_the_open_clip_has_tokens_in_proportion_and_can_be_selected():
    memory = ClipMemory("pool-frames:keep=10", clip=8, select=1, spread=0)
    film = scenes([180.0, 180.0, 0.0])
    for frames, tokens in ((1, 1), (3, 4), (4, 5), (7, 9)):
        memory.clear()
        memory.push(film[:frames])
        assert len(memory.tokens().x) == tokens
    memory.clear()
    memory.push(film)
    out = memory.tokens(east())
    assert len(out.x) == 5
    assert out.spans.tolist() == [[8.0, 11.0]]


def test_of_the_most_similar_neighbours_the_earlier_is_dropped_and_the_span_is_kept():
    memory = ClipMemory("pool-frames:keep=4", clip=4, select=3, spread=0, capacity=3)
    memory.push(scenes([0.0, 80.0, 90.0, 200.0]))
    out = memory.tokens()
    assert out.spans.tolist() == [[0.0, 3.0], [4.0, 11.0], [12.0, 15.0]]
    assert sorted(set(out.frames.tolist())) == [0, 8, 12], "tokens of the later clip, with their true times"
    memory.push(scenes([210.0]))
    assert memory.tokens().spans.tolist() == [[0.0, 3.0], [4.0, 11.0], [12.0, 19.0]]


def test_embed_says_what_is_compared():
    def brightest(maps):
        return torch.stack([maps[..., 0].amax(), maps[..., 1].amax(), -maps.amin()])

    memory = ClipMemory("pool-frames:keep=4", clip=4, select=1, spread=0, embed=brightest)
    film = scenes([90.0, 0.0, 180.0])
    memory.push(film)
    assert pieces(memory.tokens(torch.tensor([0.0, 0.0, 1.0]))) == [2]
    with pytest.raises(ValueError, match="question is a vector of 3 numbers"):
        memory.tokens(east())
    wrong = ClipMemory("pool-frames:keep=4", clip=4, embed=lambda maps: maps)
    with pytest.raises(ValueError, match="embed gives one vector"):
        wrong.push(film)


def test_clips_refuse_bad_settings():
    kind = get_class("pool-frames")
    assert ClipMemory(kind(keep=4)).settings()["reducer"] == "pool-frames:keep=4"
    for reducer in ("uniform@projector:keep=4", 3):
        with pytest.raises(ValueError, match="reducer is a temporal method"):
            ClipMemory(reducer)
    with pytest.raises(ValueError, match="ppllava reads clip, which a stream of features does not have"):
        ClipMemory("ppllava:keep=4,clip=a/b")
    for bad, message in [
        ({"clip": 0}, "clip is an int >= 1"), ({"select": -1}, "select is an int >= 0"),
        ({"spread": 1.0}, "spread is an int >= 0"), ({"select": 0, "spread": 0}, "both 0"),
        ({"capacity": 5}, "capacity is an int >= 6"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ClipMemory("pool-frames:keep=4", **bad)
