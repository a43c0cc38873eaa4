"""tokenreduce: fewer tokens for vision transformers and image/video language models, without training.

>>> import tokenreduce as tr
>>> tr.patch(model, tr.ToMe(r=13))      # doctest: +SKIP
>>> tr.unpatch(model)                   # doctest: +SKIP

Importing this package loads torch and nothing heavier; model libraries are touched only when their models are.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tokenreduce.core.evidence import Evidence
from tokenreduce.core.plan import Merge, Mix, Plan, Pool, Prune
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import get_method, list_methods, parse
from tokenreduce.core.trace import record
from tokenreduce.patching import describe, kept_columns, patch, patched, reduce_tokens, unpatch

if TYPE_CHECKING:  # the registry finds methods by itself; this only tells type checkers their names
    from tokenreduce.video.encoder.vidtldr import VidTLDR
    from tokenreduce.video.language.flashvid_llm import FlashVIDLLM
    from tokenreduce.video.language.framefusion import FrameFusion
    from tokenreduce.video.language.holitom_merge import HoliTomMerge
    from tokenreduce.video.language.prunevid_prune import PruneVidPrune
    from tokenreduce.video.projector.dycoke import DyCoke
    from tokenreduce.video.projector.evs import EVS
    from tokenreduce.video.projector.fastvid import FastVID
    from tokenreduce.video.projector.flashvid import FlashVID
    from tokenreduce.video.projector.frame_merge import FrameMerge
    from tokenreduce.video.projector.holitom import HoliTom
    from tokenreduce.video.projector.pool_frames import PoolFrames
    from tokenreduce.video.projector.ppllava import PPLLaVA
    from tokenreduce.video.projector.prunevid import PruneVid
    from tokenreduce.video.projector.timesuite import TokenShuffle
    from tokenreduce.video.projector.uniform_frames import UniformFrames
    from tokenreduce.video.projector.vidcom2 import VidCom2
    from tokenreduce.vision.encoder.ats import ATS
    from tokenreduce.vision.encoder.diffrate import DiffRate
    from tokenreduce.vision.encoder.dpcknn import DPCKNN
    from tokenreduce.vision.encoder.evit import EViT
    from tokenreduce.vision.encoder.kmedoids import KMedoids
    from tokenreduce.vision.encoder.mctf import MCTF
    from tokenreduce.vision.encoder.mustdrop_merge import MustDropMerge
    from tokenreduce.vision.encoder.pitome import PiToMe
    from tokenreduce.vision.encoder.random_drop import Random
    from tokenreduce.vision.encoder.repshift import RepresentationShift
    from tokenreduce.vision.encoder.resize import Resize
    from tokenreduce.vision.encoder.tofu import ToFu
    from tokenreduce.vision.encoder.tome import ToMe, ToMeKth
    from tokenreduce.vision.encoder.uniform import Uniform
    from tokenreduce.vision.encoder.zerotprune import ZeroTPrune
    from tokenreduce.vision.language.aim import AIM
    from tokenreduce.vision.language.dart import DART
    from tokenreduce.vision.language.fastv import FastV
    from tokenreduce.vision.language.lazyllm import LazyLLM
    from tokenreduce.vision.language.mustdrop import MustDrop
    from tokenreduce.vision.language.pyramiddrop import PyramidDrop
    from tokenreduce.vision.language.random_drop import RandomVisual
    from tokenreduce.vision.language.sparsevlm import SparseVLM
    from tokenreduce.vision.language.vscan_prune import VScanLLM
    from tokenreduce.vision.projector.aim_merge import AIMMerge
    from tokenreduce.vision.projector.cdpruner import CDPruner
    from tokenreduce.vision.projector.divprune import DivPrune
    from tokenreduce.vision.projector.fastervlm import FasterVLM
    from tokenreduce.vision.projector.fopru import FoPru
    from tokenreduce.vision.projector.globalcom2 import GlobalCom2
    from tokenreduce.vision.projector.hiprune import HiPrune
    from tokenreduce.vision.projector.hired import HiRED
    from tokenreduce.vision.projector.holov import HoloV
    from tokenreduce.vision.projector.mmtok import MMTok
    from tokenreduce.vision.projector.pool import PoolTokens
    from tokenreduce.vision.projector.prumerge import PruMerge, PruMergePlus
    from tokenreduce.vision.projector.random_drop import RandomTokens
    from tokenreduce.vision.projector.resize import ResizeTokens
    from tokenreduce.vision.projector.sap import SpatialAugmented
    from tokenreduce.vision.projector.scope import SCOPE
    from tokenreduce.vision.projector.tokencorr import TokenCorr
    from tokenreduce.vision.projector.trim import TRIM
    from tokenreduce.vision.projector.uniform import UniformTokens
    from tokenreduce.vision.projector.visionzip import VisionZip
    from tokenreduce.vision.projector.vispruner import VisPruner
    from tokenreduce.vision.projector.vscan import VScan

# Modules are found by their old names, too, for one release.
__path__.append(os.path.join(os.path.dirname(__file__), "_old"))

__version__ = "0.1.0"
__all__ = [
    "AIM", "AIMMerge", "ATS", "CDPruner", "DART", "DPCKNN", "DiffRate", "DivPrune", "DyCoke", "EVS", "EViT",
    "Evidence", "FastV", "FastVID", "FasterVLM", "FlashVID", "FlashVIDLLM", "FoPru", "FrameFusion", "FrameMerge",
    "GlobalCom2", "HiPrune", "HiRED", "HoliTom", "HoliTomMerge", "HoloV", "KMedoids", "LazyLLM", "MCTF", "MMTok",
    "Merge", "Mix", "MustDrop", "MustDropMerge", "PPLLaVA", "PiToMe", "Plan", "Pool", "PoolFrames", "PoolTokens",
    "PruMerge", "PruMergePlus", "Prune", "PruneVid", "PruneVidPrune", "PyramidDrop", "Random", "RandomTokens",
    "RandomVisual", "Reducer", "RepresentationShift", "Resize", "ResizeTokens", "SCOPE", "SparseVLM",
    "SpatialAugmented", "TRIM", "ToFu", "ToMe", "ToMeKth", "TokenCorr", "TokenShuffle", "Uniform", "UniformFrames",
    "UniformTokens", "VScan", "VScanLLM", "VidCom2", "VidTLDR", "VisPruner", "VisionZip", "ZeroTPrune", "describe",
    "estimate", "get_method", "kept_columns", "list_methods", "parse", "patch", "patched", "record", "reduce_tokens",
    "tune", "unpatch", "zoo",
]  # fmt: skip


#: Rooms that load more than torch, and what is wanted of them: nothing means the module.
_LATE = {"zoo": ("zoo", ""), "estimate": ("estimation", "estimate"), "tune": ("tuning", "tune")}


def __getattr__(name: str) -> Any:
    """Method classes (``tr.ToMe``, ``tr.PiToMe``, ...) come from the registry, other rooms when first used."""
    if name in _LATE:
        import importlib

        room, what = _LATE[name]
        module = importlib.import_module(f"tokenreduce.{room}")
        return getattr(module, what) if what else module
    if not name.startswith("_"):
        from tokenreduce.core.registry import load_all

        for kind in load_all().values():
            if kind.__name__ == name:
                return kind
    raise AttributeError(f"module 'tokenreduce' has no attribute {name!r}")


def __dir__() -> list[str]:
    from tokenreduce.core.registry import load_all

    return sorted({*globals(), *__all__, *(kind.__name__ for kind in load_all().values())})
