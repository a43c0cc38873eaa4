"""Conversations with several turns, on the cache of the first."""

from __future__ import annotations

import pytest
import torch
from vlms import VLMS, prompts

from tokenreduce.adapters.language.generation import cache_as, cache_of

ROWS = {"alone": (((9, "i"),), ((6, "i"),)), "padded": (((9, "i"), (5, "ii")), ((6, "i"), (4, "i")))}


def call(model, cache, turn):
    with torch.no_grad():
        out = model(**turn, use_cache=True, **({} if cache is None else cache_as(model, cache)))
    return cache_of(out), out.logits


def talk(model, turns, cache=None):
    """Logits of every turn."""
    logits = []
    for turn in turns:
        cache, made = call(model, cache, turn)
        logits.append(made)
    return logits


def stock_talks(model, turns):
    """Skip where a release's own model fails on these turns (Gemma 3 with new images in early ones)."""
    try:
        talk(model, turns)
    except RuntimeError as error:
        pytest.skip(f"the stock model of this release fails: {error}")


def conversation(name, rows, more):
    """A prompt with images, a turn with a new image, and one token more, with what the family says of its tokens."""
    vlm = VLMS[name]
    first, second = prompts(vlm, rows), prompts(vlm, more)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    length = first["attention_mask"].shape[1]
    longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    third = {"input_ids": torch.full((len(rows), 1), 17), "attention_mask": longer}
    place = (longer.cumsum(1) - 1).clamp(min=0) + int(name.startswith("pali"))
    if vlm.types == "mm_token_type_ids":  # positions are places in images
        place = place.expand(4, -1, -1)
    second["attention_mask"] = mask
    types = "token_type_ids"
    if types in first:  # read by position
        second[types] = torch.cat([first[types], second[types]], 1)
    if vlm.types == "mm_token_type_ids":
        del first[vlm.types], second[vlm.types]
    at = (slice(0, length), slice(length, -1), slice(-1, None))
    return [{**turn, "position_ids": place[..., s]} for turn, s in zip((first, second, third), at, strict=True)]
