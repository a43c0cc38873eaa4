"""Building toy models: small numbers for whatever a config takes, and wide weights, so that small mistakes show."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
from typing import Any

import torch
import transformers

from toys.settings import SETTINGS

IMAGE, VIDEO, OPEN, CLOSE, AUDIO = 99, 98, 97, 96, 95
#: The rows of the table of families, which have tests of their own.
TABLE = (
    "llava", "llava_next", "llava_next_video", "llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
    "internvl", "idefics3", "smolvlm", "paligemma", "gemma3",
)  # fmt: skip
_TEXT_NAMES = ("text_config", "llm_config", "language_config", "language_model_config")
_SMALL = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=120, max_position_embeddings=512, head_dim=8, embed_dim=32, depth=2, num_heads=2, out_hidden_size=32,
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_routed_experts=4,
    moe_num_experts=4, bos_token_id=1, eos_token_id=2, pad_token_id=0, image_size=32, patch_size=4, mlp_dim=64,
    d_model=32, projection_dim=32, num_layers=2, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
    mlp_ratio=2, query_pre_attn_scalar=8, global_head_dim=8, vocab_size_per_layer_input=120, linear_num_key_heads=2,
    linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, shared_expert_intermediate_size=16,
    num_position_embeddings=64, sliding_window=512, text_hidden_size=32, projector_hidden_size=32,
    num_kv_shared_layers=0, hidden_size_per_layer_input=0,
)  # fmt: skip
_VISION = dict(
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16, global_head_dim=16, hidden_size=32,
    intermediate_size=64, embed_dim=32,
)  # fmt: skip
_AUDIO = dict(
    num_hidden_layers=1, hidden_size=32, num_attention_heads=2, d_model=32, encoder_layers=1, encoder_attention_heads=2,
    encoder_ffn_dim=32, output_dim=32,
)  # fmt: skip
_TOP = dict(
    image_token_id=IMAGE, image_token_index=IMAGE, video_token_id=VIDEO, video_token_index=VIDEO,
    vision_start_token_id=OPEN, vision_end_token_id=CLOSE, image_start_token_id=OPEN, image_end_token_id=CLOSE,
    video_start_token_id=94, video_end_token_id=93, boi_token_index=OPEN, eoi_token_index=CLOSE, boi_token_id=OPEN,
    eoi_token_id=CLOSE, audio_token_id=AUDIO, audio_token_index=AUDIO, tie_word_embeddings=False,
)  # fmt: skip
_WIDTHS = ("text_hidden_size", "projector_hidden_size", "projection_dim", "hidden_size")
_OF_TEXT = ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")
#: Parameters above which a toy is none.
_MOST = 60_000_000


def families() -> list[str]:
    """Folders of the installed transformers whose models merge image or video features into a prompt."""
    root = os.path.join(os.path.dirname(transformers.__file__), "models")
    out = []
    for name in sorted(os.listdir(root)):
        path = os.path.join(root, name, f"modeling_{name}.py")
        if os.path.exists(path):
            with open(path) as file:
                code = file.read()
            makes = "def get_image_features" in code or "def get_video_features" in code
            if makes and ("masked_scatter" in code or "get_placeholder_mask" in code):
                out.append(name)
    return out


def outer_class(name: str) -> Any:
    """The model of a folder that a user would load."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    own = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, transformers.PreTrainedModel)]
    own = [c for c in own if c.__module__ == module.__name__]
    ends = ("ConditionalGeneration", "CausalLM", "BlockDiff")
    chats = [c for c in own if hasattr(c, "generate")]
    found = [c for c in chats if any(e in c.__name__ for e in ends) and hasattr(c, "get_image_features")]
    found = found or [c for c in chats if "ConditionalGeneration" in c.__name__]
    return (found or [c for c in own if hasattr(c, "get_image_features")])[-1]


@functools.lru_cache(maxsize=4)
def _config(name: str) -> Any:
    kind, over = outer_class(name).config_class, SETTINGS.get(name, {})
    if name == "neomme":
        return kind(
            vocab_size=120, embedding_rank=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, patch_size=4, embedding_dim=16,
            image_token_id=IMAGE, document_token_id=OPEN, layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
    parts = dict(getattr(kind, "sub_configs", {}) or {})
    if not parts:
        return kind(**{**_numbers(kind, "text", {}), **_numbers(kind, "top", over.get("top", {}))})
    made = {part: _part(kind, part, sub, over) for part, sub in parts.items()}
    made = {part: value for part, value in made.items() if value is not ...}
    return _construct(kind, {**_numbers(kind, "top", over.get("top", {})), **made})


def _part(kind: Any, part: str, sub: Any, over: dict[str, Any]) -> Any:
    """The config of a part, ``...`` where the family leaves it to its default."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    role = "text" if part in _TEXT_NAMES else "audio" if "audio" in part else "vision"
    if part in over.get("types", {}):
        sub = CONFIG_MAPPING[over["types"][part]]
    elif sub.__name__ == "AutoConfig":
        default = getattr(kind(), part, None)
        if default is None:
            return ...
        sub = type(default)
    mine = over.get(part, {})
    if mine is None:
        return None
    numbers = _numbers(sub, role, mine)
    for name, inside in (getattr(sub, "sub_configs", {}) or {}).items():
        if name not in numbers and inside.__name__ != "AutoConfig":
            given = over.get(name, {})
            numbers[name] = _construct(inside, _numbers(inside, "text" if "text" in name else "vision", given))
    return _construct(sub, numbers, set(mine))


def _names(kind: Any) -> set[str]:
    names: set[str] = set()
    for one in kind.__mro__:
        names |= set(getattr(one, "__annotations__", {}))
        if "__init__" in vars(one):
            names |= set(inspect.signature(one.__init__).parameters)
    return names - {"self", "args", "kwargs"}


def _numbers(kind: Any, role: str, over: dict[str, Any]) -> dict[str, Any]:
    """Small numbers for what a config of this ``role`` takes."""
    every = _names(kind)
    names = every - set(getattr(kind, "attribute_map", {}) or {})
    if role == "top":
        out = {k: v for k, v in _TOP.items() if k in every}
        out.update({k: 32 for k in _WIDTHS if k in names})
        return {**out, **({"pad_token_id": 0} if "pad_token_id" in every else {}), **over}
    base = {**_SMALL, **({} if role == "text" else _VISION), **(_AUDIO if role == "audio" else {})}
    gone = () if role == "text" else _OF_TEXT
    gone = (*gone, "max_position_embeddings", "sliding_window") if role == "vision" else gone
    return {**{k: v for k, v in base.items() if k in names and k not in gone}, **over}


def _construct(kind: Any, numbers: dict[str, Any], fixed: Any = ()) -> Any:
    """A config of what its strict fields accept of ``numbers``."""
    for _ in range(20):
        try:
            return kind(**numbers)
        except Exception as error:  # which one depends on the field
            named = re.search(r"for field '(\w+)'", str(error))
            name = named and named.group(1)
            if name is None or name not in numbers or name in fixed:
                raise
            value = numbers.pop(name)
            if isinstance(value, int) and "float" in str(error):
                numbers[name] = float(value)
            elif isinstance(value, int) and ("list" in str(error) or "tuple" in str(error)):
                numbers[name] = [value, value]
    raise ValueError(f"no config of {kind.__name__} from these numbers")


def build(name: str) -> Any:
    """The toy of a folder. Raises where its config does not follow the pattern, or the model is big all the same."""
    kind = outer_class(name)
    torch.manual_seed(0)
    config = _config(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > _MOST:
        raise ValueError(f"the smallest {name} has {size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "mm_input_projection" in key or not torch.isfinite(p).all():
                p.normal_(std=0.2)
            elif p.dim() > 1:
                p.mul_(30.0 if "lm_head" in key else 10.0)
            if p.dim() > 1 and not p.any():
                p.normal_(std=0.2)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def inner_of(model: Any) -> Any:
    """The model that merges features into embeddings."""
    while hasattr(getattr(model, "model", None), "get_image_features"):
        model = model.model
    return model
