"""Names that modules had before, for plug-ins: ``tokenreduce.budget`` is ``tokenreduce.core.budget`` now.

They are found through the path of the package, warn once, and go with the next release.
"""

import warnings

__all__ = ["moved"]


def moved(old: str, new: str) -> None:
    """Say that ``tokenreduce.<old>`` is ``tokenreduce.<new>`` now."""
    warnings.warn(
        f"tokenreduce.{old} is tokenreduce.{new} now; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=3,
    )
