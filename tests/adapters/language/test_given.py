"""Embeddings that the caller merged, and images that come onto a cache: reduced, or said; never silently left."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from vlms import IMAGE, VIDEO, VLMS, prompts
from vlms_masked import CASES, PIXELS, close, hidden, layers_of

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_as, cache_of
from tokenreduce.adapters.language.given import prints

GRIDS = {"image": ("image_sizes", "pixel_attention_mask", "image_grid_thw"), "video": ("video_grid_thw",)}


def features(model, inputs, kind):
    pixels = next((inputs[k] for k in PIXELS[kind] if k in inputs), None)
    if pixels is None:
        return None
    more = {k: inputs[k] for k in GRIDS[kind] if k in inputs}
    made = getattr(model.model, f"get_{kind}_features")(pixels, **more).pooler_output
    return torch.cat(list(made)) if isinstance(made, list | tuple) else made.flatten(0, -2)


def merged(model, inputs):
    """What a caller does who merges: embeddings of the ids, features in the places of the placeholders."""
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    for kind, token in (("image", IMAGE), ("video", VIDEO)):
        if (made := features(model, inputs, kind)) is not None:
            embeds = embeds.masked_scatter((ids == token).unsqueeze(-1), made.to(embeds.dtype))
    return embeds


def masks(inputs, *more):
    return {k: inputs[k] for k in ("attention_mask", "token_type_ids", *more) if k in inputs}


def said(caught):
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "reduce" in str(w.message)]


@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "fopru:keep=0.3", "fastv:layer=2,keep=0.3", "tome:r=1"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "internvl", "idefics3", "gemma3"])
@pytest.mark.filterwarnings("error")
def test_merged_embeddings_are_known_by_their_features(name, spec):
    """All stages, and also methods that look at the tower: bit-identical to the call with ids and pixels."""
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["video" if name == "llava_onevision" else "unequal"])
    with torch.no_grad(), tr.patched(vlm.model, spec):
        want = vlm.model(**inputs).logits
        with tr.record(vlm.model, flops=False) as trace:
            got = vlm.model(inputs_embeds=merged(vlm.model, inputs), **masks(inputs)).logits
    assert trace.plans
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_generate_from_merged_embeddings_is_what_masking_would_give(name):
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["two images"])
    settings = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        with tr.patched(vlm.model, "divprune:keep=0.3,positions=original"), tr.record(vlm.model, flops=False) as trace:
            got = vlm.model.generate(inputs_embeds=merged(vlm.model, inputs), **masks(inputs), **settings)
        (plan,) = trace.plans
        with hidden(layers_of(name, vlm.model), plan.sources() < 0, 0):
            want = vlm.model.generate(inputs_embeds=merged(vlm.model, inputs), **masks(inputs), **settings)
    assert torch.equal(got.sequences, want.sequences)
    close(torch.stack(got.logits), torch.stack(want.logits))


def test_token_types_say_which_embeddings_are_visual():
    """Features from elsewhere: the types that the caller passes are enough for methods on embeddings."""
    vlm = VLMS["qwen2_vl"]
    inputs = prompts(vlm, CASES["two images"])
    with torch.no_grad():
        embeds = merged(vlm.model, inputs) + 0.01
        call = {"inputs_embeds": embeds, **masks(inputs, "mm_token_type_ids")}
        patched, caught = tr.patched(vlm.model, "fastv:layer=2,keep=0.3"), warnings.catch_warnings(record=True)
        with patched, caught as seen, tr.record(vlm.model, flops=False) as trace:
            warnings.simplefilter("always")
            got = vlm.model(**call).logits
        assert not said(seen)
        dropped = trace.plans[0].sources() < 0
        assert not (dropped & (inputs["mm_token_type_ids"] == 0)).any()
        with hidden(layers_of("qwen2_vl", vlm.model), dropped, 2):
            want = vlm.model(**call).logits
        close(got[:, -1], want[:, -1])
        with (
            tr.patched(vlm.model, "fopru:keep=0.3"),
            pytest.raises(ValueError, match="call were made elsewhere"),
        ):
            vlm.model(**call)


@pytest.mark.parametrize("spec", ["divprune:keep=0.3", "fastv:layer=2,keep=0.3", "tome:r=2"])
def test_what_nobody_knows_is_said(spec):
    vlm = VLMS["llava"]
    inputs = prompts(vlm, CASES["unequal"])
    text = prompts(vlm, ((6, ""), (4, "")))
    with torch.no_grad():
        embeds, words = merged(vlm.model, inputs) + 0.01, vlm.model.get_input_embeddings()(text["input_ids"])
        stock = vlm.model(inputs_embeds=embeds, **masks(inputs)).logits
        padded = torch.where(text["attention_mask"].bool().unsqueeze(-1), words, torch.zeros(()))
        with tr.patched(vlm.model, spec), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with tr.record(vlm.model, flops=False) as trace:
                got = vlm.model(inputs_embeds=embeds, **masks(inputs)).logits
            assert len(said(caught)) == len(trace.notes) == 1
            assert "pass input_ids and pixel_values" in trace.notes[0].lower()
            for one in (words, padded):  # text alone has nothing to reduce
                vlm.model(inputs_embeds=one, **masks(text))
            vlm.model.model.language_model(inputs_embeds=words)
            assert len(said(caught)) == 1
            vlm.model.model.language_model(inputs_embeds=embeds)
            assert len(said(caught)) == 2
    assert torch.equal(got, stock)


def test_a_language_model_that_is_called_alone():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, CASES["two images"])
    with torch.no_grad(), tr.patched(vlm.model, "visionzip:keep=0.3"):
        want = vlm.model(**inputs).logits
        got = vlm.model.model.language_model(inputs_embeds=merged(vlm.model, inputs), **masks(inputs))
        assert torch.equal(vlm.model.lm_head(got.last_hidden_state), want)
        two = copy.deepcopy(vlm.model)
        again = two.model.language_model(inputs_embeds=merged(two, inputs), **masks(inputs))
        assert torch.equal(again.last_hidden_state, got.last_hidden_state)
    assert not [k for m in vlm.model.modules() for k in vars(m) if "tokenreduce" in k or k.startswith("get_")]


def test_questions_on_features_that_were_made_once():
    """Other prompts, other rows and orders, equal images: every column gets the evidence of its own feature."""
    vlm = VLMS["llava"]
    one = prompts(vlm, ((6, "i"), (6, "i")))
    pixels = one["pixel_values"]
    table = vlm.model.get_input_embeddings()

    def placed(made, *order):
        words = [table(torch.tensor([[3 + i, 4, 5]])) for i in range(len(order))]
        return torch.cat([t for i, k in enumerate(order) for t in (words[i], made[k][None])] + [words[0]], 1)

    for order, images in (((1, 0), (0, 1)), ((0,), (0, 1)), ((0, 1), (0, 0)), ((1,), (0, 1))):
        given = pixels[list(images)]
        ids = [[3 + i, 4, 5, *[IMAGE] * 16] for i in range(len(order))]
        ids = torch.tensor([[t for row in ids for t in row] + [3, 4, 5]])
        with torch.no_grad(), tr.patched(vlm.model, "visionzip:keep=0.3"):
            want = vlm.model(input_ids=ids, pixel_values=given[list(order)]).logits
            made = vlm.model.get_image_features(given).pooler_output
            for _ in range(2):
                assert torch.equal(vlm.model(inputs_embeds=placed(made, *order)).logits, want)


def on_a_cache(model, words, inputs, tokens=3):
    """Logits of an image and a question behind ``words`` in a cache, then of tokens one by one, then of a turn."""
    more = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    mask = torch.cat([torch.ones_like(words), inputs["attention_mask"]], 1)
    cache = cache_of(model(input_ids=words, use_cache=True))
    out = [model(input_ids=inputs["input_ids"], attention_mask=mask, **more, **cache_as(model, cache)).logits[:, -1]]
    for n in (1,) * tokens + (4,):
        mask = torch.cat([mask, torch.ones_like(mask[:, :n])], 1)
        new = torch.arange(10, 10 + n).expand(len(words), -1)
        out.append(model(input_ids=new, attention_mask=mask, **cache_as(model, cache)).logits[:, -1])
    return torch.stack(out)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3"])
@pytest.mark.filterwarnings("error:.*reduce")
def test_images_behind_a_cached_text_are_reduced(name, positions):
    """Unequal numbers of tokens are left in the rows, which have padding between the cached text and their images."""
    vlm = VLMS[name]
    inputs, words = prompts(vlm, CASES["unequal"]), torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
    spec = f"divprune:keep=0.3,positions={positions}"
    with torch.no_grad():
        with tr.patched(vlm.model, spec), tr.record(vlm.model, flops=False) as trace:
            got = on_a_cache(vlm.model, words, inputs)
            (plan,) = trace.plans
            if positions == "compact":  # the prompt in one call
                at = torch.cat([words, inputs["input_ids"]], 1)
                mask = torch.cat([torch.ones_like(words), inputs["attention_mask"]], 1)
                rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
                close(got[0], vlm.model(input_ids=at, attention_mask=mask, **rest).logits[:, -1])
                return
        gone = torch.cat([torch.zeros(2, 4, dtype=torch.bool), plan.sources() < 0], 1)
        with hidden(layers_of(name, vlm.model), gone, 0):
            close(got, on_a_cache(vlm.model, words, inputs))
        with tr.patched(vlm.model, "divprune:keep=1.0"):
            kept = on_a_cache(vlm.model, words, inputs)
        assert torch.equal(kept, on_a_cache(vlm.model, words, inputs))


def test_a_reduced_tower_behind_a_cached_text():
    vlm = VLMS["llava"]
    inputs, words = prompts(vlm, CASES["alone"]), torch.tensor([[3, 4, 5, 6]])
    whole = {**inputs, "input_ids": torch.cat([words, inputs["input_ids"]], 1)}
    whole.pop("attention_mask")
    for spec in ("tome:r=2", "tome:r=2+visionzip:keep=4", "cdpruner:keep=4"):
        with torch.no_grad(), tr.patched(vlm.model, spec):
            got = on_a_cache(vlm.model, words, inputs)[0]
            close(got, vlm.model(**whole).logits[:, -1])


@pytest.mark.parametrize("spec", ["fastv:layer=2,keep=0.3", "divprune:keep=0.3+fastv:layer=2,keep=0.3"])
def test_images_that_come_onto_a_cache_are_said(spec):
    vlm = VLMS["llava"]
    inputs, words = prompts(vlm, CASES["alone"]), torch.tensor([[3, 4, 5, 6]])
    image = {k: inputs[k] for k in ("input_ids", "pixel_values")}
    with torch.no_grad():
        stock = vlm.model(**image, **cache_as(vlm.model, cache_of(vlm.model(input_ids=words, use_cache=True)))).logits
        with tr.patched(vlm.model, spec), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache = cache_of(vlm.model(input_ids=words, use_cache=True))
            with tr.record(vlm.model, flops=False) as trace:
                got = vlm.model(**image, **cache_as(vlm.model, cache)).logits
                vlm.model(input_ids=words[:, :1], **cache_as(vlm.model, cache))
            assert len(said(caught)) == 1
            assert ": the cache holds text already, and this call brings images" in trace.notes[0]
            cache = cache_of(vlm.model(**inputs, use_cache=True))
            vlm.model(input_ids=words, **cache_as(vlm.model, cache))
            assert len(said(caught)) == 1
            vlm.model(**image, **cache_as(vlm.model, cache))
            assert "a later turn brings images" in said(caught)[1]
    assert torch.equal(got, stock)
    assert "images of later turns stay, with a warning" in str(tr.describe(vlm.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_prints_tell_rows_apart(dtype):
    rows = torch.randn(500, 60, generator=torch.Generator().manual_seed(0)).to(dtype)
    near = rows.clone()
    near[:, 3] *= 1.01
    swapped = rows.flip(1)
    assert len(prints(torch.cat([rows, near, swapped])).unique()) == 1500
    assert torch.equal(prints(rows), prints(rows.clone()))


def test_types_on_a_family_that_needs_none_and_features_in_another_thread():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, CASES["two images"])
    types = (inputs["input_ids"] == IMAGE).long()
    with torch.no_grad(), tr.patched(vlm.model, "divprune:keep=0.3"):
        want = vlm.model(**inputs).logits
        embeds = []
        worker = threading.Thread(target=lambda: embeds.append(merged(vlm.model, inputs)))
        with torch.no_grad():
            worker.start()
            worker.join()
        assert torch.equal(vlm.model(inputs_embeds=embeds[0], **masks(inputs)).logits, want)
        vlm.model(**inputs)
        got = vlm.model(inputs_embeds=embeds[0], mm_token_type_ids=types, **masks(inputs)).logits
        assert got.shape == want.shape


def test_a_training_step_is_not_kept_alive():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, CASES["unequal"])
    with tr.patched(vlm.model, "visionzip:keep=0.3"):
        made = []
        hook = vlm.model.model.multi_modal_projector.register_forward_hook(
            lambda m, a, out: made.append(weakref.ref(out))
        )
        vlm.model(**inputs).logits.sum().backward()
        hook.remove()
        gc.collect()
        assert made[0]() is None
    vlm.model.zero_grad()
