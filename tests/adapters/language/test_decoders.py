"""Language models of many kinds inside LLaVA: dropping is masking, or the layer is refused by what it needs."""

from __future__ import annotations

import functools
from contextlib import ExitStack

import pytest
import torch
from vlms import IMAGE, Vlm, _plain, _run, _text, _tower, _wide, prompts
from vlms_masked import CASES, close, generate, hidden

import tokenreduce as tr
from tokenreduce.adapters.language.cuts import slots_kept

EXPERTS = dict(num_experts=2, num_local_experts=2, num_experts_per_tok=1, moe_intermediate_size=32)
SCALED = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8,
    "max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.8,
}  # fmt: skip
#: name -> (config class, settings). Ministral 3 scales queries by position ids, here from the eighth on.
TEXTS = {
    "ministral3": ("Ministral3Config", dict(head_dim=8, rope_parameters=SCALED)),
    "stablelm": ("StableLmConfig", {}),
    "stablelm parallel": ("StableLmConfig", dict(use_parallel_residual=True)),
    "nemotron": ("NemotronConfig", dict(head_dim=8)),
    "phi": ("PhiConfig", {}),
    "persimmon": ("PersimmonConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "apertus": ("ApertusConfig", {}),
    "cohere": ("CohereConfig", {}),
    "glm4": ("Glm4Config", dict(head_dim=8)),
    "smollm3": ("SmolLM3Config", {}),
    "mixtral": ("MixtralConfig", EXPERTS),
}


@functools.lru_cache(maxsize=2)
def vlm(kind):
    import transformers as hf

    torch.manual_seed(0)
    name, settings = TEXTS[kind] if kind in TEXTS else (kind, MORE.get(kind, {}))
    text = getattr(hf, name)(**{**_text(), **settings})
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_tower(32, 8)), text_config=text, image_token_index=IMAGE,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Vlm(functools.partial(_wide, hf.LlavaForConditionalGeneration(config)), "LlavaModel", _run(16), _plain)


def dropped_from(trace, length):
    """layer -> (B,L) bool of the columns that are gone from there on."""
    columns, out = None, {}
    for step in (s for s in trace.steps if s.plan is not None):
        if columns is None:
            columns = torch.arange(length).expand(step.plan.batch, -1)
        kept = slots_kept(step.plan)
        columns, valid = columns.gather(1, kept.at), kept.there
        gone = torch.ones(len(columns), length, dtype=torch.bool)
        for row, here in enumerate(columns if valid is None else [c[v] for c, v in zip(columns, valid, strict=True)]):
            gone[row, here] = False
        out[step.layer if step.stage == "language" else 0] = gone
    return out


SPECS = ("divprune:keep=0.3,positions=original", "fastv:layer=2,keep=0.3", "dart:layer=2,keep=0.3", "pyramiddrop")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", TEXTS)
def test_dropping_is_masking(kind, spec):
    one = vlm(kind)
    inputs = prompts(one, CASES["unequal"])
    layers = one.model.model.language_model.layers
    with tr.patched(one.model, spec):
        sequences, logits, trace = generate(one.model, inputs)
    assert trace.plans
    with ExitStack() as stack:
        for layer, gone in dropped_from(trace, inputs["input_ids"].shape[1]).items():
            stack.enter_context(hidden(layers, gone, layer))
        want_sequences, want, _ = generate(one.model, inputs)
    assert torch.equal(sequences, want_sequences)
    close(logits, want)


@pytest.mark.parametrize("kind", ["ministral3", "stablelm", "phi", "nemotron"])
def test_methods_that_choose_again_and_merge_run_or_are_refused(kind):
    one = vlm(kind)
    inputs = prompts(one, CASES["unequal"])
    stock = generate(one.model, inputs)
    for spec in ("lazyllm:revive=false", "dycoke-cache", "lazyllm", "framefusion:cost=0.5"):
        if (kind, spec) in (("ministral3", "lazyllm"), ("phi", "framefusion:cost=0.5")):
            with pytest.raises(ValueError, match=r"revive=false|does not have under the names"):
                tr.patch(one.model, spec)
            continue
        tr.patch(one.model, spec)
        _, logits, trace = generate(one.model, inputs)
        tr.unpatch(one.model)
        assert logits.isfinite().all()
        assert trace.steps or trace.decode
        assert not torch.equal(logits, stock[1])
    assert torch.equal(generate(one.model, inputs)[1], stock[1])


REFUSED = {
    ("GptOssConfig", "fastv:layer=2"): "GptOssAttention has parameters of its own in its softmax \\(sinks\\)",
    ("DiffLlamaConfig", "pyramiddrop"): "DiffLlamaAttention has parameters of its own",
    ("BioGptConfig", "divprune:keep=0.3"): "a BioGptDecoderLayer, is not given rotary tables",
    ("XGLMConfig", "lazyllm"): "a XGLMDecoderLayer, is not given rotary tables",
    ("GraniteConfig", "framefusion"): "GraniteDecoderLayer does more behind that than to add the MLP",
    ("Olmo2Config", "framefusion"): "Olmo2DecoderLayer does more behind that",
    ("Glm4Config", "framefusion"): "Glm4DecoderLayer does more behind that",
    ("Gemma3nTextConfig", "fastv:layer=2"): "a Gemma3nTextDecoderLayer, is given per_layer_input",
    ("Gemma3nTextConfig", "divprune:keep=0.3"): "no method of this library fits this language model",
    ("BambaConfig", "divprune:keep=0.3"): "language model",
}
MORE = {
    "GptOssConfig": dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=512),
    "XGLMConfig": dict(d_model=32, num_layers=4, attention_heads=4, ffn_dim=64),
    "GraniteConfig": dict(residual_multiplier=0.5),
    "Glm4Config": dict(head_dim=8),
    "Gemma3nTextConfig": dict(
        head_dim=8, vocab_size_per_layer_input=120, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
        laurel_rank=8, activation_sparsity_pattern=[0.0] * 4, layer_types=["full_attention"] * 4, altup_num_inputs=2,
    ),
    "BambaConfig": dict(
        attn_layer_indices=[1, 3], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "spec"), REFUSED)
def test_layers_that_need_more_are_refused_when_patched(kind, spec):
    model = vlm(kind).model
    with pytest.raises((ValueError, TypeError), match=REFUSED[kind, spec]):
        tr.patch(model, spec)
    assert not [k for m in model.modules() for k in vars(m) if "tokenreduce" in k]
