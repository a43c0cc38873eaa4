"""Folders that servers load, read back by transformers."""

from __future__ import annotations

import pytest
import torch

from tokenreduce.integrations.vllm.source import config_of, source_of
from tokenreduce.integrations.vllm.stand_in import save_stand_in

transformers = pytest.importorskip("transformers")


def test_the_stand_in_has_the_names_of_published_checkpoints(tmp_path):
    from safetensors import safe_open

    folder = save_stand_in(tmp_path / "model", layers=1, width=64, image=28)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert any(name.startswith("vision_tower.vision_model.encoder.layers.0.") for name in names), sorted(names)[:4]
    assert any(name.startswith("language_model.model.layers.0.") for name in names), sorted(names)[:4]
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.dtype == torch.bfloat16
    processor = transformers.AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    )
    assert processor.tokenizer(text)["input_ids"][0] == model.config.image_token_id


def test_the_embedded_model_is_written_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENREDUCE_CACHE", str(tmp_path))
    source = source_of("world-llava")
    config = transformers.AutoConfig.from_pretrained(source)
    assert config.text_config.architectures == ["LlamaForCausalLM"]
    assert config.model_type == config_of("world-llava").model_type == config_of(source).model_type
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "serve").glob("*/*")}
    assert source_of("world-llava") == source
    assert before == {f.name: f.stat().st_mtime_ns for f in (tmp_path / "serve").glob("*/*")}
    assert not list((tmp_path / "serve").glob(".*"))
