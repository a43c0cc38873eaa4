"""``bench vlm --server`` against a server over real HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai_server import COLOURS, ENOUGH, TOKENS, FakeServer
from PIL import Image
from typer.testing import CliRunner, Result

from tokenreduce.bench.questions import Item
from tokenreduce.bench.remote.answers import ANSWERS, Answer
from tokenreduce.bench.remote.client import UnreachableError, check_url
from tokenreduce.bench.remote.questions import Form, image_url
from tokenreduce.bench.remote.row import throughput
from tokenreduce.bench.remote.sweep import Remote
from tokenreduce.bench.report import rebuild
from tokenreduce.bench.runs import load_run
from tokenreduce.cli import app

pytest.importorskip("httpx")
QUESTIONS = 30
TEXT = "which colour is it"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about pictures of one colour; every fifth expects the wrong one, the last picture is not there."""
    folder = tmp_path_factory.mktemp("colours")
    lines = []
    for i in range(QUESTIONS):
        name = list(COLOURS)[i % 3]
        Image.new("RGB", (20, 20), COLOURS[name]).save(folder / f"{i}.png")
        answer = "grey" if i % 5 == 0 else name
        lines.append({"image": f"{i}.png", "question": TEXT, "answer": answer, "type": "even" if i % 2 else "odd"})
    lines.append({"image": "none.png", "question": TEXT, "answer": "red"})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "questions.jsonl"


def task(server: FakeServer, data: Path, **changes: Any) -> Remote:
    return Remote(
        server.url, data=str(data), limit=None, **{"concurrency": 4, "pause": 0.01, "timeout": 5.0, **changes}
    )


def call(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["bench", "vlm", *map(str, words)])


def test_a_server_of_ours_at_several_keeps(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with FakeServer() as server:
        result = call(
            "--server", server.url, "--data", data, "--out", tmp_path, "--keep", "64,0.05", "--concurrency", 4
        )
        asked = len(server.requests)
        assert result.exit_code == 0, result.output
        again = call("--server", server.url, "--data", data, "--out", tmp_path, "--keep", "64,0.05", "--concurrency", 4)
        assert again.exit_code == 0
        assert len(server.requests) == asked == 3 * QUESTIONS  # a second run asks nothing
        assert server.most <= 4
        assert all(h["Authorization"] == "Bearer secret" for h in server.headers)
    whole, some, few = load_run(tmp_path).rows
    words = len(TEXT.split())
    assert (whole["id"], some["id"], few["id"]) == ("unreduced", "served:keep=64", "served:keep=0.05")
    assert [r["prompt_tokens"] for r in (whole, some, few)] == [TOKENS + words, 64 + words, 10 + words]
    assert some["prompt_share"] == pytest.approx((64 + words) / (TOKENS + words))
    assert [r["accuracy"] for r in (whole, some, few)] == [0.8, 0.8, 0.2]  # below ENOUGH tokens it says grey
    assert whole["accuracy_odd"] == pytest.approx(12 / 15)
    assert few["agreement"] == 0
    for row in (whole, some, few):
        assert row["questions"] == QUESTIONS
        assert 0 < row["latency_p50_s"] <= row["latency_p90_s"] <= row["latency_p99_s"]
        assert row["requests_per_s"] > 0
    problem = load_run(tmp_path).info["problems"][0]
    assert problem["path"].endswith("none.png")
    assert "secret" not in "".join(f.read_text(errors="replace") for f in tmp_path.glob("*.json*"))
    assert all(word in result.output for word in ("prompt %", "p99", "req/s"))


def test_any_other_server_as_it_is(data: Path, tmp_path: Path) -> None:
    with FakeServer(ours=False, usage=False) as server:
        result = call("--server", server.url, "--data", data, "--out", tmp_path, "--prompt", "Say {question}", "--json")
        assert result.exit_code == 0, result.output
    assert all("mm_processor_kwargs" not in body for body in server.requests)
    assert server.requests[0]["messages"][0]["content"][1]["text"] == f"Say {TEXT}"
    row = json.loads(result.stdout)["runs"][0]["rows"][0]
    assert (row["accuracy"], row["prompt_tokens"], row["spec"]) == (0.8, None, "served")


def test_a_server_that_ignores_keep_is_told(data: Path, tmp_path: Path) -> None:
    with FakeServer(ours=False) as server:
        run = task(server, data, keeps=(64,)).sweep(tmp_path)
        assert "ignores tokenreduce_keep" in run.errors[0]["error"]
        assert run.errors[0]["id"] == "served:keep=64"
        server.ours = True  # the right one, at the same address
        whole, some = task(server, data, keeps=(64,)).sweep(tmp_path).good
        assert some["prompt_tokens"] == whole["prompt_tokens"] - TOKENS + 64
    with FakeServer(usage=False) as server:
        run = task(server, data, keeps=(64,)).sweep(tmp_path / "other")
        assert "no usage.prompt_tokens" in run.errors[0]["error"]


def test_a_server_that_dies_midway_loses_nothing(data: Path, tmp_path: Path) -> None:
    with FakeServer(dies_after=10) as server:
        with pytest.raises(UnreachableError, match=r"10 answers of unreduced.*the same command"):
            task(server, data, keeps=(64,), tries=2).sweep(tmp_path)
        kept = (tmp_path / ANSWERS).read_bytes()
        (tmp_path / ANSWERS).write_bytes(kept + b'{"point": "unred')  # and the power went, too
        server.dies_after = None
        run = task(server, data, keeps=(64,)).sweep(tmp_path)
        assert len(server.requests) == 2 * QUESTIONS
    assert (tmp_path / ANSWERS).read_bytes().startswith(kept)
    with FakeServer() as server:
        whole = task(server, data, keeps=(64,)).sweep(tmp_path / "whole")
    same = ("id", "accuracy", "accuracy_odd", "prompt_tokens", "prompt_share", "agreement", "questions")
    assert [{k: r.get(k) for k in same} for r in run.rows] == [{k: r.get(k) for k in same} for r in whole.rows]
    rebuild([tmp_path])


def test_errors_that_pass_are_tried_again_and_others_are_listed(data: Path, tmp_path: Path) -> None:
    def fault(body: dict[str, Any], number: int) -> Any:
        if number % 7 == 0:
            return 503, {"error": {"message": "warming up"}}
        if number % 11 == 0:
            return 0.6  # longer than the time limit
        if number == 2:
            return 400, {"error": {"message": "image too large"}}
        return None

    with FakeServer(fault) as server:
        (row,) = task(server, data, timeout=0.3, tries=6).sweep(tmp_path).rows
    assert (row["questions"], row["problems"]) == (QUESTIONS - 1, 1)
    notes = "\n".join(row["notes"])
    assert "refused 1 question" in notes
    assert "image too large" in notes
    assert "came after further tries" in notes


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ((400, {"error": {"message": "set --trust-request-mm-kwargs"}}), ("HTTP 400", "--trust-request-mm-kwargs")),
        ((200, {"error": "odd"}), ("no chat completion",)),
        ((200, "<html>"), ("no JSON", ".../v1")),
        ((401, {"detail": "who are you"}), ("HTTP 401: who are you",)),
    ],
)
def test_a_server_that_refuses_all_is_a_failed_row(data: Path, tmp_path: Path, fault: Any, words: tuple[str]) -> None:
    with FakeServer(lambda body, number: fault) as server:
        result = call("--server", server.url, "--data", data, "--out", tmp_path, "--keep", "64", "--concurrency", "4")
        assert result.exit_code == 1, result.output
        assert server.seen < QUESTIONS  # given up early
    assert all(word in result.output for word in words), result.output


def test_nobody_there_and_bad_settings(data: Path, tmp_path: Path) -> None:
    with FakeServer() as server:
        gone = server.url
        for words, said in {
            ("--model", "huge"): "it has: tiny",
            ("--keep", "0"): "counts of visual tokens",
            ("--keep", "1.5"): "ratios in (0,1]",
            ("--keep", "many"): "--keep lists numbers",
            ("--prompt", "What?"): "{question}",
            ("--methods", "divprune"): "--methods: not together with --server",
            ("--device", "cpu", "--repeats", "3"): "--device, --repeats: not together",
        }.items():
            result = call("--server", gone, "--data", data, "--out", tmp_path, *words)
            assert (result.exit_code, "bug" in result.output) == (2, False), result.output
            assert said in result.output
        assert call("--keep", "64", "--out", tmp_path).exit_code == 2  # without a server
    with pytest.raises(UnreachableError, match="does not answer after 2 tries"):
        Remote(gone, data=str(data), tries=2, pause=0.01).sweep(tmp_path / "none")
    for bad in ("127.0.0.1:8000", "ftp://x/v1", ""):
        with pytest.raises(ValueError, match="--server is an address"):
            check_url(bad)


def test_pictures_arrive_as_they_are_seen(tmp_path: Path) -> None:
    turned = Image.new("RGB", (30, 10), COLOURS["red"])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.jpg")
    Image.new("LA", (8, 8)).save(tmp_path / "grey.png")
    kinds = {}
    for name in ("turned.jpg", "plain.jpg", "grey.png"):
        url = image_url(Item(0, "", ("",), None, tmp_path / name))
        kinds[name] = url.partition(";")[0]
    assert kinds == {"turned.jpg": "data:image/png", "plain.jpg": "data:image/jpeg", "grey.png": "data:image/png"}
    body = Form("m", "{question}", 3).body(Item(0, "{question}", ("",), None, tmp_path / "plain.jpg"), None)
    assert body["messages"][0]["content"][1]["text"] == "{question}"


def test_throughput_leaves_out_the_time_between_sessions() -> None:
    def answer(session: str, began: float) -> Answer:
        return Answer("p", 0, session, began, 2.0, 1)

    assert throughput([answer("a", 0), answer("a", 0), answer("b", 1000), answer("b", 1002)]) == 4 / 6
    assert ENOUGH < TOKENS
