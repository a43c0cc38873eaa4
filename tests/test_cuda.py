"""Patched models on a CUDA device: the same outputs as on the CPU, no waiting for the device, CUDA graphs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from families import FAMILIES, OTHERS, first_tensor
from support import images, tiny_vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from vlms import VLMS, prompts

import tokenreduce as tr
from tokenreduce.adapters.encoders.sizes import FORMS, sizes_as
from tokenreduce.adapters.language.generation import cache_as, cache_of
from tokenreduce.bench.performance.cuda.clock import captured, syncs

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ENCODERS = ("tome:r=4", "pitome:ratio=0.8,prop_attn=true", "evit:base_keep_rate=0.7", "diffrate:keep=0.4", "repshift")
LANGUAGE = {
    "projector": ("visionzip", "divprune", "cdpruner"), "language": ("fastv", "pyramiddrop"),
    "cache": ("snapkv", "knorm"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact():
    """Convolutions in float32, not in TensorFloat-32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def moved(given, dtype: torch.dtype = torch.float32):
    return {k: t.to(DEVICE, dtype) if t.is_floating_point() else t.to(DEVICE) for k, t in given.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", ENCODERS)
@pytest.mark.parametrize(
    "name", ["timm vit", "timm eva02", "open_clip vit", "torchvision vit", "transformers clip", "transformers dinov3"]
)
@torch.no_grad()
def test_encoders_give_what_they_give_on_the_cpu(name, spec, form):
    model, given = {**FAMILIES, **OTHERS}[name]()
    model.eval()
    with tr.patched(model, spec):
        want = first_tensor(model(**given))
    with sizes_as(form):
        tr.patch(model.to(DEVICE), spec)
    got = first_tensor(model(**moved(given))).cpu()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    half = first_tensor(model.bfloat16()(**moved(given, torch.bfloat16)))
    assert half.shape == want.shape
    assert half.isfinite().all()


@torch.no_grad()
def test_sizes_in_the_keys_need_no_other_kernel_than_flash_attention():
    model, x = tiny_vit().to(DEVICE, torch.bfloat16), images().to(DEVICE, torch.bfloat16)
    with tr.patched(model, "tome:r=4"):
        want = model(x)
    with sizes_as("key"):
        tr.patch(model, "tome:r=4")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it does not take what it is given
        got = model(x)
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", ENCODERS)
@torch.no_grad()
def test_a_forward_does_not_wait_and_replays_as_a_graph(spec, form):
    model, x = tiny_vit().to(DEVICE), images().to(DEVICE)
    with sizes_as(form):
        tr.patch(model, spec)
    model(x)
    assert not syncs(lambda: model(x), DEVICE)
    held, kept = x.clone(), []
    replay = captured(lambda: kept.append(model(held)))
    other = images(2).flip(0).to(DEVICE)
    held.copy_(other)
    replay()
    torch.testing.assert_close(kept[-1], model(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stage", "method"), [(s, m) for s, methods in LANGUAGE.items() for m in methods])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_language_models_give_what_they_give_on_the_cpu(name, stage, method):
    vlm = VLMS[name]
    given = prompts(vlm, ((9, "i"), (6, "i")))
    model = copy.deepcopy(vlm.model)
    tr.patch(model, tr.get_method(f"{method}:keep=0.5", stage))
    ends = []
    for device in ("cpu", DEVICE):
        inputs = {k: t.to(device) for k, t in given.items()}
        out = model.to(device).generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        ends.append((out.sequences.cpu(), torch.stack(out.logits).cpu()))
    (ids, logits), (ids_too, logits_too) = ends
    assert torch.equal(ids_too, ids)
    torch.testing.assert_close(logits_too, logits, rtol=1e-3, atol=1e-2)
    whole = cache_of(model(**moved(given), use_cache=True))
    half = model.bfloat16()(**moved(given, torch.bfloat16), use_cache=True)
    assert half.logits.isfinite().all()
    assert [layer.keys.shape for layer in cache_of(half).layers] == [layer.keys.shape for layer in whole.layers]


@pytest.mark.parametrize("spec", ["visionzip:keep=0.5", "fastv:keep=0.5", "snapkv:keep=0.5"])
@torch.no_grad()
def test_a_decode_step_waits_no_more_than_the_stock_models(spec):
    model = copy.deepcopy(VLMS["llava"].model).to(DEVICE)
    given, token = moved(prompts(VLMS["llava"], ((9, "i"),))), torch.full((1, 1), 7, device=DEVICE)

    def waits() -> int:
        cache = cache_of(model(**given, use_cache=True))
        model(input_ids=token, **cache_as(model, cache))
        with warnings.catch_warnings():
            return syncs(lambda: model(input_ids=token, **cache_as(model, cache)), DEVICE) or 0

    stock = waits()
    with tr.patched(model, spec):
        assert waits() <= stock
