"""tokenreduce: fewer tokens for vision transformers and image/video language models, without training.

>>> import tokenreduce as tr
>>> tr.patch(model, tr.ToMe(r=13))      # doctest: +SKIP
>>> tr.unpatch(model)                   # doctest: +SKIP

Importing this package loads torch and nothing heavier; model libraries are touched only when their models are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenreduce.evidence import Evidence
from tokenreduce.patching import describe, patch, patched, reduce_tokens, unpatch
from tokenreduce.plan import Merge, Plan, Pool, Prune
from tokenreduce.reducer import Reducer
from tokenreduce.registry import get_method, list_methods, parse
from tokenreduce.trace import record

if TYPE_CHECKING:
    from tokenreduce.vision.encoder.tome import ToMe

__version__ = "0.1.0"
__all__ = [
    "Evidence", "Merge", "Plan", "Pool", "Prune", "Reducer", "ToMe", "describe", "get_method", "list_methods",
    "parse", "patch", "patched", "record", "reduce_tokens", "unpatch", "zoo",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Method classes (``tr.ToMe``, ``tr.PiToMe``, ...) come from the registry, ``tr.zoo`` when first used."""
    if name == "zoo":
        import importlib

        return importlib.import_module("tokenreduce.zoo")
    if not name.startswith("_"):
        from tokenreduce.registry import load_all

        for kind in load_all().values():
            if kind.__name__ == name:
                return kind
    raise AttributeError(f"module 'tokenreduce' has no attribute {name!r}")


def __dir__() -> list[str]:
    from tokenreduce.registry import load_all

    return sorted({*globals(), *__all__, *(kind.__name__ for kind in load_all().values())})
