"""What a search is to reach: a share of FLOPs, of the cache, or of the time to the first token."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KINDS", "Target", "target_of"]

KINDS = {"flops": "FLOPs", "kv": "bytes of keys and values", "ttft": "time to the first token"}


@dataclass(frozen=True)
class Target:
    """``share`` of what the unreduced model spends of ``kind``."""

    kind: str
    share: float

    @property
    def label(self) -> str:
        return KINDS[self.kind]

    def __str__(self) -> str:
        return f"{self.kind}={self.share:g}"


def target_of(text: str) -> Target:
    """
    >>> target_of("flops=0.4")
    Target(kind='flops', share=0.4)

    Raises ``ValueError`` for another kind and a share outside (0, 1).
    """
    kind, _, number = text.partition("=")
    try:
        share = float(number)
    except ValueError:
        share = 0.0
    if kind not in KINDS or not 0 < share < 1:
        raise ValueError(f"target is {', '.join(f'{k}=SHARE' for k in KINDS)} with a share in (0, 1), not {text!r}")
    return Target(kind, share)
