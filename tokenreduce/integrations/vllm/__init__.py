"""Fewer visual tokens in vLLM, out of tree: the plug-in that the entry point ``vllm.general_plugins`` names.

vLLM calls :func:`register` in every process of a server. The model class is found by its path when an engine asks for
it, so that a server without us pays nothing.
"""

from __future__ import annotations

from tokenreduce.integrations.vllm.names import ARCHITECTURE

__all__ = ["register"]


def register() -> None:
    """Make the architecture :data:`~.names.ARCHITECTURE` known to vLLM. Does nothing the second time."""
    from vllm import ModelRegistry

    from tokenreduce.integrations.vllm.cpu_runner import mend

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"tokenreduce.integrations.vllm.model:{ARCHITECTURE}")
    mend()
