"""Fewer visual tokens in vLLM, out of tree: the plug-in that the entry point ``vllm.general_plugins`` names.

vLLM calls :func:`register` in every process of a server. The model class is found by its path when an engine asks for
it, so that a server without us pays nothing.
"""

from __future__ import annotations

from tokenreduce.integrations.vllm.names import ARCHITECTURE, NATIVE

__all__ = ["register"]


def register() -> None:
    """Make :data:`~.names.ARCHITECTURE` and :data:`~.names.NATIVE` known to vLLM. Does nothing the second time."""
    from vllm import ModelRegistry

    from tokenreduce.integrations.vllm.cpu_runner import mend

    known = ModelRegistry.get_supported_archs()
    for name, place in ((ARCHITECTURE, "model"), (NATIVE, "native")):
        if name not in known:
            ModelRegistry.register_model(name, f"tokenreduce.integrations.vllm.{place}:{name}")
    mend()
