"""What can act where in a model, as a table and as facts."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from typing import Any

from tokenreduce.adapters.across_frames import why_not_frames
from tokenreduce.adapters.encoders.tower import Tower
from tokenreduce.adapters.finding import denoisers_in, language_in, module_of, stages_of, towers_in, unsupported
from tokenreduce.core.reducer import Reducer

__all__ = ["Description", "describe"]

#: What the code behind a tower is given, see :mod:`tokenreduce.adapters.encoders.readers`.
_HANDED = {
    "all": "all are handed out again, merged ones as copies (what reads them counts on that)",
    "keys": "a decoder attends to them: merged ones are handed out as copies, dropped ones not",
}


@dataclass(frozen=True)
class Description:
    """What can act where in a model. ``print`` shows a table; ``towers`` has the facts."""

    model: str
    towers: tuple[Tower, ...]
    active: tuple[Reducer, ...]
    language: Any = None
    #: Decoder layers of a patched model with the steps that act there, where asked for.
    layers: tuple[Any, ...] = ()
    #: What ``auto:`` stood for, and why.
    note: str = ""
    denoisers: tuple[Any, ...] = ()
    #: Whether frames of a video run through one tower as a batch, so that they can merge in there.
    films: bool = False
    #: Whether one of the last two decoder layers has a sliding window.
    slides: bool = False

    @property
    def stages(self) -> tuple[str, ...]:
        if self.denoisers:
            return ("diffusion",)
        return stages_of(self.towers, self.language)

    def methods(self, stage: str | None = None) -> list[str]:
        """Methods of ``stage`` (by default the first that the model has) that its sites can serve, with settings that
        fit: no block or layer that is not there, and tables where one is needed."""
        from tokenreduce.core.registry import get_class, list_methods

        stage = self.stages[0] if stage is None else stage
        if stage not in self.stages or (self.language is not None and not self.language.served):
            return []
        given: list[Any] = [t.evidence for t in self.towers]
        if stage == "diffusion":
            return list_methods(stage=stage)
        if stage != "encoder":
            given = [self.language.projector if stage == "projector" else self.language.evidence]
        kinds = {name: get_class(name, stage) for name in list_methods(stage=stage)}
        return [
            name for name, kind in kinds.items()
            if all(need in evidence for evidence in given for need in kind.needs)
            and (self._fits_towers(kind) if stage == "encoder" else not (kind.unwindowed and self.slides))
        ]  # fmt: skip

    def _fits_towers(self, method: type[Reducer]) -> bool:
        """Whether the towers have the blocks of an encoder method, in front of those that a language model reads where
        it sets tokens aside; see frames as a batch for one that merges them; and take the images of one that makes them
        smaller, of which no prompt has placeholders for all patches."""
        last = min((len(t.blocks) - 1 for t in self.towers), default=-1)
        if method.rebuilds and self.language is not None and self.language.how == "table":
            last = min(last, self.language.vision.feature)
        if method.first_block > last:
            return False
        if method.merges_frames:
            return self.films
        shrinks = method.position == "input" and "pixels" not in method.needs
        return not shrinks or (self.language is None and all(t.resizes for t in self.towers))

    def __str__(self) -> str:
        lines = [self.model]
        for t in self.towers:
            where = t.name or "(the model itself)"
            sides = "x".join(str(side) for side in t.grid or ())
            grid = "set by the image" if t.grid is None else f"{t.prefix} + {sides} = {t.tokens}"
            lines += [
                f"  encoder  {where}: {t.family}, {len(t.blocks)} layers, tokens {grid}",
                f"           class token: {'yes' if t.cls else 'no'}; evidence: {', '.join(t.evidence)}"
                + (f"; keys are {t.rope}-RoPE" if t.rope else ""),
            ]
            if t.hands != "own":
                lines.append(f"           its tokens: {_HANDED['keys' if t.hands == 'keys' else 'all']}")
        if self.language is not None:
            where = self.language.name or "(the model itself)"
            lines += [
                f"  projector {where}: visual tokens of every image at the entry of the language model; "
                f"evidence: {', '.join(('features', *self.language.projector))}",
            ]
            if "language" in self.language.stages:
                lines.append(
                    f"  language {where}: {self.language.family}, {len(self.language.layers)} layers; "
                    f"evidence: {', '.join(self.language.evidence)}"
                )
            if "cache" in self.language.stages:
                lines.append(
                    f"  cache    {where}: keys and values of every layer, thinned behind the prompt or in decode"
                )
            lines += [f"  note     {where}: {limit}" for limit in self.language.limits]
        for d in self.denoisers:
            levels = ", ".join(f"{blocks} at 1/{level}" for level, blocks in d.levels().items())
            lines.append(f"  diffusion {d.name or '(the model itself)'}: {d.family}, transformer blocks: {levels}")
        for stage in self.stages:
            lines.append(f"  methods  {stage}: {', '.join(self.methods(stage))}")
        lines.append(f"  active   {' + '.join(r.spec() for r in self.active) or 'none'}")
        lines += [f"  chosen   {self.note}"] if self.note else []
        lines += [f"  steps    {site}" for site in self.layers]
        return "\n".join(lines)

    __repr__ = __str__


def describe(model: Any, *, detail: bool = False) -> Description:
    """The sites of ``model``; with ``detail``, what happens at each decoder layer of a patched one, in order. Raises
    ``TypeError`` for a model without adapter."""
    from tokenreduce.core.undo import note_of, reducers_of

    model = module_of(model)
    if denoisers := denoisers_in(model):
        return Description(type(model).__name__, (), reducers_of(model), note=note_of(model), denoisers=denoisers)
    language = language_in(model)
    found = towers_in(model, language)
    towers, films = tuple(t for _, t in found), why_not_frames(model, found, language, merging=True) is None
    if not towers and language is None:
        raise unsupported(model)
    layers: tuple[Any, ...] = ()
    if detail and language is not None:
        layers = tuple(importlib.import_module("tokenreduce.adapters.language.site").sites_in(language.layers))
    slides = language is not None and language.served and _slides(language)
    return Description(
        type(model).__name__, towers, reducers_of(model), language, layers, note_of(model), films=films, slides=slides
    )  # fmt: skip


def _slides(language: Any) -> bool:
    """Whether one of the last two decoder layers of ``language`` has a sliding window."""
    if "language" not in language.stages:
        return False
    window = importlib.import_module("tokenreduce.adapters.language.decoders").window_of
    depth = len(language.layers)
    with contextlib.suppress(ValueError):  # attention of another kind, for which every method says so
        return any(window(language.text.config, i) is not None for i in range(max(depth - 2, 0), depth))
    return False
