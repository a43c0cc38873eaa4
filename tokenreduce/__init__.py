"""tokenreduce: fewer tokens for vision transformers and image/video language models, without training.

>>> import tokenreduce as tr
>>> tr.patch(model, tr.ToMe(r=13))      # doctest: +SKIP
>>> tr.unpatch(model)                   # doctest: +SKIP

Importing this package loads nothing, so that the command line answers at once; torch comes with the first name that is
used, and model libraries are touched only when their models are.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # everything is imported when first used (below); this only tells type checkers the names
    from tokenreduce import zoo
    from tokenreduce.core.cache_reducer import CacheReducer
    from tokenreduce.core.diffusion_reducer import DiffusionReducer
    from tokenreduce.core.evidence import CacheEvidence, DiffusionEvidence, Evidence
    from tokenreduce.core.plan import Merge, Mix, Plan, Pool, Prune
    from tokenreduce.core.reducer import Reducer
    from tokenreduce.core.registry import get_method, list_methods, parse
    from tokenreduce.core.trace import record
    from tokenreduce.estimation import estimate
    from tokenreduce.patching import describe, kept_columns, patch, patched, reduce_tokens, unpatch
    from tokenreduce.streaming import stream
    from tokenreduce.tuning import tune
    from tokenreduce.video.cache.dycoke_cache import DyCokeCache
    from tokenreduce.video.cache.infinipot_v import InfiniPotV
    from tokenreduce.video.cache.streammem import StreamMem
    from tokenreduce.video.encoder.earlytom import EarlyTom
    from tokenreduce.video.encoder.pixel_diff import PixelDiff
    from tokenreduce.video.encoder.vidtldr import VidTLDR
    from tokenreduce.video.language.flashvid_llm import FlashVIDLLM
    from tokenreduce.video.language.framefusion import FrameFusion
    from tokenreduce.video.language.holitom_merge import HoliTomMerge
    from tokenreduce.video.language.prunevid_prune import PruneVidPrune
    from tokenreduce.video.language.sttm_llm import STTMLLM
    from tokenreduce.video.projector.dycoke import DyCoke
    from tokenreduce.video.projector.evs import EVS
    from tokenreduce.video.projector.fastvid import FastVID
    from tokenreduce.video.projector.flashvid import FlashVID
    from tokenreduce.video.projector.frame_merge import FrameMerge
    from tokenreduce.video.projector.holitom import HoliTom
    from tokenreduce.video.projector.pool_frames import PoolFrames
    from tokenreduce.video.projector.ppllava import PPLLaVA
    from tokenreduce.video.projector.prunevid import PruneVid
    from tokenreduce.video.projector.sttm import STTM
    from tokenreduce.video.projector.timesuite import TokenShuffle
    from tokenreduce.video.projector.uniform_frames import UniformFrames
    from tokenreduce.video.projector.vcast import VCAST
    from tokenreduce.video.projector.vidcom2 import VidCom2
    from tokenreduce.vision.cache.a2sf import A2SF
    from tokenreduce.vision.cache.adakv import AdaKV
    from tokenreduce.vision.cache.aircache import AirCache
    from tokenreduce.vision.cache.duoattention import DuoAttention
    from tokenreduce.vision.cache.ems import EMS
    from tokenreduce.vision.cache.expected_attention import ExpectedAttention
    from tokenreduce.vision.cache.h2o import H2O
    from tokenreduce.vision.cache.keydiff import KeyDiff
    from tokenreduce.vision.cache.keyformer import Keyformer
    from tokenreduce.vision.cache.knorm import Knorm
    from tokenreduce.vision.cache.lazyeviction import LazyEviction
    from tokenreduce.vision.cache.lookm import LookM
    from tokenreduce.vision.cache.meda import MEDA
    from tokenreduce.vision.cache.minicache import MiniCache
    from tokenreduce.vision.cache.mixkv import MixKV
    from tokenreduce.vision.cache.mustdrop_cache import MustDropCache
    from tokenreduce.vision.cache.prefixkv import PrefixKV
    from tokenreduce.vision.cache.pyramidkv import PyramidKV
    from tokenreduce.vision.cache.random_drop import RandomKeys
    from tokenreduce.vision.cache.razorattention import RazorAttention
    from tokenreduce.vision.cache.recycled import Recycled
    from tokenreduce.vision.cache.snapkv import SnapKV
    from tokenreduce.vision.cache.streamingllm import Recent, StreamingLLM
    from tokenreduce.vision.cache.tgvkv import TGVKV
    from tokenreduce.vision.cache.tokenselect import TokenSelect
    from tokenreduce.vision.cache.tova import TOVA
    from tokenreduce.vision.cache.vase import VaSE
    from tokenreduce.vision.cache.vlcache import VLCache
    from tokenreduce.vision.diffusion.tomesd import ToMeSD
    from tokenreduce.vision.encoder.ats import ATS
    from tokenreduce.vision.encoder.diffrate import DiffRate
    from tokenreduce.vision.encoder.dpcknn import DPCKNN
    from tokenreduce.vision.encoder.dymu import DyMU
    from tokenreduce.vision.encoder.evit import EViT
    from tokenreduce.vision.encoder.ficoco_v import FiCoCoV
    from tokenreduce.vision.encoder.ipcv import IPCV
    from tokenreduce.vision.encoder.kmedoids import KMedoids
    from tokenreduce.vision.encoder.mctf import MCTF
    from tokenreduce.vision.encoder.mustdrop_merge import MustDropMerge
    from tokenreduce.vision.encoder.pitome import PiToMe
    from tokenreduce.vision.encoder.pixelprune import PixelPrune
    from tokenreduce.vision.encoder.random_drop import Random
    from tokenreduce.vision.encoder.repshift import RepresentationShift
    from tokenreduce.vision.encoder.resize import Resize
    from tokenreduce.vision.encoder.soft_slim import SoftSlim
    from tokenreduce.vision.encoder.t2t_pool import T2TPool
    from tokenreduce.vision.encoder.tofu import ToFu
    from tokenreduce.vision.encoder.tome import ToMe, ToMeKth
    from tokenreduce.vision.encoder.uniform import Uniform
    from tokenreduce.vision.encoder.zerotprune import ZeroTPrune
    from tokenreduce.vision.language.aim import AIM
    from tokenreduce.vision.language.apet_llm import ApETLLM
    from tokenreduce.vision.language.d2pruner import D2Pruner
    from tokenreduce.vision.language.dart import DART
    from tokenreduce.vision.language.dstp import DSTP
    from tokenreduce.vision.language.fastv import FastV
    from tokenreduce.vision.language.ficoco import FiCoCoL
    from tokenreduce.vision.language.fitprune import FitPrune
    from tokenreduce.vision.language.lazyllm import LazyLLM
    from tokenreduce.vision.language.mustdrop import MustDrop
    from tokenreduce.vision.language.pact import PACT
    from tokenreduce.vision.language.pyramiddrop import PyramidDrop
    from tokenreduce.vision.language.random_drop import RandomVisual
    from tokenreduce.vision.language.sparsevlm import SparseVLM
    from tokenreduce.vision.language.v2drop import V2Drop
    from tokenreduce.vision.language.vscan_prune import VScanLLM
    from tokenreduce.vision.language.vtw import VTW
    from tokenreduce.vision.projector.adaptvision import AdaptVision
    from tokenreduce.vision.projector.aim_merge import AIMMerge
    from tokenreduce.vision.projector.apet import ApET
    from tokenreduce.vision.projector.cdpruner import CDPruner
    from tokenreduce.vision.projector.divprune import DivPrune
    from tokenreduce.vision.projector.fastervlm import FasterVLM
    from tokenreduce.vision.projector.fopru import FoPru
    from tokenreduce.vision.projector.globalcom2 import GlobalCom2
    from tokenreduce.vision.projector.gprune import GPrune
    from tokenreduce.vision.projector.hiprune import HiPrune
    from tokenreduce.vision.projector.hired import HiRED
    from tokenreduce.vision.projector.holov import HoloV
    from tokenreduce.vision.projector.mmtok import MMTok
    from tokenreduce.vision.projector.otprune import OTPrune
    from tokenreduce.vision.projector.pool import PoolTokens
    from tokenreduce.vision.projector.prumerge import PruMerge, PruMergePlus
    from tokenreduce.vision.projector.prunesid import PruneSID
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
    from tokenreduce.vision.projector.zooprune import ZOOPrune

# Modules are found by their old names, too, for one release.
__path__.append(os.path.join(os.path.dirname(__file__), "_old"))

__version__ = "0.2.0"
__all__ = [
    "A2SF", "AIM", "AIMMerge", "ATS", "AdaKV", "AdaptVision", "AirCache", "ApET", "ApETLLM", "CDPruner",
    "CacheEvidence", "CacheReducer", "D2Pruner", "DART", "DPCKNN", "DSTP", "DiffRate", "DiffusionEvidence",
    "DiffusionReducer", "DivPrune", "DuoAttention", "DyCoke", "DyCokeCache", "DyMU", "EMS", "EVS", "EViT", "EarlyTom",
    "Evidence", "ExpectedAttention", "FastV", "FastVID", "FasterVLM", "FiCoCoL", "FiCoCoV", "FitPrune", "FlashVID",
    "FlashVIDLLM", "FoPru", "FrameFusion", "FrameMerge", "GPrune", "GlobalCom2", "H2O", "HiPrune", "HiRED", "HoliTom",
    "HoliTomMerge", "HoloV", "IPCV", "InfiniPotV", "KMedoids", "KeyDiff", "Keyformer", "Knorm", "LazyEviction",
    "LazyLLM", "LookM", "MCTF", "MEDA", "MMTok", "Merge", "MiniCache", "Mix", "MixKV", "MustDrop", "MustDropCache",
    "MustDropMerge", "OTPrune", "PACT", "PPLLaVA", "PiToMe", "PixelDiff", "PixelPrune", "Plan", "Pool", "PoolFrames",
    "PoolTokens", "PrefixKV", "PruMerge", "PruMergePlus", "Prune", "PruneSID", "PruneVid", "PruneVidPrune",
    "PyramidDrop", "PyramidKV", "Random", "RandomKeys", "RandomTokens", "RandomVisual", "RazorAttention", "Recent",
    "Recycled", "Reducer", "RepresentationShift", "Resize", "ResizeTokens", "SCOPE", "STTM", "STTMLLM", "SnapKV",
    "SoftSlim", "SparseVLM", "SpatialAugmented", "StreamMem", "StreamingLLM", "T2TPool", "TGVKV", "TOVA", "TRIM",
    "ToFu", "ToMe", "ToMeKth", "ToMeSD", "TokenCorr", "TokenSelect", "TokenShuffle", "Uniform", "UniformFrames",
    "UniformTokens", "V2Drop", "VCAST", "VLCache", "VScan", "VScanLLM", "VTW", "VaSE", "VidCom2", "VidTLDR",
    "VisPruner", "VisionZip", "ZOOPrune", "ZeroTPrune", "describe", "estimate", "get_method", "kept_columns",
    "list_methods", "parse", "patch", "patched", "record", "reduce_tokens", "stream", "tune", "unpatch", "zoo",
]  # fmt: skip


#: Where the public names that are no methods are, by module.
_HOMES = {
    "core.cache_reducer": ("CacheReducer",),
    "core.diffusion_reducer": ("DiffusionReducer",),
    "core.evidence": ("CacheEvidence", "DiffusionEvidence", "Evidence"),
    "core.plan": ("Merge", "Mix", "Plan", "Pool", "Prune"),
    "core.reducer": ("Reducer",),
    "core.registry": ("get_method", "list_methods", "parse"),
    "core.trace": ("record",),
    "estimation": ("estimate",),
    "streaming": ("stream",),
    "tuning": ("tune",),
    "patching": ("describe", "kept_columns", "patch", "patched", "reduce_tokens", "unpatch"),
}
#: Subpackages and modules that are attributes without being imported first.
_MODULES = (
    "adapters",
    "algorithms",
    "bench",
    "common",
    "core",
    "estimation",
    "measure",
    "patching",
    "streaming",
    "tuning",
    "video",
    "vision",
    "zoo",
)
#: Subpackages that must be imported: looking for them as attributes should load nothing.
_APART = ("cli", "demo")


def __getattr__(name: str) -> Any:
    """Names and subpackages are imported when first used; method classes (``tr.ToMe``, ...) come from the registry."""
    if name in _MODULES:
        return importlib.import_module(f"tokenreduce.{name}")
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = found = getattr(importlib.import_module(f"tokenreduce.{home}"), name)
            return found
    if not name.startswith("_") and name not in _APART:
        from tokenreduce.core.registry import load_all

        for kind in load_all().values():
            if kind.__name__ == name:
                return kind
    raise AttributeError(f"module 'tokenreduce' has no attribute {name!r}")


def __dir__() -> list[str]:
    from tokenreduce.core.registry import load_all

    return sorted({*globals(), *__all__, *(kind.__name__ for kind in load_all().values())})
