"""Words of the world as token ids, and as a real transformers tokenizer and processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenreduce.zoo.world.vocabulary import CANVAS, WORDS

__all__ = [
    "BOS",
    "EOS",
    "IDS",
    "IMAGE",
    "PAD",
    "SIZE",
    "TEMPLATE",
    "UNKNOWN",
    "encode",
    "image_processor",
    "processor",
    "tokenizer",
]

#: Turns of a chat as the model was trained to read them, images first: no role, no mark of an answer.
TEMPLATE = (
    "{% for turn in messages %}{% if turn.content is string %}{{ turn.content }}{% else %}"
    "{% for part in turn.content %}{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
PAD, BOS, EOS, UNKNOWN, IMAGE = range(5)
#: Token id of every word.
IDS = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
#: Rows of the embedding table, some of them free.
SIZE = -(-len(IDS) // 16) * 16


def encode(text: str) -> list[int]:
    """Token ids of a text whose words are all known (``KeyError`` otherwise); no special tokens are added."""
    return [IDS[word] for word in text.split()]


def tokenizer(ids: Mapping[str, int] = IDS, longest: int = 2048) -> Any:
    """A ``PreTrainedTokenizerFast`` of the words ``ids``: lower case, one token per word, "?" ignored, ``<bos>`` put in
    front; it warns of more than ``longest`` tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(dict(ids), unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", " ")])
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def image_processor(side: int = CANVAS) -> Any:
    """A ``CLIPImageProcessor`` that does what :class:`~tokenreduce.zoo.world_vit.WorldTransform` does, for pictures of
    ``side`` x ``side``."""
    from transformers import CLIPImageProcessor

    from tokenreduce.zoo.world_vit import MEAN, STD

    return CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=[MEAN] * 3,
        image_std=[STD] * 3, do_convert_rgb=True,
    )  # fmt: skip


def processor() -> Any:
    """The ``LlavaProcessor`` of ``world-llava``: "<image> what color is the star" and a picture.

    Its chat template writes just that: a placeholder for each picture of a turn, and the question.
    """
    from transformers import LlavaProcessor

    from tokenreduce.zoo.world_vit import PATCH

    return LlavaProcessor(
        image_processor(), tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
