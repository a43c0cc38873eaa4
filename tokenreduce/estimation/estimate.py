"""Puts an estimate together: subject, operators, device, limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenreduce.core.auto import auto_of, is_auto
from tokenreduce.core.labels import label_of
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import parse
from tokenreduce.estimation.auto import chosen_on
from tokenreduce.estimation.devices import Device
from tokenreduce.estimation.limits import first_acting, first_token, limit, seconds_by, worth_from
from tokenreduce.estimation.lookup import device_named
from tokenreduce.estimation.memory import cache_bytes, largest_batch
from tokenreduce.estimation.ops import DECODE, PARTS
from tokenreduce.estimation.record import Recorded, recorded
from tokenreduce.estimation.result import Estimate, Side
from tokenreduce.estimation.roofline import part_of
from tokenreduce.estimation.subject import Ask, Subject
from tokenreduce.estimation.subjects import subject_of
from tokenreduce.patching import describe

__all__ = ["compared", "estimate"]


def estimate(
    model: str | Path,
    *reducers: Reducer | str,
    device: str = "h100",
    batch: int = 1,
    image: tuple[int, int] | None = None,
    frames: int | None = None,
    prompt: int = 64,
    answer: int = 128,
    dtype: str = "bf16",
) -> Estimate:
    """What ``model`` costs by part, stock and with ``reducers``, before it is loaded: from its config alone.

    A narrow model with the same layers is built, patched and run once, so that the tokens of every layer and every
    operator of the methods are those of the real adapters; operators are then read at the true widths and timed by a
    roofline: the longer of computing and moving bytes, and no less than starting them.

    Args:
        model: an embedded model, ``timm:NAME?options``, ``open_clip:NAME``, a Hub id, or a folder with a config.
        reducers: as :func:`tokenreduce.patch` takes them; none for the stock model alone.
        device: one of ``h100``, ``a100``, ``l4``, ``rtx4090``, ``jetson-orin``, ``cpu``, or ``measured`` (this machine,
            after ``tokenreduce calibrate``).
        batch: samples; all have one image or clip.
        image: (width, height) in pixels; the model's own size by default (1344x1008 where it has none, frames 448x448).
        frames: a clip of as many frames, for models that take videos.
        prompt, answer: text tokens before and behind the image, and of the answer.
        dtype: ``bf16``, ``fp16`` or ``fp32``.

    Random numbers stand for the image, so methods that keep more where more is to be seen are estimated on noise; a
    note says so for those whose samples may keep unequal numbers. Decode steps are those behind the prompt. Embeddings,
    sampling and the tokenizer are left out.

    Raises ``ValueError`` for bad settings, an unknown device, a model without a vision part and methods that do not fit
    it; ``OSError`` for a config that cannot be had; ``ImportError`` that names a missing extra.
    """
    for key, value, least in (("batch", batch, 1), ("prompt", prompt, 4), ("answer", answer, 0), ("frames", frames, 2)):
        wrong = isinstance(value, bool) or not isinstance(value, int) or value < least
        if wrong and not (key == "frames" and value is None):
            raise ValueError(f"{key} is an int >= {least}, not {value!r}")
    on = device_named(device, dtype)
    subject = subject_of(str(model), Ask(image, frames, prompt))
    chosen, why = _chosen(subject, reducers)
    stock = recorded(subject)
    made = recorded(subject, chosen) if chosen else None

    def side(one: Recorded) -> Side:
        parts = tuple(part_of(p, one.of(p), one.tokens(p), on, batch, dtype) for p in PARTS if one.of(p))
        first = sum(p.seconds for p in parts if p.name != DECODE)
        token = sum(p.seconds for p in parts if p.name == DECODE)
        held = cache_bytes(subject, one, dtype) * batch
        return Side(parts, first, token, held, largest_batch(subject, one, on.memory, dtype, answer))

    seconds = seconds_by(on, batch, dtype)
    first_layer = 1 if made is None else first_acting(stock, made)
    noise = [f"{label_of(r)}: what it keeps may depend on the image, which is noise here" for r in chosen if r.ragged]
    notes = tuple(dict.fromkeys([*why, *subject.notes, *noise, *(() if made is None else made.notes)]))
    limits = {s: limit(subject, stock, s, first_layer, seconds) for s in _stages(subject, chosen)}
    worth = None if made is None else worth_from(subject, stock, made, seconds)
    return Estimate(
        subject.title, device, dtype, batch, subject.shown, subject.text if subject.answers else 0,
        answer if subject.answers else 0, subject.visual, subject.parameters, "+".join(label_of(r) for r in chosen),
        side(stock), None if made is None else side(made), limits, worth, notes,
    )  # fmt: skip


def _chosen(subject: Subject, given: Sequence[Reducer | str]) -> tuple[tuple[Reducer, ...], list[str]]:
    """Methods as :func:`tokenreduce.patch` takes them, and what ``auto:`` stood for."""
    texts = [r for r in given if is_auto(r)]
    if not texts:
        return parse(*given, stage=None if subject.answers else "encoder") if given else (), []
    if len(given) > 1:
        raise ValueError("auto stands for all methods of a patch; give it alone")
    found = chosen_on(subject, auto_of(str(texts[0])))
    return found.reducers, [str(found)]


def compared(
    subject: Subject, reducers: Sequence[Reducer], device: Device, batch: int, dtype: str
) -> tuple[float, float]:
    """Seconds to the first token (of an encoder's forward), stock and with ``reducers``."""
    seconds = seconds_by(device, batch, dtype)
    return first_token(recorded(subject), seconds), first_token(recorded(subject, reducers), seconds)


def _stages(subject: Subject, chosen: Sequence[Reducer]) -> list[str]:
    """Stages of the methods, or all that the model has where there are none."""
    there = [s for s in describe(subject.narrow).stages if s != "cache" or any(r.stage == s for r in chosen)]
    acting = {r.stage for r in chosen}
    return [s for s in there if not acting or s in acting]
