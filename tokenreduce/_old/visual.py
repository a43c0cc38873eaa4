"""Moved to :mod:`tokenreduce.core.evidence`."""

from tokenreduce._old import moved
from tokenreduce.core.evidence import *  # noqa: F403
from tokenreduce.core.evidence import ImageEvidence as Visual  # noqa: F401
from tokenreduce.core.evidence import TowerEvidence as Mapped  # noqa: F401

moved("visual", "core.evidence")
