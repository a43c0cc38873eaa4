from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, OTHERS, first_tensor
from support import images, tiny_vit

import tokenreduce as tr
from tokenreduce.adapters.encoders.sizes import FORMS, fold, sizes_as

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def heads(width: int, dtype: torch.dtype, n: int = 23) -> tuple[list[torch.Tensor], torch.Tensor]:
    q, k, v = (torch.randn(2, 3, n, width) for _ in range(3))
    bias = torch.randint(1, 40, (2, 1, 1, n)).float().log()
    bias[1, ..., -4:] = float("-inf")
    return [t.to(dtype) for t in (q, k, v)], bias


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("width", "scale"), [(20, None), (62, 0.3), (63, None), (64, None), (80, 1.0)])
def test_sizes_in_the_keys_are_sizes_in_the_mask(width, scale, dtype):
    (q, k, v), bias = heads(width, dtype)
    made = fold(q, k, v, bias, scale)
    assert made.q.shape == made.k.shape == made.v.shape
    assert made.q.shape[-1] % 8 == 0
    assert width + 2 <= made.q.shape[-1] < width + 10
    got = F.scaled_dot_product_attention(made.q, made.k, made.v, scale=made.scale)[..., : made.width]
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias, scale=scale)
    torch.testing.assert_close(got.float(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_gradients_are_those_of_the_mask():
    (q, k, v), bias = heads(20, torch.float32)
    grads = []
    for form in FORMS:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        if form == "key":
            made = fold(*leaves, bias)
            out = F.scaled_dot_product_attention(made.q, made.k, made.v, scale=made.scale)[..., : made.width]
        else:
            out = F.scaled_dot_product_attention(*leaves, attn_mask=bias)
        out.square().sum().backward()
        grads.append([t.grad for t in leaves])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


NAMES = (
    "timm vit", "timm eva02", "open_clip vit", "torchvision vit", "transformers vit", "transformers clip",
    "transformers siglip2, padded", "transformers dinov3",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", ["tome:r=4", "ats:layers=[0],num_tokens=30,drop_tokens=false"])
@torch.no_grad()
def test_patched_models_give_the_same_with_both_and_no_mask_with_keys(name, spec, monkeypatch):
    """``ats`` leaves the images of a batch unequal numbers of tokens, with empty places behind them."""
    model, given = {**FAMILIES, **OTHERS}[name]()
    model.eval()
    masks, stock = [], F.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return stock(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with tr.patched(model, spec):
        want = first_tensor(model(**given))
    assert any(mask is not None for mask in masks)
    with sizes_as("key"):
        tr.patch(model, spec)
    masks.clear()
    got = first_tensor(model(**given))
    again = first_tensor(copy.deepcopy(model)(**given))
    padded = "padded" in name  # the first block takes the stock mask of empty places
    assert masks
    assert padded or all(mask is None for mask in masks)
    tr.unpatch(model)
    assert not any("_tokenreduce_sizes" in vars(m) for m in model.modules())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(again, got)


@torch.no_grad()
def test_a_compiled_model_takes_sizes_in_its_keys():
    model, x = tiny_vit(), images()
    with sizes_as("key"):
        tr.patch(model, "tome:r=4")
    want = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), want, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_other_forms_are_refused_by_name():
    with pytest.raises(ValueError, match="one of mask, key, not 'query'"), sizes_as("query"):
        pass
