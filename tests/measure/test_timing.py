from __future__ import annotations

import pytest
import torch

from tokenreduce.measure import breakeven, timing
from tokenreduce.measure.breakeven import break_even
from tokenreduce.measure.memory import peak_bytes
from tokenreduce.measure.timing import Timing, fused_attention, interleaved


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
