"""What every architecture of an installed library can have: one row each."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Row"]


@dataclass(frozen=True)
class Row:
    """How ``name`` of ``library`` is supported: ``how`` is "table", "discovered" or "refused", ``stages`` are where
    methods can act, and ``reason`` says why not, or what is left out."""

    library: str
    name: str
    how: str
    stages: tuple[str, ...]
    reason: str
