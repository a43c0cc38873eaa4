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

if TYPE_CHECKING:  # the registry finds methods by itself; this only tells type checkers their names
    from tokenreduce.vision.encoder.ats import ATS
    from tokenreduce.vision.encoder.diffrate import DiffRate
    from tokenreduce.vision.encoder.dpcknn import DPCKNN
    from tokenreduce.vision.encoder.evit import EViT
    from tokenreduce.vision.encoder.kmedoids import KMedoids
    from tokenreduce.vision.encoder.mctf import MCTF
    from tokenreduce.vision.encoder.pitome import PiToMe
    from tokenreduce.vision.encoder.random_drop import Random
    from tokenreduce.vision.encoder.repshift import RepresentationShift
    from tokenreduce.vision.encoder.resize import Resize
    from tokenreduce.vision.encoder.tofu import ToFu
    from tokenreduce.vision.encoder.tome import ToMe, ToMeKth
    from tokenreduce.vision.encoder.uniform import Uniform
    from tokenreduce.vision.encoder.zerotprune import ZeroTPrune
    from tokenreduce.vision.language.dart import DART
    from tokenreduce.vision.language.fastv import FastV
    from tokenreduce.vision.language.pyramiddrop import PyramidDrop
    from tokenreduce.vision.language.sparsevlm import SparseVLM
    from tokenreduce.vision.projector.divprune import DivPrune

__version__ = "0.1.0"
__all__ = [
    "ATS", "DART", "DPCKNN", "DiffRate", "DivPrune", "EViT", "Evidence", "FastV", "KMedoids", "MCTF", "Merge", "PiToMe",
    "Plan", "Pool", "Prune", "PyramidDrop", "Random", "Reducer", "RepresentationShift", "Resize", "SparseVLM", "ToFu",
    "ToMe", "ToMeKth", "Uniform", "ZeroTPrune", "describe", "get_method", "list_methods", "parse", "patch", "patched",
    "record", "reduce_tokens", "unpatch", "zoo",
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
