from __future__ import annotations

import json

import pytest
import torch

from tokenreduce.estimation.calibrate import calibrate
from tokenreduce.estimation.devices import DEVICES, Sheet
from tokenreduce.estimation.lookup import device_named
from tokenreduce.estimation.measured import Curve, Measured, save, stored
from tokenreduce.estimation.ops import TOWER, Op

#: Kernels of 1 s, 100 FLOP/s, 10 bytes/s, and nothing is lost.
PLAIN = Sheet("plain", {"fp32": 100.0}, 10.0, 1e3, 0.0, 1.0, 1.0, 1.0, 1.0, tile=1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENREDUCE_CACHE", str(tmp_path))
    return tmp_path


def test_an_operator_takes_the_longer_of_computing_and_moving():
    product = Op("matmul", TOWER, flops=1000.0, moved=10.0, weights=5.0, rows=4.0)
    assert PLAIN.seconds(product, 1, "fp32") == (10.0, "compute")
    assert PLAIN.seconds(product, 2, "fp32") == (20.0, "compute")
    assert PLAIN.seconds(Op("matmul", TOWER, flops=100.0, moved=10.0, weights=5.0, rows=4.0), 2, "fp32") == (
        10.0,
        "memory",
    )
    assert PLAIN.seconds(Op("plain", TOWER, moved=1.0), 1, "fp32") == (1.0, "launch")
    assert PLAIN.seconds(Op("plain", TOWER, moved=3.0, count=3.0), 1, "fp32") == (3.0, "launch")
    assert PLAIN.seconds(Op("attention", TOWER, flops=1000.0, causal=True), 1, "fp32") == (5.0, "compute")


def test_few_rows_cost_as_much_as_a_tile():
    device = DEVICES["a100"]
    times = [device.seconds(Op("matmul", TOWER, flops=r * 1e9, rows=r), 1, "bf16")[0] for r in (33, 64, 65)]
    assert times[0] == pytest.approx(times[1])
    assert times[2] == pytest.approx(2 * times[1])


def test_names_and_dtypes():
    assert device_named("h100", "bf16").memory == 80e9
    with pytest.raises(ValueError, match=r"unknown device 'h10'; known: h100, a100, .*measured; did you mean h100"):
        device_named("h10", "bf16")
    with pytest.raises(ValueError, match="dtype is one of fp32, bf16, fp16, not 'int8'"):
        device_named("h100", "int8")


def test_a_curve_goes_through_its_points():
    curve = Curve((1.0, 10.0, 1000.0), (2.0, 8.0, 8.0))
    assert [curve.at(x) for x in (0.1, 1.0, 10.0, 100.0, 1e6)] == pytest.approx([2.0, 2.0, 8.0, 8.0, 8.0])
    assert curve.at(10**0.5) == pytest.approx(4.0)


def made(**changes) -> Measured:
    flat = Curve((1.0, 2.0), (100.0, 100.0))
    settings = dict(
        name="measured", dtype="fp32", threads=torch.get_num_threads(), torch_version="2",
        matmul=((1.0, flat), (9.0, flat)), attention=flat, row=50.0,
        streams={"plain": flat, "sort": Curve((1.0, 2.0), (1.0, 1.0))}, launch=0.5, memory=1e9,
    )  # fmt: skip
    return Measured(**{**settings, **changes})


def test_a_measured_operator_adds_its_start():
    device = made()
    assert device.seconds(Op("matmul", TOWER, flops=100.0, rows=9.0, inner=2.0, outer=2.0), 1, "fp32") == (
        1.5,
        "compute",
    )
    assert device.seconds(Op("plain", TOWER, moved=25.0), 2, "fp32") == (2.5, "memory")
    assert device.seconds(Op("norm", TOWER, moved=25.0), 2, "fp32") == (2.5, "memory")
    assert device.seconds(Op("sort", TOWER, moved=1.0, count=2.0), 1, "fp32") == (5.0, "memory")
    assert device.seconds(Op("plain", TOWER, moved=1.0), 1, "fp32") == (0.54, "launch")
    assert device.seconds(Op("attention", TOWER, flops=9.0, moved=25.0, rows=1.0, inner=3.0), 1, "fp32") == (
        2.5,
        "memory",
    )


def test_what_was_measured_is_stored_for_its_threads_and_dtype(cache):
    with pytest.raises(
        ValueError, match=r"nothing was measured here for fp32 and \d+ threads; run tokenreduce calibrate"
    ):
        stored("fp32")
    path = save(made())
    assert path.parent == cache / "calibration"
    assert stored("fp32") == made()
    with pytest.raises(ValueError, match="for bf16"):
        device_named("measured", "bf16")
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 0}))
    with pytest.raises(ValueError, match="no calibration of this version"):
        stored("fp32")
    path.write_text("{")
    with pytest.raises(ValueError, match="no calibration of this version"):
        stored("fp32")


def test_calibrating_measures_everything(cache, monkeypatch):
    monkeypatch.setattr("tokenreduce.estimation.calibrate.ROWS", (1, 8))
    monkeypatch.setattr("tokenreduce.estimation.calibrate.WEIGHTS", ((16, 16), (16, 32)))
    monkeypatch.setattr("tokenreduce.estimation.calibrate.KEYS", (8, 16))
    monkeypatch.setattr("tokenreduce.estimation.calibrate.ELEMENTS", (2**10, 2**12))
    found = calibrate("fp32", 1.0)
    assert [w for w, _ in found.matmul] == [256.0, 512.0]
    assert set(found.streams) == {"plain", "norm", "act", "softmax", "move", "sort"}
    rates = [r for _, c in found.matmul for r in c.rates] + [*found.attention.rates, found.row, found.launch]
    assert all(r > 0 for r in [*rates, *(r for c in found.streams.values() for r in c.rates)])
    save(found)
    assert stored("fp32") == found
    with pytest.raises(ValueError, match="seconds is a number >= 1"):
        calibrate("fp32", 0.5)
    with pytest.raises(ValueError, match="dtype is one of"):
        calibrate("fp8")
