"""Moved to :mod:`tokenreduce.core.registry`."""

from tokenreduce._old import moved
from tokenreduce.core.registry import *  # noqa: F403

moved("registry", "core.registry")
