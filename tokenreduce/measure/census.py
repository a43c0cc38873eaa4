"""What of the installed model libraries is supported, as a table: its rows."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Row"]


@dataclass(frozen=True)
class Row:
    """One architecture of a library.

    Args:
        library: "timm", "open_clip", "transformers" or "torchvision".
        name: the class of the model, or the name of its configuration in open_clip.
        how: "table" (an adapter names it), "discovered" (found by how it is built) or "refused".
        stages: where methods can act: "encoder", "projector", "language", "cache"; empty where refused.
        reason: why it is refused, as ``tr.patch`` says it; "" where it is not.
    """

    library: str
    name: str
    how: str
    stages: tuple[str, ...] = ()
    reason: str = ""
