"""Into how many tiles an image is cut, from its size alone: AdaptVision's partition (arXiv 2408.16986)."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.core.budget import check_count

__all__ = ["Partition", "partition"]

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Partition:
    """Tiles of ``tile`` x ``tile`` pixels in ``rows`` and ``columns``, of an image stretched to :attr:`size`."""

    tile: int
    rows: int
    columns: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) that the image is resized to, without regard to its aspect ratio (Lanczos, as published)."""
        return self.columns * self.tile, self.rows * self.tile

    @property
    def views(self) -> tuple[tuple[tuple[int, int], Box], ...]:
        """Label (row, column) and box (left, upper, right, lower) in the resized image of every view, in order: the
        thumbnail, the whole of it resized once more to one tile, with label (0, 0), then the tiles row by row from
        (1, 1). A single tile is both, as published: it is encoded twice."""
        whole = ((0, 0), (0, 0, *self.size))
        s = self.tile
        tiles = [
            ((r + 1, c + 1), (c * s, r * s, (c + 1) * s, (r + 1) * s))
            for r in range(self.rows) for c in range(self.columns)
        ]  # fmt: skip
        return (whole, *tiles)


def partition(width: int, height: int, tile: int = 336, most: int = 3) -> Partition:
    """How an image of ``width`` x ``height`` pixels is cut: its long side becomes as many tiles as it needs, at most
    ``most``, and the short side, scaled by the same factor and cut to a whole number, as many as that needs. No content
    is looked at. One pixel above a multiple of ``tile`` costs a row or a column.

    Raises ``ValueError`` for numbers below 1.

    >>> [(p.columns, p.rows) for p in (partition(640, 480), partition(673, 200), partition(336, 700))]
    [(2, 2), (3, 1), (2, 3)]
    """
    for name, value in (("width", width), ("height", height), ("tile", tile), ("most", most)):
        check_count(value, name, 1)
    long, short = max(width, height), min(width, height)
    along = min(-(-long // tile), most)
    across = min(-(-max(along * tile * short // long, 1) // tile), most)
    return Partition(tile, along, across) if height >= width else Partition(tile, across, along)
