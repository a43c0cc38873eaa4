"""Every registered temporal method inside models that take videos, as videos or as several images."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass

import pytest
import torch
from vlms import IMAGE, VIDEO, VLMS, encodes_before, prompts
from vlms_masked import close, dropped_by, generate, hidden, layers_of

import tokenreduce as tr
from tokenreduce.algorithms.projector import kept
from tokenreduce.algorithms.temporal import Temporal, by_frame, frames_of
from tokenreduce.core.registry import get_class

METHODS = [n for n in tr.list_methods(stage="projector") if get_class(n, "projector").temporal]
#: family -> (rows of a batch, frames of a video, tokens of a frame)
FILMS = {
    "llava": (((9, "iii"), (6, "iii")), 3, 16),
    "internvl": (((9, "iii"), (6, "iii")), 3, 16),
    "llava_next_video": (((9, "v"), (5, "v")), 8, 1),
    "llava_onevision": (((9, "v"), (5, "v")), 8, 1),
    "video_llava": (((9, "v"), (5, "v")), 2, 9),
    "qwen2_vl": (((9, "v"), (5, "v")), 2, 8),
    "qwen2_5_vl": (((9, "v"), (5, "v")), 2, 8),
    "qwen3_vl": (((9, "v"), (5, "v")), 2, 8),
}
every = pytest.mark.parametrize("name", METHODS)
families = pytest.mark.parametrize("family", FILMS)


@dataclass(frozen=True)
class Probe(Temporal):
    """Keeps the tokens whose embeddings differ most from those at their place in the frame before."""

    keep: int | float = 0.5

    def choose(self, evidence, keep):
        x = by_frame(evidence)
        SEEN.append(evidence)
        change = torch.cat([x[:, :1].norm(dim=-1) * 10, (x[:, 1:] - x[:, :-1]).norm(dim=-1)], 1)
        return kept(change.flatten(1).argsort(dim=1, descending=True)[:, :keep], evidence)


SEEN: list[tr.Evidence] = []


def method(name, keep):
    return get_class(name, "projector")(keep=keep)


def model_for(family, name):
    model = VLMS[family].model
    if name not in tr.describe(model).methods("projector"):
        with pytest.raises(ValueError, match="Methods that fit"):
            tr.patch(model, method(name, 4))
        pytest.skip(f"{name} is refused on {family}, with what fits")
    return model


def film(family):
    rows, frames, per_frame = FILMS[family]
    return prompts(VLMS[family], rows), frames, per_frame


def alone(inputs, b):
    real = inputs["attention_mask"][b].bool()
    out = {}
    for key, value in inputs.items():
        if key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            out[key] = value[b : b + 1, real]
        else:
            out[key] = value.chunk(2)[b]
    return out


def visual_of(inputs):
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


@families
def test_the_frames_of_a_video_come_together_in_order(family):
    model = VLMS[family].model
    inputs, frames, per_frame = film(family)
    SEEN.clear()
    with torch.no_grad(), tr.patched(model, Probe(keep=0.5)), tr.record(model) as trace:
        model(**inputs)
    (evidence,) = SEEN
    assert frames_of(evidence) == (frames, per_frame)
    assert evidence.batch == 2
    assert evidence.view.tolist() == [t for t in range(frames) for _ in range(per_frame)]
    assert torch.equal(evidence.place[:per_frame], evidence.place[-per_frame:])
    blank = visual_of(inputs).sum(1) - frames * per_frame
    left = (trace.plans[0].sources() >= 0) & visual_of(inputs)
    assert (left.sum(1) == Probe(keep=0.5).total(frames * per_frame) + blank).all()


@families
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_dropping_is_hiding(family, settings):
    """Masking oracle: original positions, left padding, unequal prompts."""
    if settings and not encodes_before() and family in ("llava", "internvl"):
        pytest.skip("this transformers gives the beams of a prompt with several images another order of images")
    model = VLMS[family].model
    inputs, _, _ = film(family)
    with tr.patched(model, Probe(keep=0.4, positions="original")):
        got, logits, trace = generate(model, inputs, **settings)
    with hidden(layers_of(family, model), dropped_by(trace, inputs), 0):
        want, stock, _ = generate(model, inputs, **settings)
    assert torch.equal(got, want)
    close(logits, stock)


@every
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_masking_oracle(name, family):
    """Every method on original positions: the unpatched model with what the plan mixed written into its embeddings and
    what it dropped hidden as keys."""
    model = model_for(family, name)
    inputs, _, _ = film(family)
    vlm, length = VLMS[family], inputs["input_ids"].shape[1]
    if family == "llava" and get_class(name, "projector").space == "vision":
        pytest.skip("mixes before the projector, as tests/adapters/test_vlm_projector.py checks for all of that kind")
    reducer = get_class(name, "projector")(keep=0.4, positions="original")
    with tr.patched(model, reducer):
        got, logits, trace = generate(model, inputs)
    (step,) = [s for s in trace.steps if s.stage == "projector"]

    def write(module, args, kwargs):
        x = kwargs["inputs_embeds"].clone()
        if x.shape[1] != length:
            return None
        for (rows, columns, plan), hosts in zip(step.parts, step.slots, strict=True):
            for b, (row, mine, host) in enumerate(zip(rows[:, 0], columns, hosts, strict=True)):
                made = plan.matrix(dtype=torch.float32)[b] @ kwargs["inputs_embeds"][row, mine]
                x[row, host[host >= 0]] = made[host >= 0]
        return args, {**kwargs, "inputs_embeds": x}

    text = model.model.get_submodule(vlm.text)
    hook = text.register_forward_pre_hook(write, with_kwargs=True)
    try:
        with hidden(layers_of(family, model), dropped_by(trace, inputs), 0):
            want, stock, _ = generate(model, inputs)
    finally:
        hook.remove()
    assert torch.equal(got, want)
    close(logits, stock)


@every
@families
def test_a_padded_batch_generates_what_its_rows_do(name, family):
    model = model_for(family, name)
    inputs, _, _ = film(family)
    with tr.patched(model, method(name, 0.4)):
        sequences, logits, _ = generate(model, inputs)
        for b in range(2):
            got = generate(model, alone(inputs, b))
            assert torch.equal(got[0][0, -4:], sequences[b, -4:])
            close(got[1][0], logits[b])
    far = generate(model, inputs)[1]
    assert float((far - logits).abs().max()) > 0.1, "the reduction changes something"


@every
@families
def test_keep_is_what_enters_the_language_model(name, family):
    model = model_for(family, name)
    inputs, frames, per_frame = film(family)
    present = frames * per_frame
    blank = visual_of(inputs).sum(1) - present
    for keep in (5, 0.5):
        reducer = method(name, keep)
        with torch.no_grad(), tr.patched(model, reducer), tr.record(model) as trace:
            model(**inputs)
        left = (trace.plans[0].sources() >= 0) & visual_of(inputs)
        assert (left.sum(1) == reducer.total(present) + blank).all()


@every
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_keep_everything_and_unpatch_are_bit_identical(name, family):
    model = model_for(family, name)
    inputs, _, _ = film(family)
    stock = generate(model, inputs)[1]
    with tr.patched(model, method(name, 1.0)):
        assert torch.equal(generate(model, inputs)[1], stock)
    assert torch.equal(generate(model, inputs)[1], stock)


@every
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "llava"])
def test_pictures_are_left_alone(name, family):
    model = model_for(family, name)
    inputs = prompts(VLMS[family], ((9, "i"), (5, "i")))
    stock = generate(model, inputs)[1]
    with tr.patched(model, method(name, 3)):
        assert torch.equal(generate(model, inputs)[1], stock)


def test_a_picture_beside_a_video_stays():
    for family in ("llava_onevision", "qwen2_5_vl"):
        model = VLMS[family].model
        inputs = prompts(VLMS[family], ((9, "iv"), (5, "v")))
        with torch.no_grad(), tr.patched(model, Probe(keep=2)), tr.record(model) as trace:
            model(**inputs)
        left = trace.plans[0].sources() >= 0
        pictures = inputs["input_ids"] == IMAGE
        assert left[pictures].all()
        blank = 1 if family == "llava_onevision" else 0
        assert ((left & (inputs["input_ids"] == VIDEO)).sum(1) == 2 + blank).all()


def test_tiles_of_a_picture_are_no_frames():
    """InternVL: tiles stand side by side, frames have text between them."""
    from vlms import _noise

    model = VLMS["internvl"].model
    ids = torch.tensor([[5, 6, *[IMAGE] * 48, 7, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _noise(3, 3, 32, 32)}
    stock = generate(model, inputs)[1]
    with tr.patched(model, Probe(keep=3)):
        assert torch.equal(generate(model, inputs)[1], stock)


def test_two_videos_are_two():
    model = VLMS["qwen3_vl"].model
    inputs = prompts(VLMS["qwen3_vl"], ((9, "vv"), (5, "v")))
    with torch.no_grad(), tr.patched(model, Probe(keep=5)), tr.record(model) as trace:
        model(**inputs)
    left = ((trace.plans[0].sources() >= 0) & visual_of(inputs)).sum(1)
    assert left.tolist() == [10, 5]


def test_a_video_of_which_the_frames_are_not_known_is_refused():
    model = VLMS["llava_onevision"].model
    inputs, _, _ = film("llava_onevision")
    with torch.no_grad():
        made = model.model.get_video_features(inputs["pixel_values_videos"])
        given = {k: v for k, v in inputs.items() if k != "pixel_values_videos"}
        with tr.patched(model, Probe(keep=5)), pytest.raises(ValueError, match="frames of a video are not known"):
            model(**given, mm_encoder_outputs={"video": made})


@families
def test_methods_inside_the_tower_combine(family):
    model = VLMS[family].model
    inputs, frames, per_frame = film(family)
    with torch.no_grad(), tr.patched(model, tr.ToMe(r=2), Probe(keep=0.5)), tr.record(model) as trace:
        got = model(**inputs).logits
    assert torch.isfinite(got).all()
    left = ((trace.plans[-1].sources() >= 0) & visual_of(inputs)).sum(1)
    blank = visual_of(inputs).sum(1) - frames * per_frame
    assert (left == Probe(keep=0.5).total(frames * per_frame) + blank).all()


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_threads_do_not_mix(family):
    model = copy.deepcopy(VLMS[family].model)
    inputs, _, _ = film(family)
    both = [alone(inputs, b) for b in range(2)]
    with tr.patched(model, Probe(keep=0.4), "fastv:layer=2,keep=0.5"):
        want = [generate(model, one)[1] for one in both]
        got: dict[int, torch.Tensor] = {}

        def work(b):
            with torch.no_grad():
                out = model.generate(
                    **both[b], max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
                )
            got[b] = torch.stack(out.logits, 1)

        threads = [threading.Thread(target=work, args=(b,)) for b in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert all(torch.equal(got[b], want[b]) for b in range(2))
