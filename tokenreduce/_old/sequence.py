"""Moved to :mod:`tokenreduce.algorithms.sequence`."""

from tokenreduce._old import moved
from tokenreduce.algorithms.sequence import *  # noqa: F403

moved("sequence", "algorithms.sequence")
