"""Every kind of open_clip model run forward, on small copies of its own configurations: what stands behind the tower
(poolings, projections, decoders) gets what it is made for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

open_clip = pytest.importorskip("open_clip")

import tokenreduce as tr  # noqa: E402

#: Sizes that are made small; what else a configuration says is kept.
SMALL = dict(layers=3, width=32, head_width=16, image_size=48, patch_size=8, mlp_ratio=2.0)
TEXT = dict(context_length=8, vocab_size=60, width=32, heads=2, layers=1)
#: Towers of timm by the first part of their name: the smallest of their kind, and a size of images that it takes.
TIMM = {
    "vit": ("test_vit", 160),
    "eva": ("eva02_tiny_patch14_224", 224),
    "eva02": ("eva02_tiny_patch14_224", 224),
    "relpos": ("test_vit_relpos", 160),
}


def _signature(config: dict[str, Any]) -> tuple[Any, ...]:
    vision = config["vision_cfg"]
    tower = str(vision.get("timm_model_name", "")).split("_")
    kind = "relpos" if "relpos" in tower else tower[0]
    flags = {k: v for k, v in vision.items() if k not in {*SMALL, "timm_model_name"} and not isinstance(v, float)}
    return kind, json.dumps(flags, sort_keys=True), "multimodal_cfg" in config, bool(config.get("custom_text"))


def _kinds() -> dict[str, dict[str, Any]]:
    found: dict[Any, str] = {}
    configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    for name, config in configs.items():
        vision = config["vision_cfg"]
        if not isinstance(vision.get("layers", 0), list):  # a ResNet
            found.setdefault(_signature(config), name)
    return {name: configs[name] for name in found.values()}


KINDS = _kinds()
REFUSED = [n for n, c in KINDS.items() if _signature(c)[0] in ("convnext", "fastvit", "swin")]
HYBRID = [n for n, c in KINDS.items() if _signature(c)[0] == "vitamin"]
RUN = [n for n in KINDS if n not in (*REFUSED, *HYBRID)]


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    config = json.loads(json.dumps(KINDS[name]))
    vision, kind = config["vision_cfg"], _signature(config)[0]
    size = 48
    if "timm_model_name" in vision:
        tower, size = TIMM[kind]
        vision |= dict(timm_model_name=tower, timm_model_pretrained=False, image_size=size)
    else:
        vision |= SMALL
        if "attn_pooler_heads" in vision:
            vision["attn_pooler_heads"] = 2
    text = {k: v for k, v in config["text_cfg"].items() if not k.startswith("hf_")} | TEXT
    settings = dict(embed_dim=32, vision_cfg=vision, text_cfg=text, quick_gelu=config.get("quick_gelu", False))
    torch.manual_seed(0)
    if "multimodal_cfg" in config:
        decoder = dict(context_length=8, vocab_size=60, width=32, heads=2, layers=1, attn_pooler_heads=2)
        model = open_clip.CoCa(**settings, multimodal_cfg=decoder)
    else:
        model = (open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP)(**settings)
    with torch.no_grad():
        for p in model.parameters():  # some are left uninitialised
            if p.dim() > 1:
                p.normal_(std=0.08)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    words = torch.randint(1, 59, (2, 8), generator=torch.Generator().manual_seed(2))
    words[:, -1] = 59
    return model.eval(), images, words


def outputs(model: nn.Module, images: Tensor, words: Tensor) -> dict[str, Tensor]:
    got = model(images, words)
    found = got if isinstance(got, dict) else dict(zip(("image", "text", "scale"), got, strict=False))
    return {k: v for k, v in found.items() if isinstance(v, Tensor)}


@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_runs_forward(name: str) -> None:
    model, images, words = build(name)
    want = outputs(model, images, words)
    with tr.patched(model, tr.ToMe(r=0)):
        same = outputs(model, images, words)
    assert all(torch.equal(same[k], want[k]) for k in want)
    for method in ("tome:r=4", "evit:keep=0.7", "uniform:keep=0.5"):
        with tr.patched(model, method):
            with tr.record(model, flops=False) as trace:
                got = outputs(model, images, words)
            alone = outputs(model, images[1:], words[1:])
        assert any(step.plan is not None for step in trace.steps)
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
        image = next(k for k in got if "image" in k)
        assert torch.isfinite(got[image]).all()
        assert not torch.equal(got[image], want[image])
        torch.testing.assert_close(got[image][1:], alone[image], rtol=1e-4, atol=1e-5)
    again = outputs(model, images, words)
    assert all(torch.equal(again[k], want[k]) for k in want)


@pytest.mark.parametrize("name", REFUSED)
def test_hierarchical_towers_are_refused(name: str) -> None:
    import timm

    with torch.device("meta"):
        trunk = timm.create_model(KINDS[name]["vision_cfg"]["timm_model_name"])
    with pytest.raises(TypeError, match="hierarchical model"):
        tr.patch(trunk, tr.ToMe(r=2))
