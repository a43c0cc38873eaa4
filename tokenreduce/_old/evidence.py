"""Moved to :mod:`tokenreduce.core.evidence`."""

from tokenreduce._old import moved
from tokenreduce.core.evidence import *  # noqa: F403

moved("evidence", "core.evidence")
