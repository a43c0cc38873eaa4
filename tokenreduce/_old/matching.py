"""Moved to :mod:`tokenreduce.algorithms.matching`."""

from tokenreduce._old import moved
from tokenreduce.algorithms.matching import *  # noqa: F403

moved("matching", "algorithms.matching")
