"""Moved to :mod:`tokenreduce.algorithms.temporal`."""

from tokenreduce._old import moved
from tokenreduce.algorithms.temporal import *  # noqa: F403

moved("temporal", "algorithms.temporal")
