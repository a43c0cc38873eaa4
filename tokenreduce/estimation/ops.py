"""Operators as a device sees them."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["DECODE", "KINDS", "PARTS", "PREFILL", "PROJECTOR", "TOWER", "Op", "kind_of"]

TOWER, PROJECTOR, PREFILL, DECODE = PARTS = ("vision tower", "projector", "prefill", "decode per token")
#: Classes of operators that run at different rates.
KINDS = ("matmul", "attention", "plain", "norm", "act", "softmax", "move", "sort")

_NAMES = {
    "matmul": ("mm", "addmm", "bmm", "baddbmm", "convolution", "_convolution", "addbmm"),
    "sort": ("topk", "sort", "argsort", "kthvalue", "unique", "_unique2", "unique_consecutive", "nonzero"),
    "norm": ("native_layer_norm", "native_group_norm", "var_mean", "var", "std", "_fused_rms_norm", "cumsum"),
    "act": ("gelu", "silu", "silu_", "exp", "sigmoid", "tanh", "sin", "cos", "log", "erf", "pow", "erfinv"),
    "softmax": ("_softmax", "_safe_softmax", "_log_softmax", "logsumexp"),
    "move": (
        "index", "index_select", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "index_put",
        "index_put_", "_index_put_impl_", "cat", "stack", "clone", "copy_", "_to_copy", "embedding", "masked_select",
        "scatter_reduce", "index_add", "index_copy", "roll", "flip", "constant_pad_nd",
    ),
}  # fmt: skip
_KIND = {name: kind for kind, names in _NAMES.items() for name in names}


def kind_of(name: str) -> str:
    """The class of an operator of aten by its name, ``plain`` for what only reads and writes."""
    return _KIND.get(name, "plain")


@dataclass(frozen=True)
class Op:
    """One operator, or ``count`` alike, for one sample of a batch.

    Attributes:
        flops: of one sample, two per multiply-add. Causal attention counts in full here, as torch's counter has it.
        moved: elements of activations that are read and written, of one sample.
        weights: elements of parameters that are read, once for the batch.
        rows, inner, outer: of a matmul (rows, inner) @ (inner, outer); of attention queries, keys and head width.
        layer: block or decoder layer, -1 outside of these. ``own``: part of making or applying a plan.
        causal: attention that kernels do half of.
    """

    kind: str
    part: str
    flops: float = 0.0
    moved: float = 0.0
    weights: float = 0.0
    rows: float = 0.0
    inner: float = 0.0
    outer: float = 0.0
    layer: int = -1
    own: bool = False
    causal: bool = False
    count: float = 1.0

    def shortened(self, share: float) -> Op:
        """The same on ``share`` of the tokens: attention grows with their square unless it has one query."""
        both = share * share if self.kind == "attention" and self.rows > 1 else share
        if self.kind == "attention":
            rows = self.rows * share if self.rows > 1 else self.rows
            return replace(self, flops=self.flops * both, moved=self.moved * share, rows=rows, inner=self.inner * share)
        return replace(self, flops=self.flops * share, moved=self.moved * share, rows=self.rows * share)
