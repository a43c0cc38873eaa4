"""What dropping visual tokens must equal: the unpatched model of :mod:`vlms` with the dropped tokens hidden as keys."""

from __future__ import annotations

import torch
from vlms import IMAGE, VLMS, encodes_before

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_in

FILMS = [name for name, vlm in VLMS.items() if vlm.video]
#: Families whose positions may be compact.
FLAT = [n for n in VLMS if not n.startswith(("qwen", "gemma3")) and n not in ("llava_next_window", "paligemma2")]
#: name -> (rows of the batch, padded side)
CASES = {
    "unequal": ((9, "i"), (5, "ii")),
    "alone": ((7, "i"),),
    "two images": ((8, "ii"), (6, "ii")),
    "beams": ((6, "ii"), (9, "i")) if encodes_before() else ((6, "i"), (9, "")),
    "video": ((5, "v"), (8, "iv")),
}


def layers_of(name, model):
    return model.model.get_submodule(VLMS[name].text).layers


class hidden:  # noqa: N801 - used like open()
    """The unpatched model with ``dropped`` (B,L) hidden as keys from ``layer`` on: its own masks and that."""

    def __init__(self, layers, dropped, layer):
        self.layers, self.dropped, self.layer, self.hooks = layers, dropped, layer, []

    def hide(self, module, args, kwargs):
        attention, cache, stock = module.self_attn, cache_in(kwargs), kwargs.get("attention_mask")
        q = args[0].shape[1]
        past = 0 if cache is None else int(cache.layers[attention.layer_idx].get_seq_length())
        slots, offset = (q, 0) if cache is None else cache.layers[attention.layer_idx].get_mask_sizes(q)
        column = offset + torch.arange(slots)
        if stock is None:
            stock = (column <= past + torch.arange(q)[:, None]) | torch.tensor(not attention.is_causal)
        elif stock.dtype != torch.bool:
            stock = stock == 0
        gone = torch.cat([self.dropped, torch.zeros(len(self.dropped), offset + slots, dtype=torch.bool)], 1)
        see = stock & ~gone[:, None, None, offset : offset + slots]
        own = column == past + torch.arange(q)[:, None]
        see = see | (own & ~see.any(-1, keepdim=True))
        if attention.config._attn_implementation == "eager":
            see = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
        kwargs["attention_mask"] = see
        return args, kwargs

    def __enter__(self):
        self.hooks = [m.register_forward_pre_hook(self.hide, with_kwargs=True) for m in self.layers[self.layer :]]

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def generate(model, inputs, **settings):
    with torch.no_grad(), tr.record(model, flops=False) as trace:
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True, **settings
        )
    return out.sequences, torch.stack(out.logits, 1), trace


def dropped_by(trace, inputs):
    """(rows of the batch and its beams, L) bool of what the one plan of a trace drops; only visual tokens."""
    (plan,) = trace.plans
    dropped = plan.sources() < 0
    visual = (inputs["input_ids"] == 99) | (inputs["input_ids"] == 98)
    assert not (dropped & ~visual.repeat_interleave(len(dropped) // len(visual), 0)).any()
    return dropped


#: What families and releases call the pixels of images and videos.
PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


def features_of(model, inputs, kind):
    """The output of ``get_image_features`` or ``get_video_features`` on a batch of inputs, None without such inputs."""
    pixels = next((inputs[k] for k in PIXELS[kind] if k in inputs), None)
    if pixels is None:
        return None
    more = {k: inputs[k] for k in ("image_sizes", "pixel_attention_mask") if k in inputs and kind == "image"}
    return getattr(model.model, f"get_{kind}_features")(pixels, **more)


def shortened(vlm, inputs, gone):
    """The same prompts without the dropped placeholders, and the image features that are left, as a user would give
    them to the unpatched model."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool() & ~gone
    width = int(real.sum(1).max())
    out = {}
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        if key in inputs:
            out[key] = torch.zeros(len(ids), width, dtype=torch.long)
            for i, row in enumerate(inputs[key]):
                left = row[real[i]]
                out[key][i, width - len(left) :] = left
    with torch.no_grad():
        features = features_of(vlm.model, inputs, "image").pooler_output
    listed = isinstance(features, list | tuple)
    flat = (torch.cat(list(features)) if listed else features.flatten(0, -2))[~gone[ids == IMAGE]]
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    out["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=[flat] if listed else flat[None])}
    return out


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.detach().abs().max()))


def flash(module, query, key, value, attention_mask, scaling=None, is_causal=None, position_ids=None, **kwargs):
    """What flash attention computes, with its library's test for packed sequences; no kernel for it on a CPU."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    assert module.config._attn_implementation == "flash_attention_2", "kernels are loaded by this name"
    assert attention_mask is not None or not _is_packed_sequence(position_ids, query.shape[0])
    assert position_ids is None or position_ids.shape[-1] == query.shape[2]
    q, s = query.shape[2], key.shape[2] if attention_mask is None else attention_mask.shape[1]
    key, value = (t[:, :, :s].repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    see = torch.arange(s) <= s - q + torch.arange(q)[:, None]
    if attention_mask is not None:
        assert attention_mask.dim() == 2
        see = see & attention_mask.bool()[:, None, None]
        see = see | ~see.any(-1, keepdim=True)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, see, scale=scaling)
    return out.transpose(1, 2).contiguous(), None
