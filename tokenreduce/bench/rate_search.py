"""Search for DiffRate's rates by gradient (arXiv 2305.17997), with the weights frozen, on a loader of your own.

>>> from tokenreduce.bench.rate_search import search_rates
>>> rates = search_rates(model, loader, target_gmacs=2.9)       # doctest: +SKIP
>>> tr.patch(model, rates)                                      # doctest: +SKIP

Every layer learns how many patches survive pruning and how many survive merging, each as a distribution over
candidate numbers. While searching no token is removed: tokens that the current numbers exclude are hidden from
attention, and a straight-through estimator carries the loss's opinion of that back into the distributions. A second
loss pulls the multiply-adds to the target.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenreduce.algorithms.scoring import descending, finite, importance, unit
from tokenreduce.bench.costs import Costs, Forward, logits
from tokenreduce.core.budget import check_count
from tokenreduce.core.evidence import Evidence
from tokenreduce.core.plan import Identity, Merge, Plan, take
from tokenreduce.core.reducer import Reducer
from tokenreduce.patching import describe, patched
from tokenreduce.vision.encoder.diffrate import DiffRate

__all__ = ["Costs", "SearchStep", "search_rates"]

#: What a hidden token's size is multiplied by. Not 0: the logarithm must stay finite and have a gradient. A hidden
#: token then draws a millionth of the attention it would get, the share that the official masked softmax gives it too.
HIDDEN = 1e-6


# -- what is learned ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Layer:
    """One layer at one step: patches that arrive, survive pruning, survive merging, with what gradients need."""

    arrive: int
    middle: int
    left: int
    #: (2,) kept numbers and (2, patches) survival probabilities by rank, of pruning and merging; None in a layer
    #: that is not compressed.
    counts: Tensor | None = None
    survive: Tensor | None = None


class _Rates(nn.Module):
    """Distributions over the number of patches that stay: one for pruning and one for merging per layer."""

    above: Tensor
    candidates: Tensor

    def __init__(self, patches: int, depth: int, granularity: int, uncompressed: frozenset[int]) -> None:
        super().__init__()
        self.patches, self.depth = patches, depth
        self.layers = [i for i in range(depth) if i not in uncompressed]
        candidates = torch.arange(patches, 0, -granularity)
        self.logits = nn.Parameter(torch.zeros(len(self.layers), 2, len(candidates)))
        self.register_buffer("candidates", candidates.float())
        # A patch of rank t survives under every candidate larger than t.
        self.register_buffer("above", (candidates[:, None] > torch.arange(patches)).float())
        self.now: list[_Layer] = []

    def forward(self) -> list[_Layer]:
        """The layers under the current logits; also what :class:`_Soft` plans by until the next call."""
        probability = self.logits.softmax(-1)
        expected = probability @ self.candidates
        # Rounding noise must not lift an integer to the next one.
        whole = (expected.detach() - 1e-4).ceil().clamp(min=1)
        counts = whole + expected - expected.detach()
        survive = probability @ self.above
        numbers = iter(whole.int().tolist())
        rows = iter(range(len(self.layers)))
        layers, arrive = [], self.patches
        for layer in range(self.depth):
            if layer not in self.layers:
                layers.append(_Layer(arrive, arrive, arrive))
                continue
            prune, merge = next(numbers)
            middle = min(arrive, prune)
            left = min(middle, merge)
            row = next(rows)
            layers.append(_Layer(arrive, middle, left, counts[row], survive[row]))
            arrive = left
        self.now = layers
        return layers

    def left(self, prefix: int) -> list[Any]:
        """Tokens that leave each layer; the minimum passes gradients to both of the layer's numbers, and only there."""
        out: list[Any] = []
        for layer in self.now:
            counts = 0.0 if layer.counts is None else (layer.counts - layer.counts.detach()).sum()
            out.append(counts + float(prefix + layer.left))
        return out

    def reducer(self) -> DiffRate:
        return DiffRate(
            prune_kept_num=tuple(1 + layer.middle for layer in self.now),
            merge_kept_num=tuple(1 + layer.left for layer in self.now),
            tokens=1 + self.patches,
        )


@dataclass(frozen=True, eq=False, repr=False)
class _Masked(Plan):
    """All tokens, sorted; ``merge`` (on sorted tokens) updates destinations, and hidden tokens shrink to nothing.

    The mask (N,) travels in the sizes: their logarithm is the key bias of later attention, so a token of size 1e-6 is
    seen by nobody, pooling ignores it, and gradients reach the mask through the bias.
    """

    order: Tensor
    mask: Tensor
    merge: Merge | None

    def representatives(self) -> Tensor:
        return self.order

    def sources(self) -> Tensor:
        return self.order.argsort(1)

    def reduce(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        y = take(x, self.order)
        return y if self.merge is None else torch.cat([self.merge.reduce(y), y[:, self.merge.k :]], 1)

    def reduce_size(self, size: Tensor | None) -> Tensor:
        if size is None:
            size = torch.ones(self.order.shape, device=self.order.device)
        size = size.gather(1, self.order)
        if self.merge is not None:
            merged = self.merge.reduce_size(size)
            assert merged is not None
            size = torch.cat([merged, size[:, self.merge.k :]], 1)
        return size * self.mask


@dataclass(frozen=True, eq=False)
class _Soft(Reducer, needs=("attention",)):
    """DiffRate as it is while its rates are learned: what it would remove stays, hidden."""

    rates: _Rates

    @property
    def proportional(self) -> bool:
        return True

    def acts_at(self, layer: int, depth: int) -> bool:
        return layer in self.rates.layers

    def plan(self, evidence: Evidence) -> Plan:
        n, p = evidence.n, evidence.prefix
        if n - p != self.rates.patches:
            raise ValueError(
                f"{n - p} patches, but the search began with {self.rates.patches}: give images of one size"
            )
        layer = self.rates.now[evidence.layer]
        if layer.left == layer.arrive:
            return Identity.like(evidence.x)
        assert layer.survive is not None
        middle, left = p + layer.middle, p + layer.left
        with torch.no_grad():
            scores = finite(importance(evidence), evidence)
            place = torch.arange(n, device=scores.device)
            scores = scores.masked_fill(place >= p + layer.arrive, float("-inf")).masked_fill(place < p, float("inf"))
            order = descending(scores)
            merge = None
            if left < middle:
                metric = unit(take(evidence.x, order[:, :middle]))
                best, target = (metric[:, left:] @ metric[:, p:left].transpose(1, 2)).max(-1)
                rows = place.expand(evidence.batch, -1)
                scale = best.clamp(min=0.0)
                merge = Merge(n, rows[:, :left], rows[:, left:middle], p + target, size_scale=scale, by_size=False)
        mask = torch.ones(n, device=scores.device)
        for start, stop, chance in ((middle, p + layer.arrive, layer.survive[0]), (left, middle, layer.survive[1])):
            if start < stop:
                hard = torch.where((place >= start) & (place < stop), HIDDEN, 1.0)
                mask = mask * (hard + F.pad(chance - chance.detach(), (p, 0)))
        return _Masked(n, order, mask, merge)


# -- the search --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SearchStep:
    """What ``on_step`` sees: the task loss and the multiply-adds of the rates that this step was made with."""

    step: int
    steps: int
    loss: float
    gmacs: float
    rates: DiffRate


def search_rates(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    target_gmacs: float,
    granularity: int = 4,
    epochs: int = 3,
    steps: int | None = None,
    lr: float = 0.01,
    min_lr: float = 0.001,
    lam: float = 5.0,
    warmup: int = 0,
    uncompressed: Sequence[int] = (0,),
    costs: Costs | None = None,
    forward: Forward | None = None,
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
    on_step: Callable[[SearchStep], None] | None = None,
) -> DiffRate:
    """Rates for ``model`` that cost ``target_gmacs``, found by gradient on labelled images (arXiv 2305.17997).

    The model is any with an adapter and one vision tower with a class token. Its weights are frozen and left
    bit-identical, without gradients; it runs in eval mode, and afterwards every module's mode and every parameter's
    ``requires_grad`` are as they were. One search serves one image size; the returned lists scale to others.

    Args:
        loader: yields (images (B,C,H,W), labels (B,)), as tuples or lists whose last two entries these are.
        target_gmacs: giga multiply-adds of one image, counted as ``costs`` does.
        granularity: distance of the candidate numbers of patches.
        epochs, steps: passes over the loader, or instead the number of optimizer steps (the loader is repeated).
        lr, min_lr: of AdamW without weight decay on the rates; the cosine goes from one to the other.
        lam: weight of (GMACs - target)^2 beside the task loss. 5 is the paper's for models of some GMACs; a small
            model needs more, in proportion to 1 / target^2.
        warmup: first steps without the cost term.
        uncompressed: layers that stay dense, negative ones from the end; the paper leaves out block 0, and for
            models that pool over patches (MAE) the last block too: (0, -1).
        costs: by default measured, see :meth:`Costs.measure`; ``Costs.vit`` is the paper's formula.
        forward: ``forward(model, images)``; by default the model is called, and ``.logits`` taken where there is one.
        loss: ``loss(outputs, labels)``, the task loss.
        autocast: a dtype such as ``torch.bfloat16`` to run the model in mixed precision.
        device: where to move the model; images follow the model.
        on_step: called after every step.

    Differences to the official search: the merge uses the sizes of inference instead of sizes clamped to 1 first (so
    that a search step computes what the returned reducer computes); a hidden token attends like any other instead of
    to itself too, which changes its own row only, and nobody reads that.

    Returns a :class:`DiffRate` with both lists and ``tokens`` filled in. Warns when it misses the target by more than
    5 %. Raises ``ValueError`` for bad settings, a model without class token or with several towers, a target out of
    reach or a loader that yields nothing, and ``FloatingPointError`` when the task loss is not finite.
    """
    check_count(granularity, "granularity", 1)
    check_count(epochs, "epochs", 1)
    check_count(warmup, "warmup")
    if steps is None:
        if not isinstance(loader, Sized):
            raise ValueError("the loader has no length; give steps, the number of optimizer steps")
        steps = epochs * len(loader)
    check_count(steps, "steps (or the length of the loader)", 1)
    tower = _tower(model)
    depth = len(tower.blocks)
    for layer in uncompressed:
        if not -depth <= layer < depth:
            raise ValueError(
                f"uncompressed names layer {layer}, but the model has {depth}: give 0 to {depth - 1}, or -1 ..."
            )
    if device is not None:
        model.to(device)
    place = next(model.parameters()).device
    run = forward or logits
    batches = _repeated(loader, place)
    images, labels = next(batches)
    with _frozen(model):
        costs = Costs.measure(model, images, run) if costs is None else costs
        skipped = frozenset(layer % depth for layer in uncompressed)
        rates = _Rates(costs.tokens - tower.prefix, depth, granularity, skipped).to(place)
        _check_target(target_gmacs, costs, rates, tower.prefix)
        optimizer = torch.optim.AdamW(rates.parameters(), lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, min_lr)
        with patched(model, _Soft(rates)), torch.enable_grad():
            for step in range(steps):
                rates()
                with nullcontext() if autocast is None else torch.autocast(place.type, autocast):
                    task = loss(run(model, images), labels)
                if not bool(torch.isfinite(task)):
                    raise FloatingPointError(
                        f"the task loss is {float(task.detach())} at step {step}; check images and labels"
                    )
                cost = costs.gmacs(rates.left(tower.prefix))
                weight = lam if step >= warmup else 0.0
                optimizer.zero_grad()
                (task.float() + weight * (cost - target_gmacs) ** 2).backward()
                optimizer.step()
                schedule.step()
                if on_step is not None:
                    on_step(SearchStep(step, steps, float(task.detach()), float(cost.detach()), rates.reducer()))
                if step + 1 < steps:
                    images, labels = next(batches)
            with torch.no_grad():
                rates()
                reached = float(costs.gmacs(rates.left(tower.prefix)))
    if abs(reached / target_gmacs - 1) > 0.05:
        warnings.warn(
            f"the rates found cost {reached:.4g} GMACs, the target is {target_gmacs:.4g}; raise steps or lam",
            stacklevel=2,
        )
    return rates.reducer()


def _tower(model: nn.Module) -> Any:
    towers = describe(model).towers
    if len(towers) > 1:
        names = ", ".join(t.name or "the model itself" for t in towers)
        raise ValueError(f"the model has several towers ({names}); search on one of them alone")
    if not towers[0].cls:
        raise ValueError("DiffRate ranks patches by the class token's attention while searching; this model has none")
    return towers[0]


def _check_target(target: float, costs: Costs, rates: _Rates, prefix: int) -> None:
    most = costs.gmacs([costs.tokens] * rates.depth)
    fewest = prefix + int(rates.candidates[-1])
    left: list[int] = []
    for layer in range(rates.depth):
        compressed = layer in rates.layers
        left.append(fewest if compressed else left[-1] if left else costs.tokens)
    least = costs.gmacs(left)
    if not least <= target <= most:
        raise ValueError(f"target_gmacs is between {least:.4g} and {most:.4g} (everything kept) here, not {target!r}")


def _repeated(loader: Iterable[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        found = False
        for batch in loader:
            found = True
            yield batch[-2].to(device, non_blocking=True), batch[-1].to(device, non_blocking=True)
        if not found:
            raise ValueError(
                "the loader yields no batch (a generator can be read once only: give a list or a DataLoader)"
            )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for the weights inside; afterwards everything is as it was."""
    modes = [(m, m.training) for m in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, want in wanted:
            parameter.requires_grad_(want)
