"""Moved to :mod:`tokenreduce.core.trace`."""

from tokenreduce._old import moved
from tokenreduce.core.trace import *  # noqa: F403

moved("trace", "core.trace")
