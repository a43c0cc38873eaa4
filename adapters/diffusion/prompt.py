"""Composite tokens in the prompt of a diffusers pipeline: what belongs together is attended to as one token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenreduce.algorithms.composite import Group, composite_plan

try:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
except ImportError as error:
    raise ImportError("composite tokens need diffusers: pip install 'tokenreduce[diffusion]'") from error

__all__ = ["composite_embeds"]

Words = str | Sequence[str]


@torch.no_grad()
def composite_embeds(
    pipe: Any,
    prompt: str,
    bind: Mapping[str, Words],
    *,
    noun_weight: float = 1.0,
    attribute_weight: float = 1.0,
    absorbed: str = "zero",
    ends: str | None = None,
) -> dict[str, Tensor]:
    """Embeddings of ``prompt`` in which nouns and what belongs to them are one token each (arXiv 2411.07132).

    Behind the text encoder, the tokens of a noun and of its attributes, or of things that it carries, are summed into
    one composite token at the place of the noun's first, so that they share one cross-attention map. Nothing is trained
    or optimised: the paper's updates of the composite token by two losses in the first steps are not here. ::

        given = composite_embeds(pipe, "a cat with red hat and a dog", {"cat": "red hat"}, ends="a cat and a dog")
        image = pipe(**given).images[0]

    Args:
        pipe: a ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``.
        prompt: one prompt.
        bind: for every noun the words, or several pieces, that belong to it, as they stand in the prompt, each of which
            occurs in it once.
        noun_weight, attribute_weight: factors of the two sums. The paper has a plain sum, its code 1.1 and 1.2.
        absorbed: what becomes of the places of absorbed tokens: "zero" leaves them with an embedding of zeros, as the
            paper's code does, so that they still take a share of attention; "drop" takes them out, so that the prompt
            gets shorter, and positions behind them move up (cross-attention does not see positions).
        ends: end token substitution: the embeddings from the prompt's end token on become those of this shorter prompt,
            the same one without attributes, since end tokens gather what the prompt says of all nouns.

    Returns:
        Arguments for ``pipe``: ``prompt_embeds`` (1,K,C), and ``pooled_prompt_embeds`` of the whole prompt where the
        pipeline has them. The pipeline makes those of the negative prompt, as long as these, by itself.

    Raises ``TypeError`` for another pipeline, and ``ValueError`` for words that are not in the prompt, or more than
    once, or in two groups, prompts that are too long, ``ends`` longer than the prompt, and another ``absorbed``.
    """
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise TypeError(
            f"composite tokens are for StableDiffusionPipeline and StableDiffusionXLPipeline, not {type(pipe).__name__}"
        )
    if absorbed not in ("zero", "drop"):
        raise ValueError(f"absorbed is 'zero' or 'drop', not {absorbed!r}")
    text, spans = _tokens(pipe, prompt)
    groups = [_group(text, spans, noun, words) for noun, words in bind.items()]
    embeds, pooled = _encoded(pipe, prompt)
    if ends is not None:
        last = len(spans) - 1
        if len(_tokens(pipe, ends)[1]) > len(spans):
            raise ValueError(f"ends={ends!r} has more tokens than the prompt; it is the prompt without attributes")
        embeds = torch.cat([embeds[:, :last], _encoded(pipe, ends)[0][:, last:]], 1)
    plan = composite_plan(embeds.shape[1], groups, noun_weight, attribute_weight).to(embeds.device)
    made = plan.reduce(embeds)
    if absorbed == "zero":
        at = plan.representatives().unsqueeze(-1).expand_as(made)
        made = torch.zeros_like(embeds).scatter(1, at, made)
    return {"prompt_embeds": made, **({} if pooled is None else {"pooled_prompt_embeds": pooled})}


def _tokens(pipe: Any, prompt: str) -> tuple[str, list[tuple[int, int]]]:
    """The prompt as it is tokenised, and the characters of each token, of which the first and the last are the start
    and the end. Raises ``ValueError`` for one that is too long."""
    found = []
    for tokenizer in filter(None, (pipe.tokenizer, getattr(pipe, "tokenizer_2", None))):
        text = pipe.maybe_convert_prompt(prompt, tokenizer)
        got = tokenizer(text, return_offsets_mapping=True)
        if len(got["input_ids"]) > tokenizer.model_max_length:
            raise ValueError(
                f"the prompt has {len(got['input_ids'])} tokens, and the text encoder reads "
                f"{tokenizer.model_max_length}: make it shorter"
            )
        found.append((text, [(int(a), int(b)) for a, b in got["offset_mapping"]]))
    if any(other != found[0] for other in found[1:]):
        raise ValueError(f"the two tokenizers of the pipeline split {prompt!r} in different ways")
    return found[0]


def _group(text: str, spans: list[tuple[int, int]], noun: str, words: Words) -> Group:
    pieces = [words] if isinstance(words, str) else list(words)
    return _places(text, spans, noun), [place for piece in pieces for place in _places(text, spans, piece)]


def _places(text: str, spans: list[tuple[int, int]], words: str) -> list[int]:
    """Places of the tokens of ``words``, which occur once as whole words."""
    found = list(re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE)) if words.strip() else []
    if len(found) != 1:
        raise ValueError(
            f"{words!r} occurs {len(found)} times in {text!r}; name words, as they stand there, that occur once"
        )
    begin, end = found[0].span()
    return [i for i, (a, b) in enumerate(spans[1:-1], 1) if a < end and b > begin]


def _encoded(pipe: Any, prompt: str) -> tuple[Tensor, Tensor | None]:
    """(1,L,C) embeddings and, where the pipeline has one, the pooled embedding (1,D)."""
    device = pipe._execution_device
    got = pipe.encode_prompt(prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return got[0], got[2] if len(got) > 2 else None
