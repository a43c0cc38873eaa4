"""Moved to :mod:`tokenreduce.algorithms.scoring`."""

from tokenreduce._old import moved
from tokenreduce.algorithms.scoring import *  # noqa: F403

moved("scoring", "algorithms.scoring")
