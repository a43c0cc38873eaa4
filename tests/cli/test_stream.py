"""``tokenreduce stream`` on a film."""

from __future__ import annotations

import pytest

pytest.importorskip("av")
pytest.importorskip("timm")

from films import film as write_film
from typer.testing import CliRunner

from tokenreduce.cli import app

run = CliRunner()


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_film(tmp_path_factory.mktemp("film") / "film.mp4", 40, rate=4)


def shown(*args):
    result = run.invoke(app, ["stream", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.output


def test_memory_stays_small(film):
    out = shown(film, "--fps", 4, "--chunk", 8, "--capacities", "1,1,2")
    assert "at most 263" in out, "196 + 49 + 2 * 9"
    assert "40 " in out


def test_a_stream_continues_where_it_stopped(film, tmp_path):
    whole = shown(film, "--fps", 4, "--memory", "clips", "--reducer", "evs:keep=32").splitlines()[-1]
    state = tmp_path / "memory.safetensors"
    shown(film, "--fps", 4, "--memory", "clips", "--reducer", "evs:keep=32", "--state", state)
    again = run.invoke(
        app, ["stream", str(film), "--fps", "4", "--memory", "clips", "--reducer", "evs:keep=32", "--state", str(state)]
    )
    assert again.exit_code == 0
    assert "holds 40 frames" in again.output
    assert whole in again.output
    other = run.invoke(app, ["stream", str(film), "--memory", "pyramid", "--state", str(state)])
    assert other.exit_code != 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--memory", "tape"], "--memory is"), (["--capacities", "2,x"], "--capacities"),
        (["--memory", "clips", "--reducer", "visionzip:keep=4"], "temporal"), (["--fps", "0"], "fps"),
    ],
)  # fmt: skip
def test_bad_settings(film, args, message):
    result = run.invoke(app, ["stream", str(film), *args])
    assert result.exit_code != 0
    assert message in str(result.output) + str(result.exception)


def test_a_text_file_is_no_film(tmp_path):
    (tmp_path / "film.mp4").write_text("no film")
    result = run.invoke(app, ["stream", str(tmp_path / "film.mp4")])
    assert result.exit_code != 0
    assert "film.mp4" in str(result.output) + str(result.exception)
