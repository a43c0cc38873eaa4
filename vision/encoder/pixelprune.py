"""PixelPrune (arXiv 2604.00886): units of an image that their neighbours predict never enter the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.algorithms.pixels import PixelReducer
from tokenreduce.algorithms.prediction import predicted, surprise

__all__ = ["PixelPrune"]


@dataclass(frozen=True)
class PixelPrune(PixelReducer, name="pixelprune", paper="2604.00886", title="PixelPrune"):
    """PixelPrune: drop the units of an image whose pixels their neighbours predict, before the first block.

    With A on the left, B above and C above A, a unit is predicted to be A in the first row and B in the first column;
    elsewhere it is B where C is like A and not like B, else A. Units that are like their prediction (``tolerance``,
    boundary included) go, the first of an image never does. How many stay follows from the image alone and is known
    before any model runs: a uniform picture leaves one unit, noise leaves all. Every frame of a video is an image.

    ``tolerance=0`` is the lossless setting of the paper's tables: pixels of what goes equal, bit by bit, those of a
    unit that stays. The tower and the language model still have fewer keys, so that outputs differ. Photographs keep
    nearly everything there; documents and screens do not.

    Points of this implementation. The scan that replaces what goes by its prediction runs along anti-diagonals and
    gives the same (:func:`tokenreduce.algorithms.prediction.predicted`). Official thresholds are shares of 255. Pixels
    are compared as the tower gets them: in half precision, the ones that rounding made equal are equal to it as well,
    while the official code looks before. Both temporal copies of an image are looked at where they differ. Videos, on
    which the official code fails, are images one after the other here. The other scans and the choice of a later layer,
    which are ablations of the paper, are left out: methods of the encoder and projector stages do that. Kept tokens
    stand at their original positions in the tower, and in the language model as the family counts them.

    Args:
        tolerance, metric, keep, std: see :class:`~tokenreduce.algorithms.pixels.PixelReducer`; ``keep`` leaves those
            that are furthest from their raw predictions, ties to the first.
        anchored: whether what goes counts as its prediction for the units behind it, so that errors never add up.

    Raises ``ValueError`` for values other than these.
    """

    anchored: bool = True

    def gone(self, units: Tensor) -> Tensor:
        return predicted(units.flatten(0, 1), self.limit, self.metric, self.anchored).unflatten(0, units.shape[:2])

    def scores(self, units: Tensor, keep: int) -> Tensor:
        return surprise(units.flatten(0, 1), 0.0, self.metric).unflatten(0, units.shape[:2])
