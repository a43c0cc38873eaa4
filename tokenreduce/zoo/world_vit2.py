"""``world-vit-2``: the encoder of the second world (:mod:`tokenreduce.zoo.world2`), 224 px in 784 patches.

It starts from ``world-vit`` (:func:`grown`: the position table interpolated) and learns what every patch shows (kind,
colour, character, its place on the sign or in the document, rank from the left, texture, row and column; read where
LLaVA reads, at layer -2) and what the whole shows (on the class token). A second part teaches the class token to name
what is there in pictures that hold little, and where to look: at every thing and character alike in the two last
layers, at places alone in the first (:func:`looking`). Most steps see 128 of the 784 patches, those that show something
first: a seventh of the time, and it carries over to all of them. As for ``world-vit``, one set of
weights is a timm classifier, a ``CLIPVisionModel`` (:func:`as_clip`) and a tower, bit for bit.
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

from tokenreduce.zoo.stages import fit_stages
from tokenreduce.zoo.training import Schedule, half
from tokenreduce.zoo.world2.scenes import CELL_OF, CHARACTER_OF, PLATE_OF, SIZES, scene
from tokenreduce.zoo.world2.signs import LETTERS
from tokenreduce.zoo.world2.vocabulary import CANVAS, CHARACTERS, COLOURS, GRID, KINDS, SPLITS, TEXTURES
from tokenreduce.zoo.world2_batches import FEW, FULL, SPARSE, Sights, choose, sights
from tokenreduce.zoo.world_vit import CLIP as OLD
from tokenreduce.zoo.world_vit import (
    WIDTH,
    WorldTransform,
    _class_logits,
    _class_row,
    architecture,
    as_clip,
    pixels,
)

__all__ = [
    "CLIP", "LABELS", "STAGES", "Stage", "World2Transform", "accuracy", "as_clip", "build", "facts",
    "grown", "train",
]  # fmt: skip

SIDE = CANVAS
#: What the classifier names: the kinds of the things that are there, and the characters on signs and in documents.
LABELS = (*KINDS, *CHARACTERS)
#: The same architecture for transformers.
CLIP = {**OLD, "image_size": SIDE}
SLOTS, MOST_RIGHT = 4 + 9, 10


@dataclass(frozen=True)
class Stage:
    """A part of the training: it starts from the weights before it with an optimiser of its own and sees ``keep`` of
    the 784 patches of ``scenes``. ``named`` weighs what the class token says, ``looks`` where it looks."""

    name: str
    schedule: Schedule
    keep: int
    scenes: tuple[dict[str, Any], ...] = field(default=(SPARSE, FULL, FULL, FULL), hash=False)
    named: float = 0.7
    looks: float = 0.0


#: Scenes that the class token can name, beside those that teach the patches.
_NAMED = (FEW, FEW, SPARSE, FULL)
STAGES = (
    Stage("subset", Schedule(6_000, batch=16, lr=2e-3, warmup=150, final=0.2, seed=20), 128),
    Stage("named", Schedule(5_000, batch=16, lr=1.5e-3, warmup=100, final=0.1, seed=22), 128, _NAMED, 2.0, 0.3),
    Stage("whole", Schedule(250, batch=16, lr=4e-4, warmup=20, seed=21), GRID * GRID, _NAMED, 2.0, 0.3),
)
#: The class token looks by place in this many first layers, and at what it names in this many last ones.
EARLY, LATE = 2, 2
#: A Gaussian of so many patches around the middle.
SPREAD = 10.0


def build() -> nn.Module:
    """The untrained architecture, a ``timm.models.VisionTransformer`` with 0.77 M parameters."""
    return architecture(SIDE, len(LABELS))


def grown(old: nn.Module) -> nn.Module:
    """A ``world-vit-2`` that starts as the ``world-vit`` ``old``: positions interpolated, a new classifier."""
    from timm.layers import resample_abs_pos_embed

    new = build()
    state = {k: v for k, v in old.state_dict().items() if not k.startswith("head.")}
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [GRID, GRID])
    new.load_state_dict(state, strict=False)
    return new


#: Pictures to what the model takes; the class itself knows the first world's side.
World2Transform = functools.partial(WorldTransform, SIDE)


# -- training --------------------------------------------------------------------------------------------------------
def embed(vit: Any, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """What enters the first block (B,1+K,C): the class token and the patches ``keep`` (B,K), or all."""
    x = vit.patch_embed(x) + vit.pos_embed[:, 1:]
    if keep is not None:
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
    first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
    return vit.norm_pre(torch.cat([first.to(x.dtype), x], 1))  # type: ignore[no-any-return]


def look(vit: Any, x: Tensor, keep: Tensor | None = None, rows: Sequence[int] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """What layer -2 gives (B,1+K,C), the pooled class token (B,C), and how it attends to the patches in the layers
    ``rows``, log-probabilities (R,B,H,K)."""
    x, seen = embed(vit, x, keep), []
    for i, block in enumerate(vit.blocks):
        if i in rows:
            seen.append(_class_logits(block.attn, block.norm1(x))[..., 0, 1:].float().log_softmax(-1))
        if i < len(vit.blocks) - 1:
            x = block(x)
    return x, vit.norm(_class_row(vit.blocks[-1], x))[:, 0], torch.stack(seen) if seen else x.new_zeros(0)


def looking(rows: Tensor, owner: Tensor, where: Tensor) -> Tensor:
    """How far class attention ``rows`` (R,B,H,K) of the first ``EARLY`` and last ``LATE`` layers is from what it should
    be, at least 0.

    In the first ones a Gaussian around the middle, whatever is there (``where`` (B,K) are the patches): the divergence
    KL(Gaussian | row). In the last ones the same share for every owner (B,K), a thing or a character, over the mean of
    the heads: that of the uniform distribution over owners. The plates of signs are nobody's.
    """
    y, x = (((axis - (GRID - 1) / 2) ** 2) / (2 * SPREAD**2) for axis in (where // GRID, where % GRID))
    place = (-y - x).log_softmax(-1)[:, None]
    early = (place.exp() * (place - rows[:EARLY])).sum(-1).mean()
    plate = (owner >= CHARACTER_OF) & (owner % 10 == PLATE_OF) & (owner < CELL_OF)
    owner = torch.where(plate, -1, owner)
    same = (owner[:, None] == owner[..., None]).float()
    # What the owner of every patch gets, (LATE,B,K).
    shares = torch.einsum("lbk,bkj->lbj", rows[-LATE:].exp().mean(2), same)
    weight = (owner >= 0) / same.sum(-1)  # every owner counts once
    count = weight.sum(-1).clamp(min=1)
    apart = -((shares.clamp(min=1e-6).log() * weight).sum(-1) / count) - count.log()
    return early + apart.mean()


class Pretraining(nn.Module):
    """The encoder and the heads that teach it. ``forward`` gives logits by name: dense ones (B,K,n) and those of the
    class token (B,n), whose ``labels`` are the encoder's own classifier."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit: Any = vit
        dense = dict(
            kind=len(KINDS) + 1, colour=len(COLOURS) + 1, character=len(CHARACTERS) + 1, slot=SLOTS + 1,
            rank=MOST_RIGHT, texture=len(TEXTURES), row=GRID, column=GRID,
        )  # fmt: skip
        whole = dict(colours=len(COLOURS), pairs=len(KINDS) * len(COLOURS), background=len(TEXTURES), count=16)
        self.sizes = {"dense": tuple(dense.items()), "whole": tuple(whole.items())}
        self.norm = nn.LayerNorm(WIDTH)
        self.dense = nn.Linear(WIDTH, sum(dense.values()))
        self.whole = nn.Linear(WIDTH, sum(whole.values()))

    def forward(self, x: Tensor, keep: Tensor | None = None, looks: bool = False) -> dict[str, Tensor]:
        depth = len(self.vit.blocks)
        rows = (*range(EARLY), *range(depth - LATE, depth)) if looks else ()
        tokens, pooled, seen = look(self.vit, x, keep, rows)
        out = {"labels": self.vit.head(pooled)} | ({"rows": seen} if looks else {})
        for part, logits in (("dense", self.dense(self.norm(tokens[:, 1:]))), ("whole", self.whole(pooled))):
            names, sizes = zip(*self.sizes[part], strict=True)
            out.update(zip(names, logits.split(sizes, -1), strict=True))
        return out


def targets(made: Sights, keep: np.ndarray, device: str) -> dict[str, Tensor]:
    """What :class:`Pretraining` should say of the patches ``keep`` (B,K)."""
    all_ = torch.from_numpy(made.labels)
    at = all_.gather(2, torch.from_numpy(keep)[:, None].expand(-1, 6, -1))
    kind, colour, character, slot, owner, rank = at.unbind(1)
    where, b = torch.from_numpy(keep), len(keep)
    background = torch.from_numpy(made.background)

    def several(index: Tensor, n: int) -> Tensor:
        return torch.zeros(b, n + 1).scatter_(1, torch.where(index >= 0, index, n), 1.0)[:, :-1]

    kinds, colours, characters = (all_[:, i] for i in range(3))
    pairs = several(torch.where(kinds >= 0, kinds * len(COLOURS) + colours, -1), len(KINDS) * len(COLOURS))
    table = pairs.view(b, len(KINDS), len(COLOURS))
    found = dict(
        kind=torch.where(kind >= 0, kind, len(KINDS)), colour=torch.where(colour >= 0, colour, len(COLOURS)),
        character=torch.where(character >= 0, character, len(CHARACTERS)), slot=torch.where(slot >= 0, slot, SLOTS),
        rank=rank, owner=owner, owned=owner >= 0, texture=background[:, None].expand_as(kind), row=where // GRID,
        column=where % GRID, labels=torch.cat([table.amax(2), several(characters, len(CHARACTERS))], 1),
        colours=table.amax(1), pairs=pairs, background=background, count=torch.from_numpy(made.count),
    )  # fmt: skip
    return {k: v.to(device) for k, v in found.items()}


def losses(out: dict[str, Tensor], want: dict[str, Tensor], named: float = 0.7, looks: float = 0.0) -> Tensor:
    """The sum of all losses. Most patches show nothing, and count a tenth. See :class:`Stage`."""
    owned = want["owned"].float()
    weight = owned + 0.1 * (1 - owned)

    def dense(name: str, weight: Tensor) -> Tensor:
        each = F.cross_entropy(out[name].float().flatten(0, 1), want[name].flatten(), ignore_index=-1, reduction="none")
        return (each * weight.flatten()).sum() / weight.sum().clamp(min=1)

    def several(name: str, positive: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            out[name].float(), want[name], pos_weight=torch.tensor(positive, device=weight.device)
        )

    shows = dense("kind", weight) + dense("colour", weight)
    shows = shows + 3 * dense("character", weight) + 1.5 * dense("slot", weight)
    ranked = (want["rank"] >= 0).float()
    shows = shows + 0.3 * dense("rank", ranked) + 0.3 * dense("texture", 1 - owned)
    places = dense("row", weight) + dense("column", weight)
    whole = several("labels", 3.0) + several("colours", 1.0) + several("pairs", 10.0)
    ones = F.cross_entropy(out["background"].float(), want["background"])
    ones = ones + F.cross_entropy(out["count"].float(), want["count"])
    where = looks * looking(out["rows"], want["owner"], want["row"] * GRID + want["column"]) if looks else 0.0
    return shows + 0.5 * places + named * (whole + 0.3 * ones) + where


@torch.no_grad()
def held_out(model: Pretraining, *, device: str = "cpu", scenes: int = 32) -> dict[str, float]:
    """Shares of right answers on validation pictures, all 784 patches seen: patches that show something by kind,
    colour, character (of each size: ``read_12``) and so on."""
    was = model.training
    model.eval()
    hits: dict[str, list[float]] = {}
    for i in range(scenes // 16):
        made = sights(i, batch=16, seed=90, split="validation")
        every = np.broadcast_to(np.arange(GRID * GRID), (16, GRID * GRID)).copy()
        want = targets(made, every, device)
        with half(device):
            out = model(pixels(made.pixels).to(device))
        shown = dict(
            kind=want["kind"] < len(KINDS), colour=want["colour"] < len(COLOURS),
            character=want["character"] < len(CHARACTERS), slot=want["slot"] < SLOTS, rank=want["rank"] >= 0,
            texture=~want["owned"], row=want["owned"], column=want["owned"],
        )  # fmt: skip
        for name, where in shown.items():
            right = (out[name].argmax(-1) == want[name])[where]
            hits.setdefault(name, []).append(float(right.float().mean()))
        found = ((out["kind"].argmax(-1) < len(KINDS)) | (out["character"].argmax(-1) < len(CHARACTERS))).float()
        shows = shown["kind"] | shown["character"]
        hits.setdefault("found", []).append(float((found == shows.float()).float().mean()))
        for name in ("background", "count"):
            hits.setdefault(f"({name})", []).append(float((out[name].argmax(-1) == want[name]).float().mean()))
        guess, true = out["labels"] > 0, want["labels"] > 0
        for name, part in (("kinds", slice(None, len(KINDS))), ("characters", slice(len(KINDS), None))):
            both = (guess & true)[:, part].sum() / (guess | true)[:, part].sum().clamp(min=1)
            hits.setdefault(f"({name})", []).append(float(both))
    model.train(was)
    return {k: sum(v) / len(v) for k, v in hits.items()}


@torch.no_grad()
def accuracy(model: nn.Module, split: str = "test", *, scenes: int = 400) -> dict[str, float]:
    """How much of what is in ``scenes`` scenes (3 to 6 things, 1 or 2 signs, no document) is among as many best labels:
    ``kinds`` of the kinds alone, ``characters`` of the characters alone, ``accuracy`` of both together.

    Raises ``ValueError`` for a split that is not in ``SPLITS``.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    device = next(model.parameters()).device
    was = model.training
    model.eval()
    parts = {"accuracy": slice(None), "kinds": slice(len(KINDS)), "characters": slice(len(KINDS), None)}
    found: dict[str, list[float]] = {name: [] for name in parts}
    first = SPLITS[split].start
    for start in range(0, scenes, 20):
        made = [scene(first + s, **FEW) for s in range(start, min(start + 20, scenes))]
        logits = model(pixels(np.stack([m.image for m in made])).to(device)).cpu()
        there = torch.zeros(len(made), len(LABELS))
        for row, m in zip(there, made, strict=True):
            row[[LABELS.index(t.kind) for t in m.objects]] = 1
            row[[LABELS.index(c) for s in m.signs for c in s.text]] = 1
        for name, part in parts.items():
            for guess, true in zip(logits[:, part], there[:, part], strict=True):
                n = int(true.sum())
                found[name].append(float(true[guess.topk(n).indices].sum()) / n)
    model.train(was)
    return {name: sum(values) / len(values) for name, values in found.items()}


def facts(model: nn.Module) -> dict[str, Any]:
    """What the card says about ``model``: what it finds on held-out scenes, data and limits."""
    found = accuracy(model)
    few = ", ".join(k for k in ("kinds", "characters") if found[k] < 0.9)
    return {
        **{k: round(v, 4) for k, v in found.items()},
        "not_learned": f"{few} by the class token" if few else "nothing of what it is asked",
        "data": "generated scenes of the second world (tokenreduce.zoo.world2), seeds of the train split",
        "limits": f"{len(KINDS)} drawn kinds and {len(CHARACTERS)} characters of one font, {min(LETTERS)} px and more, "
        f"on a lattice of 4 px; things of {min(SIZES)} px and more; {SIDE}x{SIDE} pixels; no photographs",
    }


def train(
    out: Path,
    *,
    start: nn.Module,
    device: str = "cpu",
    stop_after: float | None = None,
    workers: int = 1,
    compiled: bool = False,
    stages: Sequence[Stage] = STAGES,
    save_every: int = 500,
    report: Callable[[dict[str, Any]], None] = print,
) -> nn.Module:
    """Train from ``start`` (a ``world-vit``, which is :func:`grown`, or a ``world-vit-2`` to go on from), or from
    ``out``'s checkpoints, and return the timm model; see :func:`.world_vit.train`."""
    torch.manual_seed(20)
    known: Any = start
    model = Pretraining(start if known.pos_embed.shape[1] == 1 + GRID * GRID else grown(start))
    for block in model.vit.blocks:  # explicit attention has the faster backward pass on CPU
        block.attn.fused_attn = device != "cpu"
    forward = torch.compile(model.forward) if compiled else model.forward

    def loss(stage: Stage, made: Sights, step: int) -> Tensor:
        keep = choose(made.labels[:, 4] >= 0, stage.keep, np.random.default_rng((23, step)))
        want = targets(made, keep, device)
        out = forward(pixels(made.pixels).to(device), torch.from_numpy(keep).to(device), stage.looks > 0)
        return losses(out, want, stage.named, stage.looks)

    def judge(_: Stage) -> dict[str, Any]:
        found = held_out(model, device=device)
        named = {f"({k} named)": v for k, v in accuracy(model.vit, "validation", scenes=60).items()}
        return {**found, **named, "accuracy": found["character"]}

    fit_stages(
        model, stages, out, loss=loss, judge=judge, device=device, stop_after=stop_after, workers=workers,
        save_every=save_every, report=report,
        draw=lambda stage: functools.partial(
            sights, batch=stage.schedule.batch, seed=stage.schedule.seed, scenes=stage.scenes
        ),
    )  # fmt: skip
    for block in model.vit.blocks:
        block.attn.fused_attn = True
    return model.vit.eval()  # type: ignore[no-any-return]
