"""Amdahl's arithmetic on operators that take as many seconds as they have FLOPs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tokenreduce.estimation.limits import first_acting, first_token, limit, seconds_by, worth_from
from tokenreduce.estimation.memory import cache_bytes, largest_batch
from tokenreduce.estimation.ops import DECODE, PREFILL, PROJECTOR, TOWER, Op
from tokenreduce.estimation.record import Recorded


class Clock:
    name, memory, launch, behind = "clock", 1e3, 0.0, False

    def seconds(self, op, batch, dtype):
        return op.flops * batch, "compute"


class Launches(Clock):
    launch, behind = 4.0, True


def layers(part: str, rows: list[float], each: float) -> list[Op]:
    return [Op("matmul", part, flops=each * n, weights=1.0, rows=n, layer=i) for i, n in enumerate(rows)]


SUBJECT = SimpleNamespace(answers=True, visual=30, text=10, keys=(2, 8), parameters=50)
STOCK = Recorded((
    *layers(TOWER, [30, 30], 1.0), Op("matmul", TOWER, flops=10.0), Op("matmul", PROJECTOR, flops=5.0),
    *layers(PREFILL, [40, 40, 40], 1.0), Op("attention", DECODE, flops=8.0, rows=1.0, inner=40.0),
    Op("matmul", DECODE, flops=2.0, weights=1.0, rows=1.0, layer=0),
), (40.0,) * 3)  # fmt: skip
MADE = Recorded((
    *layers(TOWER, [30, 30], 1.0), Op("matmul", TOWER, flops=10.0), Op("matmul", PROJECTOR, flops=5.0),
    Op("plain", PROJECTOR, flops=1.0, own=True), *layers(PREFILL, [40, 20, 20], 1.0),
), (40.0, 20.0, 20.0))  # fmt: skip
SECONDS = seconds_by(Clock(), 1, "fp32")


def test_limits_are_what_is_left_without_visual_tokens():
    assert first_token(STOCK, SECONDS) == 60 + 10 + 5 + 120
    assert limit(SUBJECT, STOCK, "encoder", 1, SECONDS) == pytest.approx(195 / (10 + 5 + 120))
    assert limit(SUBJECT, STOCK, "projector", 1, SECONDS) == pytest.approx(195 / (75 + 30))
    assert limit(SUBJECT, STOCK, "language", 2, SECONDS) == pytest.approx(195 / (75 + 80 + 10))
    assert limit(SUBJECT, STOCK, "cache", 1, SECONDS) == pytest.approx(10 / 4)
    assert first_acting(STOCK, MADE) == 1
    assert first_acting(STOCK, STOCK) == 1


def test_the_budget_that_gains_five_percent():
    found = worth_from(SUBJECT, STOCK, MADE, SECONDS)
    # Two of three layers lose n tokens each: 195 / (195 + 1 - 2n) = 1.05.
    n = (196 - 195 / 1.05) / 2
    assert (found.part, found.all) == (PREFILL, 40)
    assert found.tokens == pytest.approx(40 - 2 * n / 3, abs=0.01)
    dear = Recorded((*MADE.ops, Op("sort", PREFILL, flops=60.0, own=True)), MADE.cached)
    assert worth_from(SUBJECT, STOCK, dear, SECONDS).tokens is None
    assert worth_from(SUBJECT, STOCK, STOCK, SECONDS).tokens is None


def test_starting_operators_can_take_longer_than_running_them():
    seconds = seconds_by(Launches(), 1, "fp32")
    assert seconds([Op("plain", TOWER, flops=5.0), Op("plain", TOWER, flops=1.0)]) == 8.0
    assert seconds([Op("plain", TOWER, flops=5.0), Op("plain", PREFILL, flops=1.0)]) == 9.0


def test_what_fits_into_memory():
    assert cache_bytes(SUBJECT, MADE, "bf16") == (40 + 20 + 20) * 2 * 2 * 8 * 2
    assert cache_bytes(SUBJECT, MADE, "bf16", 10) == (50 + 30 + 30) * 2 * 2 * 8 * 2
    moved = Recorded((Op("plain", PREFILL, moved=30.0, count=3.0), Op("plain", DECODE, moved=99.0)), (1.0,))
    each = 3 * 2 * 2 * 8 * 2 + 2 * 10 * 2
    assert largest_batch(SUBJECT, moved, (100 + 7.5 * each) / 0.9, "bf16", 2) == 7
    assert largest_batch(SUBJECT, moved, 90, "bf16", 2) == 0


def test_shorter_operators():
    half = Op("attention", PREFILL, flops=8.0, moved=4.0, rows=10.0, inner=10.0).shortened(0.5)
    assert (half.flops, half.moved, half.rows, half.inner) == (2.0, 2.0, 5.0, 5.0)
    one = Op("attention", DECODE, flops=8.0, moved=4.0, rows=1.0, inner=10.0).shortened(0.5)
    assert (one.flops, one.rows, one.inner) == (4.0, 1.0, 5.0)
    product = Op("matmul", PREFILL, flops=8.0, moved=4.0, weights=3.0, rows=10.0).shortened(0.5)
    assert (product.flops, product.moved, product.weights, product.rows) == (4.0, 2.0, 3.0, 5.0)
