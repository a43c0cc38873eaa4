"""Searches methods, settings and a split of the budget over stages for a model and data."""

from tokenreduce.tuning.tune import Found, tune

__all__ = ["Found", "tune"]
