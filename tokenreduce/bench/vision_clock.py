"""Time and memory of an image model against the stock one."""

from __future__ import annotations

import time
import warnings

from torch import Tensor, nn

from tokenreduce.bench.models import Loaded
from tokenreduce.bench.times import floor, speed_keys
from tokenreduce.bench.vision_parts import inference
from tokenreduce.core.trace import record
from tokenreduce.measure.memory import peak_bytes
from tokenreduce.measure.timing import fused_attention, interleaved

__all__ = ["clocked"]


def clocked(
    loaded: Loaded, stock: nn.Module, x: Tensor, reduced: bool, repeats: int, amp: str | None
) -> dict[str, float | None]:
    """Times of the model of ``loaded``, patched where it is ``reduced``, and of ``stock`` on images ``x`` (B,C,H,W) in
    ``repeats`` interleaved rounds, peak memory, and the reduction's share of the forward."""
    device = str(x.device)

    def run(which: nn.Module) -> Tensor:
        with inference(device, amp):
            return loaded.forward(which, x)

    with warnings.catch_warnings(), fused_attention(device):
        warnings.simplefilter("ignore")  # the notes were taken already
        times = interleaved({"stock": lambda: run(stock), "this": lambda: run(loaded.model)}, repeats, device=device)
        peak = peak_bytes(lambda: run(loaded.model), device)
        share: float | None = 0.0
        if reduced and x.device.type == "cpu":
            own = total = 0.0
            for _ in range(min(3, repeats)):
                began = time.perf_counter()
                with record(loaded.model, flops=False, timing=True) as trace:
                    run(loaded.model)
                total += time.perf_counter() - began
                own += trace.seconds
            share = own / total
        elif reduced:
            share = None  # kernels run behind the CPU's clock
    seconds, faster = times["this"].median / len(x), times["stock"].against(times["this"])
    return {
        "seconds_per_image": seconds,
        "images_per_s": 1 / seconds,
        **speed_keys(faster if reduced else floor(faster)),
        "peak_mb": peak / 1e6,
        "reduction_share": share,
    }
