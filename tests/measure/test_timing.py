from __future__ import annotations

import pytest
import torch

from tokenreduce.measure import breakeven, timing
from tokenreduce.measure.breakeven import break_even
from tokenreduce.measure.memory import peak_bytes
from tokenreduce.measure.timing import Speedup, Timing, fused_attention, interleaved


class Clock:
    """A clock that only moves when told, so that timings are exact."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", made)
    return made


def test_rounds_call_everyone_once_in_alternating_order(clock: Clock) -> None:
    calls: list[str] = []
    out = interleaved({n: lambda n=n: calls.append(n) for n in "abc"}, repeats=3, warmup=1)
    assert "".join(calls) == "cba" + "abc" + "cba" + "abc"
    assert list(out) == ["a", "b", "c"]
    assert all(len(t.times) == 3 for t in out.values())


def test_times_and_ratio_are_per_round(clock: Clock) -> None:
    durations = {"stock": iter([9.0, 4.0, 9.0, 8.0]), "fast": iter([9.0, 4.0, 3.0, 1.0])}

    def work(name: str):
        def call() -> None:
            clock.now += next(durations[name])

        return call

    out = interleaved({n: work(n) for n in durations}, repeats=3, warmup=1)
    assert out["stock"].times == (4.0, 9.0, 8.0)
    assert out["fast"].times == (4.0, 3.0, 1.0)
    assert out["stock"].median == 8.0
    # Ratios 1, 3, 8 have the median 3; the ratio of the medians would be 8 / 3.
    assert out["stock"].ratio(out["fast"]) == 3.0
    assert out["fast"].ratio(out["stock"]) == pytest.approx(1 / 3)


def test_functions_run_without_gradients() -> None:
    w = torch.ones(2, requires_grad=True)
    seen: list[bool] = []
    interleaved({"f": lambda: seen.append((w * 2).requires_grad)}, repeats=1)
    assert seen == [False, False]


@pytest.mark.parametrize("settings", [{"repeats": 0}, {"repeats": 1, "warmup": -1}])
def test_bad_rounds(settings: dict) -> None:
    with pytest.raises(ValueError, match="repeats"):
        interleaved({"f": int}, **settings)


def test_no_function() -> None:
    with pytest.raises(ValueError, match="functions"):
        interleaved({}, 1)


def test_ratio_of_different_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds"):
        Timing("a", (1.0,)).ratio(Timing("b", (1.0, 2.0)))


def test_peak_counts_what_lived_at_the_same_time() -> None:
    megabyte = 1 << 20

    def work() -> torch.Tensor:
        a = torch.zeros(megabyte, dtype=torch.uint8)
        b = torch.zeros(2 * megabyte, dtype=torch.uint8)
        del a
        c = torch.zeros(megabyte // 2, dtype=torch.uint8)
        return b[:1].clone() + c[:1]

    assert 3 * megabyte <= peak_bytes(work) < 3 * megabyte + 4096


def test_peak_ignores_what_was_there_before() -> None:
    before = [torch.zeros(1 << 22)]

    def work() -> torch.Tensor:
        before.clear()
        return torch.zeros(1 << 10, dtype=torch.uint8)

    assert peak_bytes(work) <= 1 << 12
    assert peak_bytes(lambda: None) == 0


def test_peak_leaves_the_profiler_off_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)
    assert peak_bytes(lambda: torch.zeros(1 << 16, dtype=torch.uint8)) >= 1 << 16


def test_peak_of_other_devices_is_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        peak_bytes(lambda: None, "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_on_cuda() -> None:
    torch.zeros(1, device="cuda")
    assert peak_bytes(lambda: torch.zeros(1 << 20, dtype=torch.uint8, device="cuda"), "cuda") == 1 << 20


@pytest.mark.parametrize(
    ("ratios", "size"),
    [
        ({1: 0.5, 2: 0.9, 4: 1.2, 8: 1.5}, 4),
        ({1: 1.1, 2: 0.9, 4: 1.2, 8: 1.5}, 4),  # one lucky small size is no break-even
        ({1: 1.1, 2: 1.2}, 1),
        ({1: 1.3, 2: 1.2, 4: 1.0}, None),
    ],
)
def test_break_even(monkeypatch: pytest.MonkeyPatch, ratios: dict[int, float], size: int | None) -> None:
    def fake(functions, repeats, warmup, device):
        n = functions["stock"]()
        assert functions["reduced"]() == -n
        return {"stock": Timing("stock", (ratios[n],)), "reduced": Timing("reduced", (1.0,))}

    monkeypatch.setattr(breakeven, "interleaved", fake)
    got = break_even(lambda x: x, lambda x: -x, lambda n: n, reversed(list(ratios)))
    assert got.size == size
    assert got.speedups == ratios
    assert str(got).startswith("never" if size is None else f"faster from {size} on")


def test_break_even_measures_for_real() -> None:
    got = break_even(torch.sum, torch.mean, lambda n: torch.ones(n), (1, 3), repeats=2)
    assert list(got.speedups) == [1, 3]
    assert all(v > 0 for v in got.speedups.values())


@pytest.mark.parametrize("sizes", [(), (0, 1)])
def test_break_even_bad_sizes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sizes"):
        break_even(abs, abs, abs, sizes)


def test_stock_models_are_timed_with_fused_attention():
    before = torch.backends.mha.get_fastpath_enabled()
    with fused_attention("cpu"):
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == before
    with pytest.raises(ZeroDivisionError), fused_attention("cpu"):
        1 / 0  # noqa: B018
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize(
    ("ratios", "low", "high"),
    [
        ([1.2], 0.0, float("inf")),  # one round says nothing
        ([0.9, 1.1, 1.2], 0.9, 1.2),
        ([1.1, 1.2, 1.3, 1.4, 1.5], 1.1, 1.5),
        ([float(i) for i in range(1, 16)], 4.0, 12.0),  # 96.5 % of the medians of 15 lie between the 4th and the 12th
    ],
)
def test_a_speedup_has_the_interval_of_its_median(ratios: list[float], low: float, high: float) -> None:
    found = Speedup.of(reversed(ratios))
    assert (found.low, found.high, found.rounds) == (low, high, len(ratios))
    assert found.ratio == sorted(ratios)[len(ratios) // 2]


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    for rounds, least in ((3, 0.72), (5, 0.92), (7, 0.95), (20, 0.95)):
        draws = torch.exp(torch.randn(1500, rounds, generator=generator, dtype=torch.float64))
        found = [Speedup.of(row) for row in draws.tolist()]
        assert sum(not f.certain for f in found) / len(found) >= least - 0.01


def test_a_speedup_within_noise_is_not_called_one() -> None:
    stock, fast = Timing("a", (1.0, 1.2, 1.1)), Timing("b", (1.1, 1.0, 1.0))
    found = stock.against(fast)
    assert (found.ratio, found.certain, found.cell) == (1.1, False, "≈1.10x")
    assert str(found) == "as fast, within noise (≈1.10x, interval 0.91 to 1.20)"
    assert str(Speedup.of([1.5, 1.6, 1.4])) == "1.50x faster (speed-up 1.40 to 1.60)"
    assert str(Speedup.of([0.5, 0.4, 0.8])) == "2.00x slower (speed-up 0.40 to 0.80)"
    assert Speedup.of([1.2]).interval == "unknown, one round"
    with pytest.raises(ValueError, match="no round"):
        Speedup.of([])


def test_a_time_beside_a_speedup_agrees_with_it() -> None:
    # Medians 127.9 and 138.6 ms, and yet 1.1 times faster in the median of the rounds.
    stock = Timing("stock", (0.1279, 0.2, 0.1))
    reduced = Timing("reduced", (0.1386, 0.18, 0.09))
    found = stock.against(reduced)
    assert stock.median < reduced.median
    assert found.ratio > 1
    assert stock.median / found.after(stock.median) == pytest.approx(found.ratio)


def test_break_even_is_where_the_gain_is_above_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {1: (0.9, 1.0, 1.1), 2: (0.95, 1.2, 1.3), 4: (1.2, 1.3, 1.4)}

    def fake(functions, repeats, warmup, device):
        return {"stock": Timing("stock", rounds[functions["stock"]()]), "reduced": Timing("reduced", (1.0, 1.0, 1.0))}

    monkeypatch.setattr(breakeven, "interleaved", fake)
    got = break_even(lambda x: x, lambda x: x, lambda n: n, (1, 2, 4))
    assert str(got) == "faster from 4 on (1: ≈1.00x, 2: ≈1.20x, 4: 1.30x)"
