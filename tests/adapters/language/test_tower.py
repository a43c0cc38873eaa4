"""What reaches the language model's entry from the vision tower of every family: places, scores, features; and what
methods that mix tokens put there."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from vlms import IMAGE, VIDEO, VLMS, encodes_before, prompts
from vlms_masked import CASES, close, generate

import tokenreduce as tr
from tokenreduce.algorithms.projector import Projector, saliency
from tokenreduce.algorithms.scoring import received_attention
from tokenreduce.core.plan import Identity, Merge, Pool


class Seen(Projector):
    """Remembers its evidence and keeps everything; looks at every block."""

    whole = True

    def __init__(self, looks=(0, None), newlines="keep"):
        super().__init__(newlines=newlines)
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "blocks", looks)

    def required(self):
        return ("tower", "text")

    def tower_blocks(self):
        return self.blocks

    def plan(self, evidence):
        self.seen.append(evidence)
        return Identity.like(evidence.x)

    def spec(self):
        return "seen"


def shown(name, inputs, looks=(0, None)):
    """(columns of its image tokens, evidence) of every image, in one forward."""
    method, model = Seen(looks), VLMS[name].model
    with torch.no_grad(), tr.patched(model, method), tr.record(model) as trace:
        model(**inputs)
    (step,) = [s for s in trace.steps if s.stage == "projector"]
    return list(zip(step.parts, method.seen, strict=True))


def embeddings(name, inputs):
    """What the unpatched model hands to its language model."""
    model, out = VLMS[name].model, []
    hook = model.model.get_submodule(VLMS[name].text).register_forward_pre_hook(
        lambda module, args, kwargs: out.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return out[0]


@pytest.mark.parametrize("kinds", ["i", "ii", "v"])
@pytest.mark.parametrize("name", VLMS)
def test_tokens_are_those_of_the_prompt(name, kinds):
    vlm = VLMS[name]
    if "v" in kinds and not vlm.video:
        pytest.skip("no video")
    inputs = prompts(vlm, ((7, kinds), (5, "i")))
    x = embeddings(name, inputs)
    seen = 0
    for (rows, columns, _), evidence in shown(name, inputs):
        assert torch.equal(evidence.x, x[rows, columns])
        ids = inputs["input_ids"][rows, columns]
        assert ((ids == IMAGE) | (ids == VIDEO)).all()
        seen += ids.numel()
        assert evidence.origin.index.min() >= 0
        assert int(evidence.origin.index.max()) < evidence.origin.views * evidence.origin.patches
        assert evidence.text.shape[0] == evidence.batch
        real = inputs["input_ids"][rows[:, 0]]
        for b in range(evidence.batch):  # the question is the text behind the last image
            last = int(((real[b] == IMAGE) | (real[b] == VIDEO)).nonzero().max())
            want = vlm.model.get_input_embeddings()(real[b, last + 1 :])
            got = evidence.text[b][evidence.text_valid[b]]
            torch.testing.assert_close(got * (want.norm() / got.norm()), want)
    blank = sum(int((e.origin.view < 0).sum()) for _, e in shown(name, inputs))
    assert blank == 0, "row ends are not shown"
    assert seen > 0


@pytest.mark.parametrize("kinds", ["i", "ii", "v"])
@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "llava_next_video", "llava_onevision", "video_llava", "paligemma"]
)
def test_features_are_what_the_projector_makes_the_tokens_of(name, kinds):
    vlm = VLMS[name]
    if "v" in kinds and not vlm.video:
        pytest.skip("no video")
    for _, evidence in shown(name, prompts(vlm, ((7, kinds), (5, "i")))):
        if evidence._features is None:  # pooled behind the projector
            assert (name, kinds) == ("llava_onevision", "v")
            assert evidence.origin.weight is not None
            continue
        with torch.no_grad():
            torch.testing.assert_close(vlm.model.model.multi_modal_projector(evidence.features), evidence.x)


def maps(name, inputs, block):
    """Attention maps (views,H,N,N) of a block of the unpatched model's tower, eager."""
    model = VLMS[name].model.model
    tower = next(getattr(model, n) for n in ("vision_tower", "image_tower", "vision_model") if hasattr(model, n))
    attention = []

    def watch(module, args, kwargs, output):
        attention.append(output[1])

    layers = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
    attn = layers[block].attention if hasattr(layers[block], "attention") else layers[block].self_attn
    hook = attn.register_forward_hook(watch, with_kwargs=True)
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            VLMS[name].model(**inputs)
    finally:
        hook.remove()
        tower.set_attn_implementation(before)
    return torch.cat(attention)


@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "llava_onevision", "video_llava", "internvl", "idefics3", "paligemma", "gemma3"]
)
def test_scores_are_those_of_the_tower_at_the_places_of_its_patches(name):
    """Against eager maps of the unpatched model, and the family's places worked out by hand."""
    vlm = VLMS[name]
    inputs = prompts(vlm, ((6, "i"),))
    ((_, evidence),) = shown(name, inputs)
    config = vlm.model.config
    layer = getattr(config, "vision_feature_layer", -1)
    depth = evidence.tower_depth
    block = depth - 1 if layer == -1 or not isinstance(layer, int) else layer % (depth + 1) - 1
    a = maps(name, inputs, block).double().mean(1)
    cls = name in ("llava", "llava_next", "video_llava", "internvl")
    scores = a[:, 0, 1:] if cls else a.mean(1)
    side = math.isqrt(scores.shape[1])
    scores = scores.unflatten(1, (side, side))
    if name in ("internvl", "idefics3"):
        r = 2
        want = scores.unfold(1, r, r).unfold(2, r, r).mean((-1, -2)).flatten()
    elif name == "gemma3":
        want = torch.nn.functional.avg_pool2d(scores[None], 2)[0].flatten()
    elif name in ("llava_next", "llava_onevision"):  # an overview and two crops side by side, unpadded
        want = torch.cat([scores[0].flatten(), torch.cat([scores[1], scores[2]], 1).flatten()])
    else:
        want = scores.flatten()
    torch.testing.assert_close(saliency(evidence)[0].double(), want, rtol=1e-4, atol=1e-6)
    assert evidence.tower().cls == cls


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_scores_of_packed_towers(name, block):
    """Block 0 of Qwen2.5-VL sees windows of 2x2 units; frames never see each other."""
    vlm = VLMS[name]
    inputs = prompts(vlm, ((6, "i"),))
    ((_, evidence),) = shown(name, inputs, (block,))
    visual, rows = vlm.model.model.visual, []
    stock = type(visual.blocks[block].attn).forward

    def eager(attn, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
        n = hidden_states.shape[0]
        q, k, _ = attn.qkv(hidden_states).view(n, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        cos, sin = (t[None].double() for t in position_embeddings)

        def turn(t):
            t = t.double()
            half = t.shape[-1] // 2
            return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin

        logits = turn(q) @ turn(k).transpose(1, 2) * attn.scaling
        part = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())
        logits = logits.masked_fill(part[:, None] != part, float("-inf"))
        rows.append(logits.softmax(-1).mean(0).mean(0))
        return stock(attn, hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs)

    attn = visual.blocks[block].attn
    attn.forward = eager.__get__(attn)
    try:
        with torch.no_grad():
            vlm.model(**inputs)
    finally:
        del attn.forward
    units = rows[0].view(-1, 4).mean(1)
    if name == "qwen2_5_vl":
        index = __import__("transformers.vision_utils", fromlist=["x"]).get_vision_window_index(
            inputs["image_grid_thw"], 2, visual.window_size, visual.patch_size
        )[0]
        units = units[index.argsort()]
    got = evidence.tower(block).per_token(received_attention)[0].double()
    torch.testing.assert_close(got, units, rtol=1e-4, atol=1e-6)


# -- mixing ----------------------------------------------------------------------------------------------------------
class Mixing(Projector):
    """Fixed plans on an image: what is written where does not depend on a score."""

    whole = True

    def __init__(self, make, space="language", positions=None, own=False):
        super().__init__(keep=4, positions=positions)
        for key, value in {"make": make, "own": own, "_space": space}.items():
            object.__setattr__(self, key, value)

    @property
    def space(self):
        return self._space

    def tower_blocks(self):
        return (None,)

    def with_class(self):
        return self.own

    def at(self, keep):
        return self

    def plan(self, evidence):
        return self.make(evidence)

    def spec(self):
        return "mixing"


def means(evidence):
    """Tokens 0 and 5 alone, 2 with 3 and 4, and 7 with the rest."""
    n, b = evidence.n, evidence.batch
    keep = torch.tensor([[0, 2, 5, 7]]).expand(b, -1)
    src = torch.tensor([[1, 3, 4, 6, *range(8, n)]]).expand(b, -1)
    dst = torch.tensor([[3, 1, 1, 3, *[3] * (n - 8)]]).expand(b, -1)
    return Merge(n, keep, src, dst)


def official(evidence):
    """Class token first, then tokens in an order that is not theirs, the last with half of another."""
    p, n = evidence.prefix, evidence.n
    w = torch.zeros(evidence.batch, 3 + p, n)
    keep = [*range(p), 6 + p, 1 + p, 4 + p]
    for k, token in enumerate(keep):
        w[:, k, token] = 1
    w[:, -1, 5 + p] = 0.5
    return Pool(n, w, False, keep=torch.tensor([keep]).expand(evidence.batch, -1))


def by_hand(name, inputs, write):
    """Logits of the unpatched model's language model on a prompt whose image embeddings ``write`` replaced."""
    model = VLMS[name].model
    x = embeddings(name, inputs)
    rows = []
    for b in range(len(x)):
        at = (inputs["input_ids"][b] == IMAGE).nonzero().flatten()
        real = inputs["attention_mask"][b].bool()
        front = x[b, : at[0]][real[: at[0]]]
        rows.append(torch.cat([front, write(b, x[b, at]), x[b, at[-1] + 1 :]]))
    return [
        model.lm_head(model.model.get_submodule(VLMS[name].text)(inputs_embeds=r[None]).last_hidden_state)[0]
        for r in rows
    ]


@pytest.mark.parametrize("name", ["llava", "internvl", "video_llava"])
def test_mixed_tokens_in_the_language_space(name):
    inputs = prompts(VLMS[name], ((7, "i"), (4, "i")))
    model = VLMS[name].model
    method = Mixing(means)
    with torch.no_grad():
        with tr.patched(model, method):
            got = model(**inputs).logits

        def write(b, image):
            n = len(image)
            return torch.stack([image[0], image[2:5].mean(0), image[5], image[[1, 6, 7, *range(8, n)]].mean(0)])

        want = by_hand(name, inputs, write)
    for b, rows in enumerate(want):
        close(got[b, -len(rows) :], rows)


@pytest.mark.parametrize("own", [False, True])
def test_mixed_tokens_in_the_vision_space_go_through_the_projector(own):
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((7, "i"), (4, "i")))
    inner = vlm.model.model
    with torch.no_grad():
        with tr.patched(vlm.model, Mixing(official, "vision", own=own)), tr.record(vlm.model) as trace:
            got = vlm.model(**inputs).logits
        hidden = inner.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]

        def write(b, image):
            f = hidden[b]
            mixed = f[5] + 0.5 * f[6]  # patch 4 and half of patch 5, behind the class token
            out = [image[6], image[1], inner.multi_modal_projector(mixed[None])[0]]
            return torch.stack([inner.multi_modal_projector(f[:1])[0], *out] if own else out)

        want = by_hand("llava", inputs, write)
    for b, rows in enumerate(want):
        close(got[b, -len(rows) :], rows)
    (step,) = trace.steps
    assert step.tokens == inputs["input_ids"].shape[1] - 16 + 3 + own
    assert [type(p).__name__ for _, _, p in step.parts] == ["Pool"]


def test_original_positions_leave_mixed_tokens_at_their_places():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((7, "i"),))
    with torch.no_grad(), tr.patched(vlm.model, Mixing(official, "vision", "original")), tr.record(vlm.model) as trace:
        vlm.model(**inputs)
    kept = (trace.plans[0].sources()[0] >= 0)[inputs["input_ids"][0] == IMAGE].nonzero().flatten().tolist()
    assert kept == [1, 4, 6]


@pytest.mark.parametrize("name", VLMS)
def test_generation_with_mixed_tokens_in_a_batch_is_that_of_the_rows_alone(name):
    vlm = VLMS[name]
    inputs = prompts(vlm, ((9, "i"), (5, "i")))
    with tr.patched(vlm.model, Mixing(means, "vision")):
        sequences, logits, _ = generate(vlm.model, inputs)
        beams = generate(vlm.model, inputs, num_beams=2)[0]
        for b in range(2):
            real = inputs["attention_mask"][b].bool()
            alone = {k: v[b : b + 1] if len(v) == 2 else v for k, v in inputs.items()}
            for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
                if key in alone:
                    alone[key] = alone[key][:, real]
            if "image_grid_thw" in inputs:
                alone["pixel_values"] = inputs["pixel_values"].chunk(2)[b]
            got = generate(vlm.model, alone)
            assert torch.equal(got[0][0, -4:], sequences[b, -4:])
            close(got[1][0], logits[b])
            assert torch.equal(generate(vlm.model, alone, num_beams=2)[0][0, -4:], beams[b, -4:])


def test_gradients_reach_the_tower_through_mixed_tokens():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((7, "i"),))
    inputs["pixel_values"].requires_grad_()
    with tr.patched(vlm.model, Mixing(official, "vision", own=True)):
        vlm.model(**inputs).logits.square().sum().backward()
    assert float(inputs["pixel_values"].grad.abs().sum()) > 0


def test_side_by_side_images_are_two_images():
    vlm = VLMS["llava"]
    one = prompts(vlm, ((7, "ii"),))
    ids = one["input_ids"]
    at = (ids[0] == IMAGE).nonzero().flatten()
    order = torch.cat([ids[0, : at[0]], ids[0, at], ids[0, at[-1] + 1 :]])[None]  # without the word between them
    inputs = {**one, "input_ids": order, "attention_mask": torch.ones_like(order)}
    with torch.no_grad(), tr.patched(vlm.model, tr.FasterVLM(keep=3)), tr.record(vlm.model) as trace:
        vlm.model(**inputs)
    kept = (trace.plans[0].sources()[0] >= 0)[order[0] == IMAGE]
    assert [int(kept[:16].sum()), int(kept[16:].sum())] == [3, 3]


@pytest.mark.skipif(not encodes_before(), reason="this transformers takes no mm_encoder_outputs")
def test_features_from_elsewhere():
    """Evidence of the tower comes with features of the patched model, and is missed in those of another."""
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((7, "i"),))
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        strange = vlm.model.model.get_image_features(pixels)
        with tr.patched(vlm.model, tr.FasterVLM(keep=4)):
            want = vlm.model(**inputs, pixel_values=pixels).logits
            mine = vlm.model.model.get_image_features(pixels)
            got = vlm.model(**inputs, mm_encoder_outputs={"image": mine}).logits
            close(got, want)
            with pytest.raises(ValueError, match="image features of this call were made elsewhere; pass pixel_values"):
                vlm.model(**inputs, mm_encoder_outputs={"image": strange})
            bare = {"image": BaseModelOutputWithPooling(pooler_output=strange.pooler_output)}
            with pytest.raises(ValueError, match="made elsewhere"):
                vlm.model(**inputs, mm_encoder_outputs=bare)


def test_budgets_of_views():
    """A count is for the image: shared out among overview and crops; of 4, 8 tokens here."""
    vlm = VLMS["llava_next"]
    inputs = prompts(vlm, ((7, "i"),))
    visual = inputs["input_ids"][0] == IMAGE
    for keep, want in ((7, (3, 4)), (2, (1, 1)), (1, (1, 0)), (11, (4, 7)), (0.5, (2, 4))):
        with torch.no_grad(), tr.patched(vlm.model, tr.FasterVLM(keep=keep)), tr.record(vlm.model) as trace:
            vlm.model(**inputs)
        kept = (trace.plans[0].sources()[0] >= 0)[visual]
        assert (int(kept[:4].sum()), int(kept[4:].sum()) - 2) == want


def test_row_ends_can_go():
    vlm = VLMS["llava_next"]
    inputs = prompts(vlm, ((7, "i"),))
    with torch.no_grad(), tr.patched(vlm.model, tr.FasterVLM(keep=1.0, newlines="drop")), tr.record(vlm.model) as trace:
        vlm.model(**inputs)
    kept = (trace.plans[0].sources()[0] >= 0)[inputs["input_ids"][0] == IMAGE]
    assert (~kept).nonzero().flatten().tolist() == [8, 13]


@pytest.mark.parametrize("case", CASES)
def test_nothing_stays_on_the_model(case):
    vlm = VLMS["llava_next_video"]
    inputs = prompts(vlm, CASES[case])
    want = generate(vlm.model, inputs)[1]  # the library puts something on modules at the first call
    before = {n: set(vars(m)) for n, m in vlm.model.named_modules()}
    with tr.patched(vlm.model, tr.FasterVLM(keep=0.5)):
        generate(vlm.model, inputs)
    assert {n: set(vars(m)) for n, m in vlm.model.named_modules()} == before
    assert torch.equal(generate(vlm.model, inputs)[1], want)


def test_a_caller_may_ask_for_another_layer_than_the_configuration():
    model = VLMS["llava"].model
    inputs = prompts(VLMS["llava"], ((9, "i"), (5, "i")))
    with torch.no_grad(), tr.patched(model, "visionzip:keep=6"), tr.record(model) as trace:
        out = model(**inputs, vision_feature_layer=-1).logits
    assert torch.isfinite(out).all()
    assert (trace.plans[0].sources() >= 0)[inputs["input_ids"] == IMAGE].sum() == 12
