"""SnapKV (arXiv 2404.14469): keep the keys that the end of the prompt attends to, smoothed over their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.algorithms.key_rows import marked_sums
from tokenreduce.algorithms.key_scorer import KeyScorer
from tokenreduce.algorithms.keys import pooled
from tokenreduce.core.budget import Keep, check_count
from tokenreduce.core.evidence import CacheEvidence

__all__ = ["SnapKV"]


@dataclass(frozen=True)
class SnapKV(KeyScorer, name="snapkv", needs=("attention",), paper="2404.14469", title="SnapKV"):
    """SnapKV: behind each layer's prefill, keep the keys with most attention from the last tokens of the prompt.

    A key's score is the softmaxed attention of the last ``window_size`` tokens (softmax over all keys, causal inside
    the window), summed over them, averaged over the query heads of its KV head, and pooled over neighbouring slots in
    front of the window. With ``what="all"``, the window itself always stays. Keys keep their rotation and their order;
    nothing is evicted while decoding.

    Args:
        keep, what: see :class:`~tokenreduce.algorithms.key_scorer.KeyScorer`. With ``what="visual"`` all text
            stays beside the budget, neighbours of every kind take part in pooling, and visual keys inside the window
            compete like the others (the paper does not know such a case).
        window_size: last tokens of the prompt that judge; 64 in the code's class, 32 in its runs. A shorter prompt
            judges with all of its tokens.
        kernel_size, pooling: odd width and kind ("avgpool", "maxpool") of the smoothing; ends count zeros.
        max_capacity_prompt: instead of ``keep``, with ``what="all"``: slots per head, the window included; a shorter
            prompt is left alone.

    The official code keeps one cache per *query* head; scores are averaged over the group here, as kvpress does, since
    a cache per query head multiplies memory.

    Raises ``ValueError`` for an even kernel, another pooling, a capacity that is not larger than the window, or that is
    given with ``what="visual"``, and in a forward for a budget below the window (``what="all"``).
    """

    window_size: int = 32
    kernel_size: int = 5
    pooling: str = "avgpool"
    max_capacity_prompt: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.window_size, "window_size", 1)
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is an odd int >= 1, not {self.kernel_size!r}")
        if self.pooling not in ("avgpool", "maxpool"):
            raise ValueError(f"pooling={self.pooling!r}: choose 'avgpool' or 'maxpool'")
        if self.max_capacity_prompt is None:
            return
        if self.what != "all":
            raise ValueError("max_capacity_prompt counts all keys of a head; give what=all with it, or keep instead")
        if self.max_capacity_prompt <= self.window_size:
            raise ValueError(
                f"max_capacity_prompt={self.max_capacity_prompt} is not larger than window_size={self.window_size}"
            )

    def query_rows(self) -> int:
        return self.window_size

    def over_group(self, scores: Tensor) -> Tensor:
        """(B*Hkv,G,N) scores of query heads to (B*Hkv,N) of their KV head."""
        return scores.mean(1)

    def importance(self, evidence: CacheEvidence) -> Tensor:
        scores = self.over_group(marked_sums(evidence, evidence.last(self.window_size)))
        scores = scores.masked_fill(~evidence.there, 0.0)
        window = self.always(evidence)
        if window is not None:  # takes no part, so that pooling sees zeros behind the last key in front of it
            scores = scores.masked_fill(window, 0.0)
        return pooled(scores, self.kernel_size, self.pooling)

    def always(self, evidence: CacheEvidence) -> Tensor | None:
        return evidence.last(self.window_size) if self.what == "all" else None

    def wanted(self, evidence: CacheEvidence) -> Keep | Tensor:
        return self.keep if self.max_capacity_prompt is None else self.max_capacity_prompt
