"""Running the embedded models to see what a method keeps."""

from __future__ import annotations

import functools
import re
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokenreduce.adapters.language.generation import cache_of, generation_of
from tokenreduce.algorithms.head_table import FILE
from tokenreduce.algorithms.pixels import PixelReducer
from tokenreduce.bench.gallery.kept import Kept, Without
from tokenreduce.bench.gallery.pictures import QUESTIONS, clip, scenes
from tokenreduce.bench.models import load_model
from tokenreduce.bench.vlms import load_vlm
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.evidence import Evidence
from tokenreduce.core.labels import label_of
from tokenreduce.core.plan import Plan
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import get_class, parse
from tokenreduce.core.trace import Trace, record
from tokenreduce.measure.frames import own_form
from tokenreduce.measure.generation import follow, greedy, visual_columns
from tokenreduce.measure.heads import measure_heads
from tokenreduce.measure.kept import frame_places, places
from tokenreduce.measure.picture import look
from tokenreduce.measure.question import Question, ask
from tokenreduce.patching import patched

__all__ = ["IN_FRONT", "SETTINGS", "WITHOUT", "kept_by", "setting"]

SHARE = 0.25
#: Settings of methods of which a quarter of the tokens alone would show nothing: their windows are longer than answers
#: are here.
SETTINGS: dict[str, dict[str, Any]] = {
    "infinipot-v": {"keep": SHARE, "query_ratio": 0.125},
    "lazyeviction": {"keep": SHARE, "window": 8},
    "vase": {"keep": SHARE, "residual_length": 8},
}
#: What is to be known of a picture.
NOTES = {
    "resize": "The image is made smaller before there are tokens: one stands where several would have been.",
    "vtw": "All visual tokens leave before one layer; the layers in front of it see all.",
    "v2drop": "It goes on dropping from layer to layer: the mean over layers is a quarter.",
    "pixel-diff": "It looks at pixels alone, here of units of 16x16, and acts where a model takes videos as such.",
}
#: What stands in front of a method that goes on where another one left off.
IN_FRONT = {"mustdrop-cache": "mustdrop:keep=0.25"}
#: Methods of which no picture can be made here, and why.
WITHOUT = {"minicache": "it drops no token; pairs of layers share what they hold of each."}
#: New tokens behind which caches are looked at.
TOKENS = 16
#: Pixels of a side of the encoder's patches, and of the units that are compared in clips.
PATCH, UNIT = 8, 16
ENCODER, ASKED = "world-vit", "world-llava"


def setting(name: str) -> tuple[Reducer, ...]:
    """The method as it is shown, behind what it goes with: a quarter of the tokens stay, where that can be told."""
    kind = get_class(name)
    known = {f.name for f in fields(kind)}
    given = SETTINGS.get(name, {"keep": SHARE} if "keep" in known else {})
    given = {**given, **({"table": str(Path(_heads().name) / FILE)} if "table" in known else {})}
    in_front = parse(IN_FRONT[name]) if name in IN_FRONT else ()
    return (*in_front, kind(**given))


def kept_by(name: str) -> Kept | Without:
    """What the method called ``name`` keeps of the gallery's pictures, or why that cannot be shown.

    Raises ``ValueError`` for an unknown name, and what the method raises in a model that it should fit.
    """
    if name in WITHOUT:
        return Without(WITHOUT[name])
    reducers = setting(name)
    called = [*(r.name for r in reducers[:-1]), name]
    spec = re.sub(r"table=[^,+]+", f"table={FILE}", label_of(reducers, called))
    about: dict[str, Any] = {"spec": spec, "note": NOTES.get(name, "")}
    one = reducers[-1]
    film = type(one).__module__.startswith("tokenreduce.video.")
    if isinstance(one, PixelReducer) and film:
        return Kept(**about, model="", pictures="clip", maps=(_of_pixels(one),))
    if one.stage == "cache":
        return _in_cache(about, reducers, film)
    if one.stage == "encoder":
        maps = tuple(_in_encoder(reducers, image) for image in scenes())
        return Kept(**about, model=ENCODER, pictures="scenes", maps=maps)
    maps = tuple(_left(seen, reducers) for seen in _asked(film))
    return Kept(**about, model=ASKED, pictures="clip" if film else "scenes", maps=maps)


@functools.cache
def _encoder() -> Any:
    return load_model(ENCODER)


@functools.cache
def _vlm() -> Any:
    return load_vlm(ASKED, "cpu", "fp32")


@functools.cache
def _heads() -> tempfile.TemporaryDirectory[str]:
    """A folder with the table of the model's heads, as long as somebody holds it."""
    folder = tempfile.TemporaryDirectory()
    measure_heads(_vlm().model).save(Path(folder.name) / FILE)
    return folder


@dataclass(frozen=True)
class _Seen:
    """One question: where the visual ``columns`` (rows, columns) of its picture lie; frames side by side."""

    question: Question
    columns: np.ndarray


@functools.cache
def _asked(film: bool) -> tuple[_Seen, ...]:
    """The questions about the scenes, or about the clip."""
    loaded = _vlm()
    if film:
        question = own_form(loaded, clip(), QUESTIONS[-1])
        every = visual_columns(loaded.model, question).nonzero().flatten()
        side = round((len(every) / len(question.images)) ** 0.5)
        frames = frame_places(loaded.processor, question, (side, side), every)
        return (_Seen(question, np.concatenate([f.columns.view(f.grid).numpy() for f in frames], 1)),)
    made = []
    for image, text in zip(scenes(), QUESTIONS, strict=False):
        question = ask(loaded.processor, [image], f"{loaded.processor.image_token} {text}")
        (place,) = places(loaded.model, loaded.processor, question)
        made.append(_Seen(question, place.columns.view(place.grid).numpy()))
    return tuple(made)


def _in_encoder(reducers: tuple[Reducer, ...], image: Image.Image) -> np.ndarray:
    seen = look(_encoder(), image, reducers)
    plan, (rows, cols) = seen.plan(), seen.grid
    source = np.arange(rows * cols) if plan is None else plan.sources()[0, seen.prefix :].numpy() - seen.prefix
    # A smaller image has fewer patches, of which each covers several.
    times = image.height // PATCH // rows
    return np.where(source < 0, -1, source).reshape(rows, cols).repeat(times, 0).repeat(times, 1)


def _of_pixels(reducer: Reducer) -> np.ndarray:
    """(rows, frames*columns) what stays of the clip's units, by their pixels."""
    frames = torch.from_numpy(np.stack([np.asarray(frame) for frame in clip()]).astype(np.float32))
    side = frames.shape[1] // UNIT
    units = frames.unflatten(2, (side, UNIT)).unflatten(1, (side, UNIT)).transpose(2, 3).reshape(1, -1, 3 * UNIT**2)
    plan = reducer.plan(Evidence(units, grid=(len(frames), side, side)))
    stay = plan.sources()[0].view(len(frames), side, side)
    return np.concatenate(list(stay.numpy()), 1)


def _run(question: Question, reducers: tuple[Reducer, ...], tokens: int) -> tuple[Trace, Any]:
    """The trace of an answer of so many ``tokens``, and its cache."""
    model = _vlm().model
    with torch.inference_mode(), patched(model, *reducers), record(model, flops=False) as trace:
        given = question.inputs if question.remake is None else question.remake(model)
        out = greedy(model, dict(given), tokens, min_new_tokens=tokens, return_dict_in_generate=True)
    return trace, cache_of(out)


def _left(seen: _Seen, reducers: tuple[Reducer, ...]) -> np.ndarray:
    """(rows, columns) the token of each patch behind the last step of a prefill."""
    trace, _ = _run(seen.question, reducers, 1)
    length = seen.question.inputs["input_ids"].shape[1]
    behind = follow(trace.steps, length)
    left = behind[-1][1] if behind else torch.arange(length)
    return left.numpy()[seen.columns]


def _in_cache(about: dict[str, Any], reducers: tuple[Reducer, ...], film: bool) -> Kept | Without:
    maps = []
    for seen in _asked(film):
        chosen: dict[int, torch.Tensor] = {}
        trace, cache = _run(seen.question, (*reducers[:-1], _watched(reducers[-1], chosen)), TOKENS)
        length = seen.question.inputs["input_ids"].shape[1]
        if chosen:
            held = torch.stack([chosen[layer][:, :length] for layer in sorted(chosen)])
        else:
            held = _seen_in_decode(trace, cache, length) if trace.decode else _held(cache, length)
        maps.append(held.numpy()[:, :, seen.columns])
    if all(m.all() for m in maps):
        return Without("it holds the keys of all visual tokens in all layers and heads.")
    heads = max(m.shape[1] for m in maps)
    counts = tuple(m.sum(1) * (heads // m.shape[1]) for m in maps)
    return Kept(**about, model=ASKED, pictures="clip" if film else "scenes", maps=counts, heads=heads)


def _watched(reducer: Reducer, chosen: dict[int, torch.Tensor]) -> Reducer:
    """A method that hides keys for some steps and leaves the cache whole, which writes its last choice of every layer
    into ``chosen``, (heads, slots) bool; others as they are."""
    if not (isinstance(reducer, CacheReducer) and reducer.temporary()):
        return reducer

    class Watched(type(reducer)):  # type: ignore[misc]
        def plan(self, evidence: Any) -> Plan:
            plan = super().plan(evidence)
            if not plan.is_identity:
                chosen[evidence.layer] = plan.sources() >= 0
            return plan

    return Watched(**{f.name: getattr(reducer, f.name) for f in fields(reducer)})


def _held(cache: Any, length: int) -> torch.Tensor:
    """(layers, heads, columns of the prompt) bool: whose keys the cache holds."""
    generation = generation_of(cache)
    if generation is None:
        return torch.ones(len(cache.layers), 1, length, dtype=torch.bool)
    layers = []
    for number, layer in enumerate(cache.layers):
        there = generation.columns.of_cache(number, layer.keys.shape[2])
        at = there.at[0].where(there.real()[0] & (there.at[0] < length), length)
        layers.append(torch.zeros(len(at), length + 1, dtype=torch.bool).scatter(1, at, True)[:, :length])
    heads = max(len(held) for held in layers)
    return torch.stack([held.expand(heads, -1) for held in layers])


def _seen_in_decode(trace: Trace, cache: Any, length: int) -> torch.Tensor:
    """(layers, 1, columns of the prompt) bool: what the last new token saw, of methods that choose anew for each."""
    seen = torch.ones(len(cache.layers), 1, length, dtype=torch.bool)
    last = {step.layer: step.seen[0, :length] for step in trace.decode}
    for layer in sorted(last):
        seen[layer:] = last[layer]
    return seen
