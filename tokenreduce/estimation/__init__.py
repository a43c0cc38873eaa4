"""What a model costs before it runs: FLOPs, bytes and time by part, stock and reduced, from its config alone."""

from tokenreduce.estimation.estimate import estimate
from tokenreduce.estimation.result import Estimate

__all__ = ["Estimate", "estimate"]
