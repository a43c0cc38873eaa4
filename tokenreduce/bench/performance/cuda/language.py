"""Rows of image language models: prefill, decode step and memory, beside the stock model in the same rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_as, cache_of
from tokenreduce.bench.performance.cuda.cases import Language, shape_of
from tokenreduce.bench.performance.cuda.clock import captured, syncs, timed, told
from tokenreduce.bench.performance.prefills import shell
from tokenreduce.bench.performance.shapes import build, build_packed, packed_prompt, prompt
from tokenreduce.measure.generation import cache_bytes
from tokenreduce.measure.memory import peak_bytes
from tokenreduce.measure.timing import Timing, interleaved

__all__ = ["Languages"]

#: Tokens of a round of decoding.
STEPS = 8


@dataclass
class Languages:
    """Measures one :class:`Language` at a time; the stock model stays until another shape is asked for. Arguments are
    those of :class:`~tokenreduce.bench.performance.cuda.encoders.Encoders`."""

    device: str
    cuda: Any = torch.cuda
    backend: str = "inductor"
    seconds: float = 2.0
    _stock: tuple[str, Any, dict[str, Tensor]] = field(default=("", None, {}), repr=False)

    def __call__(self, case: Language) -> dict[str, Any]:
        """The facts of a row, seconds in ``times``; ratios are stock over patched."""
        stock, given = self._model(case.shape)
        patched = tr.patch(shell(stock), tr.get_method(f"{case.method}:keep={case.keep}", case.stage))
        measure = {"eager": self._eager, "graphs": self._graphs, "compiled": self._compiled}[case.form]
        with torch.no_grad():
            return measure(stock, patched, given, case.stage)

    def _model(self, name: str) -> tuple[Any, dict[str, Tensor]]:
        if self._stock[0] != name:
            self._stock = ("", None, {})  # the memory of the last one is needed
            if torch.device(self.device).type == "cuda":
                torch.cuda.empty_cache()
            shape, packed = shape_of(name)
            how = {"device": self.device, "dtype": torch.bfloat16}
            model = build_packed(shape, **how) if packed else build(shape, **how)  # type: ignore[arg-type]
            self._stock = (name, model, packed_prompt(shape, **how) if packed else prompt(shape, **how))  # type: ignore[arg-type]
        return self._stock[1:]

    def _eager(self, stock: Any, patched: Any, given: dict[str, Tensor], stage: str) -> dict[str, Any]:
        caches = {"stock": _prefill(stock, given), "patched": _prefill(patched, given)}
        text = int((given["input_ids"][0] != stock.config.image_token_id).sum())
        layers = [layer.keys.shape[-2] - text for layer in caches["patched"].layers]
        held = [cache_bytes(cache) for cache in caches.values()]  # before they grow
        calls: dict[str, Callable[[], Any]] = {
            "stock": partial(_prefill, stock, given), "patched": partial(_prefill, patched, given),
        }  # fmt: skip
        if stage == "projector":
            calls["short"] = partial(_short, stock, given, layers[0], text)
        first = timed(calls, self.seconds, self.device)
        models = {"stock": stock, "patched": patched}
        steps = self._decode(models, caches, given)
        facts = {
            "visual": [layers[0], round(sum(layers) / len(layers), 1)],
            "kv": held,
            "peak": [peak_bytes(calls[name], self.device) for name in models],
            "syncs": [syncs(calls[name], self.device) for name in models],
            "times": {"prefill": [first[n].median for n in models], "step": [steps[n].median for n in models]},
            "speedup": told(first["stock"].against(first["patched"])),
            "step": told(steps["stock"].against(steps["patched"])),
        }
        if "short" in first:
            facts["possible"] = told(first["stock"].against(first["short"]))
        return facts

    def _decode(self, models: dict[str, Any], caches: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Timing]:
        """Seconds of a decode step; caches grow from round to round, all by as much."""
        token, many = given["input_ids"][:, -1:], STEPS if self.seconds else 1

        def steps(name: str) -> None:
            for _ in range(many):
                _step(models[name], token, caches[name])

        rounds = min(7, max(1, round(self.seconds * 3)))
        got = interleaved({n: partial(steps, n) for n in models}, rounds, min(rounds - 1, 1), self.device)
        return {n: Timing(n, tuple(t / many for t in got[n].times)) for n in models}

    def _graphs(self, stock: Any, patched: Any, given: dict[str, Tensor], stage: str) -> dict[str, Any]:
        """A decode step behind the prompt: the graph that is replayed computes the same step again."""
        token = given["input_ids"][:, -1:]
        functions = {}
        for name, model in {"stock": stock, "patched": patched}.items():
            cache = _prefill(model, given)
            functions[name] = captured(partial(_step, model, token, cache), self.cuda)
        times = timed(functions, self.seconds, self.device)
        return {
            "times": {"step": [times[n].median for n in functions]},
            "step": told(times["stock"].against(times["patched"])),
        }  # fmt: skip

    def _compiled(self, stock: Any, patched: Any, given: dict[str, Tensor], stage: str) -> dict[str, Any]:
        """Prefills whose decoder layers are compiled one by one, which is one graph for all; no cache is kept, since a
        layer's number in it would be a graph of its own."""
        torch.compiler.reset()
        models = {"stock": shell(stock), "patched": patched}
        calls = {}
        for name, model in models.items():
            for layer in model.model.language_model.layers:
                layer.compile(backend=self.backend)
            calls[name] = partial(model, **given, use_cache=False, logits_to_keep=1)
        times = timed(calls, self.seconds, self.device)
        return {
            "times": {"prefill": [times[n].median for n in calls]},
            "speedup": told(times["stock"].against(times["patched"])),
        }  # fmt: skip


def _prefill(model: Any, given: dict[str, Tensor]) -> Any:
    return cache_of(model(**given, use_cache=True, logits_to_keep=1))


def _step(model: Any, token: Tensor, cache: Any) -> Any:
    return model(input_ids=token, use_cache=True, **cache_as(model, cache)).logits


def _short(model: Any, given: dict[str, Tensor], visual: int, text: int) -> Any:
    """A stock prefill of as many tokens as are left, behind the tower on the whole image: what no method that acts
    before the language model can be faster than."""
    inner = model.model
    grid = {k: v for k, v in given.items() if k == "image_grid_thw"}
    inner.get_image_features(given["pixel_values"], **grid)
    x = inner.get_input_embeddings()(given["input_ids"][:, : visual + text])
    return model.lm_head(inner.language_model(inputs_embeds=x, use_cache=True).last_hidden_state[:, -1:])
