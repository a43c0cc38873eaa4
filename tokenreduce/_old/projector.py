"""Moved to :mod:`tokenreduce.algorithms.projector`."""

from tokenreduce._old import moved
from tokenreduce.algorithms.projector import *  # noqa: F403

moved("projector", "algorithms.projector")
