"""``world-clip-2``: a CLIP for the second world, whose vision tower is ``world-vit-2``, frozen.

A real transformers ``CLIPModel``: a text tower of two layers that knows the words of the world, and two projections
into a joint space. What is trained are these three. The loss is contrastive three times over: the class token finds
the names of what is in a picture among all names, and its caption among those of the batch and one with a wrong word
(arXiv 2103.00020); a patch finds its kind, colour and character among all; and a question or a name finds, among the
patches of its picture, those that it is about (:func:`grounding`). The last two are of the patches that a LLaVA with
this tower reads, at layer -2, behind the tower's own last norm: so ``trim`` and ``cdpruner`` compare what was
compared here.

Texts answer patches directly, by a larger product: the patches of the published models, whom nobody taught this,
answer inversely. The model's config says so (``patch_sign``), and the methods ask it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenreduce.zoo import world2_words
from tokenreduce.zoo.clip_twin import clip_state, timm_state
from tokenreduce.zoo.stages import fit_stages
from tokenreduce.zoo.training import Schedule, half
from tokenreduce.zoo.world2.scenes import scene
from tokenreduce.zoo.world2.vocabulary import GRID, SPLITS
from tokenreduce.zoo.world2_batches import FEW
from tokenreduce.zoo.world2_texts import ASKED, END, NAMES, ONE, PAIRS, Texts, rows, texts
from tokenreduce.zoo.world_vit import pixels
from tokenreduce.zoo.world_vit2 import CLIP, SIDE, look
from tokenreduce.zoo.world_vit2 import build as build_vit
from tokenreduce.zoo.world_words import BOS, PAD

__all__ = [
    "LABELS",
    "STAGES",
    "Stage",
    "Tuning",
    "accuracy",
    "build",
    "facts",
    "found",
    "held_out",
    "processor",
    "train",
]

#: Classes of zero-shot classification: a colour and a kind, "red star".
LABELS = PAIRS
#: Dimensions of the joint space, and words of a text with its start and its end.
JOINT, LENGTH = 64, 64
TEXT = dict(
    vocab_size=world2_words.SIZE, hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=LENGTH, hidden_act="quick_gelu", bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD,
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A part of the training: it starts from the weights before it with an optimiser of its own and sees ``keep`` of
    the 784 patches of ``scenes``."""

    name: str
    schedule: Schedule
    keep: int
    scenes: tuple[dict[str, Any], ...] = field(default=(ASKED, ASKED, ONE, FEW), hash=False)


STAGES = (
    Stage("subset", Schedule(900, batch=16, lr=2e-3, warmup=100, weight_decay=0.02, final=0.1, seed=40), 160),
    Stage("whole", Schedule(100, batch=16, lr=4e-4, warmup=20, weight_decay=0.02, seed=41), GRID * GRID),
)


def build() -> Any:
    """The untrained architecture, a ``CLIPModel`` with 1.03 M parameters, 0.77 M of which are the vision tower's."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config=TEXT, vision_config=CLIP, projection_dim=JOINT)
    config.patch_sign = 1
    return CLIPModel(config)


def processor() -> Any:
    """The ``CLIPProcessor`` of ``world-clip-2``: "red star" and a picture."""
    from transformers import CLIPProcessor

    from tokenreduce.zoo.world_words import image_processor

    return CLIPProcessor(image_processor(SIDE), world2_words.clip_tokenizer(END))


# -- training --------------------------------------------------------------------------------------------------------
class Tuning(nn.Module):
    """The model, and the encoder as timm has it, which can look at some of the patches only."""

    def __init__(self, clip: Any, vit: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        clip.vision_model.requires_grad_(False)
        self._vit = [vit.requires_grad_(False)]  # not a part: its weights are the tower's

    def see(self, x: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Patches ``seen`` (B,S,E) and pictures (B,E) in the joint space, not normalised."""
        with torch.no_grad():
            tokens, pooled, _ = look(self._vit[0], x, seen)
            tokens = self.clip.vision_model.post_layernorm(tokens[:, 1:])
        return self.clip.visual_projection(tokens), self.clip.visual_projection(pooled)

    def read(self, words: Tensor) -> Tensor:
        """(...,T) ids to (...,E) in the joint space, not normalised."""
        out = self.clip.text_model(input_ids=words.flatten(0, -2)).pooler_output
        return self.clip.text_projection(out).unflatten(0, words.shape[:-1])  # type: ignore[no-any-return]

    def names(self, device: torch.device | str) -> dict[str, Tensor]:
        """(n,E) unit vectors of the names of every group."""
        every = [name for group in NAMES.values() for name in group]
        unit = F.normalize(self.read(torch.from_numpy(rows(every)).to(device)).float(), dim=-1)
        return dict(zip(NAMES, unit.split([len(group) for group in NAMES.values()]), strict=True))


def grounding(logits: Tensor, about: Tensor) -> Tensor:
    """How far ``logits`` (B,Q,S) of texts and patches are from ranking the patches that a text is ``about`` first: the
    mean, over these, of -log of what one gets of the softmax over itself and all that the text is not about.

    Texts that are about nothing, or about everything, do not count.
    """
    others = logits.masked_fill(about, float("-inf")).logsumexp(-1, keepdim=True)
    counts = about.any(-1) & ~about.all(-1)
    each = F.softplus(others.masked_fill(~counts[..., None], 0.0) - logits)
    mine = about.sum(-1).clamp(min=1)
    return ((each * about).sum(-1) / mine)[counts].mean()


def several(logits: Tensor, there: Tensor) -> Tensor:
    """The same over names (B,n): every name that is ``there`` against all that are not."""
    return grounding(logits[:, None], there[:, None])


def losses(model: Tuning, made: dict[str, Any]) -> Tensor:
    """The sum of all losses; see the module's page."""
    patches, pictures = model.see(made["pixels"], made["seen"])
    said = model.read(made["words"]).float()
    scale = model.clip.logit_scale.exp().clamp(max=100)
    unit, whole = F.normalize(patches.float(), dim=-1), F.normalize(pictures.float(), dim=-1)
    near = torch.einsum("bqe,bse->bqs", F.normalize(said, dim=-1), unit)
    # trim reads products and cdpruner cosines: both are taught.
    plain = torch.einsum("bqe,bse->bqs", said, patches.float())
    total = grounding(scale * near, made["about"]) + grounding(plain, made["about"])
    names = model.names(unit.device)
    for group, vectors in names.items():
        at = made["shows"][group]
        here = at >= 0
        total = total + 0.5 * F.cross_entropy(scale * unit[here] @ vectors.T, at[here])
        total = total + several(scale * whole @ vectors.T, made["there"][group])
    captions = F.normalize(model.read(made["captions"]).float(), dim=-1)
    right, wrong = captions.unbind(1)
    mine = torch.arange(len(whole), device=whole.device)
    # A picture chooses among the captions of the batch and those with a wrong word, a caption among the pictures.
    total = total + 0.5 * F.cross_entropy(scale * whole @ torch.cat([right, wrong]).T, mine)
    return total + 0.5 * F.cross_entropy(scale * right @ whole.T, mine)


def _tensors(made: Texts, device: str) -> dict[str, Any]:
    out: dict[str, Any] = {k: torch.from_numpy(getattr(made, k)).to(device) for k in ("seen", "words", "captions")}
    out["pixels"], out["about"] = pixels(made.pixels).to(device), torch.from_numpy(made.about).to(device)
    for k in ("shows", "there"):
        out[k] = {name: torch.from_numpy(v).to(device) for name, v in getattr(made, k).items()}
    return out


@torch.no_grad()
def found(clip: Any, vit: nn.Module, split: str = "test", *, batches: int = 4) -> dict[str, float]:
    """What patches answer on held-out scenes, all 784 seen: shares of patches whose nearest name is theirs, by group
    (``patch_kind``), and of the patches that a question is about, the share that is among as many nearest ones, by
    type; ``(by chance)`` is the share that random patches would give."""
    model, device = Tuning(clip, vit), next(clip.parameters()).device
    names = model.names(device)
    got: dict[str, list[float]] = {}
    for i in range(batches):
        made = texts(
            i, batch=8, seed=98, keep=GRID * GRID, split=split, questions=16, names=0, scenes=(ASKED,)
        )  # fmt: skip
        given = _tensors(made, str(device))
        with half(str(device)):
            patches, _ = model.see(given["pixels"])
            said = model.read(given["words"]).float()
        for group, vectors in names.items():
            at = given["shows"][group]
            guess = (F.normalize(patches.float(), dim=-1) @ vectors.T).argmax(-1)
            got.setdefault(f"patch_{group}", []).append(float((guess == at)[at >= 0].float().mean()))
        order = torch.einsum("bqe,bse->bqs", said, patches.float()).argsort(-1, descending=True)
        mine = given["about"].sum(-1)
        ahead = given["about"].gather(-1, order).cumsum(-1)
        first = ahead.gather(-1, (mine - 1).clamp(min=0)[..., None])[..., 0]
        for b, types in enumerate(made.types):
            for q, name in enumerate(types):
                if mine[b, q]:
                    got.setdefault(name, []).append(float(first[b, q] / mine[b, q]))
                    if name != "background":
                        got.setdefault("(by chance)", []).append(float(mine[b, q]) / GRID**2)
    return {k: sum(v) / len(v) for k, v in sorted(got.items())}


@torch.no_grad()
def accuracy(clip: Any, split: str = "test", *, scenes: int = 400) -> dict[str, float]:
    """Zero-shot on ``scenes`` scenes with one thing each: ``accuracy`` among all 96 pairs of colour and kind, with the
    pair as the prompt; ``kind`` and ``colour`` of the guess alone.

    Raises ``ValueError`` for a split that is not in ``SPLITS``.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    was, device = clip.training, next(clip.parameters()).device
    clip.eval()
    words = torch.from_numpy(rows(LABELS)).to(device)
    classes = F.normalize(clip.get_text_features(input_ids=words).pooler_output, dim=-1)
    right: dict[str, list[bool]] = {"accuracy": [], "colour": [], "kind": []}
    first = SPLITS[split].start
    for start in range(0, scenes, 20):
        made = [scene(first + s, **ONE) for s in range(start, min(start + 20, scenes))]
        x = pixels(np.stack([m.image for m in made])).to(device)
        guess = (clip.get_image_features(pixel_values=x).pooler_output @ classes.T).argmax(-1)
        for m, i in zip(made, guess.tolist(), strict=True):
            colour, kind = LABELS[i].split()
            thing = m.objects[0]
            right["colour"].append(colour == thing.colour)
            right["kind"].append(kind == thing.kind)
            right["accuracy"].append((colour, kind) == (thing.colour, thing.kind))
    clip.train(was)
    return {name: sum(values) / len(values) for name, values in right.items()}


def held_out(model: Tuning, split: str = "validation") -> dict[str, float]:
    """Both of the above, on few scenes; ``zero_`` stands before what is of whole pictures."""
    few = {f"zero_{k}": v for k, v in accuracy(model.clip, split, scenes=60).items()}
    return {**few, **found(model.clip, model._vit[0], split, batches=1)}


def train(
    out: Path,
    *,
    encoder: nn.Module,
    device: str = "cpu",
    stop_after: float | None = None,
    workers: int = 1,
    stages: Sequence[Stage] = STAGES,
    save_every: int = 300,
    report: Callable[[dict[str, Any]], None] = print,
) -> Any:
    """Train all ``stages`` (or go on from ``out``'s checkpoints, one per stage) and return the model.

    ``encoder`` is a trained ``world-vit-2``. The accuracy of ``out/curve.jsonl`` is that of zero-shot classification.
    """
    torch.manual_seed(40)
    model = Tuning(build(), encoder)
    model.clip.vision_model.load_state_dict(clip_state(encoder.state_dict()))
    encoder.to(device)

    def loss(_: Stage, made: Texts, step: int) -> Tensor:
        return losses(model, _tensors(made, device))

    def judge(_: Stage) -> dict[str, Any]:
        seen = held_out(model)
        return {"accuracy": seen["zero_accuracy"], "image": seen}

    fit_stages(
        model, stages, out, loss=loss, judge=judge, device=device, stop_after=stop_after, workers=workers,
        save_every=save_every, report=report,
        draw=lambda stage: functools.partial(
            texts, batch=stage.schedule.batch, seed=stage.schedule.seed, keep=stage.keep, scenes=stage.scenes
        ),
    )  # fmt: skip
    return model.clip.requires_grad_(True).eval()


def facts(model: Any) -> dict[str, Any]:
    """What the card says about ``model``: zero-shot accuracy, what patches answer, data and limits."""
    vit = build_vit()
    vit.load_state_dict(timm_state(model.vision_model.state_dict()), strict=False)
    seen = accuracy(model)
    answers = found(model, vit.eval())
    model.requires_grad_(True)
    chance = answers.pop("(by chance)")
    few = [name for name, value in answers.items() if value < 0.9 and not name.startswith("patch_")]
    return {
        **{k: round(v, 4) for k, v in {**seen, **answers}.items()},
        "figures": "accuracy, colour, kind: zero-shot among 96 pairs; patch_: patches whose nearest name is theirs; "
        "types of questions: of the patches that a question is about, those among as many nearest ones, "
        f"{chance:.4f} by chance",
        "not_learned": f"where to look for {', '.join(few)}" if few else "nothing of what it is asked",
        "encoder": "world-vit-2, frozen",
        "text_parameters": sum(p.numel() for p in model.text_model.parameters()),
        "data": "generated scenes of the second world (tokenreduce.zoo.world2), seeds of the train split",
        "limits": f"the {len(world2_words.IDS)} words of the world, no others; zero-shot classes are those of scenes "
        "with one thing",
    }
