"""Thinning the cache of a stream, every layer alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapters.encoders.hf_attention import softcap_of
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import CacheEvidence
from tokenreduce.core.plan import Plan

__all__ = ["plans_of", "thin_all"]


def plans_of(
    method: CacheReducer, cache: Any, tokens: list[Tensor], each: int, queries: dict[int, Tensor], found: Any
) -> list[Plan]:
    """One plan for each layer. ``tokens`` (Hkv,N) numbers the visual token of every slot, ``each`` of which are a
    frame; ``queries`` (1,H,R,d) by layer stand behind all slots."""
    evidences = []
    for i, layer in enumerate(cache.layers):
        attention = found.layers[i].self_attn
        numbers, keys, values = tokens[i], layer.keys[0], layer.values[0]
        q = queries.get(i)
        rows = None
        if q is not None:  # no slot holds the rows' own tokens: every slot is in front of them
            q = q[0].unflatten(0, (len(keys), -1))
            rows = torch.ones(1, 1, q.shape[2], numbers.shape[1], dtype=torch.bool, device=keys.device)
        evidences.append(
            CacheEvidence(
                keys, values, queries=q, kv_heads=len(keys), visual=numbers >= 0, layer=i, depth=len(cache.layers),
                scale=getattr(attention, "scaling", None), softcap=softcap_of(attention), mask=rows,
                frame_of=torch.where(numbers >= 0, numbers // each, -1),
                columns=torch.where(numbers >= 0, numbers + int((numbers[0] < 0).sum()), 0),
                mrope="mrope_section" in (getattr(found.text.config, "rope_parameters", None) or {}),
            )
        )  # fmt: skip
    plans = method.plans(evidences) if method.moment() == "prompt" else [method.plan(e) for e in evidences]
    counts = {plan.k for plan in plans}
    uneven = any(plan.validity() is not None and not bool(plan.validity().all()) for plan in plans)  # type: ignore[union-attr]
    if len(counts) > 1 or uneven:
        raise ValueError(
            f"{method.spec()} leaves layers or heads unequal numbers of keys ({sorted(counts)}); a stream needs as "
            f"many in each: choose infinipot-v, streammem, snapkv, knorm or keydiff"
        )
    return plans


def thin_all(method: CacheReducer, plans: list[Plan], cache: Any, tokens: list[Tensor]) -> list[Tensor]:
    """Let every layer hold what its plan leaves; the numbers of the tokens that are left."""
    out = []
    for layer, plan, numbers in zip(cache.layers, plans, tokens, strict=True):
        if plan.is_identity:
            out.append(numbers)
            continue
        keys, values = layer.keys[0], layer.values[0]
        merged = not bool(plan.untouched().all())
        layer.keys = (plan.gather(keys) if merged and not _merges(method) else plan.reduce(keys))[None].contiguous()
        layer.values = plan.reduce(values)[None].contiguous()
        out.append(plan.gather(numbers))
    return out


def _merges(method: CacheReducer) -> bool:
    """Whether keys are averaged, too: in a stream they are of different places."""
    return bool(getattr(method, "merge_keys", False))
