"""Moved to :mod:`tokenreduce.core.schedule`."""

from tokenreduce._old import moved
from tokenreduce.core.schedule import *  # noqa: F403

moved("schedule", "core.schedule")
