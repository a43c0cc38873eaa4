"""Moved to :mod:`tokenreduce.algorithms.clustering`."""

from tokenreduce._old import moved
from tokenreduce.algorithms.clustering import *  # noqa: F403

moved("clustering", "algorithms.clustering")
