"""Devices by name."""

from __future__ import annotations

import difflib

from tokenreduce.estimation.devices import BYTES, DEVICES, Device
from tokenreduce.estimation.measured import stored

__all__ = ["device_named"]


def device_named(name: str, dtype: str) -> Device:
    """A device of :data:`DEVICES`, or ``measured``: this machine, by what ``tokenreduce calibrate`` has stored.

    Raises ``ValueError`` for another name (with the known ones) or dtype, and where nothing was measured yet.
    """
    if dtype not in BYTES:
        raise ValueError(f"dtype is one of {', '.join(BYTES)}, not {dtype!r}")
    if name == "measured":
        return stored(dtype)
    if name not in DEVICES:
        known = [*DEVICES, "measured"]
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown device {name!r}; known: {', '.join(known)}{hint}")
    return DEVICES[name]
