"""vLLM's runner on CPUs, in which models with M-RoPE are never asked for the positions of what they pruned.

``GPUModelRunner.load_model`` notes whether a model prunes. ``CPUModelRunner`` has a ``load_model`` of its own, which
forgets that, in 0.32 and 0.33. Here it is noted behind it.
"""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["mend", "mended"]

_MARK = "_tokenreduce_mended"


def mend() -> None:
    """Let the runner of this process note whether its model prunes, where it runs on CPUs. Does nothing twice."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if not hasattr(CPUModelRunner.load_model, _MARK):
        CPUModelRunner.load_model = mended(CPUModelRunner.load_model)


def mended(load_model: Any) -> Any:
    """``load_model`` of a runner, which then has ``is_multimodal_pruning_enabled``."""

    @functools.wraps(load_model)
    def load(runner: Any, *args: Any, **kwargs: Any) -> Any:
        out = load_model(runner, *args, **kwargs)
        config = runner.model_config.multimodal_config
        able = bool(getattr(runner.get_model(), "supports_multimodal_pruning", False))
        runner.is_multimodal_pruning_enabled = (
            able and config is not None and bool(config.is_multimodal_pruning_enabled())
        )
        return out

    setattr(load, _MARK, True)
    return load
