"""A method whose every row, head and layer keeps other keys, and what it must equal: the unpatched model with the keys
that left hidden in every call behind the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenreduce.adapters.language.generation import cache_in
from tokenreduce.algorithms.keys import keep_slots
from tokenreduce.core.cache_reducer import CacheReducer


@dataclass(frozen=True)
class Scatter(CacheReducer):
    """Another budget for every row, head and layer; decided right behind the layer, or ``together`` behind the last."""

    together: bool = False
    share: float = 0.5
    alike: bool = False
    beams: int = 1

    def moment(self):
        return "prompt" if self.together else "layer"

    def plan(self, evidence):
        stay = evidence.there.clone()
        for row in range(len(stay)):
            head = 0 if self.alike else row % evidence.kv_heads
            g = torch.Generator().manual_seed(
                1000 * evidence.layer + 10 * (row // evidence.kv_heads // self.beams) + head
            )
            visual = evidence.visual[row].nonzero().flatten()
            count = int(len(visual) * (self.share + (0 if self.alike else 0.1 * head + 0.05 * evidence.layer)))
            gone = visual[torch.randperm(len(visual), generator=g)[count:]]
            stay[row, gone] = False
        return keep_slots(stay, evidence)


Scatter.name = "scatter"  # not registered: tables take every registered method


class masked:  # noqa: N801 - used like open()
    """The unpatched model with the columns that ``gone`` (layer -> (B,Hkv,L) bool) marks hidden as keys in every call
    behind the prompt."""

    def __init__(self, layers, gone):
        self.layers, self.gone, self.hooks = layers, gone, []

    def hide(self, module, args, kwargs):
        attention, cache, stock = module.self_attn, cache_in(kwargs), kwargs.get("attention_mask")
        gone, q = self.gone.get(attention.layer_idx), args[0].shape[1]
        layer = cache.layers[attention.layer_idx]
        past = int(layer.get_seq_length())
        if gone is None or past == 0:
            return None
        slots, offset = layer.get_mask_sizes(q)
        if stock is None:
            stock = (torch.arange(slots) + offset <= past + torch.arange(q)[:, None])[None, None]
        elif stock.dtype != torch.bool:
            stock = stock == 0
        rows = gone.repeat_interleave(getattr(attention, "num_key_value_groups", 1), 1)
        rows = torch.cat([rows, torch.zeros(*rows.shape[:2], offset + slots, dtype=torch.bool)], 2)
        see = stock & ~rows[:, :, None, offset : offset + slots]
        if attention.config._attn_implementation == "eager":
            see = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
        kwargs["attention_mask"] = see
        return args, kwargs

    def __enter__(self):
        self.hooks = [m.register_forward_pre_hook(self.hide, with_kwargs=True) for m in self.layers]

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


class kept_plans:  # noqa: N801 - used like open()
    """What every layer's plan dropped, by layer, in columns of the prompt: (B,Hkv,L) bool."""

    def __init__(self, method, monkeypatch):
        self.gone, self.method, self.patch = {}, type(method), monkeypatch

    def __enter__(self):
        stock = self.method.plan

        def plan(method, evidence):
            made = stock(method, evidence)
            columns = evidence.columns
            gone = torch.zeros(len(columns), int(columns.max()) + 1, dtype=torch.bool)
            away = (made.sources() < 0) & evidence.there
            gone.scatter_(1, torch.where(away, columns, 0), away)
            for row in range(len(columns)):  # column 0 is text, which no plan drops
                assert not gone[row, 0]
            self.gone[evidence.layer] = gone.unflatten(0, (evidence.batch, evidence.kv_heads))
            return made

        self.patch.setattr(self.method, "plan", plan)
        return self.gone

    def __exit__(self, *error):
        self.patch.undo()
