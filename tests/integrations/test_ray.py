"""Ray Data's actors do what processes do: the same parts, errors as they were, and an actor that dies loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from split_task import Squares
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce.bench.workers import WorkerError
from tokenreduce.cli import app

pytest.importorskip("ray", reason="make test-ray has an environment with it")

from tokenreduce.integrations.ray_data import RayPool

REDUCERS = tr.parse("divprune:keep=9")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests; workers find what lies beside the tests."""
    import ray

    paths = {"PYTHONPATH": str(Path(__file__).parents[1])}
    ray.init(num_cpus=4, log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": paths})
    yield
    ray.shutdown()


def test_every_part_comes_once_though_an_actor_dies(tmp_path: Path) -> None:
    pool = RayPool([Squares(tmp_path, kills=5)] * 2)
    found = list(pool.run(REDUCERS, range(12)))
    assert sorted(found) == [(i, (i * i, ["divprune:keep=9"])) for i in range(12)]
    assert (tmp_path / "dead-0").exists()
    assert list(pool.run((), [])) == []


def test_errors_arrive_as_they_were(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="30 does not fit"):
        list(RayPool([Squares(tmp_path, fails=30)] * 2).run((), range(28, 33)))
    with pytest.raises(OSError, match="there are no weights"):
        list(RayPool([Squares(tmp_path, broken=True)] * 2).run((), [1, 2]))


def test_what_kills_every_actor_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="Ray gave up"):
        list(RayPool([Squares(tmp_path, kills=1, times=99)] * 2).run((), [0, 1]))


def test_features_are_those_of_one_process(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    words = ["encode", "digits-vit", "digits", "--reduce", "tome:r=4", "--limit", "20", "--rows", "4"]
    made = {}
    for name, more in {"one": [], "ray": ["--workers", "2", "--engine", "ray"]}.items():
        done = CliRunner().invoke(app, [*words, *more, "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        files = sorted((tmp_path / name).glob("*.parquet"))
        made[name] = [np.stack(parquet.read_table(f)["embedding"].to_numpy()) for f in files]
    assert len(made["ray"]) == 5
    for a, b in zip(made["one"], made["ray"], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("task", "option"),
    [
        ("vlm --limit 12 --budgets 0.25 --methods divprune", "--workers"),
        ("vision --model digits-vit --limit 12 --budgets 0.5 --methods tome", "--processes"),
    ],
)
def test_the_table_of_a_benchmark_is_that_of_one_process(tmp_path: Path, task: str, option: str) -> None:
    words = ["bench", *task.split(), "--batch", "4", "--repeats", "0", "--json"]
    rows = []
    for name, more in {"one": [], "ray": [option, "2", "--engine", "ray"]}.items():
        done = CliRunner().invoke(app, [*words, *more, "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        lines = (tmp_path / name / "rows.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if k != "wall_s"} for line in lines])
    assert rows[0] == rows[1]


def test_no_cluster(tmp_path: Path) -> None:
    import ray

    ray.shutdown()
    with pytest.raises(OSError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        list(RayPool([Squares(tmp_path)] * 2, address="127.0.0.1:1").run((), [1]))
