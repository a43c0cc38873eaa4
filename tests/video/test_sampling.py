"""Which frames are chosen, against plain references and worked examples."""

from __future__ import annotations

import importlib
import itertools
import math

import numpy as np
import pytest

from tokenreduce.video import aks, by_fps, max_min, pairs, select_frames, uniform
from tokenreduce.video.reading import Frames
from tokenreduce.video.sampling import at_times

# Uniform.


def test_uniform_is_linspace_cut_to_integers():
    assert uniform(10, 4) == [0, 3, 6, 9]
    assert uniform(100, 3) == [0, 49, 99]
    assert uniform(5, 1) == [0]
    assert uniform(7, 2) == [0, 6]
    for count, n in itertools.product((9, 33, 101, 1000), (2, 5, 8)):
        exact = [math.floor(i * (count - 1) / (n - 1) + 1e-9) for i in range(n)]
        assert uniform(count, n) == exact
        assert np.abs(np.linspace(0, count - 1, n).astype(int) - exact).max() <= 1


def test_uniform_of_few_frames():
    assert uniform(3, 8) == [0, 1, 2]
    assert uniform(3, 8, repeat=True) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert uniform(1, 4, repeat=True) == [0, 0, 0, 0]


def test_pairs_are_neighbours():
    assert pairs([0, 2], 6) == [0, 1, 4, 5]
    assert pairs([0, 2], 5) == [0, 1, 4, 4]
    assert uniform(12, 4, pairs=True) == [0, 1, 10, 11]
    assert uniform(5, 4, pairs=True) == [0, 1, 4, 4]


@pytest.mark.parametrize("call", [
    lambda: uniform(0, 2), lambda: uniform(3, 0), lambda: uniform(3, 2.0), lambda: uniform(9, 3, pairs=True),
    lambda: by_fps([], 1), lambda: by_fps([0, 1], -1), lambda: by_fps([1, 0], 1), lambda: by_fps([0, float("nan")], 1),
    lambda: aks([0.1, float("nan")], 1), lambda: aks([1, 2], 1, depth=-1), lambda: aks([], 1),
    lambda: max_min([1, 2], 1), lambda: max_min([[1.0], [2.0]], 1, [1.0]), lambda: max_min([[1.0]], 1, weight=2),
])  # fmt: skip
def test_bad_settings(call):
    with pytest.raises(ValueError):
        call()


# By time.


def test_by_fps_does_not_drift():
    times = np.arange(30000) * 1001 / 30000
    chosen = by_fps(times, 1, 1001.0)
    assert len(chosen) == 1001
    assert np.abs(times[chosen] - np.arange(1001)).max() < 1001 / 30000 + 1e-9
    # Every 29th frame, as int(29.97) has it, would be 33 s off at the end.
    assert chosen[1000] == 29970


def test_by_fps_below_one_frame_per_second_and_above_the_rate():
    times = np.arange(10) * 4.0
    assert by_fps(times, 1, 40.0) == list(range(10))
    assert by_fps(times, 1000, 40.0) == list(range(10))
    assert by_fps(times, 0.125, 40.0) == [0, 2, 4, 6, 8]


def test_by_fps_takes_the_frame_on_screen():
    times = [0.0, 0.1, 0.2, 5.0, 5.1]  # a still picture from 0.2 to 5
    assert by_fps(times, 1, 5.2) == [0, 2, 3]
    assert at_times(times, [0.15, 4.9, 5.0, 9.0, 0.0]) == [1, 2, 3, 4, 0]


def test_rounded_timestamps_do_not_fall_one_frame_back():
    rounded = np.round(np.arange(240) / 24, 3)
    assert at_times(rounded, np.arange(240) / 24) == list(range(240))
    assert by_fps(rounded, 24, 10.0) == list(range(240))


def test_ten_seconds_at_one_per_second_are_ten_frames():
    times = np.arange(100) / 10
    assert by_fps(times, 1, 10.0) == [10 * i for i in range(10)]
    assert by_fps(times, 1, 10.0, most=4) == [0, 30, 60, 90]
    assert by_fps(times, 2) == [5 * i for i in range(20)]


# Adaptive keyframe sampling.


def published(scores, n, t1=0.8, t2=-100.0, depth=5):
    """The paper's rule by plain loops: bins level by level, n / 2^d best of each."""
    low, high = min(scores), max(scores)
    values = [(s - low) / (high - low) for s in scores]
    bins, done = [(0, list(range(len(values))))], []
    while bins:
        level, frames = bins.pop()
        inside = sorted((values[i] for i in frames), reverse=True)
        mean = sum(inside) / len(inside)
        best = inside[:n]
        deviation = (sum((v - mean) ** 2 for v in inside) / len(inside)) ** 0.5
        if (sum(best) / len(best) - mean > t1 and deviation > t2) or level == depth:
            done.append((level, frames))
        else:
            half = len(frames) // 2
            bins += [(level + 1, frames[:half]), (level + 1, frames[half:])]
    out = []
    for level, frames in done:
        out += sorted(frames, key=lambda i: (-values[i], i))[: int(n / 2**level)]
    return sorted(out)


@pytest.mark.parametrize(("count", "n", "depth", "t1"), [
    (256, 64, 5, 0.8), (300, 64, 5, 0.8), (128, 32, 5, 0.8), (90, 8, 3, 0.3), (90, 8, 2, 0.2), (64, 16, 4, 0.5),
])  # fmt: skip
def test_aks_is_the_published_rule_where_it_divides(count, n, depth, t1):
    for seed in range(5):
        scores = np.random.default_rng(seed).random(count) ** 3
        assert aks(scores, n, t1, depth=depth) == published(scores.tolist(), n, t1, depth=depth)


def test_aks_by_hand():
    # Two best stand out from all: taken from wherever they are, also side by side.
    scores = [0.0] * 16
    scores[3], scores[4] = 1.0, 0.9
    assert aks(scores, 2, t1=0.5) == [3, 4]
    # They do not stand out enough for 0.99: one from each half, the first of equals in the second.
    assert aks(scores, 2, t1=0.99) == [3, 8]


def test_aks_gives_as_many_frames_as_asked_for():
    rng = np.random.default_rng(0)
    assert published(rng.random(200).tolist(), 16) == []  # the published rule gives none: int(16 / 32) is 0
    for n in (1, 2, 3, 7, 16, 31, 33, 48, 63, 100):
        for count in (5, 33, 100, 200):
            chosen = aks(rng.random(count), n)
            assert len(chosen) == min(n, count)
            assert chosen == sorted(set(chosen))


def test_what_is_left_over_goes_to_the_more_relevant_half():
    low, high = [0.1, 0.2, 0.1, 0.0], [0.9, 1.0, 0.8, 0.7]
    assert aks(low + high, 3, depth=1) == [1, 4, 5]
    assert aks(high + low, 3, depth=1) == [0, 1, 5]


def test_aks_covers_the_video_where_relevance_alone_collapses():
    scores = np.zeros(128)
    scores[48:80] = 1 - np.arange(32) / 1000
    best = sorted(np.argsort(-scores, kind="stable")[:8].tolist())
    assert best == list(range(48, 56))
    chosen = aks(scores, 8, t1=1.0)
    assert chosen == [0, 16, 32, 48, 64, 80, 96, 112]
    assert len({i // 16 for i in aks(scores, 8)}) >= 4


def test_equal_scores_say_nothing():
    assert aks([0.3] * 50, 5) == uniform(50, 5)
    assert aks([0.3], 5) == [0]


def test_aks_in_pairs():
    scores = [0, 0, 0, 1, 0, 0, 0, 0, 0.5, 0.5, 0, 0.1]
    chosen = aks(scores, 4, t1=0.99, pairs=True)
    assert chosen == [2, 3, 8, 9]
    assert aks(scores[:5], 6, pairs=True) == [0, 1, 2, 3, 4, 4]


# Diversity.


def farthest(features, n, relevance=None, weight=0.5):
    """Farthest points by plain loops."""
    rows = [np.array(f, float) / np.linalg.norm(f) for f in features]
    apart = [[1 - float(a @ b) for b in rows] for a in rows]
    count = len(rows)
    if relevance is None:
        factor = [1.0] * count
        nearest = [min(apart[i][j] for j in range(count) if j != i) for i in range(count)]
        chosen = [next(i for i in range(count) if nearest[i] >= max(nearest) - 1e-6)]
    else:
        low, high = min(relevance), max(relevance)
        factor = [1 - weight + weight * (r - low) / (high - low) for r in relevance]
        chosen = [list(relevance).index(high)]
    while len(chosen) < n:
        gains = [(min(apart[i][j] for j in chosen) * factor[i], -i) for i in range(count) if i not in chosen]
        chosen.append(-max(gains)[1])
    return sorted(chosen)


@pytest.mark.parametrize("weight", [None, 0.0, 0.5, 1.0])
def test_max_min_is_the_greedy_rule(weight):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        features, relevance = rng.standard_normal((40, 6)), rng.random(40)
        for n in (1, 2, 9, 40):
            if weight is None:
                assert max_min(features, n) == farthest(features, n)
            elif n < 40 or weight > 0:
                given = max_min(features, n, relevance, weight=weight)
                assert given == farthest(features, n, relevance, weight)


def test_max_min_by_hand():
    angles = np.radians([0, 2, 4, 90, 92, 180])
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert max_min(features, 1) == [5]  # 88 degrees from its nearest
    assert max_min(features, 2) == [0, 5]
    assert max_min(features, 3) == [0, 3, 5]


def test_near_duplicates_are_not_chosen_for_their_relevance():
    angles = np.radians([0, 0, 0, 30, 90])
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    relevance = [1.0, 0.99, 0.98, 0.0, 0.1]
    assert max_min(features, 3, relevance) == [0, 3, 4]
    assert max_min(features, 3, relevance, weight=0.9) == [0, 3, 4]
    # Of two frames that are equally far, relevance decides.
    across = np.array([[1.0, 0], [0, 1], [0, -1]])
    assert max_min(across, 2, [1.0, 0.2, 0.8]) == [0, 2]
    assert max_min(across, 2, [1.0, 0.8, 0.2]) == [0, 1]


def test_a_still_picture_is_spread_over_time():
    same = np.ones((65, 4))
    assert max_min(same, 5) == [0, 16, 32, 48, 64]
    assert len(set(max_min(same, 30))) == 30


def test_length_does_not_count_and_zero_is_no_error():
    features = np.random.default_rng(0).standard_normal((20, 5))
    assert max_min(features, 6) == max_min(features * np.arange(1, 21)[:, None], 6)
    assert len(max_min(np.zeros((9, 3)), 4)) == 4


def test_max_min_in_pairs():
    angles = np.radians([0, 0, 1, 1, 90, 90, 180])
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert max_min(features, 4, pairs=True) == [0, 1, 6, 6]


# Choosing from frames or a file.


class Brightness:
    """Pictures and texts in a space of directions: "white" is 0 degrees, "black" 90."""

    size = 8

    def __init__(self):
        self.shapes = []

    def images(self, frames):
        self.shapes.append(frames.shape)
        angles = (1 - frames.reshape(len(frames), -1).mean(1) / 255) * np.pi / 2
        return np.stack([np.cos(angles), np.sin(angles)], 1)

    def texts(self, texts):
        return np.array([{"white": [1.0, 0.0], "black": [0.0, 1.0]}[t] for t in texts])


def clip(levels, times=None):
    levels = np.asarray(levels, np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (len(levels), 4, 6, 3)).copy()
    times = np.arange(len(levels), dtype=np.float64) if times is None else np.asarray(times, np.float64)
    return Frames(frames, times, np.arange(len(levels)) * 10, 1.0, float(times[-1] + 1), len(levels) * 10, "pyav")


def test_the_question_decides():
    levels = [0] * 20
    levels[4], levels[13] = 255, 250
    chosen = select_frames(clip(levels), 2, "aks", query="white", encoder=Brightness())
    assert chosen.indices.tolist() == [40, 130]
    assert chosen.times.tolist() == [4.0, 13.0]
    assert chosen.frames[:, 0, 0, 0].tolist() == [255, 250]
    assert (chosen.method, chosen.warnings) == ("aks", ())
    assert chosen.scores.argmax() == 4
    both = select_frames(clip(levels), 2, "aks", query=["white", "black"], encoder=Brightness())
    assert both.scores.min() > 0.99


def test_without_a_question_frames_differ_and_without_an_encoder_they_are_uniform():
    levels = [0, 0, 0, 255, 0, 0, 0, 128]
    diverse = select_frames(clip(levels), 3, "aks", encoder=Brightness())
    assert diverse.method == "diverse"
    assert "no query" in diverse.warnings[0]
    assert diverse.indices.tolist() == [0, 30, 70]
    plain = select_frames(clip(levels), 3, "aks", query="white")
    assert plain.method == "uniform"
    assert "needs an encoder" in plain.warnings[0]
    assert plain.indices.tolist() == [0, 30, 70]
    assert select_frames(clip(levels), 4, "uniform").indices.tolist() == [0, 20, 40, 70]
    flat = select_frames(clip([9] * 8), 3, "aks", query="white", encoder=Brightness())
    assert (flat.method, flat.indices.tolist()) == ("diverse", [0, 30, 70])


def test_candidates_are_encoded_in_batches_and_pairs_stay_together():
    encoder = Brightness()
    chosen = select_frames(clip([0, 0, 255, 255, 0, 0, 9]), 4, "diverse", encoder=encoder, batch=3, pairs=True)
    assert [shape[0] for shape in encoder.shapes] == [3, 3, 1]
    assert chosen.indices.tolist() == [0, 10, 20, 30]


@pytest.mark.parametrize("settings", [
    {"method": "best"}, {"n": 0}, {"method": "uniform", "n": 3, "pairs": True}, {"batch": 0}, {"size": 4},
])  # fmt: skip
def test_bad_selection(settings):
    with pytest.raises(ValueError):
        select_frames(clip([0] * 9), **{"n": 2, "encoder": Brightness()} | settings)


def test_a_film_is_looked_at_once_per_second_and_gives_true_times(tmp_path):
    pytest.importorskip("av")
    from films import film, shown

    shades = [0.9 if 100 <= i < 110 else 0.05 for i in range(192)]
    path = film(tmp_path / "film.mp4", 192, rate=16, shades=shades, gop=32)
    encoder = Brightness()
    chosen = select_frames(path, 3, "diverse", query="white", encoder=encoder, pool=2.0, batch=10)
    assert chosen.candidates.tolist() == list(range(0, 192, 8))
    assert [shape[0] for shape in encoder.shapes] == [10, 10, 4]
    assert all(min(shape[1:3]) == 8 for shape in encoder.shapes)
    assert chosen.frames.shape == (3, 72, 96, 3)
    assert 104 in chosen.indices
    assert [shown(picture) for picture in chosen.frames] == chosen.indices.tolist()
    np.testing.assert_allclose(chosen.times, chosen.indices / 16, atol=1e-6)
    by_rate = select_frames(path, 4, "fps", size=36)
    assert by_rate.indices.tolist() == [0, 48, 112, 176]
    assert by_rate.frames.shape == (4, 36, 48, 3)
    assert select_frames(path, 4).indices.tolist() == uniform(192, 4)


# Encoders of real libraries.


def test_models_of_both_libraries_are_encoders():
    torch = pytest.importorskip("torch")
    from PIL import Image

    encoders = importlib.import_module("tokenreduce.adapters.language.projector.frame_scores")

    def pixels(picture: Image.Image):
        return torch.from_numpy(np.asarray(picture.resize((2, 2))).copy()).float().flatten() / 255

    class OpenClip(torch.nn.Linear):
        encode_image = torch.nn.Linear.forward

        def encode_text(self, tokens):
            return self(tokens.float())

    class Output:
        def __init__(self, pooled):
            self.pooler_output = pooled

    class Clip(torch.nn.Linear):
        def get_image_features(self, pixel_values):
            return Output(self(pixel_values))

        def get_text_features(self, input_ids):
            return self(input_ids.float())

    class Inputs(dict):
        def to(self, device):
            return self

    def processor(images=None, text=None, return_tensors="pt", padding=None, truncation=None):
        if images is not None:
            return Inputs(pixel_values=torch.stack([pixels(i) for i in images]))
        assert truncation
        return Inputs(input_ids=torch.ones(len(text), 12))

    frames = clip([0, 80, 255]).frames
    for encoder in (
        encoders.frame_encoder(OpenClip(12, 5), pixels, lambda texts: torch.ones(len(texts), 12)),
        encoders.frame_encoder(Clip(12, 5), processor),
    ):
        assert encoder.images(frames).shape == (3, 5)
        assert encoder.texts(["a", "b"]).shape == (2, 5)
        assert torch.allclose(encoder.images(frames).norm(dim=-1), torch.ones(3))
        # Rows of ones and of white pixels are the same to this model.
        assert torch.allclose(encoder.images(frames)[2], encoder.texts(["a"])[0], atol=1e-5)
        chosen = select_frames(clip([0, 80, 255, 3]), 2, "aks", query="a", encoder=encoder)
        assert 20 in chosen.indices
    with pytest.raises(ValueError, match="tokenizer"):
        encoders.frame_encoder(OpenClip(12, 5), pixels)
    with pytest.raises(ValueError, match="neither"):
        encoders.frame_encoder(torch.nn.Linear(2, 2), pixels)
