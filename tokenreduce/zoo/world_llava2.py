"""``world-llava-2``: a tiny language model that answers questions about the second world, also by reading.

A real ``LlavaForConditionalGeneration``: the tower is ``world-vit-2``, frozen; a Llama of eight layers with six query
and two key heads reads 784 tokens per picture, and 196 per frame of a clip (:func:`~.video_inputs.video_inputs`). It is
taught as ``world-llava`` was, with more losses: every visual token is compared with the words for what it shows; in two
layers the first heads are told where to look: in one at what leads to the next word (the thing that the question names,
what was said before), in a later one at where that word is read (:func:`pointing`); and between layers tokens are asked
what a question would have to work out: how their thing moves, how often it has changed, what the sign says meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenreduce.zoo import packing, world_vit2
from tokenreduce.zoo.clip_twin import clip_state, timm_state
from tokenreduce.zoo.stages import fit_stages
from tokenreduce.zoo.training import Schedule, followed, half
from tokenreduce.zoo.world2.clip_questions import VIDEO_TYPES
from tokenreduce.zoo.world2.questions import LONG
from tokenreduce.zoo.world2.vocabulary import GRID
from tokenreduce.zoo.world2_batches import sights
from tokenreduce.zoo.world2_films import any_lesson
from tokenreduce.zoo.world2_lessons import TELLS, Course, Lesson
from tokenreduce.zoo.world2_words import IDS, SIZE
from tokenreduce.zoo.world_llava import architecture, prepare
from tokenreduce.zoo.world_vit import pixels
from tokenreduce.zoo.world_vit2 import CLIP, embed
from tokenreduce.zoo.world_words import BOS, EOS, IMAGE, PAD

__all__ = ["STAGES", "Stage", "Tuning", "build", "facts", "held_out", "train"]

TEXT = dict(
    vocab_size=SIZE, hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    tie_word_embeddings=True,
)  # fmt: skip
#: Batches that the card's accuracies are from: 8 scenes with 12 short questions each, 8 with the long ones, and 2 clips
#: with 10 questions each.
HELD_OUT = (20, 8, 32)
#: From this accuracy on a type of question counts as learned.
LEARNED = 0.9
#: Layers, one per look, and the number of their query heads that are told where to look.
POINT, POINTERS = (2, 5), 2
#: Layers behind which tokens are asked each of :data:`~.world2_lessons.TELLS`: what is looked up must be there before
#: the look.
TAPS = (2, 2, 3, 4, 4, 4, 4, 1, 1)


@dataclass(frozen=True)
class Stage:
    """A part of the training: it starts from the weights before it with an optimiser of its own."""

    name: str
    schedule: Schedule
    course: Course


_READ = dict(read=3.0, letter=3.0, where_read=1.0, cell=3.0)
_SEE = dict(
    colour_of=1.5, kind_of=1.5, exist=1.0, count_all=0.6, count_colour=1.0, side=0.7, relation=1.0, at_kind=1.0,
    at_colour=1.0, background=0.5, other_kind=1.0, other_count=0.7,
)  # fmt: skip
_FILM = dict(
    order=2.0, first=0.7, last=1.0, count_events=1.5, read_at=2.0, colour_at=1.5, direction=1.0, appear=0.6,
)  # fmt: skip
#: What needs two steps is asked more often.
_HOPS = dict(relation=3.0, where_read=3.0, count_colour=1.5, other_count=1.0)
_FILM_HOPS = dict(count_events=2.5, read_at=3.0, colour_at=3.0)
STAGES = (
    Stage(
        "words", Schedule(1_500, batch=16, lr=1.5e-3, warmup=150, weight_decay=0.02, final=0.8, seed=30),
        Course(types={**_SEE, **_READ}, scene=dict(document=0.6)),
    ),
    Stage(
        "long", Schedule(4_500, batch=16, lr=1.2e-3, warmup=50, weight_decay=0.02, final=0.05, seed=31),
        Course(
            keep=(48, 64, 96), seen=160, renumber=0.3, shift=0.2, types={**_SEE, **_READ}, long=0.35, copy_colour=0.4,
            scene=dict(document=0.6),
        ),
    ),
    Stage(
        "film", Schedule(3_200, batch=16, lr=1e-3, warmup=50, weight_decay=0.02, final=0.1, seed=33),
        Course(
            keep=(48, 64, 96), seen=160, renumber=0.3, shift=0.2, types={**_SEE, **_READ}, long=0.2, copy_colour=0.4,
            scene=dict(document=0.6), video=0.7, video_types=_FILM, keep_frame=(8, 10, 14), clips=10,
        ),
    ),
    Stage(
        "both", Schedule(1_000, batch=16, lr=8e-4, warmup=30, weight_decay=0.02, final=0.1, seed=35),
        Course(
            keep=(48, 64, 96), seen=160, renumber=0.3, shift=0.2, types={**_SEE, **_READ}, long=0.6, copy_colour=0.4,
            scene=dict(document=0.6), video=0.4, video_types=_FILM, keep_frame=(8, 10, 14, 24), clips=8,
        ),
    ),
    Stage(
        "hops", Schedule(1_800, batch=16, lr=1e-3, warmup=50, weight_decay=0.02, final=0.1, seed=36),
        Course(
            keep=(48, 64, 96), seen=160, renumber=0.3, shift=0.2, types={**_SEE, **_READ, **_HOPS}, long=0.3,
            copy_colour=0.4, scene=dict(document=0.6), video=0.55, video_types={**_FILM, **_FILM_HOPS},
            keep_frame=(8, 10, 14, 24), clips=8, video_questions=12,
        ),
    ),
    Stage(
        "whole", Schedule(1_000, batch=8, lr=4e-4, warmup=20, weight_decay=0.02, seed=34),
        Course(
            keep=(64, 196, GRID * GRID), seen=GRID * GRID, renumber=0.3, types={**_SEE, **_READ, **_HOPS}, long=0.3,
            copy_colour=0.4, blind=0.1, scenes=8, scene=dict(document=0.6), video=0.4,
            video_types={**_FILM, **_FILM_HOPS},
            seen_frame=GRID * GRID // 4, keep_frame=(24, 98, GRID * GRID // 4), clips=1, video_questions=16,
        ),
    ),
    Stage(
        "last", Schedule(700, batch=8, lr=3e-4, warmup=20, weight_decay=0.02, seed=37),
        Course(
            keep=(64, 196, GRID * GRID), seen=GRID * GRID, renumber=0.2, types={**_SEE, **_READ, **_HOPS}, long=0.5,
            copy_colour=0.4, blind=0.05, scenes=8, scene=dict(document=0.6), video=0.4,
            video_types={**_FILM, **_FILM_HOPS, "colour_at": 4.0}, seen_frame=GRID * GRID // 4,
            keep_frame=(24, GRID * GRID // 4), clips=1, video_questions=16,
        ),
    ),
)  # fmt: skip


def build() -> Any:
    """The untrained architecture, a ``LlavaForConditionalGeneration``; its config names its CLIP and its tokenizer,
    which methods that compare patches with the question ask for."""
    model = architecture(CLIP, TEXT, 64)  # a description has up to 61 words
    model.config.clip_model, model.config.tokenizer_model = "world-clip-2", "world-llava-2"
    return model


# -- training --------------------------------------------------------------------------------------------------------
class Tuning(nn.Module):
    """The model, the encoder as timm has it, which can look at some of the patches only, and heads that are thrown
    away: what tokens are asked (:data:`~.world2_lessons.TELLS`)."""

    def __init__(self, llava: Any, vit: nn.Module) -> None:
        super().__init__()
        self.llava = llava
        self.tells = nn.ModuleList(nn.Linear(TEXT["hidden_size"], n) for n in TELLS.values())  # type: ignore[arg-type]
        llava.model.vision_tower.requires_grad_(False)
        self._vit = [vit.requires_grad_(False)]  # not a part: its weights are the tower's

    @torch.no_grad()
    def see(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """What enters the projector, (B,S,C), of the patches ``seen``."""
        vit: Any = self._vit[0]
        x = embed(vit, x, seen)
        for block in vit.blocks[:-1]:
            x = block(x)
        return x[:, 1:]

    def read(self, features: Tensor, made: dict[str, Tensor]) -> Read:
        """What the language model makes of ``features`` (B*F,S,C) and the questions of a lesson."""
        inner = self.llava.model
        language, table = inner.language_model, inner.language_model.embed_tokens
        words, prefix, keep = made["words"], made["prefix"], made["keep"]
        b, film = len(words), len(keep) > len(words)
        if film:
            visual = inner.multi_modal_projector(features).unflatten(1, (-1, 4)).mean(2)
            visual = visual.gather(1, keep[..., None].expand(-1, -1, visual.shape[-1])).reshape(b, -1, visual.shape[-1])
        else:
            kept = features.gather(1, keep[..., None].expand(-1, -1, features.shape[-1]))
            visual = inner.multi_modal_projector(kept)
        marks = prefix == IMAGE
        start = table(prefix).expand(b, -1, -1).index_copy(1, marks.nonzero()[:, 0], visual.float())
        places = made["text"][:, None, None] + torch.arange(words.shape[2], device=words.device)
        attended: list[Tensor] = []

        def watch(layer: int, weights: Tensor) -> None:
            if layer in POINT:
                attended.append(weights[:, :POINTERS][..., marks].float().mean(1))

        hidden, tapped = packing.packed(
            language, start, made["positions"], table(words), places.expand_as(words), taps=set(TAPS), watch=watch
        )
        unit = F.rms_norm(visual.float(), visual.shape[-1:])
        behind = dict(zip(sorted(set(TAPS)), tapped, strict=True))
        told = [head(behind[at][:, marks]) for head, at in zip(self.tells, TAPS, strict=True)]
        return Read(hidden, F.linear(unit, table.weight), torch.stack(attended, -1), told)


class Read(NamedTuple):
    """Final hidden states (B,Q,T,D) of every question word, logits (B,K,V) of words that the visual tokens show, how
    the pointing heads attend to these tokens (B,Q,T,K,2), and logits (B,K,n) of what tokens are asked."""

    hidden: Tensor
    shown: Tensor
    attended: Tensor
    told: list[Tensor]


def pointing(attended: Tensor, made: dict[str, Tensor]) -> Tensor:
    """Mean of -log of the attention that each word of an answer pays to the tokens that lead to it, and to those at
    which it can be read.

    ``attended`` (B,Q,T,K,2). A word without such a token, or whose token is not kept, does not count.
    """
    own, first, stop = made["points"][..., None, :, :].unbind(-1)  # (B,Q,T,1,2)
    frame = made["frame"][:, None, None, :, None]
    right = (made["owners"][:, None, None, :, None] == own) & (frame >= first) & (frame < stop)
    at = (made["points"][..., 0] >= 0) & right.any(-2)
    paid = (attended * right).sum(-2)[at]
    return -(paid + 1e-4).log().mean() if paid.numel() else attended.sum() * 0


def losses(model: Tuning, made: dict[str, Tensor], out: Read) -> Tensor:
    """Words of answers, ``<eos>`` behind them (0.15), words that tokens show (0.5), where to look (0.3), and what
    tokens are asked (0.3 each, places 1)."""
    after = made["next"]
    here = after >= 0
    logits = F.linear(out.hidden[here].float(), model.llava.lm_head.weight)
    each = F.cross_entropy(logits, after[here], reduction="none")
    weight = torch.where(after[here] == EOS, 0.15, 1.0)
    said = (each * weight).sum() / weight.sum()
    shows = made["shows"]
    weight = (shows >= 0) * torch.tensor([1.0, 1.0, 0.3, 0.3, 0.7, 0.7], device=shows.device)
    weight = torch.where((made["owners"] < 0)[..., None], weight * 0.3, weight)  # background
    named = -out.shown.float().log_softmax(-1).gather(-1, shows.clamp(min=0))
    total = said + 0.5 * (named * weight).sum() / weight.sum() + 0.3 * pointing(out.attended, made)
    for logits, right in zip(out.told, made["tells"].unbind(-1), strict=True):
        known = right >= 0
        if not bool(known.any()):
            continue
        if logits.shape[-1] == 1:
            total = total + F.mse_loss(logits[known][:, 0].float(), right[known] / (GRID / 2) - 1)
        else:
            total = total + 0.3 * F.cross_entropy(logits[known].float(), right[known])
    return total


_FIELDS = (
    "seen", "keep", "prefix", "positions", "text", "words", "next", "points", "shows", "owners", "frame", "tells",
)  # fmt: skip


def _tensors(made: Lesson, device: str) -> dict[str, Tensor]:
    return {k: torch.from_numpy(np.ascontiguousarray(getattr(made, k))).long().to(device) for k in _FIELDS}


@torch.no_grad()
def held_out(
    model: Tuning, *, device: str = "cpu", batches: int = 3, long: int = 1, films: int = 4,
    per_frame: int = GRID * GRID // 16, split: str = "validation", course: Course | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Accuracy on scenes and clips of ``split`` by question type, each word given the right ones before it, so that a
    whole answer is right exactly when greedy decoding finds it: of whole answers, of the words of those with several
    (``list_words``), attention that goes where it should (``(pointing)``), and what tokens tell (``(motion)`` and the
    others of :data:`~.world2_lessons.TELLS`; of places the share that is right to a patch).

    ``batches`` of 8 scenes with 12 questions each, ``long`` ones that ask for long answers, and ``films`` of 2 clips
    with 10 questions each, of which ``per_frame`` tokens of a frame are kept, what shows something first. ``progress``
    is told behind every one of them how many are done, and of how many.
    """
    was = model.training
    model.eval()
    pictures: dict[str, Any] = dict(seen=GRID * GRID, keep=(GRID * GRID,), scenes=8, copy_colour=0.35)
    clips: dict[str, Any] = dict(seen_frame=GRID * GRID // 4, keep_frame=(per_frame,), clips=2, video=1.0)
    plan = [Course(**pictures, types=_EVEN, scene=dict(document=0.6))] * batches
    plan += [Course(**pictures, long=1.0, scene=dict(document=0.6))] * long + [Course(**clips)] * films
    right: dict[str, list[float]] = {}
    for i, used in enumerate(followed(plan, progress)):
        made = any_lesson(i, course=course or used, seed=99, split=split)
        tensors = _tensors(made, device)
        with half(device):
            features = model.see(pixels(made.pixels.reshape(-1, *made.pixels.shape[2:])).to(device), tensors["seen"])
            out = model.read(features, tensors)
            guess = F.linear(out.hidden.float(), model.llava.lm_head.weight).argmax(-1)
        right.setdefault("(pointing)", []).append(float((-pointing(out.attended, tensors)).exp()))
        for name, logits, wanted in zip(TELLS, out.told, tensors["tells"].unbind(-1), strict=True):
            known = wanted >= 0
            near = (logits[..., 0] + 1) * (GRID / 2)
            told = (near - wanted).abs() < 1 if logits.shape[-1] == 1 else logits.argmax(-1) == wanted
            if bool(known.any()):
                right.setdefault(f"({name})", []).append(float(told[known].float().mean()))
        asked = tensors["next"] >= 0
        good = (guess == tensors["next"]) & asked
        for b, names in enumerate(made.types):
            for q, name in enumerate(names):
                whole = float(good[b, q].sum() == asked[b, q].sum())
                right.setdefault(name, []).append(whole)
                if int(asked[b, q].sum()) > 2:
                    right.setdefault(f"{name}_words", []).append(float(good[b, q].sum() / asked[b, q].sum()))
    model.train(was)
    found = {k: sum(v) / len(v) for k, v in sorted(right.items())}
    every = [found[k] for k in (*_EVEN, *LONG, *VIDEO_TYPES) if k in found]
    return {"all": sum(every) / len(every), **found}


_EVEN = dict.fromkeys((*_SEE, *_READ), 1.0)


def train(
    out: Path,
    *,
    encoder: nn.Module,
    start: Any = None,
    device: str = "cpu",
    stop_after: float | None = None,
    workers: int = 1,
    stages: Sequence[Stage] = STAGES,
    save_every: int = 500,
    report: Callable[[dict[str, Any]], None] = print,
) -> Any:
    """Train all ``stages`` (or go on from ``out``'s checkpoints, one per stage) and return the model.

    ``encoder`` is a trained ``world-vit-2``; ``start`` a ``world-llava-2`` to go on from. Rows of ``out/curve.jsonl``
    hold held-out accuracy by question type.
    """
    torch.manual_seed(30)
    model = Tuning(build() if start is None else start, encoder)
    model.llava.model.vision_tower.load_state_dict(clip_state(encoder.state_dict()))
    if start is None:
        made = sights(0, batch=16, seed=0)
        shown = torch.from_numpy(made.labels[:, 4]).argsort(1)[:, -128:]
        prepare(model, model.see(pixels(made.pixels), shown))  # type: ignore[arg-type]
    encoder.to(device)

    def loss(_: Stage, made: Lesson, step: int) -> Tensor:
        tensors = _tensors(made, device)
        features = model.see(pixels(made.pixels.reshape(-1, *made.pixels.shape[2:])).to(device), tensors["seen"])
        return losses(model, tensors, model.read(features, tensors))

    def judge(_: Stage) -> dict[str, Any]:
        found = held_out(model, device=device)
        return {"accuracy": found["all"], "image": found}

    fit_stages(
        model, stages, out, loss=loss, judge=judge, device=device, stop_after=stop_after, workers=workers,
        save_every=save_every, report=report,
        draw=lambda stage: functools.partial(any_lesson, course=stage.course, seed=stage.schedule.seed),
    )  # fmt: skip
    return model.llava.requires_grad_(True).eval()


def facts(model: Any, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """What the card says about ``model``: accuracy by question type on held-out questions (``accuracy`` is the mean
    over the types that are ``learned``, ``accuracy_of_all`` over all), data and limits. ``progress`` as for
    :func:`held_out`: it takes minutes."""
    vit = world_vit2.build()
    vit.load_state_dict(timm_state(model.model.vision_tower.state_dict()), strict=False)
    batches, long, films = HELD_OUT
    found = held_out(
        Tuning(model, vit.eval()), batches=batches, long=long, films=films, per_frame=GRID * GRID // 4, split="test",
        progress=progress,
    )  # fmt: skip
    model.requires_grad_(True)
    asked = (*_EVEN, *LONG, *VIDEO_TYPES)
    learned = [t for t in asked if found[t] >= LEARNED]
    return {
        "accuracy": round(sum(found[t] for t in learned) / len(learned) if learned else 0.0, 4),
        "accuracy_of_all": round(found.pop("all"), 4),
        "learned": ", ".join(learned),
        "not_learned": ", ".join(t for t in asked if t not in learned) or "nothing of what it is asked",
        **{k: round(v, 4) for k, v in found.items() if not k.startswith("(")},
        "questions": 8 * (12 * batches + len(LONG) * long) + 2 * 10 * films,
        "encoder": "world-vit-2, frozen",
        "data": "questions on scenes and clips of the second world (tokenreduce.zoo.world2), seeds of the train split",
        "limits": "the question forms of tokenreduce.zoo.world2.questions and clip_questions; clips of 16 frames",
    }


assert len(IDS) <= SIZE
