"""Assisted decoding and prompt lookup: tokens that a draft proposes and the model then verifies, several at once.

The library verifies the first draft in the call that brings the prompt. Methods choose by the prompt, its last token
above all, so here the first call gets the prompt alone, and the draft of that round goes on to the next one as far as
it was right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokenreduce.adapters.language.generation import cache_in
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.undo import Undo

__all__ = ["attach_drafts", "sees_images"]

#: Where a model has the method that chooses in every decode step, or None.
_STEPWISE = "_tokenreduce_stepwise"


def attach_drafts(generator: Any, stepwise: Reducer | None, undo: Undo) -> None:
    """Let ``generator`` verify drafts behind the prompt. ``stepwise`` is the method that chooses in every decode step,
    if there is one."""
    undo.set(generator, _STEPWISE, stepwise)
    undo.mix_in(generator, WaitingDrafts)


class WaitingDrafts(nn.Module):
    """Mixin of models that generate."""

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        return wait_for_prompt(vars(self)[_STEPWISE], super()._get_candidate_generator, *args, **kwargs)  # type: ignore[misc]


def wait_for_prompt(stepwise: Reducer | None, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``generate``'s choice of who drafts, whose first draft then waits until the prompt is cached.

    Raises ``ValueError`` for a method that chooses in every decode step, ``stepwise``.
    """
    if stepwise is not None:
        raise ValueError(
            f"{stepwise.spec()} chooses again in every decode step, for one new token; assisted decoding and prompt "
            f"lookup verify several in one step. Leave assistant_model and prompt_lookup_num_tokens out, or patch the "
            f"assistant with it instead"
        )
    made = stock(*args, **kwargs)
    if not getattr(made, "requires_model_outputs", False):  # else it has nothing to draft from in the first round
        drafts = Drafts(made)
        made.get_candidates = drafts.get_candidates
        made.update_candidate_strategy = drafts.update_candidate_strategy
    return made


@dataclass
class Drafts:
    """Stands in front of a candidate generator for the first two rounds."""

    stock: Any
    #: Rounds so far, and what was drafted before the prompt was cached: ids (B,L+N), logits (B,N,V) or None.
    rounds: int = 0
    first: tuple[Tensor, Tensor | None] | None = None

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        stock = type(self.stock).get_candidates
        self.rounds += 1
        if self.rounds == 1:
            self.first = stock(self.stock, input_ids, **kwargs)
            return input_ids, None
        drafted, self.first = self.first, None
        if drafted is not None:
            ids, logits = drafted
            n, length = input_ids.shape[1], ids.shape[1]
            right = length > n and bool((ids[:, :n] == input_ids.to(ids.device)).all())
            # How sure the assistant was, which the library sets against what turns out right, from this round on.
            del getattr(self.stock, "probs", [])[: 1 if right else None]
            if right:
                return ids, None if logits is None else logits[:, n - length :]
        return stock(self.stock, input_ids, **kwargs)

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        if self.rounds > 1:  # nothing was verified in the first round
            type(self.stock).update_candidate_strategy(self.stock, input_ids, scores, num_matches)


def sees_images(generator: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether this call of a draft's ``generate`` brings it the prompt and images that fit it.

    The library never hands a draft images, not even with the prompt, so that there would be nothing to choose from.
    They are the features of the model that it drafts for.
    """
    cache = cache_in(model_kwargs)
    if cache is not None and int(cache.get_seq_length()):
        return False
    width = generator.get_input_embeddings().embedding_dim
    return all(_width(made) == width for made in (model_kwargs.get("mm_encoder_outputs") or {}).values())


def _width(made: Any) -> int | None:
    """Channels of the output of ``get_image_features``."""
    features = getattr(made, "pooler_output", None)
    if isinstance(features, (list, tuple)):
        features = features[0] if features else None
    return None if features is None else int(features.shape[-1])
