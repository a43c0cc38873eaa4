"""From a photograph of a digit to what MNIST holds: 28x28, white on black, in a 20x20 box, centred by mass.

The normalisation is the one that the MNIST page describes; finding the background and cutting the noise around the
digit is needed because a photograph has no clean background.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from tokenreduce.common.images import as_rgb

__all__ = ["DigitTransform", "as_digit"]

SIDE, BOX = 28, 20
#: Below this share of the strongest stroke a pixel is background (paper, shadow, compression noise).
NOISE = 0.25


def _grey(image: Image.Image) -> np.ndarray:
    """(H,W) float32 in [0,255]; transparency becomes white paper."""
    return np.asarray(as_rgb(image).convert("L"), dtype=np.float32)


def as_digit(image: Image.Image) -> np.ndarray:
    """(28,28) float32 in [0,255], white digit on black.

    The background is the median of the border; when it is light the picture is inverted. A picture that is 28x28
    already is otherwise left as it is. Any other is cut to the digit, scaled into 20x20 and centred by mass; one
    without contrast comes out black.
    """
    grey = _grey(image)
    border = float(np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])))
    if border > 127.5:
        grey, border = 255 - grey, 255 - border
    if grey.shape == (SIDE, SIDE):
        return grey
    ink = np.clip(grey - border, 0, None)
    top = float(ink.max())
    out = np.zeros((SIDE, SIDE), dtype=np.float32)
    if top < 1:
        return out
    ink = np.where(ink < NOISE * top, 0, ink) * (255 / top)
    rows, cols = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    ink = ink[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    scale = BOX / max(ink.shape)
    h, w = (max(1, round(s * scale)) for s in ink.shape)
    small = np.asarray(
        Image.fromarray(ink).resize((w, h), Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR)
    )
    mass = small.sum()
    place = []
    for axis, size in ((0, h), (1, w)):
        weights = small.sum(1 - axis)
        centre = float((weights * (np.arange(size) + 0.5)).sum() / mass)
        place.append(min(max(round(SIDE / 2 - centre), 0), SIDE - size))
    out[place[0] : place[0] + h, place[1] : place[1] + w] = small
    return out


class DigitTransform:
    """PIL image to a (1,28,28) float tensor, normalised as the model was trained."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        from tokenreduce.zoo.digits import MEAN, STD

        return (torch.from_numpy(as_digit(image))[None] / 255 - MEAN) / STD

    def __repr__(self) -> str:
        return "DigitTransform(28x28, white on black)"
