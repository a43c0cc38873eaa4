"""Long answers, forced: how well a reduced model would have said what the unreduced one says.

Answers of one token come before anything has left the cache, so that they cannot tell what eviction costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenreduce.bench.asking.runner import Runner, quiet
from tokenreduce.measure.generation import greedy
from tokenreduce.measure.question import Question

__all__ = ["Forced", "forced_scores"]


class _Forcing:
    """A logits processor that lets ``ids`` come, whatever the model would say, and notes what it would have said."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.place, self.same = ids, 0, 0
        self.logs: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = int(self.ids[self.place])
        self.place += 1
        self.logs.append(float(scores[0].float().log_softmax(-1)[wanted]))
        self.same += int(scores[0].argmax()) == wanted
        forced = torch.full_like(scores, -torch.inf)
        forced[:, wanted] = 0
        return forced


class Forced:
    """The first ``tokens`` tokens that the unreduced model of ``runner`` says to every question, its end of answer left
    out, so that all are as long."""

    def __init__(self, runner: Runner, questions: Sequence[Question], tokens: int) -> None:
        self.runner, self.questions, self.tokens = runner, questions, tokens
        with torch.inference_mode(), quiet():
            self.ids = [self._said(question) for question in questions]

    def _said(self, question: Question) -> Tensor:
        inputs = self._inputs(self.runner.stock, question)
        made: Tensor = greedy(self.runner.stock, inputs, self.tokens, min_new_tokens=self.tokens)
        return made[0, inputs["input_ids"].shape[1] :]

    def _inputs(self, model: Any, question: Question) -> dict[str, Any]:
        return question.inputs if question.remake is None else question.remake(model)

    def score(self, model: Any) -> dict[str, float]:
        """``forced_agreement``, the share of these tokens that ``model`` would have said behind those before them, with
        its standard error, and ``perplexity``."""
        same, logs = [], []
        with torch.inference_mode(), quiet():
            for question, ids in zip(self.questions, self.ids, strict=True):
                forcing = _Forcing(ids)
                greedy(model, self._inputs(model, question), len(ids), min_new_tokens=len(ids),
                       logits_processor=[forcing])  # fmt: skip
                same.append(forcing.same / len(ids))
                logs += forcing.logs
        return forced_scores(same, logs)


def forced_scores(same: Sequence[float], logs: Sequence[float]) -> dict[str, float]:
    """From the share of tokens of every answer that would have come, and the log probability of each token."""
    mean, n = sum(same) / len(same), len(same)
    spread = math.sqrt(sum((s - mean) ** 2 for s in same) / max(n - 1, 1) / n)
    return {"forced_agreement": mean, "forced_agreement_stderr": spread, "perplexity": math.exp(-sum(logs) / len(logs))}
