"""DyMU's DToMe (arXiv 2504.17040): merge all pairs above a threshold, so that simple images leave fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tokenreduce.algorithms.matching import above, best_edges, bipartite, clamp_r
from tokenreduce.algorithms.scoring import key_metric
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import check_size_bias
from tokenreduce.core.schedule import Scheduled

__all__ = ["DyMU"]


@dataclass(frozen=True)
class DyMU(Scheduled, name="dymu", needs=("keys",), paper="2504.17040", title="DyMU"):
    """DyMU: in every layer, each token at an even place whose best match among the odd ones is above the layer's
    threshold merges into it.

    Matching is ToMe's, by keys averaged over heads, with proportional attention; values are means by size, sizes add
    up. How many merge follows from the image: rows of a batch are filled up with slots that are not there, behind the
    others. Order: class token, unmerged even places, odd places, ascending.

    Thresholds belong to one checkpoint, with proportional attention as it was set when they were found:
    :func:`tokenreduce.measure.thresholds.merge_thresholds` finds them on images, for a number of tokens that is right
    on average. ``r`` and ``keep`` remove that number from every image instead, which is ToMe, and what calibration does
    with a batch of one image.

    Different from the official code: sums are divided by sizes (by sizes + 1e-4 there), similarities are float32, and
    nothing but the even places caps what merges. Virtual unmerging in the language model is not in the released code;
    there, as here in image/video language models, the tokens that are left go in as they are, each at the place of its
    representative.

    Args:
        thresholds: one cosine for every layer, above which pairs merge; 1 or more merges nothing.
        r, inflect, keep: instead of ``thresholds``, see :class:`~tokenreduce.core.schedule.Scheduled`.
        prop_attn: attention logits get log(size).
        size_bias: the power of sizes instead: "log", "sqrt", "none" or a number in [0, 1]; None leaves it to
            ``prop_attn``.

    Raises ``ValueError`` for other values, both ``thresholds`` and ``r`` or ``keep``, and thresholds for another number
    of layers.
    """

    ragged: ClassVar[bool] = True

    thresholds: tuple[float, ...] | None = None
    prop_attn: bool = True
    size_bias: str | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size_bias(self.size_bias)
        value = self.thresholds
        if isinstance(value, Sequence) and not isinstance(value, str):
            object.__setattr__(self, "thresholds", tuple(value))
        if self.thresholds is None:
            return
        if self.keep is not None or self.r != 0:
            raise ValueError("give thresholds, or r or keep")
        if not isinstance(self.thresholds, tuple) or not self.thresholds:
            raise ValueError(f"thresholds is a tuple with one cosine for every layer, not {self.thresholds!r}")

    def acts_at(self, layer: int, depth: int) -> bool:
        if self.thresholds is None:
            return super().acts_at(layer, depth)
        if len(self.thresholds) != depth:
            raise ValueError(
                f"thresholds are for {len(self.thresholds)} layers and the model has {depth}; find its own with "
                f"tokenreduce.measure.thresholds.merge_thresholds"
            )
        return self.thresholds[layer] < 1

    def plan(self, evidence: EncoderEvidence) -> Plan:
        metric = key_metric(evidence)
        if self.thresholds is None:
            return bipartite(metric, clamp_r(self.amount(evidence), evidence, self.name), evidence)
        best, partner = best_edges(metric, evidence)
        return above(best > self.thresholds[evidence.layer], partner, evidence)
