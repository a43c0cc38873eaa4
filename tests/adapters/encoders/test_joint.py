"""Merging across frames inside towers that see one frame at a time, against the unpatched tower in which merged tokens
are tied: behind every attention, which is over all tokens of a frame, they take their representative's value."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support import tiny_vit
from vlms import VLMS, prompts

import tokenreduce as tr
from tokenreduce.core.evidence import Evidence
from tokenreduce.core.plan import Identity, Plan, Prune
from tokenreduce.core.reducer import Reducer
from tokenreduce.video.encoder.vidtldr import VidTLDR

#: CLIP with a class token, and SigLIP.
NAMES = ["video_llava", "llava_onevision"]


def build(name: str) -> Any:
    """A small model with a tower of 3 blocks on 5x5 patches."""
    stock = VLMS[name].build()
    config = copy.deepcopy(stock.config)
    config.vision_config.num_hidden_layers, config.vision_config.image_size = 3, 40
    config.vision_config.patch_size, config.vision_feature_layer = 8, -1
    torch.manual_seed(1)
    model = type(stock)(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(5.0)
    return model.eval()


def clips(videos: int = 1, frames: int = 4) -> torch.Tensor:
    """Videos whose frames differ a little."""
    g = torch.Generator().manual_seed(2)
    still = torch.randn(videos, 1, 3, 40, 40, generator=g)
    return still + 0.3 * torch.randn(videos, frames, 3, 40, 40, generator=g)


def tower_of(model: Any) -> Any:
    return model.model.video_tower if hasattr(model.model, "video_tower") else model.model.vision_tower


def features(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(V,n,C) the last hidden state of the tower, and what the language model is given."""
    kept = []
    hook = tower_of(model).register_forward_hook(lambda m, args, out: kept.append(out.hidden_states[-1]))
    try:
        pooled = model.model.get_video_features(pixels).pooler_output
    finally:
        hook.remove()
    return kept[0], pooled


# -- the reference -----------------------------------------------------------------------------------------------------
class Tied:
    """A stock layer's forward on all tokens of all frames. ``before`` and ``after`` say what was merged at its entry
    and behind its attention, for rows of ``count`` frames with ``prefix`` protected tokens each. ``counts`` says
    whether a frame's key counts once for each of its members, or once for all."""

    def __init__(self, layer: Any, before: Plan | None, after: Plan | None, count: int, prefix: int, counts: bool):
        self.layer, self.before, self.after = layer, before, after
        self.count, self.prefix, self.counts = count, prefix, counts
        self.weights: torch.Tensor | None = None

    def where(self, n: int) -> list[tuple[int, int]]:
        """(frame, token) of every place in a row."""
        head = [(f, t) for f in range(self.count) for t in range(self.prefix)]
        return head + [(f, t) for f in range(self.count) for t in range(self.prefix, n)]

    def __call__(self, x: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        v, n, _ = x.shape
        layer, at = self.layer, self.where(n)
        mask = x.new_zeros(v, n)
        if self.before is not None:
            for row, source in enumerate(self.before.sources().tolist()):
                met = set()
                for (f, t), group in zip(at, source, strict=True):
                    if group < 0 or (not self.counts and (f, group) in met):
                        mask[row * self.count + f, t] = float("-inf")
                    met.add((f, group))
        attn, y = layer.self_attn, layer.layer_norm1(x)
        q, k, w = (p(y).unflatten(-1, (2, -1)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        self.weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask[:, None, None]).softmax(-1)
        x = x + attn.out_proj((self.weights @ w).transpose(1, 2).flatten(2))
        if self.before is not None:
            x = self.tie(x, self.before, at, False)
        if self.after is not None:
            x = self.tie(x, self.after, at, True)
        return x + layer.mlp(layer.layer_norm2(x))

    def tie(self, x: torch.Tensor, plan: Plan, at: list[tuple[int, int]], mean: bool) -> torch.Tensor:
        out = x.clone()
        for row in range(len(x) // self.count):
            source, first = plan.sources()[row].tolist(), plan.representatives()[row].tolist()
            value = {i: x[row * self.count + f, t] for i, (f, t) in enumerate(at)}
            for group, rep in enumerate(first):
                members = [i for i, s in enumerate(source) if s == group]
                shared = torch.stack([value[i] for i in members]).mean(0) if mean else value[rep]
                for i in members:
                    out[row * self.count + at[i][0], at[i][1]] = shared
        return out


def reference(model: Any, steps: list[Any], count: int, prefix: int, counts: bool = True) -> Any:
    """The unpatched model with the plans of a recorded forward, and the layers in there."""
    stock, composed, tied = copy.deepcopy(model), None, []
    layers = tower_of(stock).encoder.layers
    for layer, step in zip(layers, steps, strict=True):
        after = composed
        if step.plan is not None:
            after = step.plan if composed is None else composed.then(step.plan)
        layer.forward = Tied(layer, composed, None if step.plan is None else after, count, prefix, counts)
        tied.append(layer.forward)
        composed = after
    return stock, tied, composed


@dataclass(frozen=True)
class Gone(Reducer):
    """Drops patches of a row in layer 0: all of frame 1, a few of others."""

    frames: int = 2
    prop_attn: bool = False

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer == 0

    def plan(self, evidence: Evidence) -> Plan:
        p, n = evidence.prefix, (evidence.n - evidence.prefix) // evidence.grid[0]
        keep = [*range(p), *(p + i for i in range(0, n, 2)), *range(p + 2 * n, evidence.n)]
        return Prune(evidence.n, torch.tensor(keep).expand(evidence.batch, -1))


SEEN: list[Evidence] = []


@dataclass(frozen=True)
class Witness(Reducer, needs=("attention",)):
    """Looks at the last layer and keeps everything."""

    frames: int = 4

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer == depth - 1

    def plan(self, evidence: Evidence) -> Plan:
        SEEN.append(evidence)
        return Identity.like(evidence.x)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("reducer", "frames"),
    [
        (tr.ToMe(r=[20, 0, 9], frames=4), 4), (tr.ToMe(r=12, frames=2), 4), (tr.ToMe(keep=0.3, frames=3), 6),
        (tr.ToMe(r=12, frames=4, prop_attn=False), 4), (Gone(), 4), (tr.ToMe(keep=0.5, frames=8), 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_merged_tokens_are_tied_and_seen_by_all_their_frames(name, reducer, frames, attention):
    model, pixels = build(name).double(), clips(2, frames).double()
    model.set_attn_implementation(attention)
    count, prefix = min(reducer.frames, frames), int(name == "video_llava")
    with tr.patched(model, reducer), tr.record(model, flops=False) as trace:
        got, given = features(model, pixels)
    # Without proportional attention means still weigh by size, so only the keys differ.
    stock, _, plan = reference(model, trace.steps, count, prefix, counts=reducer.prop_attn or isinstance(reducer, Gone))
    want, fed = features(stock, pixels)
    assert plan.n == count * (25 + prefix)
    kept = plan.sources() >= 0
    body = kept[:, count * prefix :].unflatten(1, (count, -1))
    head = kept[:, : count * prefix].unflatten(1, (count, -1))
    kept = torch.cat([head, body], 2).flatten(0, 1) if prefix else body.flatten(0, 1)
    near = 2e-4 if attention == "sdpa" else 1e-3  # the eager softmax of transformers is in float32
    torch.testing.assert_close(got[kept], want[kept], rtol=near, atol=near)
    if bool(kept.all()):
        torch.testing.assert_close(given, fed, rtol=near, atol=near)
        home = [(i - count * prefix) // 25 for i in range(count * (25 + prefix))]
        crossed = [
            home[i] != home[int(plan.representatives()[row, s])]
            for row, source in enumerate(plan.sources().tolist())
            for i, s in enumerate(source)
            if i >= count * prefix
        ]
        assert any(crossed), "some token went to another frame"


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_methods_see_the_attention_of_single_frames(name):
    """Rows are over what a frame sees; a merged key has the attention of all its members."""
    model, pixels, prefix = build(name), clips(), int(name == "video_llava")
    for before in ((), (tr.ToMe(r=[30], frames=4),)):
        SEEN.clear()
        with tr.patched(model, *before, Witness()), tr.record(model, flops=False) as trace:
            features(model, pixels)
        (evidence,) = SEEN
        assert (evidence.prefix, evidence.grid, evidence.entry) == (4 * prefix, (4, 5, 5), 4 * (25 + prefix))
        stock, tied, plan = reference(model, trace.steps, 4, prefix)
        features(stock, pixels)
        at, rows = tied[-1].where(25 + prefix), evidence.attention("all")[0]
        plan = plan or Identity(evidence.n)
        for i in range(0, evidence.n, 5):
            f, t = at[int(plan.representatives()[0, i])]
            want = torch.zeros(2, evidence.n)
            for (g, u), s in zip(at, plan.sources()[0].tolist(), strict=True):
                if g == f:
                    want[:, s] += tied[-1].weights[f, :, t, u]
            torch.testing.assert_close(rows[:, i], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*NAMES, "llava_next_video"])
@torch.no_grad()
def test_keep_everything_and_unpatch_are_bit_identical(name):
    model = VLMS[name].build()
    inputs = prompts(VLMS[name], ((9, "v"), (5, "v")))
    want = model(**inputs).logits
    for reducer in (tr.ToMe(keep=1.0, frames=2), VidTLDR(keep=1.0, frames=2), Witness(frames=2)):
        with tr.patched(model, reducer):
            assert torch.equal(model(**inputs).logits, want)
    with tr.patched(model, tr.ToMe(keep=0.5, frames=2)):
        assert not torch.equal(model(**inputs).logits[:, -1], want[:, -1])
    assert torch.equal(model(**inputs).logits, want)


@torch.no_grad()
def test_copies_of_earlier_frames_do_not_enter_the_language_model():
    """Of two equal frames the language model gets the tokens of one; a token stays when a patch of it leads a group."""
    name = "video_llava"
    model, inputs = VLMS[name].build(), prompts(VLMS[name], ((9, "v"),))
    pixels = inputs["pixel_values_videos"]
    pixels[:, 1] = pixels[:, 0]
    with tr.patched(model, tr.ToMe(r=[9], frames=2)), tr.record(model, flops=False) as trace:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    steps = [s for s in trace.steps if s.stage == "encoder" and s.plan is not None]
    assert len(steps) == 1
    (projector,) = (s for s in trace.steps if s.stage == "projector")
    first = int((inputs["input_ids"][0] == 98).nonzero()[0])
    places = steps[0].plan.representatives()[0].tolist()
    at = [(0, 0), (1, 0), *((f, t) for f in range(2) for t in range(1, 10))]
    leading = {first + 10 * f + t for f, t in (at[i] for i in places)}
    stay = set(projector.plan.keep[0].tolist()) & set(range(first, first + 20))
    assert stay == leading | {first, first + 10}
    assert len(leading) == 20 - 9


@torch.no_grad()
def test_videos_of_a_batch_and_images_are_alone():
    name = "llava_onevision"
    model, pixels = build(name), clips(3)
    inputs = prompts(VLMS[name], ((9, "i"), (5, "i")))
    with tr.patched(VLMS[name].build(), tr.ToMe(r=1)) as image_model:
        want = image_model(**inputs).logits
        tr.unpatch(image_model)
        tr.patch(image_model, tr.ToMe(r=1, frames=4))
        assert torch.equal(image_model(**inputs).logits, want), "an image is no video"
    with tr.patched(model, tr.ToMe(keep=0.4, frames=4)):
        together = model.model.get_video_features(pixels).pooler_output
        alone = torch.cat([model.model.get_video_features(pixels[i : i + 1]).pooler_output for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_the_tower_gets_cheaper():
    model, pixels = build("llava_onevision"), clips(1, 8)
    flops = []
    with torch.no_grad():
        for reducer in (None, tr.ToMe(r=[50], frames=8), tr.ToMe(r=[100], frames=8)):
            if reducer is not None:
                tr.patch(model, reducer)
            with tr.record(model) as trace:
                features(model, pixels)
            tr.unpatch(model) if reducer is not None else None
            flops.append(trace.flops)
    assert flops[0] > flops[1] > flops[2]


def test_gradients_and_checkpointing():
    pixels, grads = clips(), []
    for checkpointing in (False, True):
        model = build("llava_onevision").train()
        if checkpointing:
            tower_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with tr.patched(model, tr.ToMe(keep=0.4, frames=4)):
            model.model.get_video_features(pixels).pooler_output.square().sum().backward()
        grads.append({n: p.grad for n, p in tower_of(model).named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.isfinite(g).all() for g in grads[0].values())
    for key in grads[0]:
        torch.testing.assert_close(grads[0][key], grads[1][key])


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("build_model", "why"),
    [
        (tiny_vit, "frame by frame"), (VLMS["llava"].build, "single images"),
        (VLMS["internvl"].build, "single images"),
    ],
    ids=["vit", "llava", "internvl"],
)  # fmt: skip
def test_models_without_single_frames_are_refused(build_model, why):
    with pytest.raises(ValueError, match=why):
        tr.patch(build_model(), tr.ToMe(r=1, frames=2))


def test_what_does_not_go_together_is_refused():
    model = VLMS["video_llava"].build()
    with pytest.raises(ValueError, match="embeddings"):
        tr.patch(model, tr.ToMe(r=1, frames=2), "visionzip:keep=4")
    with pytest.raises(ValueError, match="same frames"):
        tr.patch(model, tr.ToMe(r=[1], frames=2), replace(Witness(), frames=1))
    with pytest.raises(ValueError, match="frames"):
        tr.ToMe(frames=0)
    model = build("video_llava")
    with tr.patched(model, tr.ToMe(r=1, frames=4)), pytest.raises(ValueError, match="one of 2, 3, 6"):
        model.model.get_video_features(clips(1, 6))
