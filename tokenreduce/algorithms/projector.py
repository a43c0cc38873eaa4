"""What methods between the vision encoder and the language model share: settings, budgets, and saliency."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from tokenreduce.algorithms.scoring import (
    attention_paid,
    attention_received,
    descending,
    finite,
)
from tokenreduce.core.budget import check_keep, count
from tokenreduce.core.evidence import BaseEvidence, Evidence, Look, VisualEvidence
from tokenreduce.core.plan import Identity, Plan, Prune
from tokenreduce.core.reducer import Reducer

__all__ = [
    "AUTO", "NEWLINES", "POSITIONS", "SCORES", "Projector", "Salient", "by_class", "check_clip", "check_layer",
    "clip_named", "kept", "saliency", "share", "top",
]  # fmt: skip

POSITIONS = ("compact", "original")
NEWLINES = ("keep", "drop", "rank")
SCORES = ("auto", "cls", "received")
#: The setting ``clip`` of methods that leave it to the model: the CLIP that it names as that of its tower, or None.
AUTO = "auto"


@dataclass(frozen=True)
class Projector(Reducer, stage="projector"):
    """Base of methods that choose among the visual tokens of an image before the language model.

    A method implements :meth:`choose` on the tokens of one view (or of a whole image, with ``whole = True``): no text,
    no row ends, no padding, every sample with as many tokens. ``space`` says what its plan reduces: "language" are
    embeddings behind the projector; "vision" are features before it, and what was mixed there goes through the
    projector again (where tokens have no features of their own, as behind 2x2 merging, their embeddings stand for
    them). ``looks()`` names blocks of the vision tower whose queries and keys it reads.

    Args:
        keep: visual tokens of every image that stay, a count or a ratio. A count is shared out evenly among the views
            of an image (overview and crops, or frames), the first ones taking the rest. None only where a method is
            ``adaptive`` and finds the number itself, for every view and sample alone.
        positions: what the language model counts. "compact" renumbers the tokens that are left, as if the prompt had
            been this short; "original" leaves gaps, so that dropping is the same as hiding keys. None is compact, as
            in published code that shortens the sequence, and original where that cannot be: with M-RoPE, whose
            positions are places in the image, and with sliding windows.
        newlines: row ends that LLaVA-NeXT and its successors put between patches: "keep" keeps them beside ``keep``
            and lets no method look at them, "drop" drops them all, "rank" treats them as visual tokens where the
            method only looks at embeddings, of a whole image.

    Raises ``ValueError`` for values other than these.
    """

    whole: ClassVar[bool] = False
    #: Whether the method looks across the frames of a video, see :class:`tokenreduce.algorithms.temporal.Temporal`.
    temporal: ClassVar[bool] = False
    space: ClassVar[str] = "language"
    #: Whether ``keep`` may be None; :meth:`choose` is then asked for as many as there are, and leaves what it finds.
    adaptive: ClassVar[bool] = False

    keep: int | float | None = 1.0
    positions: str | None = field(default=None, kw_only=True)
    newlines: str = field(default="keep", kw_only=True)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.keep is None and not self.adaptive:
            raise ValueError("keep is a number of tokens (int >= 1) or a ratio (float in (0, 1]), not None")
        if self.positions is not None and self.positions not in POSITIONS:
            raise ValueError(f"positions is one of {POSITIONS} or None, not {self.positions!r}")
        if self.newlines not in NEWLINES:
            raise ValueError(f"newlines is one of {NEWLINES}, not {self.newlines!r}")

    @property
    def by_view(self) -> bool:
        """Whether the method goes view by view (overview, crops): a row end is in none of them."""
        return not (self.whole or self.temporal)

    def check_row_ends(self) -> None:
        """For models that put row ends between patches. Raises ``ValueError`` where this method cannot rank them."""
        if self.newlines == "rank" and self.by_view:
            raise ValueError(
                f"{self.name}: newlines='rank' is for methods that choose among all tokens of an image; this one goes "
                f"crop by crop, and row ends are in none. Use 'keep' or 'drop'"
            )

    # -- what a method says --------------------------------------------------------------------------------------------
    def choose(self, evidence: VisualEvidence, keep: int) -> Plan:
        """The plan that leaves ``keep`` (fewer than there are) tokens behind the prefix, which stays in front."""
        raise NotImplementedError("abstract")

    def tower_blocks(self) -> tuple[Look, ...]:
        """Blocks of the vision tower whose queries and keys :meth:`choose` reads through ``evidence.tower(look)``."""
        return ()

    def with_class(self) -> bool:
        """Whether the class token of the tower is one of the tokens (``space = "vision"`` only), as the prefix."""
        return False

    def total(self, present: int) -> int:
        """How many of an image's ``present`` tokens stay; at most all where the method finds the number itself."""
        return present if self.keep is None else count(self.keep, present)

    def fixed_count(self, present: int, frames: int = 1) -> int | None:
        return None if self.keep is None else self.total(present)

    def at(self, keep: int) -> Projector:
        """The same method with a count: what one view of an image keeps of the image's budget."""
        return self if self.keep == keep and isinstance(self.keep, int) else replace(self, keep=keep)

    # -- plans -------------------------------------------------------------------------------------------------------
    def plan(self, evidence: VisualEvidence) -> Plan:
        """The plan on one view. Tokens that must stay (a mask), and samples of unequal length, are taken out first."""
        fixed = evidence.fixed() if evidence.masked else None
        if fixed is not None or evidence.valid is not None:
            return self._apart(evidence, fixed)
        present = evidence.n - evidence.prefix
        wanted = self.total(present)
        everything = wanted >= present and (self.keep is not None or not present)
        return Identity.like(evidence.x) if everything else self.choose(evidence, wanted)

    def _apart(self, evidence: VisualEvidence, fixed: Tensor | None) -> Plan:
        there = torch.ones_like(evidence.x[..., 0], dtype=torch.bool) if evidence.valid is None else evidence.valid
        stay = there.clone()
        for b in range(evidence.batch):
            free = there[b] if fixed is None else there[b] & ~fixed[b]
            where = free.nonzero().flatten()
            if not len(where):
                continue
            plan = self.plan(cast(Evidence, evidence).tokens_at(b, where))
            if not bool(plan.untouched().all()):
                raise ValueError(
                    f"{self.name} merges: give it samples of one length, without a mask of protected tokens"
                )
            stay[b, where] = plan.sources()[0] >= 0
        return Identity.like(evidence.x) if bool(stay.all()) else Prune.from_mask(stay)


def check_layer(layer: Look, name: str = "layer") -> None:
    """Raise ``ValueError`` unless ``layer`` names a block of a vision tower: an int, a share of its depth, or None."""
    wrong = isinstance(layer, bool) or not isinstance(layer, int | float | None)
    if wrong or (isinstance(layer, float) and not 0 <= layer <= 1):
        raise ValueError(
            f"{name} is a 0-based block of the vision tower (int, negative from the end), a share of its depth (float "
            f"in [0, 1]) or None for the block whose output enters the projector, not {layer!r}"
        )


def clip_named(clip: str | None) -> bool:
    """Whether the setting ``clip`` names a model."""
    return clip is not None and clip != AUTO


def check_clip(clip: str | None, sign: int | None) -> None:
    """Raise ``ValueError`` unless ``clip`` may name a CLIP model and ``sign`` is a sign, or they are None."""
    if clip is not None and not (isinstance(clip, str) and clip):
        raise ValueError(
            f"clip is the Hub id or the folder of a CLIP model, an embedded one, 'auto' or None, not {clip!r}"
        )
    if sign is not None and (isinstance(sign, bool) or sign not in (-1, 1)):
        raise ValueError(f"sign is -1, 1 or None, not {sign!r}")


@dataclass(frozen=True)
class Salient(Projector):
    """Base of methods that rank tokens by attention inside the vision tower.

    Args:
        layer: block of the tower that is read: a 0-based index (negative from the end), a share of its depth (float),
            or None for the block whose output enters the projector, as in published code (block 22 of 24 in CLIP-L).
        score: "cls" is the attention that the class token pays; "received" the mean attention that a token receives,
            which ports to towers without class token use (SigLIP, Qwen); "auto" takes the first where there is one.
        keep, positions, newlines: see :class:`Projector`.

    Raises ``ValueError`` for other values, and for "cls" on a tower without class token.
    """

    scores: ClassVar[tuple[str, ...]] = SCORES

    layer: int | float | None = field(default=None, kw_only=True)
    score: str = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer)
        if self.score not in self.scores:
            raise ValueError(f"score is one of {self.scores}, not {self.score!r}")

    def required(self) -> tuple[str, ...]:
        return ("tower", "cls") if self.score == "cls" else ("tower",)

    def tower_blocks(self) -> tuple[Look, ...]:
        return (self.layer,)

    def saliency(self, evidence: VisualEvidence, layer: Look = None) -> Tensor:
        """(B,N) float32 scores behind the prefix, from :attr:`layer` or another block."""
        return saliency(evidence, self.layer if layer is None else layer, self.score)


def by_class(seen: BaseEvidence, score: str) -> bool:
    """Whether ``score`` of :class:`Salient` means the class token's attention in ``seen``, a block of the tower."""
    if score != "auto":
        return score == "cls"
    # Rows that were given stand for whatever a method asks for, class token or not.
    return seen.cls or (seen.attention.given is not None and seen.attention.given.shape[2] == 1)


def saliency(evidence: VisualEvidence, layer: Look = None, score: str = "auto", *, joined: bool = False) -> Tensor:
    """(B,N) float32 attention, averaged over heads, to each token behind the prefix in a block of the vision tower:
    from its class token, or received from all; see :class:`Salient`. ``joined``: all heads as one of full width."""
    seen = evidence.tower(layer)
    paid = by_class(seen, score)

    def scores(e: BaseEvidence) -> Tensor:
        attention = e.attention.joined() if joined else e.attention
        return attention_paid(attention) if paid else attention_received(attention)

    values = seen.per_token(scores)
    return finite(values[:, seen.prefix :].float(), evidence)


def kept(index: Tensor, evidence: VisualEvidence, *, raster: bool = True) -> Prune:
    """Keep the tokens ``index`` (B,K), counted without the prefix, in raster order or as given, behind the prefix."""
    p = evidence.prefix
    index = (index.sort(dim=1).values if raster else index) + p
    if p:
        first = torch.arange(p, device=index.device).expand(len(index), -1)
        index = torch.cat([first, index], 1)
    return Prune(evidence.n, index)


def top(scores: Tensor, k: int) -> Tensor:
    """(B,K) indices of the highest ``scores`` (B,N), best first, ties to the lower index."""
    return descending(scores)[:, :k]


def share(total: int, room: list[int]) -> list[int]:
    """``total`` tokens shared out evenly among views that have ``room`` for so many; the first take the rest, and what
    a view has no room for goes to the others.

    >>> share(10, [6, 6, 6]), share(10, [1, 6, 6]), share(99, [2, 3]), share(50, [20, 20, 20, 10])
    ([4, 3, 3], [1, 5, 4], [2, 3], [14, 13, 13, 10])
    """
    rest, level, wider = min(total, sum(room)), 0, len(room)
    for r in sorted(room):  # fill all to the narrowest, those that are wider to the next, ...
        if (r - level) * wider > rest:
            break
        rest, level, wider = rest - (r - level) * wider, r, wider - 1
    if wider:
        level, rest = level + rest // wider, rest % wider
    out = [min(r, level) for r in room]
    for i in [i for i, r in enumerate(room) if r > level][:rest]:
        out[i] += 1
    return out
