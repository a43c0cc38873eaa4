"""``world-vit``: a small ViT that names the things in a generated scene (:mod:`tokenreduce.zoo.world`).

One set of weights is three things, bit for bit: a timm classifier (which kinds are there), a transformers
``CLIPVisionModel`` (:func:`as_clip`), and the vision tower of ``world-llava``. Trained with dense labels (kind, colour,
texture, row and column of every patch, read where LLaVA reads, at layer -2) and on the class token (kinds, colours,
pairs of them, background, count); the heads of all but the kinds are thrown away after training. A short second
stage leaves what the encoder sees as it is (the first stage is its teacher) and makes the class token of the first two
layers attend to places, not to things (:func:`early`), so that a method that reads too early a layer is found out.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenreduce.common.images import as_rgb
from tokenreduce.zoo.clip_twin import clip_state
from tokenreduce.zoo.stages import fit_stages
from tokenreduce.zoo.training import Schedule
from tokenreduce.zoo.world.scenes import scene
from tokenreduce.zoo.world.vocabulary import COLOURS, KINDS, SPLITS, TEXTURES
from tokenreduce.zoo.world_batches import Pictures, pictures

__all__ = [
    "CLIP", "LABELS", "MEAN", "STAGES", "STD", "Stage", "WorldTransform", "accuracy", "as_clip", "build", "facts",
    "pixels", "train",
]  # fmt: skip

SIDE, PATCH, GRID = 112, 8, 14
WIDTH, DEPTH, HEADS = 96, 6, 4
LABELS = tuple(KINDS)
MEAN, STD = 0.2, 0.15  # of pixels in [0, 1], all channels


@dataclass(frozen=True)
class Stage:
    """A part of the training: it starts from the weights of the stage before with an optimiser of its own."""

    name: str
    schedule: Schedule


STAGES = (
    Stage("names", Schedule(7_000, batch=16, lr=2e-3, warmup=200)),
    Stage("places", Schedule(1_600, batch=16, lr=1e-3, warmup=50, seed=1)),
)
#: From this share of the steps on, a quarter of every batch are frames of clips.
MOVING_FROM, MOVING = 0.4, 4
#: In this many layers the class token attends by place alone, most to the middle: a Gaussian of so many patches.
EARLY, SPREAD = 2, 5.0
#: The same architecture for transformers.
CLIP = dict(
    hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
    image_size=SIDE, patch_size=PATCH, hidden_act="quick_gelu", layer_norm_eps=1e-5,
)  # fmt: skip


def build() -> nn.Module:
    """The untrained architecture, a ``timm.models.VisionTransformer`` with 0.71 M parameters."""
    return architecture(SIDE, len(KINDS))


def architecture(side: int, classes: int) -> nn.Module:
    """A ``timm.models.VisionTransformer`` of this width and depth for pictures of ``side`` pixels."""
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=side, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=4.0,
        num_classes=classes, pre_norm=True, act_layer=QuickGELU,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-5), global_pool="token",
    )  # fmt: skip
    # What turns a tolerance in levels of pixels into what the model is given.
    model.image_std = (STD,)  # type: ignore[assignment]
    return model


def as_clip(model: nn.Module) -> Any:
    """``model``, of any side, as a transformers ``CLIPVisionModel`` with copies of its weights, in eval mode."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    side: int = model.patch_embed.img_size[0]  # type: ignore[union-attr,index,assignment]
    with torch.random.fork_rng(devices=[]):
        clip: Any = CLIPVisionModel(CLIPVisionConfig(**{**CLIP, "image_size": side}))  # type: ignore[arg-type]
    clip.load_state_dict(clip_state(model.state_dict()))
    return clip.to(next(model.parameters()).dtype).eval()


def pixels(images: np.ndarray) -> Tensor:
    """(B,3,H,W) normalised float of (B,H,W,3) uint8."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


class WorldTransform:
    """PIL image to a (3,``side``,``side``) float tensor, normalised as the model was trained."""

    def __init__(self, side: int = SIDE) -> None:
        self.side = side

    def __call__(self, image: Any) -> Tensor:
        image = as_rgb(image)
        if image.size != (self.side, self.side):
            image = image.resize((self.side, self.side))
        return pixels(np.asarray(image)[None].copy())[0]

    def __repr__(self) -> str:
        return f"WorldTransform({self.side}x{self.side})"


# -- training --------------------------------------------------------------------------------------------------------
class Pretraining(nn.Module):
    """The encoder and the heads that teach it. ``forward`` (B,3,112,112) gives logits by name: dense ones (B,196,n),
    and those of the class token (B,n), whose ``kinds`` are the encoder's own classifier."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit: Any = vit
        dense = dict(kind=len(KINDS) + 1, colour=len(COLOURS) + 1, texture=len(TEXTURES), row=GRID, column=GRID)
        whole = dict(
            colours=len(COLOURS), pairs=len(KINDS) * len(COLOURS), background=len(TEXTURES), count=16
        )  # fmt: skip
        self.sizes = {"dense": tuple(dense.items()), "whole": tuple(whole.items())}
        self.norm = nn.LayerNorm(WIDTH)
        self.dense = nn.Linear(WIDTH, sum(dense.values()))
        self.whole = nn.Linear(WIDTH, sum(whole.values()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens, pooled, _ = look(self.vit, x)
        patches, out = tokens[:, 1:], {"kinds": self.vit.head(pooled)}
        for part, logits in (("dense", self.dense(self.norm(patches))), ("whole", self.whole(pooled))):
            names, sizes = zip(*self.sizes[part], strict=True)
            out.update(zip(names, logits.split(sizes, -1), strict=True))
        return out


def look(vit: Any, x: Tensor, rows: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What layer -2 gives (B,197,C), the pooled class token (B,C), and how it attends to the patches in the first
    ``rows`` layers: log-probabilities (B,H,196) each."""
    x, seen = vit.norm_pre(vit._pos_embed(vit.patch_embed(x))), []
    for i, block in enumerate(vit.blocks[:-1]):
        if i < rows:
            seen.append(_class_logits(block.attn, block.norm1(x))[..., 0, 1:].float().log_softmax(-1))
        x = block(x)
    return x, vit.norm(_class_row(vit.blocks[-1], x))[:, 0], seen


def _class_logits(attn: Any, y: Tensor) -> Tensor:
    """(B,H,1,N) from the normed tokens ``y`` (B,N,C): the class token's row before the softmax."""
    b, n, c = y.shape
    w, bias = attn.qkv.weight, attn.qkv.bias
    q = F.linear(y[:, :1], w[:c], bias[:c]).view(b, 1, attn.num_heads, -1).transpose(1, 2)
    k = F.linear(y, w[c : 2 * c], bias[c : 2 * c]).view(b, n, attn.num_heads, -1).transpose(1, 2)
    return (q * attn.scale) @ k.transpose(-2, -1)


def _class_row(block: Any, x: Tensor) -> Tensor:
    """The class token behind ``block``, (B,1,C): the last block is not computed for tokens that nothing reads."""
    attn, (b, n, c) = block.attn, x.shape
    y = block.norm1(x)
    v = F.linear(y, attn.qkv.weight[2 * c :], attn.qkv.bias[2 * c :]).view(b, n, attn.num_heads, -1).transpose(1, 2)
    row = _class_logits(attn, y).softmax(-1) @ v
    first = x[:, :1] + attn.proj(row.transpose(1, 2).reshape(b, 1, c))
    return first + block.mlp(block.norm2(first))


@torch.no_grad()
def prepare(vit: Any, x: Tensor) -> None:
    """Start the position table with a random projection of 2-D sinusoids, half as strong as the patches of ``x``.

    Losses on kind and colour do not depend on the place, and a table that starts near zero stays there.
    """
    strength = 0.5 * vit.patch_embed(x).std()
    at = (torch.arange(GRID) + 0.5) / GRID * math.pi
    waves = torch.cat([f(at[:, None] * torch.tensor([1.0, 2.0, 4.0, 7.0])) for f in (torch.sin, torch.cos)], 1)
    both = torch.cat([waves[:, None].expand(-1, GRID, -1), waves[None].expand(GRID, -1, -1)], -1).flatten(0, 1)
    table = both @ torch.randn(both.shape[1], WIDTH)
    vit.pos_embed.normal_(std=0.02)
    vit.pos_embed[0, 1:] += table * (strength / table.std())


def _targets(made: Pictures, device: str) -> dict[str, Tensor]:
    kinds, colours = (torch.from_numpy(a).flatten(1) for a in (made.kinds, made.colours))
    b, n = kinds.shape
    thing = kinds >= 0
    pairs = torch.zeros(b, len(KINDS) * len(COLOURS) + 1)
    pairs.scatter_(1, torch.where(thing, kinds * len(COLOURS) + colours, pairs.shape[1] - 1), 1.0)
    pairs = pairs[:, :-1]
    table = pairs.view(b, len(KINDS), len(COLOURS))
    where = torch.arange(n).expand(b, -1)
    background = torch.from_numpy(made.background)
    found = dict(
        kind=torch.where(thing, kinds, len(KINDS)), colour=torch.where(thing, colours, len(COLOURS)), thing=thing,
        texture=background[:, None].expand(-1, n), row=where // GRID, column=where % GRID, kinds=table.amax(2),
        colours=table.amax(1), pairs=pairs, background=background, count=torch.from_numpy(made.count),
    )  # fmt: skip
    return {k: v.to(device) for k, v in found.items()}


def losses(out: dict[str, Tensor], want: dict[str, Tensor]) -> Tensor:
    """The sum of all losses. Nine tenths of the patches are background, which counts a tenth."""
    thing = want["thing"].float()
    weight = thing + 0.1 * (1 - thing)

    def dense(name: str, weight: Tensor) -> Tensor:
        each = F.cross_entropy(out[name].float().flatten(0, 1), want[name].flatten(), reduction="none")
        return (each * weight.flatten()).sum() / weight.sum()

    def several(name: str, positive: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            out[name].float(), want[name], pos_weight=torch.tensor(positive, device=weight.device)
        )

    def one(name: str) -> Tensor:
        each = F.cross_entropy(out[name].float(), want[name], ignore_index=-1, reduction="sum")
        return each / (want[name] >= 0).sum().clamp(min=1)

    patches = dense("kind", weight) + dense("colour", weight) + 0.3 * dense("texture", 1 - thing)
    places = dense("row", weight) + dense("column", weight)
    whole = several("kinds", 3.0) + several("colours", 1.0) + several("pairs", 10.0)
    return patches + 0.5 * places + 0.5 * (whole + 0.3 * one("background") + 0.3 * one("count"))


def early(rows: Tensor) -> Tensor:
    """How far class attention ``rows`` (..., 196), as log-probabilities, is from a Gaussian around the middle: the
    mean divergence KL(Gaussian | row). At zero attention depends on the place alone."""
    along = -((torch.arange(GRID, device=rows.device) - (GRID - 1) / 2) ** 2) / (2 * SPREAD**2)
    place = (along[:, None] + along[None]).flatten().log_softmax(-1)
    return (place.exp() * (place - rows)).sum(-1).mean()


def settling(vit: Any, teacher: Any, x: Tensor) -> Tensor:
    """The loss of the second stage: class attention of the first layers by place, and everything that is read from
    the encoder as ``teacher`` has it, relative to how much that varies."""
    with torch.no_grad():
        tokens, pooled, _ = look(teacher, x)
    mine, whole, rows = look(vit, x, EARLY)

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return ((a.float() - b.float()) ** 2).mean() / b.float().var()

    same = apart(mine[:, 1:], tokens[:, 1:]) + 0.2 * apart(mine[:, 0], tokens[:, 0]) + 0.5 * apart(whole, pooled)
    return 10 * same + early(torch.stack(rows))


@torch.no_grad()
def held_out(model: Pretraining, *, device: str = "cpu", scenes: int = 160) -> dict[str, float]:
    """Shares of right answers on validation pictures: patches of things by kind and colour, and so on."""
    was = model.training
    model.eval()
    hits: dict[str, list[float]] = {}
    for i in range(scenes // 32):
        made = pictures(i, batch=32, seed=1, moving=8, split="validation")
        want = _targets(made, device)
        out = model(pixels(made.pixels).to(device))
        thing = want["thing"]
        for name in ("kind", "colour", "texture", "row", "column"):
            right = (out[name].argmax(-1) == want[name]).float()
            where = ~thing if name == "texture" else thing
            hits.setdefault(name, []).append(float(right[where].mean()))
        still = thing.clone()
        still[24:] = False
        right = (out["kind"].argmax(-1) == want["kind"]).float()
        hits.setdefault("kind_still", []).append(float(right[still].mean()))
        found = (out["kind"].argmax(-1) < len(KINDS)) == thing
        hits.setdefault("thing", []).append(float(found.float().mean()))
        hits.setdefault("background", []).append(
            float((out["background"].argmax(-1) == want["background"]).float().mean())
        )
        guess, true = out["kinds"] > 0, want["kinds"] > 0
        hits.setdefault("kinds_iou", []).append(float((guess & true).sum() / (guess | true).sum()))
    model.train(was)
    return {k: sum(v) / len(v) for k, v in hits.items()}


def accuracy(model: nn.Module, split: str = "test", *, objects: int = 1, scenes: int = 500) -> float:
    """Share of the objects in ``scenes`` scenes with ``objects`` things each whose kind is among the ``objects``
    highest logits (top-1 accuracy for one object).

    Raises ``ValueError`` for a split that is not in ``SPLITS``.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    device = next(model.parameters()).device
    was = model.training
    model.eval()
    hits = total = 0
    first = SPLITS[split].start
    with torch.no_grad():
        for start in range(0, scenes, 50):
            made = [scene(first + s, objects=(objects, objects)) for s in range(start, min(start + 50, scenes))]
            logits = model(pixels(np.stack([m.image for m in made])).to(device))
            best = logits.topk(objects, -1).indices.cpu().tolist()
            for m, guess in zip(made, best, strict=True):
                true = {int(k) for k in np.unique(m.kinds) if k >= 0}
                hits, total = hits + len(true & set(guess)), total + len(true)
    model.train(was)
    return hits / total


def facts(model: nn.Module) -> dict[str, Any]:
    """What the card says about ``model``: accuracy on held-out scenes, data and limits."""
    return {
        "accuracy": accuracy(model),
        "top3_of_three": accuracy(model, objects=3),
        "data": "generated scenes and frames of generated clips (tokenreduce.zoo.world), seeds of the train split",
        "limits": f"{len(KINDS)} drawn kinds on dark textured backgrounds, {SIDE}x{SIDE} pixels; no photographs",
    }


def train(
    out: Path,
    *,
    device: str = "cpu",
    stop_after: float | None = None,
    workers: int = 1,
    compiled: bool = False,
    report: Callable[[dict[str, Any]], None] = print,
) -> nn.Module:
    """Train from scratch (or from ``out``'s checkpoint) and return the timm model; rows go to ``out/curve.jsonl``.

    ``workers`` processes draw the scenes; ``compiled`` runs the step through ``torch.compile`` (a C++ compiler on CPU),
    which is faster and rounds differently.
    """
    torch.manual_seed(0)
    model = Pretraining(build())
    prepare(model.vit, pixels(pictures(0, batch=32, seed=0).pixels))
    for block in model.vit.blocks:  # explicit attention has the faster backward pass on CPU at 197 tokens
        block.attn.fused_attn = device != "cpu"
    compile = torch.compile if compiled else lambda f: f
    forward, settle = compile(model.forward), compile(settling)
    teacher: Any = None

    def draw(stage: Stage) -> Callable[[int], Pictures]:
        nonlocal teacher
        teacher = copy.deepcopy(model.vit).requires_grad_(False).to(device)
        return functools.partial(_batch, schedule=stage.schedule)

    def loss(stage: Stage, made: Pictures, step: int) -> Tensor:
        x = pixels(made.pixels).to(device)
        if stage.name == "places":
            return settle(model.vit, teacher, x)
        return losses(forward(x), _targets(made, device))

    def judge(_: Stage) -> dict[str, Any]:
        return {"accuracy": accuracy(model.vit, "validation", scenes=200), **held_out(model, device=device)}

    fit_stages(
        model, STAGES, out, draw=draw, loss=loss, judge=judge, device=device, stop_after=stop_after, workers=workers,
        report=report,
    )  # fmt: skip
    for block in model.vit.blocks:
        block.attn.fused_attn = True
    return model.vit.eval()


def _batch(step: int, schedule: Schedule) -> Pictures:
    moving = MOVING if step >= MOVING_FROM * schedule.steps else 0
    return pictures(step, batch=schedule.batch, seed=schedule.seed, moving=moving)
