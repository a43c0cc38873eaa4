"""What is asserted of every toy, and written down in docs/models.md."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from scattered import Scatter, kept_plans, masked

import tokenreduce as tr
from tokenreduce.adapters.language.find import find
from toys.build import IMAGE, build
from toys.inputs import prompt
from toys.oracles import Stock, generate, mend_stock, relative, short_prompts, stock

#: Toys that this release's own classes cannot run, and why.
STOCK_FAILS = {
    "apertus1p5": "the config does not follow the pattern", "dots3_note": "its config names 42 layers",
    "fast_vlm": "the tower has no small form", "florence2": "the tower has no small form", "fuyu": "no text head",
    "granite4_vision": "the config does not follow the pattern", "inkling": "no small form",
    "inkling2": "the tower has no small form", "inkling2_loop": "the tower has no small form",
    "glm_image": "no small form", "diffusion_gemma": "no small form", "muse_spark": "no small form",
    "nemotron_h_omni": "the config does not follow the pattern", "qwen4_exp": "the config does not follow the pattern",
    "t5gemma2": "an encoder-decoder",
}  # fmt: skip
#: Toys whose stock prompt does not run, refused at patch.
REFUSED = ("blip_2", "instructblip", "instructblipvideo")
#: Bidirectional models, which make no new tokens.
FORWARD = ("modernvbert", "ultravbert", "neomme", "embedding_gemma2")
#: Toys with windows shorter than their prompts, which the oracles inside the language model do not know.
SHORT_WINDOWS = ("gemma4_unified",)
#: Toys whose first layers add features at all visual columns of the stock model: the layer behind them.
DEEP = {"qwen3_vl": 3, "qwen3_vl_moe": 3, "qwen3_omni_moe": 3, "cosmos3_omni": 3, "cohere_compass": 3}


@functools.lru_cache(maxsize=16)
def toy(name: str) -> Stock:
    model, inputs = plain(name)
    return stock(model, inputs)


def plain(name: str) -> tuple[Any, dict[str, Any]]:
    """A toy and its prompt."""
    mend_stock()
    model = build(name)
    return model, prompt(name, model)


def stays(trace: Any) -> torch.Tensor:
    """(B,L) the columns of the prompt that a patched model kept."""
    plans = [s.plan for s in trace.steps if s.plan is not None]
    assert len(plans) == 1, "the method acted, once"
    return plans[0].sources() >= 0


def before(name: str, spec: str, compact: bool) -> float:
    """How far a reduced generation is from that on short prompts."""
    here = toy(name)
    model, inputs = here.model, here.inputs
    with tr.patched(model, spec), tr.record(model, flops=False) as trace:
        sequences, logits = generate(model, inputs)
    stay = stays(trace)
    left = (stay & (inputs["input_ids"] == IMAGE)).sum(1).tolist()
    assert len(set(left)) == 2, "rows keep unequal numbers"
    assert relative(logits, here.logits) > 1e-3, "the reduction changes something"
    return relative(logits, short_prompts(here, stay, sequences, compact=compact))


def slides_early(name: str) -> bool:
    """Whether a toy is one of :data:`SHORT_WINDOWS`, and its windows are short."""
    here = toy(name)
    window: int = here.model.config.get_text_config().sliding_window if name in SHORT_WINDOWS else 0
    return bool(window) and window < here.inputs["input_ids"].shape[1]


def layers_to_act(name: str) -> list[int]:
    """Layers of a toy behind its first attentions, before which a method that reads those can act."""
    found = find(toy(name).model)
    if found is None or found.why_not_inside or slides_early(name):
        return []
    behind = [i + 1 for i, layer in enumerate(found.layers[:-1]) if hasattr(layer, "self_attn")]
    return [k for k in behind if k >= DEEP.get(name, 0)][:2]


def inside(name: str, layer: int) -> float:
    """How far a generation that drops tokens before a decoder layer is from stock layers on one row at a time."""
    here = toy(name)
    model, inputs = here.model, here.inputs
    with tr.patched(model, f"fastv:layer={layer},keep=0.3"), tr.record(model, flops=False) as trace:
        sequences, logits = generate(model, inputs)
    assert relative(logits, here.logits) > 1e-3, "the reduction changes something"
    return relative(logits, short_prompts(here, stays(trace), sequences, layer=layer))


def cached(name: str) -> float | None:
    """How far a generation is whose rows, heads and layers hold unequal numbers of keys from that of the stock model
    with the keys that left hidden; None where no method can take keys out."""
    here = toy(name)
    found = find(here.model)
    if found is None or "cache" not in found.stages or slides_early(name):
        return None
    model, layers = here.model, [layer for layer in found.layers if hasattr(layer, "self_attn")]
    with tr.patched(model, Scatter()), kept_plans(Scatter(), pytest.MonkeyPatch()) as gone:
        sequences, logits = generate(model, here.inputs)
    assert len(gone) == len(layers)
    assert relative(logits, here.logits) > 1e-3, "what left is missed"
    with masked(layers, gone):
        again, want = generate(model, here.inputs)
    assert torch.equal(sequences, again)
    return relative(logits, want)


def forward(name: str, spec: str) -> float:
    """How far the kept columns of a bidirectional model are from those of the stock model with the others hidden."""
    model, inputs = plain(name)
    with torch.no_grad():
        with tr.patched(model, f"{spec},positions=original"), tr.record(model) as trace:
            got = model(**inputs)[0]
        stay = stays(trace)
        want = model(**{**inputs, "attention_mask": inputs["attention_mask"] * stay})[0]
        far = model(**inputs)[0]
    worst = 0.0
    for b, real in enumerate(stay & inputs["attention_mask"].bool()):
        assert relative(far[b, real], want[b, real]) > 1e-3
        worst = max(worst, relative(got[b, -int(real.sum()) :], want[b, real]))
    return worst
