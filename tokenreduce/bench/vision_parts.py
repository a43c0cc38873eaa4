"""What an image model says to the images of one batch, here or in another process, and all of it put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenreduce.bench.data import Batch, Images
from tokenreduce.bench.hits import Answers, neighbours, ranks
from tokenreduce.bench.models import Loaded
from tokenreduce.bench.reading import Problem
from tokenreduce.common.words import counted

__all__ = ["VisionPart", "answer", "check_place", "inference", "merged"]

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class VisionPart(NamedTuple):
    """Answers to one batch.

    Attributes:
        ids: (B,) positions of the images that could be read.
        y: their labels.
        outputs: (B,k) best classes, or (B,D) features of a model without a head.
        finite: (B,) whether all outputs are numbers.
        problems: images that could not be read.
        notes: what the method had to say.
    """

    ids: Tensor
    y: Tensor
    outputs: Tensor
    finite: Tensor
    problems: list[Problem]
    notes: list[str]


def check_place(device: str, amp: str | None) -> None:
    """Raise ``ValueError`` for a device that is not there, or no CPU or CUDA device, and for another ``amp``."""
    if amp is not None and amp not in AMP:
        raise ValueError(f"amp is {', '.join(AMP)} or None, not {amp!r}")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is cpu, cuda or cuda:N, not {device!r}") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device is cpu, cuda or cuda:N, not {device!r}: memory is measured on these only")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        have = torch.cuda.device_count()
        raise ValueError(f"there is no device {device!r}: torch sees {have} CUDA devices; choose another or cpu")


@contextmanager
def inference(device: str, amp: str | None) -> Iterator[None]:
    """No gradients, and autocast where ``amp`` says so."""
    with torch.inference_mode():
        if amp is None:
            yield
        else:
            with torch.autocast(torch.device(device).type, dtype=AMP[amp]):
                yield


def answer(loaded: Loaded, model: nn.Module, batch: Batch, device: str, amp: str | None) -> VisionPart:
    """What ``model`` (that of ``loaded``, or one like it) says to a batch."""
    x = batch.x.to(device, non_blocking=True)
    with inference(device, amp):
        out = loaded.predict(x, model).float()
        finite = out.isfinite().all(-1).cpu()
        if loaded.kind != "features":
            out = out.topk(ranks(batch.y, out.shape[-1]), dim=-1).indices
    return VisionPart(batch.ids, batch.y, out.cpu(), finite, [], [])


def merged(parts: Iterable[VisionPart], loaded: Loaded, images: Images) -> Answers:
    """The answers of all parts, in order. Raises ``ValueError`` where no image could be read."""
    there = [part for part in parts if len(part.ids)]
    if not there:
        first = "".join(f"\n  {p.path}: {p.reason}" for p in images.problems[:5])
        raise ValueError(f"none of the {counted(len(images), 'image')} of {images.name} can be read:{first}")
    ids, y, got, good = (torch.cat([part[i] for part in there]) for i in range(4))  # type: ignore[misc]
    if loaded.kind == "features":
        got = neighbours(got.nan_to_num(0, 0, 0), y, len(images.classes))
    got = got.masked_fill(~good[:, None], -1)
    return Answers(ids, y, got, int((~good).sum()))
