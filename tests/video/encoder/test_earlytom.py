"""EarlyTom's merging of frames against its card in plain loops, and in a language model whose tower sees a batch of
frames: against the stock model whose tower runs by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from vlms import VIDEO, VLMS, _wide, deeper, encodes_before, prompts
from vlms_masked import CASES, close, generate, hidden, layers_of

import tokenreduce as tr
from tokenreduce.core.evidence import FrameEvidence


def cos(a, b):
    """Mean over places of the cosine of two frames (S,C)."""
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean())


def spans_of(x, tau, longest, ema):
    """The segments of frames ``x`` (T,S,C)."""
    spans, start, smoothed = [], 0, 1.0
    for i in range(1, len(x)):
        smoothed = ema * cos(x[start], x[i]) + (1 - ema) * smoothed
        if smoothed < tau or i - start + 1 >= longest:
            spans.append((start, i))
            start, smoothed = i, 1.0
    return [*spans, (start, len(x))]


def by_hand(x, tau, longest, ema):
    """The frames that are left of ``x`` (T,S,C), and the frame at whose place each one stands."""
    out, places = [], []
    for a, b in spans_of(x, tau, longest, ema):
        inner = list(range(a + 1, b - 1))
        emitted = [(x[a], a)]
        if len(inner) == 1:
            emitted.append((x[inner[0]], inner[0]))
        elif inner:
            merge, s = cos(x[a], x[b - 1]), [cos(x[f], x[f + 1]) for f in inner[:-1]]
            i, m = 0, len(inner)
            while i < m - 1:
                if s[i] > merge and (i == m - 2 or s[i] > s[i + 1]):
                    one, two = max(s[i], 0), 0 if i == m - 2 else max(s[i + 1], 0)  # weights are never negative
                    w = one / (one + two) if one + two else 1.0 if i == m - 2 else 0.5
                    emitted.append((w * x[inner[i]] + (1 - w) * x[inner[i + 1]], inner[i]))
                    i += 2
                else:
                    emitted.append((x[inner[i]], inner[i]))
                    i += 1
        if b - a > 1:
            emitted.append((x[b - 1], b - 1))
        out += [f for f, _ in emitted]
        places += [p for _, p in emitted]
    return torch.stack(out), places


def film(frames, places=5, channels=6, seed=0, noise=0.4):
    """Scenes of several frames each, with changes."""
    g = torch.Generator().manual_seed(seed)
    scenes = torch.randn(-(-frames // 6), places, channels, generator=g).repeat_interleave(6, 0)[:frames]
    return scenes + noise * torch.randn(frames, places, channels, generator=g)


def shown(x, **more):
    return FrameEvidence(x.flatten(1)[None], places=x.shape[1], **more)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("frames", "tau", "longest", "ema"), [
    (1, 0.6, 8, 0.9), (2, 0.6, 8, 0.9), (3, -1.0, 8, 1.0), (4, -1.0, 8, 0.9), (17, 0.6, 8, 0.9), (24, 0.3, 64, 0.5),
    (24, -1.0, 6, 0.9), (9, 0.9, 4, 0.9), (8, 0.6, 2, 0.9),
])  # fmt: skip
def test_the_plan_is_the_cards(frames, tau, longest, ema, seed):
    x = film(frames, seed=seed)
    plan = tr.EarlyTom(tau=tau, max_window=longest, ema=ema).plan(shown(x))
    want, places = by_hand(x, tau, longest, ema)
    assert plan.representatives()[0].tolist() == places
    torch.testing.assert_close(plan.reduce(x.flatten(1)[None])[0].view(want.shape), want, rtol=1e-4, atol=1e-5)


def test_equal_frames_and_opposite_ones():
    """Ties are no greater: of equal frames the last in between goes. Weights are never negative."""
    still = torch.ones(6, 2, 3)
    plan = tr.EarlyTom(max_window=9).plan(shown(still))
    assert plan.representatives().tolist() == [[0, 1, 2, 3, 5]]
    assert plan.sources()[0, 4] == -1
    x = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(1))
    x[5:] = -x[:3]
    plan = tr.EarlyTom(tau=-1.0, max_window=99).plan(shown(x))
    assert (plan.weights >= 0).all() if hasattr(plan, "weights") else plan.k < 8
    assert torch.isfinite(plan.reduce(x.flatten(1)[None])).all()


@pytest.mark.parametrize(("spec", "said"), [
    ("earlytom:tau=2", "tau is a cosine"), ("earlytom:ema=0", "ema is a weight"),
    ("earlytom:max_window=1", "max_window"), ("earlytom:keep=64", "keep is a share"),
    ("earlytom:positions=original", "give keep, too"), ("earlytom:keep=0.5,positions=3", "positions is"),
    ("earlytom:prune_layers=[3,3]", "prune_layers names a layer twice"),
])  # fmt: skip
def test_bad_settings(spec, said):
    with pytest.raises(ValueError, match=said):
        tr.get_method(spec)


def test_nan_and_several_videos_are_refused():
    x = film(5)
    with pytest.raises(ValueError, match="one video at a time"):
        tr.EarlyTom().plan(FrameEvidence(x.flatten(1)[None].expand(2, -1, -1), places=5))
    x[2, 1, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        tr.EarlyTom().plan(shown(x))


# -- in models ---------------------------------------------------------------------------------------------------------
METHOD = "earlytom:prune_layers=[0,2],tau=-1.0,max_window=99"
NAMES = ["llava_onevision", "llava_next_video"]
FRAMES = 7


def larger(name, side=80):
    """:func:`deeper` for frames of 5 x 5 patches, so that there is something to choose: 9 tokens, or 4."""
    stock = deeper(name)
    config = copy.deepcopy(stock.config)
    config.vision_config.image_size = side
    torch.manual_seed(0)
    return _wide(type(stock)(config))


def asked(name, frames=FRAMES, videos=1, side=32, each=1):
    """A prompt with ``videos`` of so many frames, that change slowly; ``each`` placeholders for a frame."""
    inputs = prompts(VLMS[name], ((5, "v"),) * videos)
    g = torch.Generator().manual_seed(4)
    steps = torch.randn(videos, frames, 3, side, side, generator=g).mul(0.5).cumsum(1)
    inputs["pixel_values_videos"] = steps
    rows = []
    for ids in inputs["input_ids"]:
        at = (ids == VIDEO).nonzero().flatten()
        end = int(name == "llava_onevision")  # one row end behind the video
        rows.append(torch.cat([ids[: at[0]], torch.full((frames * each + end,), VIDEO), ids[at[-1] + 1 :]]))
    inputs["input_ids"] = torch.stack(rows)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def tower_of(model):
    inner = model.model
    return inner.video_tower if hasattr(inner, "video_tower") else inner.vision_tower


def received(block, x, prefix):
    """(T,S) attention that the patches of frames ``x`` (T,N,C), a block's input, receive in it: mean of heads and
    queries."""
    attn = block.self_attn
    y = block.layer_norm1(x)
    q, k = (f(y).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for f in (attn.q_proj, attn.k_proj))
    return (q @ k.transpose(-1, -2) * attn.scale).softmax(-1).mean((1, 2))[:, prefix:]


def alone(tower, pixels, prefix, layers=(0, 2), tau=-1.0, longest=99, look=None):
    """(hidden states of all frames, frames that are left, attention in block ``look`` of those, their segments), of one
    video through the stock blocks, by loops."""
    x = tower.embeddings(pixels)
    x = tower.pre_layrnorm(x) if hasattr(tower, "pre_layrnorm") else x
    places, states, scores, spans = list(range(len(x))), [], None, None

    def whole(y):
        full = y.mean(0, keepdim=True).repeat(len(pixels), *[1] * (y.dim() - 1))
        full[places] = y
        return full

    states.append(whole(x))
    for i, block in enumerate(tower.encoder.layers):
        scores = received(block, x, prefix) if i == look else scores
        x = block(x, attention_mask=None)
        x = x[0] if isinstance(x, tuple) else x
        if i in layers:
            _, at = by_hand(x[:, prefix:], tau, longest, 0.9)
            weights = tr.EarlyTom(tau=tau, max_window=longest).plan(shown(x[:, prefix:]))
            merged = weights.reduce(x.flatten(1)[None])[0].view(-1, *x.shape[1:])
            assert weights.representatives()[0].tolist() == at
            x, places = merged, [places[p] for p in at]
            scores = weights.reduce(scores[None])[0] if i == look else scores
            spans = spans_of(x[:, prefix:], tau, longest, 0.9)
        states.append(whole(x))
    return states, places, scores, spans


def columns_of(inputs, name, row):
    """(T,S) columns of a video's tokens in a prompt."""
    at = (inputs["input_ids"][row] == VIDEO).nonzero().flatten()
    return at[: len(at) - (name == "llava_onevision")].view(FRAMES, -1)


class by_hand_tower:  # noqa: N801 - used like open()
    """The stock model whose tower gives the hidden states of :func:`alone`; ``films`` has what that gives."""

    def __init__(self, model, **settings):
        self.tower, self.settings, self.films = tower_of(model), settings, []
        self.prefix = int("CLIP" in type(self.tower).__name__)

    def __call__(self, module, args, kwargs, output):
        pixels = args[0] if args else kwargs["pixel_values"]
        self.films = [alone(self.tower, video, self.prefix, **self.settings) for video in pixels.split(FRAMES)]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(torch.cat(one) for one in zip(*(f[0] for f in self.films), strict=True))
        if output.get("last_hidden_state") is not None:
            output.last_hidden_state = torch.cat([f[0][-1] for f in self.films])
        return output

    def __enter__(self):
        self.hook = self.tower.register_forward_hook(self, with_kwargs=True)
        return self

    def __exit__(self, *error):
        self.hook.remove()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_video_is_what_the_tower_alone_and_masking_would_give(name):
    if not encodes_before():
        pytest.skip("this transformers adds row ends behind get_video_features, where this reference does not look")
    model, inputs = deeper(name), asked(name, videos=2)
    stock = generate(model, inputs)[1]
    with tr.patched(model, METHOD + "+divprune:keep=1.0,positions=original"):
        sequences, logits, trace = generate(model, inputs)
    with by_hand_tower(model) as tower:
        model(**inputs)
        gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for row, (_, left, _, _) in enumerate(tower.films):
            columns = columns_of(inputs, name, row)
            for frame in set(range(FRAMES)) - set(left):
                gone[row, columns[frame]] = True
        lefts = [left for _, left, _, _ in tower.films]
        with hidden(layers_of(name, model), gone, 0):
            want_sequences, want, _ = generate(model, inputs)
    assert gone.any()
    (step,) = [s for s in trace.steps if s.stage == "projector"]
    assert torch.equal(step.plan.sources() < 0, gone)
    assert torch.equal(sequences, want_sequences)
    close(logits, want)
    assert not torch.allclose(logits, stock, rtol=1e-3)
    inside = [s.patches for s in trace.steps if s.stage == "encoder"]
    assert inside[-1] <= inside[2] < inside[1] == inside[0]
    _, _, _, rows, cols = inputs["pixel_values_videos"].shape
    size = model.config.vision_config.patch_size
    assert inside[-1] == sum(map(len, lefts)) * (rows // size) * (cols // size)


# -- and tokens of these frames ----------------------------------------------------------------------------------------
LARGE = {"llava_onevision": {"side": 80, "each": 9}, "llava_next_video": {"side": 80, "each": 4}}


def chosen(scores, places, spans, ratio):
    """(frame at the entry, token) of what stays of a video: attention ``scores`` (T',S) of the frames that are left,
    which stand at ``places``, and their segments ``spans``."""
    s, out = scores.shape[1], []
    share = round(s * min(ratio * FRAMES / len(places), 1), 6)
    for start, stop in spans:
        for i in range(start, stop):
            row = scores[i].tolist()
            if i in (start, stop - 1):
                best = sorted(range(s), key=lambda j: (-row[j], j))[: math.ceil(share)]
            else:
                windows, best, at = max(1, round(share)), [], 0
                for w in range(windows):
                    length = s // windows + (w < s % windows)
                    best.append(max(range(at, at + length), key=lambda j: (row[j], -j)))
                    at += length
            out += [(places[i], j) for j in best]
    return sorted(out)


def pooled_by(model, scores):
    """Attention (T',P) as the model pools features."""
    inner, side = model.model, math.isqrt(scores.shape[1])
    if hasattr(inner, "apply_pooling"):
        return inner.apply_pooling(scores[..., None])[..., 0]
    pool = torch.nn.AvgPool2d(inner.config.spatial_pool_stride)
    return pool(scores.unflatten(1, (side, side))[:, None]).flatten(1)


@pytest.mark.parametrize(("keep", "layers", "tau", "longest"), [
    (0.25, [0, 2], -1.0, 99), (0.6, [0], 0.9, 5), (0.4, [1, 3], 0.5, 4), (0.9, [2], -1.0, 99),
    (0.2, ["look"], -1.0, 99), (0.3, [0, "look"], -1.0, 99),
])  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_tokens_of_the_frames_left_are_those_of_the_loop(name, keep, layers, tau, longest):
    """Two videos of one call that keep unequal numbers; the block that is "look"ed at may merge frames itself."""
    if not encodes_before():
        pytest.skip("this transformers adds row ends behind get_video_features, where this reference does not look")
    model, inputs = larger(name), asked(name, videos=2, **LARGE[name])
    stock = generate(model, inputs)[1]
    look = 4 if name == "llava_onevision" else 3
    layers = [look if i == "look" else i for i in layers]
    listed = ",".join(map(str, layers))
    spec = f"earlytom:prune_layers=[{listed}],tau={tau},max_window={longest},keep={keep},positions=original"
    with tr.patched(model, spec):
        assert tr.describe(model).active[0].spec() == tr.get_method(spec).spec()
        sequences, logits, trace = generate(model, inputs)
    with by_hand_tower(model, layers=layers, tau=tau, longest=longest, look=look) as tower:
        model(**inputs)
        gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for row, (_, places, scores, spans) in enumerate(tower.films):
            columns = columns_of(inputs, name, row)
            gone[row, columns.flatten()] = True
            for frame, token in chosen(pooled_by(model, scores), places, spans, keep):
                gone[row, columns[frame, token]] = False
        with hidden(layers_of(name, model), gone, 0):
            want_sequences, want, _ = generate(model, inputs)
    (step,) = [s for s in trace.steps if s.stage == "projector"]
    assert torch.equal(step.plan.sources() < 0, gone)
    assert torch.equal(sequences, want_sequences)
    close(logits, want)
    assert not torch.allclose(logits, stock, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_share_of_everything_is_the_stock_model_and_unpatched_it_is_again(name):
    model, inputs = larger(name), asked(name, videos=2, **LARGE[name])
    want = generate(model, inputs)[1]
    with tr.patched(model, METHOD + ",keep=1.0"):
        assert torch.equal(generate(model, inputs)[1], want)
    with tr.patched(model, METHOD + ",keep=0.3"):
        assert not torch.equal(generate(model, inputs)[1], want)
    assert torch.equal(generate(model, inputs)[1], want)
    one = asked(name, frames=1, **LARGE[name])
    with tr.patched(model, METHOD + ",keep=0.3"):
        trace = generate(model, one)[2]  # one frame: ceil of its share
    tokens = int((one["input_ids"] == VIDEO).sum()) - (name == "llava_onevision")
    assert int((trace.plans[-1].sources() < 0).sum()) == tokens - math.ceil(0.3 * tokens)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_batch_is_its_rows_with_tokens_too(name):
    model, inputs = larger(name), asked(name, videos=2, **LARGE[name])
    with tr.patched(model, METHOD + ",keep=0.4+fastv:layer=1,keep=0.5"):
        both = generate(model, inputs)[1]
        for row in range(2):
            close(generate(model, {k: v[row : row + 1] for k, v in inputs.items()})[1], both[row : row + 1])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_images_and_single_frames_stay_and_a_batch_is_its_rows(name):
    model, vlm = deeper(name), VLMS[name]
    for inputs, spec in (
        (prompts(vlm, CASES["unequal"]), METHOD), (asked(name, frames=1), METHOD),
        (prompts(vlm, CASES["unequal"]), METHOD + ",keep=0.3"),
    ):  # fmt: skip
        want = generate(model, inputs)[1]
        with tr.patched(model, spec):
            assert torch.equal(generate(model, inputs)[1], want)
    inputs = asked(name, videos=2)
    with tr.patched(model, METHOD + "+divprune:keep=0.5+fastv:layer=1,keep=0.5"):
        both = generate(model, inputs)[1]
        for row in range(2):
            close(generate(model, {k: v[row : row + 1] for k, v in inputs.items()})[1], both[row : row + 1])
    assert torch.isfinite(both).all()


@pytest.mark.parametrize(("name", "spec", "said"), [
    ("llava", METHOD, "cannot act here"), ("qwen2_5_vl", "earlytom:prune_layers=[0]", "packs frames"),
    ("llava_onevision", "earlytom", "the tower has blocks 0 to 4"),
    ("llava_onevision", METHOD + "+tome:r=1", "merges whole frames"),
    ("llava_onevision", METHOD + "+visionzip:keep=2", "of every frame"),
    ("llava_next_video", "earlytom:prune_layers=[4]", "gets what block 3"),
    ("llava_onevision", METHOD + ",keep=0.5+divprune:keep=2", "both act before the language model"),
    ("llava_onevision", METHOD + ",keep=0.5+visionzip:keep=2", "of every frame"),
    ("video_llava", "earlytom:prune_layers=[0]", "class token of every frame"),
])  # fmt: skip
def test_where_it_cannot_be_right_it_is_refused(name, spec, said):
    model = deeper(name) if name in NAMES else VLMS[name].model
    assert ("earlytom" in tr.describe(model).methods("encoder")) == (name in NAMES)
    with pytest.raises(ValueError, match=said):
        tr.patch(model, spec)
    assert not any("tokenreduce" in key for m in model.modules() for key in vars(m))
