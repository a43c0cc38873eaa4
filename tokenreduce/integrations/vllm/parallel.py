"""Evidence of a vision tower whose heads vLLM shared out among ranks (tensor parallelism)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenreduce.adapters.language.projector.seen import Encoded, PackedCall

__all__ = ["whole_heads"]


def whole_heads(seen: Encoded, config: Any) -> None:
    """Give ``seen`` the heads of all ranks, in place, so that all of them keep the same tokens. ``config`` is that of
    the vision tower."""
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", 0)
    for call in seen.calls.values():
        dim = 0 if isinstance(call, PackedCall) else 1
        if call.keys is None or call.keys.shape[dim] >= heads:
            continue
        for name in ("queries", "keys", "values"):
            part = getattr(call, name, None)
            if isinstance(part, Tensor):
                setattr(call, name, _gathered(part, dim))
        if getattr(call, "rotated", None) is not None:
            call.rotated = tuple(_gathered(part, dim) for part in call.rotated)


def _gathered(part: Tensor, dim: int) -> Tensor:
    from vllm.distributed import tensor_model_parallel_all_gather

    out: Tensor = tensor_model_parallel_all_gather(part.contiguous(), dim=dim)
    return out
