"""Moved to :mod:`tokenreduce.core.reducer`."""

from tokenreduce._old import moved
from tokenreduce.core.reducer import *  # noqa: F403

moved("reducer", "core.reducer")
