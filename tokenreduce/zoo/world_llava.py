"""``world-llava``: a tiny image/video language model that answers questions about the generated world.

A real ``LlavaForConditionalGeneration`` (1.7 M parameters): the tower is ``world-vit``, frozen; a Llama of six layers
reads 196 tokens per picture, and 49 per frame of a clip (:func:`video_inputs`). Trained in stages of growing
difficulty (:data:`STAGES`), on packed questions (:mod:`tokenreduce.zoo.packing`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenreduce.zoo import packing
from tokenreduce.zoo.clip_twin import clip_state
from tokenreduce.zoo.stages import fit_stages
from tokenreduce.zoo.training import Schedule, half
from tokenreduce.zoo.video_inputs import pool
from tokenreduce.zoo.world.vocabulary import MOTIONS
from tokenreduce.zoo.world_batches import pictures
from tokenreduce.zoo.world_lessons import Course, Lesson, lesson
from tokenreduce.zoo.world_vit import CLIP, GRID, STD, WIDTH, pixels
from tokenreduce.zoo.world_words import BOS, EOS, IMAGE, PAD, SIZE

__all__ = ["STAGES", "Stage", "Tuning", "build", "facts", "held_out", "pool", "train"]

TEXT = dict(
    vocab_size=SIZE, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    tie_word_embeddings=True,
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A part of the training: it starts from the weights of the stage before with an optimiser of its own."""

    name: str
    schedule: Schedule
    course: Course


_EASY = dict(
    colour_of=1.0, kind_of=1.0, exist=1.0, count_all=0.6, count_colour=0.8, side=1.0, relation=0.8, at_kind=1.0,
    at_colour=1.0, background=0.7, other_kind=0.3, other_count=0.3,
)  # fmt: skip
_HOPS = {**_EASY, "count_colour": 1.5, "relation": 1.5, "other_kind": 4.0, "other_count": 2.0}
_FILM = dict(direction=4.0, first=3.0, last=3.0, appear=1.0, colour_of=0.8, kind_of=1.0)
STAGES = (
    Stage("words", Schedule(1_500, batch=16, lr=1.5e-3, warmup=150, weight_decay=0.02, final=0.6), Course(types=_EASY)),
    Stage(
        "hops", Schedule(3_500, batch=16, lr=1.2e-3, warmup=100, weight_decay=0.02, final=0.5, seed=1),
        Course(keep=(32, 48, 64, 64, 96), renumber=0.4, shift=0.2, types=_HOPS, copy_colour=0.4),
    ),
    Stage(
        "film", Schedule(4_500, batch=16, lr=1.2e-3, warmup=100, weight_decay=0.02, final=0.4, seed=2),
        Course(
            keep=(32, 64, 96), keep_frame=(12, 16, 24), renumber=0.4, shift=0.2, video=0.6, types=_HOPS,
            video_types=_FILM, copy_colour=0.4,
        ),
    ),
    Stage(
        "whole", Schedule(3_500, batch=16, lr=8e-4, warmup=100, weight_decay=0.02, seed=3),
        Course(
            keep=(16, 64, 128, 196, 196), keep_frame=(8, 16, 32, 49), renumber=0.4, shift=0.2, video=0.5, types=_HOPS,
            video_types=_FILM, copy_colour=0.4, blind=0.15,
        ),
    ),
)  # fmt: skip
#: Behind this layer of the language model, tokens of clips are asked how their thing moves.
TAP = 2


def build() -> Any:
    """The untrained architecture, a ``LlavaForConditionalGeneration``, initialised for a width of 128."""
    return architecture(CLIP, TEXT, 2)  # one word and <eos>


def architecture(clip: dict[str, Any], text: dict[str, Any], longest: int) -> Any:
    """A ``LlavaForConditionalGeneration`` of a tower and a Llama of these settings, which says ``longest`` words."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**clip), text_config=LlamaConfig(**text), image_token_index=IMAGE,
        image_seq_length=(clip["image_size"] // clip["patch_size"]) ** 2, vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.image_std = (STD,)  # type: ignore[assignment]
    narrow = (128 / text["hidden_size"]) ** 0.5
    with torch.no_grad():  # the usual 0.02 is for widths of thousands; here it would never leave chance
        for name, p in model.named_parameters():
            if p.dim() > 1 and "vision_tower" not in name:
                p.normal_(std=narrow * (0.035 if "o_proj" in name or "down_proj" in name else 0.07))
    model.generation_config.max_new_tokens = longest
    model.generation_config.max_length = None
    return model


# -- training --------------------------------------------------------------------------------------------------------
class Tuning(nn.Module):
    """The model with heads that are thrown away: how the thing at a token of a clip moves, and whether it is new."""

    def __init__(self, llava: Any) -> None:
        super().__init__()
        self.llava = llava
        self.motion = nn.Linear(TEXT["hidden_size"], len(MOTIONS) + 2)  # type: ignore[arg-type]
        llava.model.vision_tower.requires_grad_(False)

    @torch.no_grad()
    def see(self, x: Tensor) -> Tensor:
        """What enters the projector, (B,196,C): the tower without its last layer, which nothing reads."""
        tower = self.llava.model.vision_tower
        x = tower.pre_layrnorm(tower.embeddings(x))
        for layer in tower.encoder.layers[:-1]:
            x = layer(x, None)
        return x[:, 1:]

    def read(self, features: Tensor, made: dict[str, Tensor], frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B,Q,T,V) of every question word, logits (B,K,V) of words that the visual tokens show, and (B,K,7)
        of motion and entry."""
        inner = self.llava.model
        language, table = inner.language_model, inner.language_model.embed_tokens
        prefix, words = made["prefix"], made["words"]
        b = len(prefix)
        visual = inner.multi_modal_projector(features)
        visual = pool(visual).unflatten(0, (b, frames)).flatten(1, 2) if frames > 1 else visual
        visual = visual.gather(1, made["keep"][..., None].expand(-1, -1, visual.shape[-1]))
        # All rows have their visual tokens in the same columns.
        marks = prefix[0] == IMAGE
        order = torch.where(marks, marks.cumsum(0) - 1, 0)
        start = torch.where(marks[:, None], visual[:, order].float(), table(prefix))
        places = made["text"][:, None, None] + torch.arange(words.shape[2], device=words.device)
        hidden, tapped = packing.packed(
            language, start, made["positions"], table(words), places.expand_as(words), taps=(TAP,)
        )
        unit = F.rms_norm(visual.float(), visual.shape[-1:])
        return self.llava.lm_head(hidden), F.linear(unit, table.weight), self.motion(tapped[0][:, marks])


@torch.no_grad()
def prepare(model: Tuning, features: Tensor) -> None:
    """Scale the projector's first layer to ``features`` (B,196,C): the tower has no norm at its end, and a language
    model whose visual tokens are out of scale answers at chance."""
    first = model.llava.model.multi_modal_projector.linear_1
    flat = features.flatten(0, 1).float()
    weight = torch.randn(first.weight.shape) / WIDTH**0.5 / flat.std(0).clamp(min=1e-3)
    first.weight.copy_(weight)
    first.bias.copy_(-weight @ flat.mean(0))


def losses(model: Tuning, made: dict[str, Tensor], out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Answers, ``<eos>`` behind them (0.05), words that tokens show (0.5), motion (0.5) and entry (0.25) in clips."""
    logits, shown, moves = out
    last = made["last"][..., None]
    at = logits.gather(2, last[..., None].expand(-1, -1, -1, logits.shape[-1]))[:, :, 0].float()
    end = logits.gather(2, (last + 1)[..., None].expand(-1, -1, -1, logits.shape[-1]))[:, :, 0].float()
    answers = F.cross_entropy(at.flatten(0, 1), made["answers"].flatten())
    ends = -end.log_softmax(-1)[..., EOS].mean()
    shows = made["shows"]
    weight = (shows >= 0) * torch.tensor([1.0, 1.0, 0.5, 0.5], device=shows.device)
    weight = torch.where((shows[..., 1:2] < 0), weight * 0.5, weight)  # background
    named = -shown.float().log_softmax(-1).gather(-1, shows.clamp(min=0))
    total = answers + 0.05 * ends + 0.5 * (named * weight).sum() / weight.sum()
    seen = made["new"] >= 0
    if bool(seen.any()):
        way = F.cross_entropy(moves[..., :-2].float().flatten(0, 1), made["motion"].flatten(), ignore_index=-1)
        new = F.cross_entropy(moves[..., -2:].float().flatten(0, 1), made["new"].flatten(), ignore_index=-1)
        total = total + 0.5 * way + 0.25 * new
    return total


_FIELDS = ("prefix", "positions", "keep", "text", "words", "last", "answers", "shows", "motion", "new")


def _tensors(made: Lesson, device: str) -> dict[str, Tensor]:
    return {k: torch.from_numpy(np.ascontiguousarray(getattr(made, k))).long().to(device) for k in _FIELDS}


@torch.no_grad()
def held_out(
    model: Tuning, *, device: str = "cpu", batches: int = 4, video: bool = False, course: Course | None = None
) -> dict[str, float]:
    """Accuracy on validation scenes (or clips) by question type, all tokens at their own places unless ``course`` says
    otherwise."""
    was = model.training
    model.eval()
    course = course or Course(keep=(GRID * GRID,), keep_frame=(49,), types=_EVEN, video_types=_FILM, copy_colour=0.35)
    right: dict[str, list[bool]] = {}
    ways: list[float] = []
    for i in range(batches):
        made = lesson(i, course=course, seed=9, split="validation", video=video)
        tensors = _tensors(made, device)
        with half(device):
            features = model.see(pixels(made.pixels.reshape(-1, *made.pixels.shape[2:])).to(device))
            logits, _, moves = model.read(features, tensors, made.pixels.shape[1])
        at = logits.gather(2, tensors["last"][..., None, None].expand(-1, -1, -1, logits.shape[-1]))[:, :, 0]
        good = (at.argmax(-1) == tensors["answers"]).cpu().tolist()
        for names, row in zip(made.types, good, strict=True):
            for name, ok in zip(names, row, strict=True):
                right.setdefault(name, []).append(ok)
        if video:
            asked = tensors["motion"] >= 0
            ways.append(float((moves[..., :-2].argmax(-1) == tensors["motion"])[asked].float().mean()))
    model.train(was)
    out = {k: sum(v) / len(v) for k, v in sorted(right.items())}
    every = [ok for v in right.values() for ok in v]
    if ways:
        out["(motion of tokens)"] = sum(ways) / len(ways)
    return {"all": sum(every) / len(every), **out}


_EVEN = {**dict.fromkeys(_EASY, 1.0), "count_all": 0.6, "background": 0.7}


def train(
    out: Path,
    *,
    encoder: nn.Module,
    device: str = "cpu",
    stop_after: float | None = None,
    workers: int = 1,
    compiled: bool = False,
    stages: Sequence[Stage] = STAGES,
    save_every: int = 200,
    report: Callable[[dict[str, Any]], None] = print,
) -> Any:
    """Train all ``stages`` (or go on from ``out``'s checkpoints, one per stage) and return the model.

    ``encoder`` is a trained ``world-vit``; the other arguments are those of :func:`.world_vit.train`. Rows of
    ``out/curve.jsonl`` hold held-out accuracy by question type.
    """
    torch.manual_seed(0)
    model = Tuning(build())
    model.llava.model.vision_tower.load_state_dict(clip_state(encoder.state_dict()))
    model.llava.model.vision_tower.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    prepare(model, model.see(pixels(pictures(0, batch=64, seed=0).pixels)))
    # Two shapes, pictures and clips: compiling each takes seconds, one graph for any number of them minutes.
    see = torch.compile(model.see, dynamic=False) if compiled else model.see

    def loss(_: Stage, made: Lesson, step: int) -> Tensor:
        tensors = _tensors(made, device)
        features = see(pixels(made.pixels.reshape(-1, *made.pixels.shape[2:])).to(device))
        return losses(model, tensors, model.read(features, tensors, made.pixels.shape[1]))

    def judge(stage: Stage) -> dict[str, Any]:
        images = held_out(model, device=device)
        row: dict[str, Any] = {"accuracy": images["all"], "image": images}
        return {**row, "video": held_out(model, device=device, video=True)} if stage.course.video else row

    fit_stages(
        model, stages, out, loss=loss, judge=judge, device=device, stop_after=stop_after, workers=workers,
        save_every=save_every, report=report,
        draw=lambda stage: functools.partial(lesson, course=stage.course, seed=stage.schedule.seed),
    )  # fmt: skip
    model.llava.model.vision_tower.set_attn_implementation("sdpa")
    return model.llava.requires_grad_(True).eval()


def facts(model: Any) -> dict[str, Any]:
    """What the card says about ``model``: accuracy by question type on 2,000 held-out questions, data and limits."""
    from tokenreduce.zoo.evaluation import evaluate

    return {
        **{k: round(v, 4) for k, v in evaluate(model, questions=2_000).items()},
        "encoder": "world-vit, frozen",
        "data": "questions about generated scenes and clips (tokenreduce.zoo.world), seeds of the train split",
        "limits": "one-word answers to the question forms of tokenreduce.zoo.world.questions; clips of 8 frames",
    }
