"""The image language model task: accuracy by question type, visual tokens, FLOPs, time and cache of a prefill."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tokenreduce.adapters.language.generation import cache_of
from tokenreduce.bench.questions import Item, load_questions, matches
from tokenreduce.bench.sweep import full_name
from tokenreduce.bench.task import Axis
from tokenreduce.bench.times import ITSELF, speed_keys
from tokenreduce.bench.vision import _whole
from tokenreduce.bench.vlms import DTYPES, LoadedVlm, load_vlm, pick_device
from tokenreduce.common.images import as_rgb
from tokenreduce.common.words import counted
from tokenreduce.core.flops import gmacs
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import get_class, get_method
from tokenreduce.core.trace import Trace, record
from tokenreduce.measure.generation import _generate, cache_bytes, layers_of, patches_left, patches_of, visual_columns
from tokenreduce.measure.question import Question, ask, prompt_text
from tokenreduce.measure.timing import fused_attention, interleaved
from tokenreduce.patching import describe, patched, twin

__all__ = ["STAGES", "VlmTask"]

STAGES = ("projector", "language", "encoder")
#: Well-known methods of every stage, for a sweep that takes a minute or two.
WELL_KNOWN = {
    "projector": ("divprune", "visionzip", "vispruner"), "language": ("fastv", "pyramiddrop"), "encoder": ("tome",),
}  # fmt: skip
#: Questions, each run alone, over which visual tokens, FLOPs and cache bytes are averaged.
PROBES = 8
#: Of these, how many are looked at where a method keeps the same number for each.
FEW = 2
#: Prepared inputs up to this many bytes stay in memory, so that a sweep prepares them once.
CACHE = 1 << 30


class _Cost(NamedTuple):
    """Means over the probes; ``layers`` are visual tokens in each layer of the language model."""

    encoder: float | None
    layers: list[float]
    flops: int
    cache: float
    notes: list[str]


class _Answers(NamedTuple):
    """``said`` and ``right`` by the id of the question; ``broken`` counts outputs that are not finite."""

    said: dict[int, str]
    right: dict[int, bool]
    broken: int


class _Batch(NamedTuple):
    """Inputs of ``items``, or ``remake(model)`` where they hold features that must be those of the patched tower."""

    items: list[Item]
    inputs: dict[str, Any]
    remake: Callable[[Any], dict[str, Any]] | None = None


@dataclass
class _Ready:
    """What :meth:`VlmTask.prepare` made. ``words`` says that an answer is one token; ``alone`` that the processor
    cannot make batches; ``kept`` are the batches where they fit into memory."""

    loaded: LoadedVlm
    items: list[Item]
    stock: nn.Module
    words: bool
    alone: bool = False
    notes: list[str] = field(default_factory=list)
    problems: dict[int, dict[str, str]] = field(default_factory=dict)
    kept: list[_Batch] | None = None
    probes: list[Question] = field(default_factory=list)
    visual: list[Tensor] = field(default_factory=list)
    baseline: _Answers | None = None
    served: tuple[list[str], list[str]] | None = None


@dataclass
class VlmTask:
    """One image language model on questions about images, measured row by row.

    Args:
        model: ``world-llava``, a Hub id or a folder; see :func:`~tokenreduce.bench.vlms.load_vlm`.
        data, split, limit, seed: see :func:`~tokenreduce.bench.questions.load_questions`.
        batch: questions per forward; prompts are padded on the left.
        device, dtype: as :func:`~tokenreduce.bench.vlms.load_vlm` takes them, but the device is a real one.
        repeats: timed rounds; 0 leaves out the time to the first token and the reduction's share.
        max_new_tokens: longest answer where answers are texts.
        stages: which methods the sweep tries; with ``few`` only :data:`WELL_KNOWN` ones, besides the baselines.

    Budgets are shares of the visual tokens, averaged over the layers of the language model: a method before it and one
    inside it cost the same there, while the vision encoder's FLOPs are fixed.

    A model whose tokenizer has every word of the world as one token answers questions about the world with the
    likeliest token behind the question. Other models and data: greedy ``generate``, and the answer is right when it
    equals a given one but for case, punctuation and articles. Bad settings raise ``ValueError``.
    """

    model: str = "world-llava"
    data: str = "world"
    split: str = "test"
    limit: int | None = 400
    batch: int = 32
    device: str = "cpu"
    dtype: str = "auto"
    repeats: int = 5
    max_new_tokens: int = 16
    seed: int = 0
    stages: tuple[str, ...] = STAGES
    few: bool = False

    name: ClassVar[str] = "vlm"
    metric: ClassVar[str] = "accuracy"
    #: Whether questions are about videos.
    films: ClassVar[bool] = False
    axis: ClassVar[Axis] = Axis(
        "visual_share", "visual tokens", "visual tokens, mean over the language model's layers, % of the unreduced ones"
    )
    baselines: ClassVar[tuple[str, ...]] = ("random@projector", "uniform@projector", "pool", "resize@projector")
    #: By stage, what ``few`` leaves.
    well_known: ClassVar[Mapping[str, tuple[str, ...]]] = WELL_KNOWN
    #: Questions over which costs are averaged.
    probed: ClassVar[int] = PROBES

    _state: _Ready | None = field(default=None, init=False, repr=False)
    _costs: dict[tuple[Reducer, ...], _Cost] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for key, least in (("batch", 1), ("repeats", 0), ("max_new_tokens", 1), ("limit", 1)):
            value = getattr(self, key)
            if key == "limit" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{key} is an int >= {least}, not {value!r}")
        self.stages = tuple(dict.fromkeys(self.stages))
        if not self.stages or any(s not in STAGES for s in self.stages):
            raise ValueError(f"stages are among {', '.join(STAGES)}, not {', '.join(self.stages) or 'none'}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {self.dtype!r}")
        pick_device(self.device)

    # -- the task ------------------------------------------------------------------------------------------------------
    def settings(self) -> dict[str, Any]:
        """Everything that makes two rows comparable."""
        keys = ("model", "data", "split", "limit", "batch", "device", "dtype", "repeats", "max_new_tokens", "seed")
        return {key: getattr(self, key) for key in keys}

    def prepare(self) -> None:
        """Load model and questions and answer all without reduction; a second call does nothing.

        Raises what :func:`load_vlm` and :func:`load_questions` raise, ``TypeError`` for a model without adapter and
        ``ValueError`` when no question can be used.
        """
        if self._state is not None:
            return
        items, problems = self._asked()
        loaded = self._load()
        if describe(loaded.model).language is None:
            raise TypeError(f"{self.model} has no language model with visual tokens that an adapter knows")
        words = self._one_word(loaded)
        ready = _Ready(loaded, items, twin(loaded.model), words, problems=problems)
        if loaded.processor.tokenizer.pad_token is None:  # padding is masked, so any token will do
            loaded.processor.tokenizer.pad_token = loaded.processor.tokenizer.eos_token
        ready.baseline = self._answer(ready)
        good = [item for item in items if item.id in ready.baseline.said]
        for item in good[: self.probed]:
            question = self._question(ready, item, self._open(ready, item))
            ready.probes.append(replace(question, inputs=self._placed(question.inputs, loaded)))
            ready.visual.append(visual_columns(loaded.model, question))
        self._state = ready

    def _load(self) -> LoadedVlm:
        return load_vlm(self.model, self.device, self.dtype)

    def methods(self) -> list[str]:
        """Full names of the methods that the model can serve, stage by stage."""
        wanted = [name for stage in self.stages for name in self.well_known[stage]]
        return [name for name in self._served()[0] if not self.few or name in wanted]

    def _served(self) -> tuple[list[str], list[str]]:
        """Methods that can be put into the model, and why the others cannot."""
        ready = self._ready
        if ready.served is None:
            model = ready.loaded.model
            described = describe(model)
            good, refused = [], []
            for stage in self.stages:
                for kind in (get_class(n, stage) for n in described.methods(stage)):
                    if getattr(kind, "temporal", False) and not self.films:  # it would leave every picture alone
                        continue
                    name = full_name(kind, STAGES)
                    half = ":keep=0.5" if stage == "encoder" and hasattr(kind, "keep") else ""
                    try:
                        with patched(model, get_method(f"{kind.name}{half}", stage)), _quiet():
                            if half:  # some only show in a forward that they do not fit
                                self._prefill(model, ready.probes[0])
                        good.append(name)
                    except ValueError as error:
                        refused.append(f"{name} is left out: {error}")
            ready.served = good, refused
        return ready.served

    @property
    def _ready(self) -> _Ready:
        self.prepare()
        assert self._state is not None
        return self._state

    @property
    def loaded(self) -> LoadedVlm:
        """The model, unpatched between rows, and its processor."""
        return self._ready.loaded

    @property
    def problems(self) -> list[dict[str, str]]:
        """Questions that could not be used, with the reason."""
        found = {} if self._state is None else self._state.problems
        return [found[key] for key in sorted(found)]

    def spent(self, reducers: Sequence[Reducer]) -> float:
        """Visual tokens per question, averaged over the layers of the language model: what budgets are shares of."""
        ready, depth = self._ready, self._depth
        totals = [int(v.sum()) for v in ready.visual]
        if not reducers:
            return sum(totals) / len(totals)
        seen: list[tuple[int, ...]] = []
        few = FEW if len(set(totals)) == 1 else len(totals)
        with patched(ready.loaded.model, *reducers), _quiet():
            for question, visual in zip(ready.probes, ready.visual, strict=True):
                with record(ready.loaded.model, flops=False) as trace:
                    self._prefill(ready.loaded.model, question)
                seen.append(layers_of(trace.steps, visual, depth)[1])
                if len(seen) == few and len(set(seen)) == 1 and not _ragged(trace):
                    break
        return sum(map(sum, seen)) / len(seen) / depth

    def flops(self, reducers: Sequence[Reducer]) -> int:
        """FLOPs of vision encoder and prefill per question: the mean over the first :data:`PROBES`, each run alone."""
        return self._cost(tuple(reducers)).flops

    def measure(self, reducers: Sequence[Reducer]) -> dict[str, Any]:
        """One row. The model is as before afterwards, also after an error.

        Per question: ``encoder_tokens`` leave the vision encoder, ``visual_tokens`` enter the language model,
        ``layer_tokens`` are in each of its layers and ``mean_visual_tokens`` is their mean; ``flops`` and
        ``cache_bytes`` are of a prefill. ``accuracy`` and, with question types, ``accuracy_<type>`` come with their
        standard errors. ``agreement`` is the share of questions with the unreduced model's answer. ``first_token_s`` is
        the time of a prefill of one question, and ``speedup`` the stock model's time over it.
        """
        ready, reducers = self._ready, tuple(reducers)
        assert ready.baseline is not None
        cost, dense = self._cost(reducers), self._cost(())
        with patched(ready.loaded.model, *reducers) if reducers else nullcontext():
            # A trace of no module takes the notes of all batches and no steps.
            with record(nn.Identity(), flops=False) as trace:
                answers = self._answer(ready) if reducers else ready.baseline
            clock = self._clock(ready, bool(reducers)) if self.repeats else {}
        same = [answers.said[i] == said for i, said in ready.baseline.said.items() if i in answers.said]
        return {
            "encoder_tokens": cost.encoder,
            "visual_tokens": cost.layers[0],
            "layer_tokens": cost.layers,
            "mean_visual_tokens": sum(cost.layers) / len(cost.layers),
            "visual_share": sum(cost.layers) / sum(dense.layers),
            "flops": cost.flops,
            "gmacs": gmacs(cost.flops),
            **self._accuracies(answers),
            "agreement": sum(same) / len(same),
            "questions": len(answers.right),
            "problems": len(ready.problems),
            "cache_bytes": cost.cache,
            **clock,
            "notes": self._notes(ready, reducers, answers, [*cost.notes, *trace.notes]),
        }

    def _accuracies(self, answers: _Answers) -> dict[str, float]:
        kinds: dict[str, list[bool]] = {}
        for item in self._ready.items:
            if item.id in answers.right and item.type is not None:
                kinds.setdefault(f"accuracy_{item.type}", []).append(answers.right[item.id])
        out: dict[str, float] = {}
        for key, right in {"accuracy": list(answers.right.values()), **kinds}.items():
            share = sum(right) / len(right)
            out[key], out[f"{key}_stderr"] = share, math.sqrt(share * (1 - share) / len(right))
        return out

    def _notes(self, ready: _Ready, reducers: tuple[Reducer, ...], answers: _Answers, said: list[str]) -> list[str]:
        notes = list(dict.fromkeys(said))
        if answers.broken:
            they = "it counts" if answers.broken == 1 else "they count"
            notes.append(f"{counted(answers.broken, 'question')} gave NaN or infinite outputs; {they} as wrong")
        return notes if reducers else [*ready.notes, *notes, *self._served()[1]]

    # -- questions: what tasks on other inputs replace --------------------------------------------------------------
    def _asked(self) -> tuple[list[Item], dict[int, dict[str, str]]]:
        """The questions, and what is wrong with those that cannot be asked."""
        return load_questions(self.data, self.split, self.limit, self.seed), {}

    def _one_word(self, loaded: LoadedVlm) -> bool:
        """Whether an answer is the likeliest token behind the question."""
        return self.data == "world" and _knows_the_world(loaded.processor.tokenizer)

    def _open(self, ready: _Ready, item: Item) -> Any:
        """What ``item`` is about. Raises ``OSError`` or ``ValueError`` where it is missing or broken."""
        return item.open()

    def _question(self, ready: _Ready, item: Item, opened: Any) -> Question:
        return ask(ready.loaded.processor, [opened], self._prompt(ready, item))

    def _groups(self, ready: _Ready) -> Iterable[list[Item]]:
        """Questions that go through the model together."""
        return (ready.items[i : i + self.batch] for i in range(0, len(ready.items), self.batch))

    def _inputs(self, ready: _Ready, batch: _Batch) -> dict[str, Any]:
        if batch.remake is not None:
            return batch.remake(ready.loaded.model)
        return self._placed(batch.inputs, ready.loaded)

    def _read(self, item: Item, text: str) -> tuple[str, bool]:
        """An answer as answers are compared with each other, and whether it is right."""
        return text, matches(text, item.answers)

    def _prompt(self, ready: _Ready, item: Item) -> str:
        if ready.words:
            return f"{ready.loaded.processor.image_token} {item.text}"
        return f"{item.text.capitalize()}? Answer with one word." if self.data == "world" else item.text

    def _batches(self, ready: _Ready) -> Iterator[_Batch]:
        if ready.kept is not None:
            yield from ready.kept
            return
        kept: list[_Batch] | None = []
        size = 0
        for group in self._groups(ready):
            for made in self._made(ready, group):
                size += sum(v.numel() * v.element_size() for v in made.inputs.values() if isinstance(v, Tensor))
                kept = None if kept is None or size > CACHE else [*kept, made]
                yield made
        ready.kept = kept

    def _made(self, ready: _Ready, items: list[Item]) -> Iterator[_Batch]:
        """Inputs of ``items``, in one batch where the processor can; those that cannot be used become problems."""
        opened = []
        for item in items:
            try:
                opened.append((item, self._open(ready, item)))
            except (OSError, ValueError) as error:
                self._problem(ready, item, error)
        for part in self._alike(opened):
            yield from self._batch_of(ready, part)

    def _alike(self, opened: list[tuple[Item, Any]]) -> Iterable[list[tuple[Item, Any]]]:
        """Parts that processors can put into one batch."""
        return [opened] if opened else []

    def _batch_of(self, ready: _Ready, opened: list[tuple[Item, Any]]) -> Iterator[_Batch]:
        if not ready.alone and len(opened) > 1:
            try:
                yield self._together(ready, opened)
                return
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            reason = ""
        broken = len(ready.problems)
        for item, one in opened:
            try:
                question = self._question(ready, item, one)
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                self._problem(ready, item, error)
                continue
            yield _Batch([item], question.inputs, question.remake)
        if reason and len(ready.problems) == broken:  # no single question is to blame
            ready.alone = True
            ready.notes.append(f"questions are asked one at a time: the processor makes no batches of them ({reason})")

    def _together(self, ready: _Ready, opened: Sequence[tuple[Item, Any]]) -> _Batch:
        processor = ready.loaded.processor
        texts = [prompt_text(processor, 1, self._prompt(ready, item)) for item, _ in opened]
        settings: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        bos = processor.tokenizer.bos_token
        if bos and texts[0].startswith(bos):  # else it would be there twice
            settings["add_special_tokens"] = False
        made = dict(processor(images=[[as_rgb(picture)] for _, picture in opened], text=texts, **settings))
        made.pop("labels", None)
        return _Batch([item for item, _ in opened], made)

    def _problem(self, ready: _Ready, item: Item, error: Exception) -> None:
        path = str(item.image) if isinstance(item.image, Path) else f"question {item.id}"
        reason = str(error).removeprefix(f"{path}: ").splitlines()[0] if str(error) else type(error).__name__
        ready.problems[item.id] = {"path": path, "reason": reason}

    # -- running -------------------------------------------------------------------------------------------------------
    def _placed(self, inputs: dict[str, Any], loaded: LoadedVlm) -> dict[str, Any]:
        """``inputs`` on the model's device, pixels in its dtype."""
        return {
            k: v.to(loaded.device, loaded.dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v
            for k, v in inputs.items()
        }

    def _answer(self, ready: _Ready) -> _Answers:
        """Answers of the model as it is now, patched or not."""
        out = _Answers({}, {}, 0)
        broken = 0
        model: Any = ready.loaded.model
        tokenizer = ready.loaded.processor.tokenizer
        for batch in self._batches(ready):
            with torch.inference_mode():
                inputs = self._inputs(ready, batch)
                if ready.words:
                    logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
                    finite = logits.isfinite().all(-1).tolist()
                    ids = logits.argmax(-1).tolist()  # rows of the table without a word have a number
                    said = [word or f"<{i}>" for i, word in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)]
                else:
                    made = _generate(model, inputs, self.max_new_tokens)[:, inputs["input_ids"].shape[1] :]
                    finite = [True] * len(batch.items)
                    said = tokenizer.batch_decode(made, skip_special_tokens=True)
            for item, text, good in zip(batch.items, said, finite, strict=True):
                broken += not good
                said_so, right = self._read(item, text) if good else ("", False)
                out.said[item.id], out.right[item.id] = said_so, right
        if not out.said:
            listed = [ready.problems[key] for key in sorted(ready.problems)][:5]
            first = "".join(f"\n  {p['path']}: {p['reason']}" for p in listed)
            raise ValueError(f"none of the {counted(len(ready.items), 'question')} of {self.data} can be used:{first}")
        return out._replace(broken=broken)

    @property
    def _depth(self) -> int:
        return len(describe(self._ready.stock).language.layers)

    def _prefill(self, model: Any, question: Question) -> Any:
        """The cache behind the prompt, when the logits of the first new token are there, as ``generate`` does it."""
        with torch.inference_mode():
            inputs = question.inputs if question.remake is None else question.remake(model)
            return cache_of(model(**inputs, use_cache=True, logits_to_keep=1))

    def _cost(self, reducers: tuple[Reducer, ...]) -> _Cost:
        if reducers not in self._costs:
            self._costs[reducers] = self._count(reducers)
        return self._costs[reducers]

    def _count(self, reducers: tuple[Reducer, ...]) -> _Cost:
        ready, depth = self._ready, self._depth
        model = ready.loaded.model
        encoders: list[int | None] = []
        layers: list[tuple[int, ...]] = []
        flops, cache = [], []
        notes: list[str] = []
        with patched(model, *reducers) if reducers else nullcontext():
            for question, visual in zip(ready.probes, ready.visual, strict=True):
                with record(model) as trace:
                    made = self._prefill(model, question)
                flops.append(trace.flops)
                cache.append(cache_bytes(made))
                layers.append(layers_of(trace.steps, visual, depth)[1])
                encoders.append(patches_left(model, question, patches_of(model, question), trace.steps))
                notes += trace.notes
        n = len(layers)
        if (
            len({tuple(row[i] / row[0] for i in range(depth)) for row in layers if row[0]}) > 1
            or len({row[0] / int(v.sum()) for row, v in zip(layers, ready.visual, strict=True)}) > 1
        ):
            notes.append(
                f"what is kept depends on the question: tokens, FLOPs and cache are means over {n} questions, each run "
                "alone; in a batch all are padded to the longest"
            )
        known = [e for e in encoders if e is not None]
        return _Cost(
            _whole(sum(known) / n) if len(known) == n else None,
            [_whole(sum(column) / n) for column in zip(*layers, strict=True)],
            round(sum(flops) / n),
            _whole(sum(cache) / n),
            list(dict.fromkeys(notes)),
        )

    def _clock(self, ready: _Ready, reduced: bool) -> dict[str, float | None]:
        """Time to the first token against the stock model, and the reduction's share of it."""
        question, model, device = ready.probes[0], ready.loaded.model, ready.loaded.device
        with _quiet(), fused_attention(device):
            times = interleaved(
                {"stock": lambda: self._prefill(ready.stock, question), "this": lambda: self._prefill(model, question)},
                self.repeats, device=device,
            )  # fmt: skip
            share: float | None = 0.0
            if reduced and device.type == "cpu":
                own = total = 0.0
                for _ in range(min(3, self.repeats)):
                    began = time.perf_counter()
                    with record(model, flops=False, timing=True) as trace:
                        self._prefill(model, question)
                    total += time.perf_counter() - began
                    own += trace.seconds
                share = own / total
            elif reduced:
                share = None  # kernels run behind the CPU's clock
        return {
            "first_token_s": times["this"].median,
            **speed_keys(times["stock"].against(times["this"]) if reduced else ITSELF),
            "reduction_share": share,
        }


# -- helpers -----------------------------------------------------------------------------------------------------------
class _quiet(warnings.catch_warnings):  # noqa: N801 - used like a function
    """Warnings are silent inside: the notes were taken already."""

    def __enter__(self) -> Any:
        out = super().__enter__()
        warnings.simplefilter("ignore")
        return out


def _ragged(trace: Trace) -> bool:
    return any(plan.validity() is not None for plan in trace.plans)


def _knows_the_world(tokenizer: Any) -> bool:
    """Whether every word of the world is one token."""
    from tokenreduce.zoo.world import WORDS

    known = tokenizer.get_vocab()
    return all(word in known for word in WORDS)
