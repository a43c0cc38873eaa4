"""CLIP as a source of text evidence: patches of a vision tower and the question in one joint space.

A model such as LLaVA has the vision tower of a CLIP checkpoint, but neither its text tower nor its projections. Methods
that compare patches with the question (TRIM, CDPruner) name that checkpoint; it is loaded when first used, without its
vision tower, in float32, once per device. ``world-clip-2`` ships with the package.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.common.known_words import check_words

__all__ = ["ANSWER_FORMATS", "JointSpace", "joint_space", "question_texts"]

#: What the evaluation scripts of LLaVA write behind a question; relevance is about the question alone.
ANSWER_FORMATS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
LONG = ("wrap", "cut", "truncate")
#: The models that ship with the package: above this room, so that they are found by name when one may be meant.
ZOO = "tokenreduce.zoo"


@dataclass(frozen=True, eq=False)
class JointSpace:
    """The parts of a CLIP model that lead into its joint space of E dimensions; made by :func:`joint_space`.

    Args:
        name: Hub id, folder or embedded model.
        norm, visual: post-layernorm of the vision tower and the projection of its features.
        text, textual: text tower and the projection of its pooled output.
        tokenizer: its tokenizer.
        length: tokens that the text tower takes, 77 in OpenAI's models.
        sign: -1 where patches answer a text inversely, as those of the published models, 1 where they were taught to
            answer it (``patch_sign`` in the config).
        patch: of an embedded model, the patch embedding of its vision tower, by which the tower is known.
    """

    name: str
    norm: nn.LayerNorm
    visual: nn.Linear
    text: nn.Module
    textual: nn.Linear
    tokenizer: Any
    length: int
    sign: int = -1
    patch: Tensor | None = None

    @torch.no_grad()
    def patches(self, features: Tensor) -> Tensor:
        """(V,N,C) hidden states of the vision tower, as they enter the projector and without class token, to (V,N,E)
        float32 in the joint space; not normalised.

        Raises ``ValueError`` when C is another width than that of this CLIP model's vision tower.
        """
        width = self.visual.in_features
        if features.shape[-1] != width:
            raise ValueError(
                f"clip={self.name!r} has a vision tower of width {width}, but the model's features have "
                f"{features.shape[-1]}: name the CLIP model that its vision tower was taken from, or set clip=None for "
                f"relevance in the space of the language model"
            )
        with torch.autocast(features.device.type, enabled=False):
            out: Tensor = self.visual(self.norm(features.float()))
        return out

    @torch.no_grad()
    def texts(self, questions: Sequence[str], long: str = "wrap") -> tuple[Tensor, Tensor]:
        """Questions to (B,M,E) float32, one row per segment of the longest question, zero where a question has fewer,
        and (B,M) bool which rows are there. Not normalised. An empty question has none.

        ``long`` says what happens to questions of more tokens than the text tower takes (all three agree on others):

        - "wrap" cuts between the start and the end token and gives each segment its own pair, so that each is a
          sentence to the tower; the first one is what "truncate" leaves;
        - "cut" is CDPruner's code (arXiv 2506.10967): cut behind every 77th token, the start token in the first
          segment and the end token in the last. The tower pools at the end token, so the others are rather arbitrary;
        - "truncate" leaves the first segment, as TRIM's code (arXiv 2409.10994).

        Raises ``ValueError`` for another ``long``, and for a word that a tokenizer of whole words does not know.
        """
        if long not in LONG:
            raise ValueError(f"long is one of {LONG}, not {long!r}")
        rows = [self._segments(q, long) if q.strip() else [] for q in questions]
        device, flat = self.visual.weight.device, [s for row in rows for s in row]
        valid = torch.zeros(len(rows), max([1, *map(len, rows)]), dtype=torch.bool, device=device)
        out = torch.zeros(*valid.shape, self.textual.out_features, device=device)
        for b, row in enumerate(rows):
            valid[b, : len(row)] = True
        if flat:
            # Filled up with 0, an ordinary token: attention is causal, so nothing before the end token sees it.
            longest = max(map(len, flat))
            ids = torch.tensor([s + [0] * (longest - len(s)) for s in flat], device=device)
            with torch.autocast(device.type, enabled=False):
                out[valid] = self.textual(self.text(input_ids=ids).pooler_output)
        return out, valid

    def _segments(self, question: str, long: str) -> list[list[int]]:
        check_words(self.tokenizer, question, f"clip={self.name!r}")
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        # Length is our matter: the tokenizer would warn about long questions.
        ids = self.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.length - 2
        if long == "cut":
            ids = [start, *ids, end]
            return [ids[i : i + self.length] for i in range(0, len(ids), self.length)]
        pieces = [ids[i : i + room] for i in range(0, max(len(ids), 1), room)]
        return [[start, *piece, end] for piece in (pieces if long == "wrap" else pieces[:1])]


def joint_space(name: str, device: torch.device | str = "cpu") -> JointSpace:
    """The joint space of the CLIP model ``name``, an embedded one (``world-clip-2``), a Hub id or a folder, on
    ``device``; loaded once and kept.

    Raises ``ValueError`` when there is no CLIP model with text tower and tokenizer under that name, ``ImportError``
    without transformers, ``OSError`` for damaged embedded weights.
    """
    return _load(name, str(torch.device(device)))


@functools.lru_cache(maxsize=4)
def _load(name: str, device: str) -> JointSpace:
    try:
        from transformers import CLIPModel
    except ImportError as error:
        raise ImportError("the setting clip needs transformers: pip install 'tokenreduce[hf]'") from error
    wanted = (
        "give the Hub id or the folder of a transformers CLIPModel, with text tower and tokenizer, such as "
        "clip=openai/clip-vit-large-patch14-336, or clip=world-clip-2, which ships with the package"
    )
    patch = None
    zoo = importlib.import_module(ZOO)
    if name in zoo.names():
        made = zoo.load(name)
        if not isinstance(made.model, CLIPModel):
            raise ValueError(f"clip={name!r} is an embedded {type(made.model).__name__}, not a CLIPModel; {wanted}")
        model, tokenizer = made.model, made.tokenizer
        patch = model.vision_model.embeddings.patch_embedding.weight.detach().clone()
    else:
        model, tokenizer = _stored(name, wanted)
    model = model.eval().requires_grad_(False)
    # The vision tower itself is not among the parts, and its memory is given back.
    parts = (model.vision_model.post_layernorm, model.visual_projection, model.text_model, model.text_projection)
    norm, visual, text, textual = (part.to(device) for part in parts)
    return JointSpace(
        name, norm, visual, text, textual, tokenizer, model.config.text_config.max_position_embeddings,
        int(getattr(model.config, "patch_sign", -1)), patch,
    )  # fmt: skip


def _stored(name: str, wanted: str) -> tuple[Any, Any]:
    """Model and tokenizer from a folder or the Hub; ``wanted`` ends the messages of errors."""
    from transformers import AutoConfig, AutoTokenizer, CLIPModel

    where = (
        "the folder lacks a file" if Path(name).is_dir() else "there is no such folder, and no such model on the Hub"
    )
    absent = f"clip={name!r} cannot be loaded ({where}, or it cannot be reached); {wanted}"
    try:
        kind = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:  # the library says ValueError for a folder that tells no type
        raise ValueError(absent) from error
    if kind != "clip":
        raise ValueError(f"clip={name!r} is a model of type {kind!r}, not 'clip'; {wanted}")
    try:
        loaded: Any = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        # Not CLIPTokenizer: it would read the words of world-clip-2, saved to a folder, as letters.
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(absent) from error
    model, info = loaded
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what the library makes of no files
        raise ValueError(f"clip={name!r} has no tokenizer; {wanted}")
    needed = ("text_model.", "text_projection.", "visual_projection.", "vision_model.post_layernorm.")
    missing = sorted(k for k in info["missing_keys"] if k.startswith(needed))
    if missing:
        raise ValueError(f"clip={name!r} lacks weights: {', '.join(missing[:4])}; {wanted}")
    return model, tokenizer


def question_texts(
    input_ids: Tensor, columns: Tensor, tokenizer: Any, drop: Sequence[str] = ANSWER_FORMATS
) -> list[str]:
    """The questions of a batch of prompts as text, one per sample; "" where there is none.

    Args:
        input_ids: (B,L) of the prompts.
        columns: (B,L) bool, which tokens are of the question: no padding, no template, no visual tokens. Stretches
            that are apart (text before and behind an image) are joined by a space.
        tokenizer: that of the language model; its special tokens are left out.
        drop: what is cut off at the end of a question.

    Raises ``ValueError`` when the shapes differ.
    """
    if input_ids.shape != columns.shape or input_ids.dim() != 2:
        shapes = f"{tuple(input_ids.shape)} and {tuple(columns.shape)}"
        raise ValueError(f"input_ids and columns are both (batch, length), not {shapes}")
    out = []
    for ids, there in zip(input_ids, columns.bool(), strict=True):
        at = there.nonzero().flatten()
        starts = ((at[1:] - at[:-1]) > 1).nonzero().flatten() + 1
        runs = ids[at].tensor_split(starts.cpu())
        parts = [tokenizer.decode(run.tolist(), skip_special_tokens=True).strip() for run in runs]
        text = " ".join(p for p in parts if p)
        for ending in drop:
            text = text.removesuffix(ending).rstrip()
        out.append(text)
    return out
