"""Models of transformers around towers that are found by how they are built: merging equal tokens changes nothing of
what they return, and what cannot be reduced says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

T = pytest.importorskip("transformers")

from equal_tokens import pictures, without_positions  # noqa: E402

import tokenreduce as tr  # noqa: E402

SMALL = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=48, patch_size=8, intermediate_size=96
)  # fmt: skip
TEXT = dict(
    hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=99,
    max_position_embeddings=12, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LABELS = dict(num_labels=5)
PYRAMID = dict(num_hidden_layers=4, out_indices=[1, 2, 3, 4], pool_scales=[1, 2])


def _one(model: str, config: str, **changes: Any) -> nn.Module:
    return getattr(T, model)(getattr(T, config)(**{**SMALL, **changes}))


def _both(kind: str, model: str, **changes: Any) -> nn.Module:
    vision, text = getattr(T, f"{kind}VisionConfig")(**SMALL), getattr(T, f"{kind}TextConfig")(**TEXT)
    config = getattr(T, f"{kind}Config")
    return getattr(T, model)(config(vision_config=vision.to_dict(), text_config=text.to_dict(), **changes))


def _blip2(model: str) -> nn.Module:
    queries = T.Blip2QFormerConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, encoder_hidden_size=48,
        vocab_size=99, use_qformer_text_input=model != "Blip2VisionModelWithProjection",
    )  # fmt: skip
    vision = T.Blip2VisionConfig(**SMALL, initializer_range=0.02)
    config = T.Blip2Config(
        vision_config=vision.to_dict(), qformer_config=queries.to_dict(), num_query_tokens=3, image_text_hidden_size=8
    )
    return getattr(T, model)(config)


SPOKEN: dict[str, Any] = {
    **{f"{kind}Model": (lambda k=kind: _both(k, f"{k}Model")) for kind in (
        "MetaClip2", "Aimv2", "AltCLIP", "ChineseCLIP", "CLIPSeg", "OwlViT", "Owlv2"
    )},
    "CLIPSegForImageSegmentation": lambda: _both(
        "CLIPSeg", "CLIPSegForImageSegmentation", extract_layers=[0, 1], reduce_dim=16, decoder_num_attention_heads=2,
        decoder_intermediate_size=16, projection_dim=24,
    ),
    "OwlViTForObjectDetection": lambda: _both("OwlViT", "OwlViTForObjectDetection", projection_dim=48),
    "Owlv2ForObjectDetection": lambda: _both("Owlv2", "Owlv2ForObjectDetection", projection_dim=48),
    "BlipForImageTextRetrieval": lambda: _both("Blip", "BlipForImageTextRetrieval"),
    "Blip2ForImageTextRetrieval": lambda: _blip2("Blip2ForImageTextRetrieval"),
}  # fmt: skip
SILENT: dict[str, Any] = {
    "DeiTForImageClassification": lambda: _one("DeiTForImageClassification", "DeiTConfig", **LABELS),
    "DeiTForMaskedImageModeling": lambda: _one("DeiTForMaskedImageModeling", "DeiTConfig", encoder_stride=8),
    "BeitForImageClassification": lambda: _one("BeitForImageClassification", "BeitConfig", **LABELS),
    "BeitForMaskedImageModeling": lambda: _one("BeitForMaskedImageModeling", "BeitConfig", vocab_size=20),
    "BeitForSemanticSegmentation": lambda: _one("BeitForSemanticSegmentation", "BeitConfig", **LABELS, **PYRAMID),
    "BeitBackbone": lambda: _one("BeitBackbone", "BeitConfig", num_hidden_layers=4, out_indices=[1, 2, 3, 4]),
    "Data2VecVisionForImageClassification": lambda: _one(
        "Data2VecVisionForImageClassification", "Data2VecVisionConfig", **LABELS
    ),
    "Data2VecVisionForSemanticSegmentation": lambda: _one(
        "Data2VecVisionForSemanticSegmentation", "Data2VecVisionConfig", **LABELS, **PYRAMID
    ),
    "IJepaForImageClassification": lambda: _one("IJepaForImageClassification", "IJepaConfig", **LABELS),
    "ViTMSNForImageClassification": lambda: _one("ViTMSNForImageClassification", "ViTMSNConfig", **LABELS),
    "ViTMAEForPreTraining": lambda: _one(
        "ViTMAEForPreTraining", "ViTMAEConfig", mask_ratio=0.25, decoder_hidden_size=24, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=24,
    ),
    "MetaClip2VisionModelWithProjection": lambda: _one("MetaClip2VisionModelWithProjection", "MetaClip2VisionConfig"),
    "MetaClip2ForImageClassification": lambda: _both("MetaClip2", "MetaClip2ForImageClassification", **LABELS),
    "OwlViTVisionModel": lambda: _one("OwlViTVisionModel", "OwlViTVisionConfig"),
    "Blip2VisionModelWithProjection": lambda: _blip2("Blip2VisionModelWithProjection"),
    "EomtForUniversalSegmentation": lambda: _one(
        "EomtForUniversalSegmentation", "EomtConfig", num_blocks=1, num_hidden_layers=3, num_queries=4,
        num_upscale_blocks=1,
    ),
}  # fmt: skip


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for v in values if isinstance(v, Tensor | tuple | list | dict) for t in tensors(v)]


@pytest.mark.parametrize("name", [*SILENT, *SPOKEN])
@torch.no_grad()
def test_merging_equal_tokens_changes_nothing(name: str) -> None:
    model: Any = without_positions((SILENT | SPOKEN)[name]())
    given: dict[str, Tensor] = {"pixel_values": pictures(6, 8)}
    if name in SPOKEN:
        given["input_ids"] = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])
    if name == "ViTMAEForPreTraining":
        given["noise"] = torch.rand(2, 36, generator=torch.Generator().manual_seed(1))
    want = tensors(model(**given))
    merging = tr.ToMe(r=[5, 4] if len(tr.describe(model).towers[0].blocks) == 2 else [5, 4, 0, 0])
    with tr.patched(model, merging), tr.record(model) as trace:
        got = tensors(model(**given))
    assert any(step.plan is not None for step in trace.steps)
    compared = 0
    for one, two in zip(got, want, strict=True):
        if one.shape == two.shape and two.is_floating_point() and two.dim():
            torch.testing.assert_close(one, two, rtol=0, atol=2e-5 * float(two.abs().max()))
            compared += 1
    assert compared
    assert all(torch.equal(a, b) for a, b in zip(tensors(model(**given)), want, strict=True))


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: T.SamVisionModel(T.SamVisionConfig(**SMALL, global_attn_indexes=[0], output_channels=16)), "windows"),
        (lambda: T.VitDetModel(T.VitDetConfig(**{k: v for k, v in SMALL.items() if k[0] != "in"})), "windows"),
        (lambda: T.TimesformerModel(T.TimesformerConfig(**SMALL, num_frames=4)), "over time and over space in turn"),
        (
            lambda: T.SwinModel(T.SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 2])),
            "hierarchical model",
        ),
        (lambda: _one("YolosModel", "YolosConfig", image_size=[48, 48]), "not 6x6 patches behind a prefix"),
        (
            lambda: T.XCLIPVisionModel(T.XCLIPVisionConfig(**SMALL, num_frames=2)),
            "2 attention modules whose queries and keys can be seen",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_reduced_says_why(build: Any, why: str) -> None:
    model = build()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=why):
        tr.patch(model, tr.ToMe(r=2))
    with pytest.raises(TypeError, match=why):
        tr.describe(model)
    assert [type(m) for m in model.modules()] == kinds


def test_masks_cannot_be_told_from_relative_biases() -> None:
    model = _one("BeitModel", "BeitConfig", use_shared_relative_position_bias=True)
    tr.patch(model, tr.ToMe(r=2))
    with pytest.raises(ValueError, match="takes no attention_mask"):
        model(torch.zeros(1, 3, 48, 48), attention_mask=torch.ones(1, 37))


@torch.no_grad()
def test_rows_of_attention_carry_relative_biases() -> None:
    """Evidence of a layer behind a plan is what the stock layer computes for the tokens that are left."""
    from dataclasses import dataclass

    from tokenreduce.core.plan import Identity, Plan, Prune
    from tokenreduce.core.reducer import Reducer

    rows: list[Tensor] = []

    @dataclass(frozen=True)
    class Looks(Reducer, needs=("attention",)):
        def plan(self, evidence: Any) -> Plan:
            if evidence.layer == 0:
                return Prune(evidence.n, torch.arange(0, evidence.n, 2).expand(2, -1))
            rows.append(evidence.attention("all"))
            return Identity.like(evidence.x)

    changes = dict(use_relative_position_bias=True, use_shared_relative_position_bias=True)
    model: Any = _one("BeitModel", "BeitConfig", **changes).eval()
    for name, p in model.named_parameters():
        p.normal_(std=0.5) if "bias_table" in name else p.mul_(2.0)
    model.set_attn_implementation("eager")
    seen: list[Tensor] = []
    model.layers[1].attention.register_forward_hook(lambda m, a, out: seen.append(out[1]))
    with tr.patched(model, Looks()):
        model(torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(rows[0], seen[0], rtol=1e-4, atol=1e-6)
