"""Image/video language models outside the table of families: found by their structure, or an error by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers as hf
from torch import nn
from vlms import encodes_before

import tokenreduce as tr

pytestmark = pytest.mark.skipif(not encodes_before(), reason="earlier releases have no discovered families")

VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)
TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=120, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def _llama() -> Any:
    return hf.LlamaConfig(**TEXT)


def _siglip() -> Any:
    return hf.SiglipVisionConfig(**VISION)


def vip_llava() -> Any:
    vision = hf.CLIPVisionConfig(**VISION)
    config = hf.VipLlavaConfig(vision_config=vision, text_config=_llama(), vision_feature_layers=[-2, -1])
    return hf.VipLlavaForConditionalGeneration(config)


def aya_vision() -> Any:
    return hf.AyaVisionForConditionalGeneration(hf.AyaVisionConfig(vision_config=_siglip(), text_config=_llama()))


def deepseek_vl() -> Any:
    config = hf.DeepseekVLConfig(vision_config=VISION, text_config=_llama(), image_token_id=99)
    return hf.DeepseekVLForConditionalGeneration(config)


def t5gemma2() -> Any:
    from transformers.models.t5gemma2 import configuration_t5gemma2 as t5

    text = TEXT | dict(head_dim=16, layer_types=["full_attention"] * 2)
    encoder = dict(text_config=text, vision_config=VISION, image_token_id=99, mm_tokens_per_image=4)
    return hf.T5Gemma2ForConditionalGeneration(t5.T5Gemma2Config(encoder=encoder, decoder=text, image_token_id=99))


def lfm2_vl() -> Any:
    vision = {k: v for k, v in VISION.items() if k != "image_size"} | dict(num_patches=16)
    text = hf.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"])
    return hf.Lfm2VlForConditionalGeneration(
        hf.Lfm2VlConfig(vision_config=hf.Siglip2VisionConfig(**vision), text_config=text, image_token_id=99)
    )


def mistral3() -> Any:
    vision = hf.PixtralVisionConfig(**VISION)
    return hf.Mistral3ForConditionalGeneration(hf.Mistral3Config(vision_config=vision, text_config=_llama()))


@pytest.mark.parametrize("build", [vip_llava, aya_vision, deepseek_vl, lfm2_vl, mistral3])
@pytest.mark.parametrize("around", [lambda model: model, nn.Sequential])
def test_found_by_structure_with_the_tower(build: Callable[[], Any], around: Callable[[Any], nn.Module]) -> None:
    model = around(build())
    about = tr.describe(model)
    assert about.language.how == "discovered"
    assert about.stages == ("language", "projector", "cache", "encoder")
    assert len(about.towers) == 1
    tr.unpatch(tr.patch(model, "tome@encoder:r=1"))
    assert not any("tokenreduce" in name for m in model.modules() for name in vars(m))


class Peeking(hf.AyaVisionModel):
    """A model of a user's own that looks at tokens between the blocks of its tower."""

    def get_image_features(self, pixel_values: Any, **kwargs: Any) -> Any:
        x = self.vision_tower.embeddings(pixel_values)
        for layer in self.vision_tower.encoder.layers:
            x = layer(x, None)
            self.seen = x.mean(1)
        return x


def test_code_that_looks_into_the_tower_is_named() -> None:
    model = aya_vision()
    model.model.__class__ = Peeking
    assert "encoder" not in tr.describe(model).stages
    with pytest.raises(ValueError, match=r"Peeking.get_image_features reads tokens of its tower between the blocks"):
        tr.patch(model, "tome@encoder:r=1")


@pytest.mark.parametrize("around", [lambda model: model, nn.Sequential])
def test_refused_by_name(around: Callable[[Any], nn.Module]) -> None:
    model = around(t5gemma2())
    calls = [tr.describe] + [lambda m, s=s: tr.patch(m, s) for s in ("tome@encoder:r=1", "fastv:layer=1,keep=0.5")]
    for call in calls:
        with pytest.raises(TypeError, match="T5Gemma2ForConditionalGeneration is not supported: it is an encoder-dec"):
            call(model)
    assert not any("tokenreduce" in name for m in model.modules() for name in vars(m))


def test_earlier_releases_are_told_apart_from_models_without_placeholders(monkeypatch) -> None:
    monkeypatch.delattr(hf.GenerationMixin, "_expand_multimodal_outputs")
    with pytest.raises(TypeError, match=r"VipLlavaForConditionalGeneration is not supported.*5\.18 or newer"):
        tr.patch(vip_llava(), "divprune:keep=0.5")
    tr.patch(hf.CLIPModel(hf.CLIPConfig(vision_config=VISION)), "tome:r=2")  # nothing else is held up


def test_the_inner_model_alone_is_found_too() -> None:
    inner = vip_llava().model
    assert tr.describe(inner).stages == ("projector", "encoder")


def test_a_tower_beside_one_is_no_part_of_it() -> None:
    tower = hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION))
    both = nn.ModuleDict({"tower": tower, "other": mistral3()})
    assert [t.name for t in tr.describe(both).towers] == ["other.model.vision_tower", "tower"]
    tr.patch(both, "tome@encoder:r=1", "divprune:keep=0.5")
    assert [type(r).__name__ for r in tr.describe(both).active] == ["ToMe", "DivPrune"]
    tr.unpatch(both)
    assert not any("tokenreduce" in name for m in both.modules() for name in vars(m))
