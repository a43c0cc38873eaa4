"""The image language model task: accuracy by question type, visual tokens, FLOPs, time and cache of a prefill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tokenreduce.bench.asking.pictures import Pictures
from tokenreduce.bench.asking.served import STAGES
from tokenreduce.bench.asking.task import QuestionTask

__all__ = ["STAGES", "VlmTask"]


@dataclass
class VlmTask(QuestionTask):
    """One image language model on questions about images, measured row by row; see :class:`QuestionTask`.

    Args:
        data, split, limit, seed: see :func:`~tokenreduce.bench.questions.load_questions`.

    A model whose tokenizer has every word of the world as one token, and few others, answers questions about the world
    with the likeliest token behind the question. Other models and data: greedy ``generate``, and the answer is right
    when it equals a given one but for case, punctuation and articles. Bad settings raise ``ValueError``.
    """

    name: ClassVar[str] = "vlm"
    baselines: ClassVar[tuple[str, ...]] = ("random@projector", "uniform@projector", "pool", "resize@projector")
    #: Well-known methods of every stage, for a sweep that takes a minute or two.
    well_known: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "projector": ("divprune", "visionzip", "vispruner"), "language": ("fastv", "pyramiddrop"), "encoder": ("tome",),
    }  # fmt: skip
    probed: ClassVar[int] = 8

    def source(self) -> Pictures:
        return Pictures(self.data, self.split, self.limit, self.seed)
