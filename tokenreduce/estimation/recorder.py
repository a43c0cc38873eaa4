"""Writes down every operator of a forward, with the shapes that it would have in the true model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tokenreduce.estimation.ops import PREFILL, PROJECTOR, TOWER, Op, kind_of
from tokenreduce.estimation.scale import Scale

__all__ = ["Recorder", "Sites"]

#: Operators of aten that neither read nor write tensors, though their schema does not say so.
_FREE = {
    "_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided",
    "is_same_size", "sym_size", "sym_numel", "set_", "prim",
}  # fmt: skip


class Sites:
    """Modules of a model by part: ``towers`` with ``blocks``, the ``projector`` (which may be a part of a tower), the
    language model ``text`` with ``layers`` and the ``head`` behind it. Without a language model everything is the
    tower's, with one what is in no other part is the projector's."""

    def __init__(
        self,
        towers: Sequence[nn.Module],
        blocks: Sequence[nn.Module],
        text: nn.Module | None = None,
        layers: Sequence[nn.Module] = (),
        head: nn.Module | None = None,
        projector: nn.Module | None = None,
    ) -> None:
        self.towers, self.blocks, self.projector = towers, blocks, projector
        self.text, self.layers, self.head = text, layers, head


class Recorder:
    """``with recorder.running(sites): model(...)`` fills :attr:`ops`. Fused attention is not computed: its output is
    the mean value, so that long prompts take no time; nothing here depends on what values are."""

    def __init__(self, scale: Scale, batch: int = 1) -> None:
        self.scale, self.batch = scale, batch
        self.ops: list[Op] = []
        self.part, self.layer, self._own, self.paused = TOWER, -1, 0, False
        self.prefill = PREFILL

    @contextmanager
    def own(self) -> Iterator[None]:
        """What runs inside belongs to making and applying plans."""
        self._own += 1
        try:
            yield
        finally:
            self._own -= 1

    @contextmanager
    def running(self, sites: Sites) -> Iterator[None]:
        with ExitStack() as stack:
            for handle in self._hooks(sites):
                stack.callback(handle.remove)
            self.part = TOWER if sites.text is None else PROJECTOR
            stack.enter_context(_Attention(self))
            stack.enter_context(_Everything(self))
            yield

    def _hooks(self, sites: Sites) -> Iterator[Any]:
        if sites.text is not None:
            for tower in sites.towers:
                yield from self._in_part(tower, lambda: TOWER)
            yield from self._in_part(sites.projector, lambda: PROJECTOR)
        for module in (sites.text, sites.head):
            yield from self._in_part(module, lambda: self.prefill)
        for group in (sites.blocks, sites.layers):
            for i, block in enumerate(group):
                yield from self._in_layer(block, i)

    def _in_part(self, module: nn.Module | None, name: Callable[[], str]) -> Iterator[Any]:
        """What runs in ``module`` belongs to the part that ``name`` says."""
        before: list[str] = []

        def enter(*_: Any) -> None:
            before.append(self.part)
            self.part = name()

        def leave(*_: Any) -> None:
            self.part = before.pop()

        if module is not None:
            yield module.register_forward_pre_hook(enter)
            yield module.register_forward_hook(leave, always_call=True)

    def _in_layer(self, module: nn.Module, i: int) -> Iterator[Any]:
        """What runs in ``module`` belongs to layer ``i``."""

        def enter(*_: Any) -> None:
            self.layer = i

        def leave(*_: Any) -> None:
            self.layer = -1

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave, always_call=True)

    def add(self, kind: str, **more: Any) -> None:
        if not self.paused:
            self.ops.append(Op(kind, self.part, layer=self.layer, own=self._own > 0, **more))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
        """q (..., H, Nq, d), k and v (..., Hkv, Nk, d), any number of samples or windows in front."""
        shapes = [self.scale.shape(t.shape, self.part) for t in (q, k, v)]
        queries, keys = shapes[0][-2], shapes[1][-2]
        many = math.prod(shapes[0][:-2])
        flops = 2.0 * many * queries * keys * (shapes[0][-1] + shapes[2][-1])
        moved = math.prod(shapes[0]) * 2 + math.prod(shapes[1]) + math.prod(shapes[2])
        self.add(
            "attention", flops=flops / self.batch, moved=moved / self.batch, rows=queries, inner=keys,
            outer=shapes[0][-1], causal=causal and queries > 1,
        )  # fmt: skip

    def matmul(self, out: Tensor, operands: list[Tensor], name: str) -> None:
        known = [t for t in operands if self._weight(t) is not None]
        if known:
            weight = known[-1]
            narrow, true = self._weight(weight) or (1, 1)
            share = weight.numel() / narrow  # of a parameter that is used in pieces
            channels = out.shape[1] if name.endswith("convolution") else out.shape[-1]
            rows = out.numel() / max(channels, 1)
            wide = true * share
            outer = float(self.scale.width(channels))
            inner = wide / max(outer, 1.0)
            rows /= self.batch
            self.add(
                "matmul", flops=2.0 * rows * wide, moved=rows * (inner + outer), weights=wide, rows=rows, inner=inner,
                outer=outer,
            )  # fmt: skip
            return
        a, b = operands[-2:]
        left, right = self.scale.shape(a.shape, self.part), self.scale.shape(b.shape, self.part)
        many = math.prod(left[:-2]) if len(left) > 2 else 1.0
        inner, outer = left[-1], right[-1]
        rows = left[-2] if len(left) > 1 else 1.0
        flops = 2.0 * many * rows * inner * outer
        moved = math.prod(left) + math.prod(right) + many * rows * outer
        self.add(
            "matmul", flops=flops / self.batch, moved=moved / self.batch, rows=many * rows / self.batch, inner=inner,
            outer=outer,
        )  # fmt: skip

    def _weight(self, tensor: Tensor) -> tuple[int, int] | None:
        if tensor.dim() < 2:
            return None
        return self.scale.weights.get(tensor.untyped_storage().data_ptr())

    def elements(self, values: Any) -> float:
        if isinstance(values, Tensor):
            return self.scale.elements(values.shape, self.part) / self.batch
        if isinstance(values, list | tuple):
            return sum(map(self.elements, values))
        return 0.0


class _Attention(TorchFunctionMode):
    """Notes fused attention and leaves it out."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = given["query"], given["key"], given["value"]
        self.recorder.attention(q, k, v, bool(given.get("is_causal", False)))
        self.recorder.paused = True
        try:
            mean = v.mean(-2, keepdim=True)
            mean = mean.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
            return mean.expand(*q.shape[:-1], v.shape[-1]).contiguous()
        finally:
            self.recorder.paused = False


class _Everything(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if self.recorder.paused or name in _FREE or _is_view(func):
            return out
        recorder, kind = self.recorder, kind_of(name)
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if kind == "matmul":
            recorder.matmul(out, tensors[:2] if name.endswith("convolution") else tensors, name)
        else:
            read = tensors[1:] if kind == "move" else tensors  # what an index picks from is not read whole
            writes = recorder.elements(out)
            reads = recorder.elements(read)
            recorder.add(kind, moved=writes + (max(writes, reads) if kind == "move" else reads))
        return out


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
