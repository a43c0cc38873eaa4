"""Models that the page shows, loaded once, and what visitors share: the machine."""

from __future__ import annotations

import threading
from typing import Any

from tokenreduce.bench.models import Loaded, load_model
from tokenreduce.bench.resolve import resolve
from tokenreduce.bench.safely import safetensors_only
from tokenreduce.bench.turns import Turns
from tokenreduce.bench.vlms import EMBEDDED as LANGUAGE
from tokenreduce.bench.vlms import LoadedVlm, load_vlm
from tokenreduce.patching import describe, twin
from tokenreduce.zoo import weights

__all__ = ["Store"]


class Store:
    """The models of one page.

    Args:
        model: a model of the user's own, beside the embedded ones: a timm name, a Hub id or a folder.
        device: where models run; ``auto`` is CUDA where there is one.
        data: labelled images of the user's own, for the benchmark of ``model``.
        classes: class names of ``model``, see :func:`~tokenreduce.bench.models.load_model`.

    Models are only ever patched as copies that share their weights (:func:`tokenreduce.patching.twin`), so visitors
    cannot get into each other's way. ``turn`` is held by whoever computes, so that clocks are not disturbed; sweeps
    stand in ``line``, one after the other, and have the turn row by row.
    """

    def __init__(
        self, model: str | None = None, device: str = "cpu", data: str | None = None, classes: str | None = None
    ) -> None:
        self.device, self.data, self.classes = device, data, classes
        self.turn, self.line = Turns(), Turns()
        self._loading = threading.Lock()
        self._loaded: dict[str, Any] = {}
        there = weights.learned()  # the others are for whoever trains them
        self.images: list[str] = [name for name in ("world-vit", "digits-vit", "world-vit-2") if name in there]
        self.languages = sorted((name for name in LANGUAGE if name in there), reverse=True)  # the second world first
        self.own: str | None = None
        if model is not None:
            with safetensors_only():
                kind, self.own = resolve(model)
            names = self.images if kind == "image" else self.languages
            if self.own in names:
                names.remove(self.own)
            names.insert(0, self.own)

    def image(self, name: str) -> Loaded:
        """An image model by one of :attr:`images`. Raises what :func:`load_model` raises, ``ValueError`` for others."""
        classes = self.classes if name == self.own else None
        return self._get(name, self.images, lambda: load_model(name, self.device, classes))

    def language(self, name: str) -> LoadedVlm:
        """A language model by one of :attr:`languages`. Raises what :func:`load_vlm` raises, and ``ValueError``."""
        return self._get(name, self.languages, lambda: _language(name, self.device))

    def copy(self, name: str) -> LoadedVlm:
        """:meth:`language` as a copy that may be patched; weights are shared."""
        loaded = self.language(name)
        return LoadedVlm(loaded.name, twin(loaded.model), loaded.processor)

    def methods(self, name: str) -> dict[str, list[str]]:
        """What a model can do, by stage in the order of the forward pass."""
        loaded = self.language(name) if name in self.languages else self.image(name)
        found = describe(loaded.model)
        return {s: found.methods(s) for s in ("encoder", "projector", "language") if s in found.stages}

    def _get(self, name: str, known: list[str], load: Any) -> Any:
        if name not in known:  # names come from the browser: nothing else is ever loaded
            raise ValueError(f"{name!r} is not on this page; there are: {', '.join(known) or 'none'}")
        with self._loading:
            if name not in self._loaded:
                with safetensors_only():
                    self._loaded[name] = load()
            return self._loaded[name]


def _language(name: str, device: str) -> LoadedVlm:
    if name not in LANGUAGE:
        return load_vlm(name, device)
    from tokenreduce import zoo

    made = zoo.load(name, device=device)
    return LoadedVlm(name, made.model, made.processor)
