"""Moved to :mod:`tokenreduce.core.budget`."""

from tokenreduce._old import moved
from tokenreduce.core.budget import *  # noqa: F403

moved("budget", "core.budget")
