"""Moved to :mod:`tokenreduce.algorithms.greedy`."""

from tokenreduce._old import moved
from tokenreduce.algorithms.greedy import *  # noqa: F403

moved("greedy", "algorithms.greedy")
