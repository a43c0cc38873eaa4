"""Models by name, with the transform and the class names that belong to them.

========================================  ==================================================================
``digits-vit``, ``world-vit``             the embedded ViTs for handwritten digits and for generated scenes
``timm:NAME``                             ``timm.create_model``; ``NAME@FILE`` a local checkpoint, ``NAME@FOLDER``
                                          a folder with ``config.json`` and weights
``open_clip:NAME/TAG``                    zero-shot classification; TAG as open_clip has it (also a file)
``hf:ID`` or ``hf:FOLDER``                transformers: image classifiers, CLIP and SigLIP (zero-shot), backbones
========================================  ==================================================================

Options follow a question mark: ``timm:vit_tiny_patch16_224?pretrained=false&img_size=64``. Random weights
(``pretrained=false``, an empty TAG) are drawn from ``seed``, 0 by default, so that two runs see one model.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tokenreduce.bench import zeroshot
from tokenreduce.common.images import as_rgb

__all__ = ["KINDS", "Loaded", "load_model"]

Transform = Callable[[Image.Image], Tensor]
#: Embedded classifiers and the size of their input.
EMBEDDED = {"digits-vit": (1, 28, 28), "world-vit": (3, 112, 112)}
#: What a model name may start with, for messages.
KINDS = (
    *EMBEDDED,
    "timm:NAME[@CHECKPOINT]",
    "open_clip:NAME/TAG",
    "hf:ID_OR_FOLDER",
)


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be evaluated.

    Attributes:
        model: in eval mode; what :func:`tokenreduce.patch` takes (all of a CLIP, of which the vision part is patched).
        kind: "classifier" (outputs are logits), "zero-shot" (image features against class prompts) or "features".
        transform: a PIL image to a tensor of ``input_size`` (C,H,W).
        num_classes: outputs, or classes of a zero-shot classifier; 0 where there are none (yet).
        labels: names of the classes in order, where they are known.
        wnids: WordNet ids of the outputs, for ImageNet models.
        forward: ``forward(model, x)`` runs a model with this one's architecture.
        encode: texts to (n, C) features, for zero-shot models.
        templates: name of the prompt templates.
        classifier: (C, classes) of a zero-shot model that knows its classes.
        notes: what a report should say about the model.
    """

    model: nn.Module = field(repr=False)
    name: str
    kind: Literal["classifier", "zero-shot", "features"]
    transform: Transform = field(repr=False)
    input_size: tuple[int, int, int]
    num_classes: int = 0
    labels: tuple[str, ...] | None = field(default=None, repr=False)
    wnids: tuple[str, ...] | None = field(default=None, repr=False)
    forward: Callable[[nn.Module, Tensor], Tensor] = field(default=nn.Module.__call__, repr=False)
    encode: Callable[[list[str]], Tensor] | None = field(default=None, repr=False)
    templates: str = "openai"
    classifier: Tensor | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def predict(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """(B,C,H,W) to logits (B,classes), or features (B,D) where ``kind`` says so.

        ``model`` stands for ``self.model`` (a copy of it). Raises ``ValueError`` for a zero-shot model without classes.
        """
        out = self.forward(self.model if model is None else model, x)
        if self.kind != "zero-shot":
            return out
        if self.classifier is None:
            raise ValueError(f"{self.name} is a zero-shot model and has no classes yet; call with_classes(names)")
        return 100 * F.normalize(out.float(), dim=-1) @ self.classifier

    def with_classes(self, names: Sequence[str]) -> Loaded:
        """A zero-shot model with prompts for ``names``; a classifier whose outputs are called that.

        Raises ``ValueError`` where a classifier has another number of outputs.
        """
        labels = tuple(names)
        if self.kind == "classifier" and len(labels) != self.num_classes:
            raise ValueError(
                f"{self.name} has {self.num_classes} outputs but {len(labels)} class names were given; "
                "give one name per output, in order"
            )
        if self.kind != "zero-shot":
            return replace(self, labels=labels)
        assert self.encode is not None
        made = zeroshot.classifier(self.encode, labels, zeroshot.templates(self.templates))
        return replace(self, labels=labels, num_classes=len(labels), classifier=made)


def load_model(
    name: str, device: torch.device | str = "cpu", classes: str | Path | Sequence[str] | None = None
) -> Loaded:
    """A model by name (see the module's page) on ``device``.

    ``classes`` names the classes: a sequence, a text file with one name per line, or ``imagenet``.

    Raises ``ValueError`` for unknown kinds, models, tags and options, ``OSError`` for weights that are not there or
    damaged (no network, wrong file), ``ImportError`` naming the extra for a missing library.
    """
    kind, colon, body = name.partition(":")
    loaders = {"timm": _timm, "open_clip": _open_clip, "hf": _hf}
    if name in EMBEDDED:
        loaded = _embedded(name, device)
    elif not colon or kind not in loaders or not body:
        raise ValueError(f"unknown model {name!r}; write one of: {', '.join(KINDS)}{_hint(name)}")
    else:
        source, _, text = body.partition("?")
        loaded = loaders[kind](name, source, _options(name, text), torch.device(device))
    names = zeroshot.read_classes(classes)
    return loaded if names is None else loaded.with_classes(names)


def _hint(name: str) -> str:
    if Path(name).expanduser().is_dir():
        return f" (for a transformers folder: hf:{name})"
    kind = difflib.get_close_matches(name.partition(":")[0], [*EMBEDDED, "timm", "open_clip", "hf"], 1)
    return f" (did you mean {kind[0]}?)" if kind and kind[0] != name else ""


# -- helpers -----------------------------------------------------------------------------------------------------------
def _options(name: str, text: str) -> dict[str, Any]:
    """``img_size=64&pretrained=false`` to values; numbers, true, false and none are read as such."""
    out: dict[str, Any] = {}
    words = {"true": True, "false": False, "none": None}
    for item in filter(None, text.split("&")):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"cannot read the option {item!r} in {name!r}; write ?option=value&option=value")
        try:
            out[key] = words[value.lower()] if value.lower() in words else json.loads(value)
        except ValueError:
            out[key] = value
    return out


def _known(name: str, options: dict[str, Any], valid: tuple[str, ...]) -> None:
    for key in options:
        if key not in valid:
            raise ValueError(f"{name!r}: unknown option {key!r}; valid options: {', '.join(valid)}")


def _library(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install 'tokenreduce[{extra}]'") from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights from ``seed``; the caller's random numbers stay where they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else type(error).__name__
    return text if len(text) < 400 else text[:400] + "..."


def _unavailable(name: str, error: BaseException, fix: str) -> OSError:
    return OSError(f"cannot load the weights of {name}: {_first(error)} Fix: {fix}")


_NETWORK = "check the network, or load it once where there is one (the hub's cache is used afterwards)"


@dataclass(frozen=True)
class _Converted:
    """``inner`` on the image in colour ``mode``; a class, so that worker processes can pickle it."""

    mode: str
    inner: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        return self.inner(as_rgb(image).convert(self.mode))


def _input_size(transform: Transform) -> tuple[int, int, int]:
    c, h, w = transform(Image.new("RGB", (96, 96))).shape
    return int(c), int(h), int(w)


# -- embedded ----------------------------------------------------------------------------------------------------------
def _embedded(name: str, device: torch.device | str) -> Loaded:
    from tokenreduce import zoo

    z = zoo.load(name, device=device)
    return Loaded(z.model, name, "classifier", z.transform, EMBEDDED[name], len(z.labels), z.labels)


# -- timm --------------------------------------------------------------------------------------------------------------
def _timm(name: str, source: str, options: dict[str, Any], device: torch.device) -> Loaded:
    timm = _library("timm", "timm")
    importlib.import_module("timm.data")
    pretrained, seed = options.pop("pretrained", True), options.pop("seed", 0)
    at = "" if source.startswith("hf-hub:") else source.partition("@")[2]
    model_name = source.partition("@")[0] if at else source
    checkpoint: dict[str, Any] = {}
    if at:
        path = Path(at).expanduser()
        if not path.exists():
            raise OSError(f"{name}: there is no checkpoint {path}; give a file, or a folder with config.json")
        if path.is_dir():
            model_name, pretrained = _timm_folder(name, model_name, path), True
        else:
            checkpoint, pretrained = {"checkpoint_path": str(path)}, False
    if ":" not in model_name and not timm.is_model(model_name.partition(".")[0]):
        close = difflib.get_close_matches(model_name.partition(".")[0], timm.list_models(), 3, 0.6)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models('*vit*') lists them"
        raise ValueError(f"timm has no model {model_name!r}; {hint}")
    try:
        with _seeded(seed):
            model = timm.create_model(model_name, pretrained=pretrained, **checkpoint, **options)
    except TypeError as error:
        given = ", ".join(options) or "none"
        raise ValueError(f"{name}: timm does not take these options ({given}): {_first(error)}") from error
    except Exception as error:
        if "pretrained tag" in str(error):
            tags = ", ".join(timm.list_pretrained(model_name.partition(".")[0] + ".*")) or "none"
            raise ValueError(f"{name}: {_first(error)} Names with weights: {tags}") from error
        if checkpoint:
            fix = "give a checkpoint of this architecture; ?num_classes=N when its head has N classes"
        elif "No pretrained weights" in str(error):
            fix = f"timm:{model_name}@FILE, or timm:{model_name}?pretrained=false for random weights"
        else:
            fix = f"{_NETWORK}, give a local file (timm:{model_name}@FILE), or ?pretrained=false for random weights"
        raise _unavailable(name, error, fix) from error
    classes = int(getattr(model, "num_classes", 0))
    subset = timm.data.infer_imagenet_subset(model) if classes else None
    wnids = tuple(timm.data.ImageNetInfo(subset).label_names()) if subset else None
    if wnids is not None and len(wnids) != classes:
        wnids = None
    known = model.pretrained_cfg.get("label_names")
    labels = tuple(known) if known and len(known) == classes else None
    if labels is None and wnids is not None:
        labels = tuple(timm.data.ImageNetInfo(subset).label_descriptions())
    transform, size = _timm_transform(timm, model)
    random = not pretrained and not checkpoint
    return Loaded(
        model.eval().to(device), name, "classifier" if classes else "features", transform, size, classes, labels, wnids,
        notes=(f"random weights (seed {seed})",) if random else (),
    )  # fmt: skip


def _timm_folder(name: str, model_name: str, path: Path) -> str:
    try:
        architecture = json.loads((path / "config.json").read_text(encoding="utf-8"))["architecture"]
    except (OSError, ValueError, KeyError) as error:
        raise OSError(
            f"{name}: {path} has no config.json with an architecture (timm.models.push_to_hf_hub and "
            "save_for_hf write one); give the weights file itself instead"
        ) from error
    if architecture != model_name.partition(".")[0]:
        raise ValueError(f"{name}: {path} holds {architecture}; write timm:{architecture}@{path}")
    return f"local-dir:{path}"


def _timm_transform(timm: ModuleType, model: Any) -> tuple[Transform, tuple[int, int, int]]:
    """The evaluation transform for the size and channels that the model was really built with."""
    config = timm.data.resolve_model_data_config(model)
    embed: Any = getattr(model, "patch_embed", None)
    channels, height, width = config["input_size"]
    if getattr(embed, "img_size", None) is not None:
        height, width = embed.img_size
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = channels if first is None or embed is None else first.in_channels
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels; the model takes {channels}")
    size = (int(channels), int(height), int(width))
    config["input_size"] = size
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    inner = timm.data.create_transform(**config, is_training=False)
    return _Converted("L" if channels == 1 else "RGB", inner), size


# -- open_clip ---------------------------------------------------------------------------------------------------------
def _encode_image(model: Any, x: Tensor) -> Tensor:
    return model.encode_image(x)


@dataclass
class _OpenClipText:
    """Texts to features; the tokenizer is fetched when first used, since some need a download."""

    model: Any
    name: str
    device: torch.device
    tokenizer: Any = None

    def __call__(self, texts: list[str]) -> Tensor:
        if self.tokenizer is None:
            import open_clip

            try:
                self.tokenizer = open_clip.get_tokenizer(self.name)
            except Exception as error:
                raise OSError(f"cannot load the tokenizer of {self.name}: {_first(error)} Fix: {_NETWORK}") from error
        return self.model.encode_text(self.tokenizer(texts).to(self.device))


def _open_clip(name: str, source: str, options: dict[str, Any], device: torch.device) -> Loaded:
    open_clip = _library("open_clip", "open_clip")
    _known(name, options, ("image_size", "templates", "seed"))
    templates = str(options.get("templates", "openai"))
    zeroshot.templates(templates)  # a wrong name fails before the download
    whole = source.startswith(("hf-hub:", "local-dir:"))
    mark = "@" if "@" in source.partition("/")[0] else "/"
    model_name, _, tag = (source, "", "") if whole else source.partition(mark)
    tag = "" if tag == "none" else tag
    if not whole and model_name not in open_clip.list_models():
        close = difflib.get_close_matches(model_name, open_clip.list_models(), 3, 0.5)
        raise ValueError(
            f"open_clip has no model {model_name!r}; "
            + (f"did you mean {' or '.join(close)}?" if close else "open_clip.list_models() lists them")
        )
    tags = [] if whole else open_clip.list_pretrained_tags_by_model(model_name)
    if tag and tag not in tags and not Path(tag).expanduser().is_file():
        raise ValueError(
            f"{name}: {tag!r} is neither a file nor a tag of {model_name}; its tags: {', '.join(tags) or 'none'}"
        )
    seed = options.get("seed", 0)
    try:
        with _seeded(seed):
            model, _, transform = open_clip.create_model_and_transforms(
                model_name,
                pretrained=(str(Path(tag).expanduser()) if tag and tag not in tags else tag) or None,
                force_image_size=options.get("image_size"),
                pretrained_text=False,
                device=device,
            )
    except Exception as error:
        fix = f"{_NETWORK}, or give a local file (open_clip:{model_name}@FILE)"
        raise _unavailable(name, error, fix) from error
    return Loaded(
        model.eval(), name, "zero-shot", _Converted("RGB", transform), _input_size(transform),
        forward=_encode_image, encode=_OpenClipText(model, model_name, device), templates=templates,
        notes=() if tag or whole else (f"random weights (seed {seed})",),
    )  # fmt: skip


# -- transformers ------------------------------------------------------------------------------------------------------
_TWO_TOWERS = ("clip", "siglip", "metaclip_2")


def _hf_logits(model: Any, x: Tensor) -> Tensor:
    return model(pixel_values=x).logits


def _hf_features(model: Any, x: Tensor) -> Tensor:
    out = model(pixel_values=x)
    pooled = getattr(out, "pooler_output", None)
    return out.last_hidden_state[:, 0] if pooled is None else pooled


def _hf_first_token(model: Any, x: Tensor) -> Tensor:
    return model(pixel_values=x).last_hidden_state[:, 0]


def _hf_image_features(model: Any, x: Tensor) -> Tensor:
    out = model.get_image_features(pixel_values=x)
    return out if isinstance(out, Tensor) else out.pooler_output


@dataclass(frozen=True)
class _HfPixels:
    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


@dataclass
class _HfText:
    model: Any
    tokenizer: Any
    device: torch.device
    lower: bool

    def __call__(self, texts: list[str]) -> Tensor:
        # SigLIP was trained on lower-case text padded to full length; CLIP masks its padding, so the same is right.
        texts = [t.lower() for t in texts] if self.lower else texts
        length = self.model.config.text_config.max_position_embeddings
        batch = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        if self.lower:
            batch.pop("attention_mask", None)
        out = self.model.get_text_features(**{k: v.to(self.device) for k, v in batch.items()})
        return out if isinstance(out, Tensor) else out.pooler_output


def _hf(name: str, source: str, options: dict[str, Any], device: torch.device) -> Loaded:
    transformers = _library("transformers", "hf")
    _known(name, options, ("templates",))
    templates = str(options.get("templates", "openai"))
    source = str(Path(source).expanduser()) if Path(source).expanduser().exists() else source

    def get(what: str, function: Callable[..., Any], **kwargs: Any) -> Any:
        try:
            return function(source, **kwargs)
        except ImportError:
            raise
        except Exception as error:
            fix = f"give a folder written by save_pretrained (with its processor), or {_NETWORK}"
            raise OSError(f"cannot load the {what} of {name}: {_first(error)} Fix: {fix}") from error

    config = get("configuration", transformers.AutoConfig.from_pretrained)
    built = tuple(getattr(config, "architectures", None) or ())
    classifies = any(a.endswith("ForImageClassification") for a in built)
    if config.model_type == "siglip2":
        raise ValueError(
            f"{name} takes patches of variable size (SigLIP2 NaFlex), which a batch of images cannot be made of here; "
            "use a checkpoint with fixed resolution"
        )
    image_processor = get("image processor", transformers.AutoImageProcessor.from_pretrained)
    transform = _Converted("RGB", _HfPixels(image_processor))
    if config.model_type in _TWO_TOWERS and not classifies:
        model, _ = _hf_weights(get, transformers.AutoModel, name)
        zeroshot.templates(templates)
        tokenizer = get("tokenizer", transformers.AutoTokenizer.from_pretrained)
        encode = _HfText(model.eval().to(device), tokenizer, device, config.model_type == "siglip")
        return Loaded(
            model, name, "zero-shot", transform, _input_size(transform),
            forward=_hf_image_features, encode=encode, templates=templates,
        )  # fmt: skip
    if classifies:
        model, _ = _hf_weights(get, transformers.AutoModelForImageClassification, name)
        count = int(config.num_labels)
        named = {int(k): str(v) for k, v in (config.id2label or {}).items()}
        labels = tuple(named[i] for i in range(count)) if sorted(named) == list(range(count)) else None
        if labels is not None and all(label == f"LABEL_{i}" for i, label in enumerate(labels)):
            labels = None  # transformers' placeholders
        wnids = _imagenet_ids() if count == 1000 else None
        return Loaded(
            model.eval().to(device), name, "classifier", transform, _input_size(transform), count, labels, wnids,
            forward=_hf_logits,
        )  # fmt: skip
    model, missing = _hf_weights(get, transformers.AutoModel, name, optional=("pooler",))
    forward = _hf_first_token if missing else _hf_features
    return Loaded(model.eval().to(device), name, "features", transform, _input_size(transform), forward=forward)


def _hf_weights(get: Any, kind: Any, name: str, optional: tuple[str, ...] = ()) -> tuple[Any, list[str]]:
    """The model and which of the ``optional`` parts it lacks; anything else missing would be random, hence an error."""
    model, info = get("weights", kind.from_pretrained, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    bad = [key for key in missing if not any(part in key for part in optional)]
    if bad:
        raise OSError(f"{name}: the checkpoint lacks {len(bad)} weights ({', '.join(bad[:4])}...); use a complete one")
    return model, missing


def _imagenet_ids() -> tuple[str, ...] | None:
    """WordNet ids of the 1,000 classes, from timm's table where timm is installed."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return None
    return tuple(ImageNetInfo("imagenet-1k").label_names())
