"""Real photographs from scikit-image in every form that a data set may have, and tiny models that read them."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import skimage.data
from PIL import Image

#: class -> photograph; sorted, as folders are
PHOTOS = ("camera", "chelsea", "coffee", "rocket")
WNIDS = ("n01440764", "n02123045", "n07930864", "n04266014")  # tench, tabby, cup, space shuttle


@functools.cache
def photo(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)())


def crop(name: str, i: int, side: int = 80) -> Image.Image:
    """The i-th square of a photograph, never the same twice."""
    image = photo(name)
    x, y = (i * 37) % (image.width - side), (i * 23) % (image.height - side)
    return image.crop((x, y, x + side, y + side))


def encoded(name: str, i: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    crop(name, i).save(out, kind)
    return out.getvalue()


def image_folder(root: Path, per_class: int = 4, names: tuple[str, ...] = PHOTOS) -> Path:
    """``root/name/0.jpg`` ...: one class per photograph."""
    for name, source in zip(names, PHOTOS, strict=False):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            (root / name / f"{i}.jpg").write_bytes(encoded(source, i))
    return root


def bomb() -> bytes:
    """A small PNG that claims 20,000 x 20,000 pixels."""
    out = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(out, "PNG")
    return out.getvalue()


def tiny_clip(folder: Path, name: str = "tiny-clip") -> str:
    """Register an open_clip model of 32 px with two layers per tower; returns its name."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    return name


_VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)


def _processor(folder: Path, kind: str) -> None:
    import transformers

    size = {"shortest_edge": 32} if kind == "CLIPImageProcessor" else {"height": 32, "width": 32}
    crops = {"crop_size": {"height": 32, "width": 32}} if kind == "CLIPImageProcessor" else {}
    getattr(transformers, kind)(size=size, **crops).save_pretrained(folder)


def hf_classifier(folder: Path, labels: tuple[str, ...] = PHOTOS) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    names = dict(enumerate(labels))
    ViTForImageClassification(ViTConfig(**_VISION, id2label=names)).save_pretrained(folder)
    _processor(folder, "ViTImageProcessor")
    return folder


def hf_backbone(folder: Path) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    settings = {k: v for k, v in _VISION.items() if k != "intermediate_size"}
    Dinov2Model(Dinov2Config(**settings)).save_pretrained(folder)
    _processor(folder, "CLIPImageProcessor")
    return folder


def hf_clip(folder: Path) -> Path:
    """A CLIP with a character-level tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    text = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=24
    )
    words = [*(chr(c) for c in range(33, 127)), *(chr(c) + "</w>" for c in range(33, 127))]
    vocabulary = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    text |= dict(vocab_size=len(vocabulary), bos_token_id=len(words), eos_token_id=len(words) + 1)
    folder.mkdir(parents=True, exist_ok=True)
    CLIPModel(CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16)).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")).save_pretrained(folder)
    _processor(folder, "CLIPImageProcessor")
    return folder


TIMM = "timm:vit_tiny_patch16_224?pretrained=false&img_size=32&patch_size=8&depth=3&embed_dim=48"
