"""Moved to :mod:`tokenreduce.algorithms.views`."""

from tokenreduce._old import moved
from tokenreduce.algorithms.views import *  # noqa: F403

moved("views", "algorithms.views")
