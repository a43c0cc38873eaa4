"""StreamingLLM (arXiv 2309.17453): the first tokens, which much attention sinks into, and the last ones stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.algorithms.decode_scorer import DecodeScorer
from tokenreduce.core.budget import Keep, check_count
from tokenreduce.core.evidence import CacheEvidence

__all__ = ["Recent", "StreamingLLM"]


@dataclass(frozen=True)
class Recent(DecodeScorer, name="recent", title="Last keys only"):
    """The last keys stay, whatever they are: the baseline that every cache method has to beat.

    Args:
        keep, what: see :class:`~tokenreduce.algorithms.key_scorer.KeyScorer`. With ``what="visual"`` the last visual
            keys stay and all text does.
        interval: with ``what="all"``, decode steps from one cut to the next; None cuts behind the prompt only.

    Raises ``ValueError`` for values other than these.
    """

    def importance(self, evidence: CacheEvidence) -> Tensor:
        return evidence.there.long().cumsum(1).float()


@dataclass(frozen=True)
class StreamingLLM(Recent, name="streamingllm", paper="2309.17453", title="StreamingLLM"):
    """StreamingLLM: the first ``start_size`` tokens (attention sinks) and the last ones stay, the middle goes; the same
    slots in every layer and head, since no content is looked at.

    With ``what="all"`` the cache is cut behind each layer's prefill, and again in decode whenever it has outgrown the
    budget, behind the step, so that the step's own attention still sees one key more. With ``what="visual"`` all text
    stays, and of the visual keys those among the first ``start_size`` tokens and the last ones: where text comes first,
    as in most chat templates, that is the baseline ``recent``. This method lets go of visual evidence first.

    The authors' code stores keys before their rotation and rotates them by their place inside the cache. Positions stay
    as they were here, as in kvpress without its re-rotation, so that distances grow past what a model was trained on
    where an answer does.

    Args:
        keep, what, interval: see :class:`Recent`.
        start_size: first tokens that stay, inside the budget; 4 as published.
        recent_size: instead of ``keep``, with ``what="all"``: last tokens that stay beside the first; 512 in the
            authors' class, 2000 in their example.

    kvpress leaves to the order of its sort which sinks stay where the budget is below ``start_size``; such a budget is
    refused here.

    Raises ``ValueError`` for negative sizes, a ``recent_size`` with ``what="visual"``, none of both sizes, and in a
    forward for a budget below the first tokens.
    """

    start_size: int = 4
    recent_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.start_size, "start_size")
        if self.recent_size is None:
            return
        check_count(self.recent_size, "recent_size")
        if self.what != "all":
            raise ValueError("recent_size counts all keys of a head; give what=all with it, or keep instead")
        if self.start_size + self.recent_size < 1:
            raise ValueError("start_size=0 and recent_size=0 leave nothing; give at least one token")

    def capacity(self, evidence: CacheEvidence) -> Keep | Tensor:
        if self.recent_size is not None:
            return self.start_size + self.recent_size
        return super().capacity(evidence)

    def always(self, evidence: CacheEvidence) -> Tensor | None:
        return evidence.first(self.start_size) if self.start_size else None
