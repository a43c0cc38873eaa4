"""Evidence: what a method may look at when it decides about tokens, a small core and one class per stage."""

from tokenreduce.core.evidence.attention import Attention, Rows, need
from tokenreduce.core.evidence.base import BaseEvidence
from tokenreduce.core.evidence.cache import CacheEvidence, Rotary
from tokenreduce.core.evidence.diffusion import DiffusionEvidence
from tokenreduce.core.evidence.encoder import EncoderEvidence
from tokenreduce.core.evidence.frames import FrameEvidence
from tokenreduce.core.evidence.image import ImageEvidence, TowerEvidence
from tokenreduce.core.evidence.language import Earlier, LanguageEvidence, Prompt
from tokenreduce.core.evidence.origin import Look, Origin, resolve
from tokenreduce.core.evidence.pairs import Joint, PoolingHead, Through
from tokenreduce.core.evidence.plain import Evidence
from tokenreduce.core.evidence.visual import VisualEvidence

__all__ = [
    "Attention", "BaseEvidence", "CacheEvidence", "DiffusionEvidence", "Earlier", "EncoderEvidence", "Evidence",
    "FrameEvidence",
    "ImageEvidence", "Joint", "LanguageEvidence", "Look", "Origin", "PoolingHead", "Prompt", "Rotary", "Rows",
    "Through", "TowerEvidence", "VisualEvidence", "need", "resolve",
]  # fmt: skip
