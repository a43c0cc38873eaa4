"""Moved to :mod:`tokenreduce.core.plan`."""

from tokenreduce._old import moved
from tokenreduce.core.plan import *  # noqa: F403

moved("plan", "core.plan")
