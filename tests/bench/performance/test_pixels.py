"""What methods on pixels cost themselves is measured on the work that a patched tower does."""

from __future__ import annotations

import pytest
import torch

import tokenreduce as tr
from tokenreduce.bench.performance import pixels


def _qwen():
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Tower

    torch.manual_seed(0)
    return Tower(
        Qwen2_5_VLVisionConfig(
            depth=1,
            hidden_size=32,
            num_heads=2,
            intermediate_size=32,
            out_hidden_size=16,
            fullatt_block_indexes=[0],
        )
    ).eval()


def _vit():
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=112, depth=1, num_classes=0).eval()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("spec", ["pixelprune", "pixelprune:keep=0.5"])
@torch.no_grad()
def test_the_work_is_that_of_a_patched_tower(spec, packed):
    """The plan that is timed is the one that the tower makes of the same image."""
    image = pixels.images(112)["screen"]
    stays = pixels.work(spec, image, packed)().places()
    assert 0 < int(stays.sum()) < stays.numel()
    model = _qwen() if packed else _vit()
    given = (pixels.rows_of(image), torch.tensor([[1, 8, 8]])) if packed else (image[None],)
    with tr.patched(model, spec), tr.record(model, flops=False) as trace:
        model(*given)
    places = trace.plan.places()[:, 0 if packed else 1 :]
    assert torch.equal(places, stays)


def test_every_method_is_measured_on_every_image_in_both_ways():
    lines = pixels.measure(["pixelprune", "pixel-diff"], rounds=1, side=112)
    assert [line[:3] for line in lines] == [
        [spec, name, way]
        for name in ("photograph", "screen")
        for spec in ("pixelprune", "pixel-diff")
        for way in ("images of 16 x 16 patches", "rows of 28 x 28 units, each twice")
    ]
    assert all(line[3].endswith("%") and float(line[4].split()[0]) >= 0 for line in lines)
