"""Words of the second world as token ids, and as a real transformers tokenizer and processor.

The words of the first world keep their ids, so its embeddings can be taken over row by row.
"""

from __future__ import annotations

from typing import Any

from tokenreduce.zoo import world_words as first
from tokenreduce.zoo.world2.vocabulary import CANVAS, WORDS

__all__ = ["IDS", "SIZE", "clip_tokenizer", "encode", "processor"]

#: Token id of every word.
IDS = {word: i for i, word in enumerate((*first.SPECIAL, *WORDS))}
#: Rows of the embedding table, some of them free.
SIZE = -(-(len(IDS) + 8) // 16) * 16

assert all(IDS[word] == i for word, i in first.IDS.items())


def encode(text: str) -> list[int]:
    """Token ids of a text whose words are all known (``KeyError`` otherwise); no special tokens are added."""
    return [IDS[word] for word in text.split()]


def processor() -> Any:
    """The ``LlavaProcessor`` of ``world-llava-2``: "<image> what color is the star" and a picture.

    Its chat template writes just that: a placeholder for each picture of a turn, and the question.
    """
    from transformers import LlavaProcessor

    from tokenreduce.zoo.world_vit import PATCH

    return LlavaProcessor(
        first.image_processor(CANVAS), first.tokenizer(IDS, 4096), patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=first.TEMPLATE,
    )  # fmt: skip


def clip_tokenizer(end: int) -> Any:
    """The tokenizer of ``world-clip-2``: the same ids, ``<bos>`` in front, and a token ``<end>`` with the id ``end``
    behind; padding to the right, of which the causal tower sees nothing."""
    from tokenizers import processors

    made = first.tokenizer({**IDS, "<end>": end})
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <end>", special_tokens=[("<bos>", first.BOS), ("<end>", end)]
    )
    made.eos_token, made.padding_side, made.model_max_length = "<end>", "right", 64
    return made
