"""What methods on pixels cost themselves: ``python -m tokenreduce.bench.performance.pixels``.

The work of a method on one image of a million pixels: cutting it into units, comparing them and making the plan, in the
way of a tower of (channels, height, width) images (CLIP, 16 x 16 patches) and in that of rows of patches (Qwen2.5-VL,
whose rows hold an image twice). A photograph leaves nearly every unit, a screen of text about half of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from tokenreduce.adapters.encoders.packed_pixels import PackedPixels, packed_plans
from tokenreduce.adapters.encoders.pixels import Pixels, at_entry
from tokenreduce.bench.performance.encoders import refuse_busy
from tokenreduce.bench.performance.sections import deliver
from tokenreduce.common.pinned import is_pinned, pin
from tokenreduce.common.words import speak_everywhere
from tokenreduce.core.evidence import EncoderEvidence
from tokenreduce.core.registry import parse

__all__ = ["SPECS", "images", "measure", "rows_of", "work"]

SPECS = (
    "pixelprune", "pixelprune:keep=0.5", "pixelprune:tolerance=8", "pixelprune:tolerance=8,metric=mae", "pixel-diff",
)  # fmt: skip
#: Side of an image: whole patches of 14 and 16 pixels, in pairs.
SIDE = 1008
STD = (0.26862954, 0.26130258, 0.27577711)


def images(side: int = SIDE) -> dict[str, Tensor]:
    """A photograph and a screen of text, (3,side,side) float32 as a processor makes them."""
    from skimage import data, transform

    photo = (transform.resize(data.astronaut(), (side, side)) * 255).round()
    rng = np.random.default_rng(0)
    screen = np.full((side, side, 3), 255.0)
    screen[:40] = 60
    for y in range(60, side - 20, 28):  # lines of words, each letter some black pixels
        for x in range(20, 20 + 14 * int(rng.integers(side // 100, side // 18)), 14):
            screen[y : y + 12, x : x + 9] = np.where(rng.random((12, 9, 1)) < 0.4, 0, 255)[:, : side - x]
    made = {"photograph": photo, "screen": screen}
    std = torch.tensor(STD).view(3, 1, 1)
    return {k: (torch.from_numpy(v).float().permute(2, 0, 1) / 255 - 0.5) / std for k, v in made.items()}


def rows_of(image: Tensor, patch: int = 14, merge: int = 2) -> Tensor:
    """(P,V) rows of patches of an ``image`` (C,H,W), which they hold twice, as Qwen2.5-VL's processor makes them."""
    channels, high, wide = image.shape
    cut = image.expand(2, -1, -1, -1).reshape(
        2, channels, high // patch // merge, merge, patch, wide // patch // merge, merge, patch
    )
    return cut.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, channels * 2 * patch * patch).contiguous()


def work(spec: str, image: Tensor, packed: bool) -> Callable[[], Any]:
    """What ``spec`` does itself about ``image``, to be called; it returns the plan."""
    reducers = parse(spec)
    method: Any = reducers[0]
    entry = at_entry(reducers, STD, "", 1)
    assert entry is not None
    if packed:
        side, rows = image.shape[-1] // 14, rows_of(image)
        embed = SimpleNamespace(
            proj=SimpleNamespace(weight=torch.zeros(1, 3, 2, 14, 14)), in_channels=3, temporal_patch_size=2
        )

        def by_rows() -> Any:
            pixels = PackedPixels.of(embed, rows, [[1, side, side]], 2, None, method.temporal)
            return packed_plans(entry, pixels, pixels.layout, 32)[0]

        return by_rows
    side = image.shape[-1] // 16

    def by_image() -> Any:
        units = Pixels(image[None], (16, 16)).units((side, side), entry.scale)
        return method.plan(EncoderEvidence(units, grid=(side, side), depth=12))

    return by_image


def measure(specs: Sequence[str] = SPECS, rounds: int = 21, side: int = SIDE) -> list[list[str]]:
    """Lines of the table: method, way, image, share of the units that stay, milliseconds per megapixel (median, lowest
    to highest, of this thread's own time)."""
    lines = []
    for name, image in images(side).items():
        for spec in specs:
            for way, packed in (("images of 16 x 16 patches", False), ("rows of 28 x 28 units, each twice", True)):
                call = work(spec, image, packed)
                plan = call()
                times = []
                for _ in range(rounds):
                    began = time.thread_time()
                    call()
                    times.append((time.thread_time() - began) * 1e9 / side**2)
                stays = float(plan.places().float().mean())
                spread = f"{statistics.median(times):.1f} ({min(times):.1f}-{max(times):.1f})"
                lines.append([spec, name, way, f"{stays:.0%}", spread])
    return lines


COLUMNS = ("method", "image", "tower", "units that stay", "ms per megapixel")


def command(
    rounds: Annotated[int, typer.Option(help="repeats of each row", min=1)] = 21,
    idle: Annotated[bool, typer.Option("--idle", help="refuse to measure while other programs compute")] = False,
    markdown: Annotated[Path | None, typer.Option(help="page whose section is replaced")] = None,
) -> None:
    """What methods on pixels cost themselves."""
    if idle:
        refuse_busy()
    torch.set_num_threads(1)
    lines = measure(rounds=rounds)
    about = (
        f"CPU, 1 thread, float32, torch {torch.__version__}{', allocator pinned' if is_pinned() else ''}; an image of "
        f"{SIDE} x {SIDE} pixels; {rounds} repeats, medians (lowest-highest) of the thread's own time."
    )
    deliver("pixels", COLUMNS, lines, about, markdown)


if __name__ == "__main__":
    pin()
    speak_everywhere()
    typer.run(command)
