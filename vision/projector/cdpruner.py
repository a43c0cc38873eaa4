"""CDPruner (arXiv 2506.10967): visual tokens that differ from each other, weighted by the question; a DPP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.algorithms.greedy import volume
from tokenreduce.algorithms.projector import AUTO, Projector, check_clip, clip_named, kept, share
from tokenreduce.algorithms.scoring import clean, finite, gram, inner, relevance, unit
from tokenreduce.core.evidence import VisualEvidence
from tokenreduce.core.plan import Plan

__all__ = ["CDPruner"]


@dataclass(frozen=True)
class CDPruner(Projector, name="cdpruner", needs=("text",), paper="2506.10967", title="CDPruner"):
    """CDPruner: greedy most probable set of a determinantal point process with kernel q_i cos(x_i, x_j) q_j, where x
    are the embeddings behind the projector and q is the relevance of a token to the question; raster order.

    With ``clip`` q is the mean over the segments of the question of MINUS the cosine between a patch and the text in
    CLIP's joint space, as in the official code: patches of these towers answer inversely. Without it q is the mean
    cosine between the embedding of a token and those of the words of the question in the language model's own space,
    not negated; this port is ours, and needs nothing but the language model. q is scaled to (0, 1] over all views of
    an image; the process runs in every view on its own. Where q is constant, as without any word, diversity alone
    decides. (Officially the scale is taken over the whole batch, and a constant q ends in NaN.)

    Once the chosen tokens span all others to rounding, the rest is filled up by descending q, so that ``keep`` tokens
    stay in any case. Ties go to the lower index.

    Args:
        keep: tokens of an image that stay (the official number is per view); 128 or 64 of 576 in the paper.
        clip: Hub id or folder of the CLIP model that the vision tower is from, such as
            "openai/clip-vit-large-patch14-336", or "world-clip-2"; None for relevance in the language model's space;
            "auto" for the CLIP that the language model names in its config (``clip_model``, as world-llava-2 does), and
            None where it names none.
        sign: factor on the similarity, -1 or 1; None is -1 with ``clip`` (1 where its patches were taught to answer
            texts, as those of world-clip-2) and 1 without.
        theta: None as published, or how strongly relevance counts, in [0, 1): q becomes exp(theta / (2 (1 - theta)) q).
        positions, newlines: see :class:`~tokenreduce.algorithms.projector.Projector`.

    Raises ``ValueError`` for values other than these.
    """

    whole: ClassVar[bool] = True

    keep: int | float = 64
    clip: str | None = field(default=AUTO, kw_only=True)
    sign: int | None = field(default=None, kw_only=True)
    theta: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip, self.sign)
        if self.theta is not None and not (isinstance(self.theta, int | float) and 0 <= self.theta < 1):
            raise ValueError(f"theta is a number in [0, 1) or None, not {self.theta!r}")

    def required(self) -> tuple[str, ...]:
        return ("clip",) if clip_named(self.clip) else ("text",)

    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        q, x = self.quality(evidence), clean(unit(evidence.projected.detach()), evidence)
        view = evidence.view.clamp(min=0)
        places = [w for v in range(int(view.max()) + 1) if len(w := (view == v).nonzero().flatten())]
        sizes = share(keep, [len(w) for w in places])
        chosen = []
        for n, k in dict.fromkeys((len(w), k) for w, k in zip(places, sizes, strict=True) if k):
            where = torch.stack([w for w, mine in zip(places, sizes, strict=True) if (len(w), mine) == (n, k)])
            part = (x, q) if n == q.shape[1] else (x[:, where].flatten(0, 1), q[:, where].flatten(0, 1))
            index = greedy(*part, k).view(len(x), -1, k)
            chosen.append(where.expand(len(x), -1, -1).gather(2, index).flatten(1))
        return kept(torch.cat(chosen, 1), evidence)

    def quality(self, evidence: VisualEvidence) -> Tensor:
        """(B,N) q of the tokens behind the prefix: above 0, and 1 for all where relevance is constant."""
        if not clip_named(self.clip):
            r = relevance(evidence)
        else:
            patches, text = evidence.clip
            text = unit(text.detach())
            there = (text != 0).any(-1).sum(1).clamp(min=1)
            mean = text.sum(1, keepdim=True) / there[:, None, None]
            r = inner(unit(patches.detach()[:, patches.shape[1] - (evidence.n - evidence.prefix) :]), mean).squeeze(-1)
        r = finite(r * (self.sign or (-1 if clip_named(self.clip) else 1)), evidence).nan_to_num(neginf=-2.0)
        low, span = r.amin(1, keepdim=True), r.amax(1, keepdim=True) - r.amin(1, keepdim=True)
        q = torch.where(span > 0, (r - low + 1e-6) / torch.where(span > 0, span, 1.0), 1.0)
        return q if self.theta is None else (q * (self.theta / (2 * (1 - self.theta)))).exp()


def greedy(x: Tensor, q: Tensor, keep: int) -> Tensor:
    """(B,K) greedy maximum a posteriori choice from the kernel of unit vectors ``x`` (B,N,D) scaled by ``q`` (B,N) > 0,
    in order of choice; tokens that add nothing come last, by descending q."""
    kernel = gram(x)
    # The cosine to itself is 1 unless the token is 0: its rounding must not decide between equal tokens.
    own = (kernel.diagonal(dim1=1, dim2=2) > 0) * q * q
    return volume(kernel.mul_(q.unsqueeze(1)).mul_(q.unsqueeze(2)), own, q, keep)
