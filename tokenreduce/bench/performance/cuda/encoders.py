"""Rows of encoders: a patched model beside the stock one and the same blocks on sliced tokens, in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import tokenreduce as tr
from tokenreduce.adapters.encoders.sizes import sizes_as
from tokenreduce.bench.performance.cuda.cases import Encoder
from tokenreduce.bench.performance.cuda.clock import attention_kernels, captured, syncs, timed, told
from tokenreduce.bench.performance.cut import Sliced
from tokenreduce.bench.performance.prefills import shell
from tokenreduce.measure.memory import peak_bytes

__all__ = ["Encoders"]


@dataclass
class Encoders:
    """Measures one :class:`Encoder` at a time; the stock model stays until another one is asked for.

    ``cuda`` is ``torch.cuda`` or what stands for it in a dry run, ``backend`` that of ``torch.compile``, ``seconds``
    the time for the rounds of one row.
    """

    device: str
    cuda: Any = torch.cuda
    backend: str = "inductor"
    seconds: float = 1.0
    _stock: tuple[Any, Any] = field(default=(None, None), repr=False)

    def __call__(self, case: Encoder) -> dict[str, Any]:
        """The facts of a row, seconds in ``times``; ``share`` is sliced over patched, the other ratios stock over."""
        stock, x = self._model(case), self._images(case)
        with torch.inference_mode(case.form != "compiled"), torch.no_grad():
            with sizes_as("key" if case.sizes == "key" else "mask"):
                patched = tr.patch(shell(stock), case.method)
            with tr.record(patched) as trace:
                patched(x[:1])
            with tr.record(stock) as before:
                stock(x[:1])
            (reducer,) = tr.describe(patched).active
            sliced = Sliced(stock, trace.tokens, reducer.acting_position()).eval()
            facts: dict[str, Any] = {"left": trace.tokens[-1], "flops": round(before.flops / trace.flops, 4)}
            if case.form == "eager":
                facts |= self._seen(stock, patched, x)
            models = {"stock": stock, "patched": patched, "sliced": sliced}
            functions, made = self._run(case, {name: partial(model, x) for name, model in models.items()}, models)
            return {**facts, **made, **_ratios(timed(functions, self.seconds, self.device))}

    def _model(self, case: Encoder) -> Any:
        import timm

        kept, model = self._stock
        if kept != (case.model, case.settings):
            self._stock = (None, None)
            torch.manual_seed(0)
            settings: dict[str, Any] = dict(case.settings)
            model = timm.create_model(case.model, **settings).eval().to(self.device, torch.bfloat16)
            self._stock = ((case.model, case.settings), model)
        return model

    def _images(self, case: Encoder) -> Any:
        size = self._stock[1].patch_embed.img_size
        return torch.randn(case.batch, 3, *size, device=self.device, dtype=torch.bfloat16)

    def _seen(self, stock: Any, patched: Any, x: Any) -> dict[str, Any]:
        """What does not depend on the clock: peaks above the weights, waits for the device, kernels of attention."""
        peaks = [peak_bytes(partial(model, x), self.device) for model in (stock, patched)]
        return {
            "peak": peaks, "syncs": syncs(partial(patched, x), self.device),
            "kernels": [attention_kernels(model, partial(model, x)) for model in (stock, patched)],
        }  # fmt: skip

    def _run(
        self, case: Encoder, functions: dict[str, Callable[[], Any]], models: dict[str, Any]
    ) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
        """The functions in the form of the case, and what making them took."""
        if case.form == "graphs":
            return {name: captured(function, self.cuda) for name, function in functions.items()}, {}
        if case.form == "eager":
            return functions, {}
        torch.compiler.reset()
        made: dict[str, Callable[[], Any]] = {}
        spent = {}
        for name, model in models.items():
            made[name] = partial(torch.compile(model, backend=self.backend), *functions[name].args)  # type: ignore[attr-defined]
            began = time.perf_counter()
            made[name]()
            spent[name] = round(time.perf_counter() - began, 2)
        return made, {"compiling": spent}


def _ratios(times: dict[str, Any]) -> dict[str, Any]:
    stock, patched, sliced = times["stock"], times["patched"], times["sliced"]
    return {
        "times": {name: one.median for name, one in times.items()}, "speedup": told(stock.against(patched)),
        "possible": told(stock.against(sliced)), "share": told(sliced.against(patched)),
    }  # fmt: skip
