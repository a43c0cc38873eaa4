"""What reading frames costs beside decord alone: ``python -m tokenreduce.bench.performance.video_reading FILE``.

The same uniform frames, in turns: ``decord.VideoReader(FILE).get_batch(indices)``, and
:func:`tokenreduce.video.read_frames`, which also checks the file's packets, rotation and timestamps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from tokenreduce.common.pinned import pin
from tokenreduce.common.words import counted
from tokenreduce.measure.timing import interleaved
from tokenreduce.video.errors import need
from tokenreduce.video.reading import READERS, open_video, read_frames

__all__ = ["measure"]


def measure(path: str, n: int = 32, repeats: int = 5, reader: str = "auto") -> str:
    """A line with both median times and their ratio.

    Raises :class:`VideoError` for a file that cannot be read, ``ImportError`` without decord.
    """
    decord = need("decord")
    video = open_video(path, reader)
    indices = video.choose(n)

    def alone() -> object:
        return decord.VideoReader(path, ctx=decord.cpu(0)).get_batch(indices).asnumpy()

    def ours() -> object:
        return read_frames(path, n=n, reader=reader)

    calls: dict[str, Callable[[], object]] = {"decord": alone, "read_frames": ours}
    timings = interleaved(calls, repeats, 1, "cpu")
    slower = timings["read_frames"].against(timings["decord"])
    base = timings["decord"].median
    why = f" (not decord: {video.why})" if video.why else ""
    return (
        f"{len(indices)} of {counted(video.count, 'frame')} of {video.size[0]}x{video.size[1]}: "
        f"decord alone {base:.3f} s, read_frames with {video.reader}{why} "
        f"{base * slower.ratio:.3f} s: {slower.cell} the time ({slower.interval}; medians of "
        f"{counted(repeats, 'round')}, in turns)"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file")
    parser.add_argument("-n", type=int, default=32, help="frames")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reader", choices=READERS, default="auto")
    given = parser.parse_args(arguments)
    print(measure(given.file, given.n, given.repeats, given.reader))


if __name__ == "__main__":
    pin()
    main()
