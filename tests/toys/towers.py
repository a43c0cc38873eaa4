"""What a toy with fewer patches in its tower must equal: the stock model, whose tower hides what was dropped.

Nothing here uses the adapters. From the layer behind the cut on an attention function hides the keys that are gone, and
behind the last layer the places of dropped patches are filled with the mean of what is left of their image, as code
behind the tower that mixes neighbours finds them. Which visual tokens have a patch that is left is found by changing
the output of the last layer one patch at a time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionInterface

import tokenreduce as tr
from tokenreduce.adapters.language.generic.towers import has_axes
from tokenreduce.core.plan import Prune
from tokenreduce.core.reducer import Reducer
from toys.build import IMAGE, inner_of
from toys.inputs import _sides, features
from toys.oracles import Stock, _rows, generate, relative, short_prompts


class Dropped(Reducer):
    """Drops other tokens in every image, in the first layer; remembers what was there and what it dropped."""

    def __init__(self, share: float = 0.4) -> None:
        object.__setattr__(self, "share", share)
        for name in ("plans", "there"):
            object.__setattr__(self, name, [])

    def required(self):
        return ()

    def acting_position(self):
        return "middle"

    def acts_at(self, layer, depth):
        return layer == 0

    def plan(self, evidence):
        g = torch.Generator().manual_seed(evidence.n + evidence.batch)
        p = evidence.prefix
        order = torch.stack([torch.randperm(evidence.n - p, generator=g) for _ in range(evidence.batch)]) + p
        there = torch.ones(evidence.batch, evidence.n, dtype=torch.bool) if evidence.valid is None else evidence.valid
        order = order.gather(1, (~there.gather(1, order)).long().argsort(dim=1, stable=True))  # padding comes last
        kept = order[:, : round((evidence.n - p) * self.share)].sort(1).values
        front = torch.arange(p).expand(evidence.batch, -1)
        keep = torch.cat([front, kept], 1)
        plan = Prune(evidence.n, keep, None if evidence.valid is None else there.gather(1, keep))
        self.plans.append(plan)
        self.there.append(there)
        return plan

    def spec(self):
        return "dropped"


@contextmanager
def hiding(tower: Any, stay: torch.Tensor, views: torch.Tensor, behind: bool) -> Iterator[None]:
    """The stock layers of a tower: keys that do not ``stay`` (slots,) are hidden behind the first, and their places
    hold the mean of their view, ``views`` (slots,), behind the last layer, or ``behind`` the tower; -1 are leading
    tokens."""
    layers = list(tower.blocks)
    start = [0]

    def attend(module, query, key, value, attention_mask=None, **kwargs):
        n, rows = key.shape[2], key.shape[0]
        here = stay[start[0] : start[0] + rows * n].view(rows, 1, 1, n)
        start[0] += rows * n
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        repeat = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeat, 1) for t in (key, value))
        logits = query @ key.transpose(2, 3) * scale
        if attention_mask is not None:
            seen = attention_mask
            logits = logits.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else logits + seen
        rows_ = logits.masked_fill(~here, torch.finfo(logits.dtype).min).softmax(-1)
        return (rows_ @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("toys_hiding", attend)

    def begin(layer, args, kwargs):
        start[0] = 0

    def filled(x):
        flat = x.reshape(-1, x.shape[-1]).clone()
        for view in views.unique().tolist():
            mine = views == view
            if view >= 0:
                flat[mine & ~stay] = flat[mine & stay].mean(0)
        return flat.view(x.shape)

    def fill(module, args, output):
        if isinstance(output, dict):
            output.last_hidden_state = filled(output.last_hidden_state)
            if output.get("hidden_states") is not None:
                first, *others = output.hidden_states
                output.hidden_states = (first, *(h if h is None else filled(h) for h in others))
            return output
        x = output[0] if isinstance(output, tuple) else output
        return (filled(x), *output[1:]) if isinstance(output, tuple) else filled(x)

    attentions = [next(m for m in layer.modules() if _attends(m)) for layer in layers[1:]]
    configs = [m.config for m in attentions]
    hooks = [layer.register_forward_pre_hook(begin, with_kwargs=True) for layer in layers]
    last = tower.module if behind else layers[-1]
    hooks.append(last.register_forward_hook(fill, prepend=last is layers[-1]))
    for module in attentions:
        module.config = copy.copy(module.config)
        module.config.__dict__["_attn_implementation_internal"] = "toys_hiding"
    try:
        yield
    finally:
        for module, config in zip(attentions, configs, strict=True):
            module.config = config
        for hook in hooks:
            hook.remove()


def _attends(module: Any) -> bool:
    return hasattr(module, "config") and any(hasattr(module, n) for n in ("q_proj", "qkv", "query", "q"))


def tokens_with(toy: Stock, layer: Any, slots: torch.Tensor) -> torch.Tensor:
    """(features,) bool: those that change where the output of ``layer`` is changed at ``slots`` (slots,) bool."""

    def shake(layer, args, output):
        x = output[0] if isinstance(output, tuple) else output
        noise = torch.randn(len(slots), x.shape[-1], generator=torch.Generator().manual_seed(5))
        made = x + (noise * slots[:, None]).view(x.shape)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    base = _made(toy)
    hook = layer.register_forward_hook(shake, prepend=True)
    try:
        return (_made(toy) != base).any(-1)
    finally:
        hook.remove()


def _made(toy: Stock) -> torch.Tensor:
    ready = features(toy.model, toy.inputs)
    return _rows(ready.pooler_output if ready.get("pooler_output") is not None else ready.last_hidden_state)


def dropped_inside(toy: Stock) -> tuple[float, float]:
    """How far a generation that drops patches in the tower is from that of the stock model which hides them and gets a
    prompt that is as short, and from the unreduced one."""
    model, inputs = toy.model, toy.inputs
    found = tr.describe(model)
    (tower,), vision = [t for t in found.towers if "video" not in t.name], found.language.vision
    layers, method = list(tower.blocks), Dropped()
    behind = tower.hands == "all" or vision.kind not in ("discovered", "packed")
    last = layers[vision.feature] if vision.kind not in ("discovered", "packed") else layers[-1]
    sizes: list[tuple[int, ...]] = []
    with tr.patched(model, method), tr.record(model, flops=False) as trace:
        sequences, logits = generate(model, inputs)
    hook = layers[0].register_forward_pre_hook(
        lambda m, a, k: sizes.append(tuple(_first(a, k).shape)), with_kwargs=True
    )
    features(model, inputs)
    hook.remove()
    stay, views = _cut(tower, method, sizes[0])
    with hiding(tower, stay, views, behind):
        ready = features(model, inputs)
    (step,) = (s for s in trace.steps if s.stage == "projector")
    columns = step.plan.sources() >= 0 if step.plan is not None else torch.ones_like(inputs["input_ids"]).bool()
    visual = inputs["input_ids"] == IMAGE
    with_patch = tokens_with(toy, last, views >= 0)
    left = tokens_with(toy, last, stay & (views >= 0))
    assert torch.equal(columns[visual], left | ~with_patch), "tokens with a patch that is left stay, and no others"
    assert bool(columns[~visual].all())
    compact = not has_axes(inner_of(model)) and compact_too(model)
    want = short_prompts(replace(toy, ready=ready), columns, sequences, compact=compact)
    return relative(logits, want), relative(logits, toy.logits)


def compact_too(model: Any) -> bool:
    """Whether positions may be counted anew in a model."""
    try:
        tr.unpatch(tr.patch(model, "random@projector:keep=0.4,positions=compact"))
    except ValueError:
        return False
    return True


def _first(args: Any, kwargs: Any) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _cut(tower: Any, method: Dropped, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots,) which patches stay, and the image of each; -1 for leading tokens."""
    plans = method.plans
    if len(plans) == 1 and shape[0] == plans[0].batch and shape[1] == plans[0].n and len(shape) == 3:
        views = torch.arange(shape[0])[:, None].expand(shape[:2]).clone()
        views[:, : tower.prefix] = -1
        views[~method.there[0]] = -1
        return (plans[0].sources() >= 0).flatten(), views.flatten()
    return _in_a_row(tower.module, plans, math.prod(shape[:-1]))


def _in_a_row(tower: Any, plans: list[Prune], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of ``count`` slots in one row, of the three images that the toys' prompts have."""
    sides = _sides(3)
    unit = count // sum(p.batch * p.n for p in plans)
    units = sum(h * w for h, w in sides)
    rows = {p.n: iter(p.sources() >= 0) for p in plans}
    numbers = [h * w * count // units // unit for h, w in sides]
    stay = torch.cat([next(rows[n]) for n in numbers])
    views = torch.arange(3).repeat_interleave(torch.tensor(numbers))
    if hasattr(tower, "fullatt_block_indexes"):
        from transformers.vision_utils import get_vision_window_index

        grids = torch.tensor([[1, *side] for side in sides])
        order = get_vision_window_index(grids, 2, tower.window_size, tower.patch_size)[0]
        stay, views = stay[order], views[order]
    return stay.repeat_interleave(unit), views.repeat_interleave(unit)
