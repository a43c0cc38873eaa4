"""Starting a server, waiting for it and asking it, for the demonstration and the measurement of throughput."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenreduce.integrations.vllm.names import KEEP

__all__ = ["Answer", "ask", "data_url", "free_port", "metrics", "running"]


@dataclass(frozen=True)
class Answer:
    """What a server said, and how many tokens its prompt and answer had."""

    text: str
    prompt_tokens: int
    completion_tokens: int


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def data_url(picture: np.ndarray) -> str:
    """``picture`` (H,W,3) uint8 as a PNG that a request carries."""
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(picture).save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def ask(
    base: str, model: str, picture: str, text: str, *, keep: int | float | None = None, tokens: int = 8,
    timeout: float = 600,
) -> Answer:  # fmt: skip
    """The answer of the server at ``base`` ("http://127.0.0.1:8000") to one question about a ``picture`` (a URL):
    greedy, ``tokens`` tokens. Raises ``OSError`` with what the server said for another status than 200."""
    body: dict[str, Any] = {
        "model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text},
        ]}],
    }  # fmt: skip
    if keep is not None:
        body["mm_processor_kwargs"] = {KEEP: keep}
    request = urllib.request.Request(
        f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            said = json.load(reply)
    except urllib.error.HTTPError as error:
        raise OSError(f"the server answered {error.code}: {error.read().decode(errors='replace')[:500]}") from error
    usage = said["usage"]
    return Answer(said["choices"][0]["message"]["content"], usage["prompt_tokens"], usage["completion_tokens"])


def metrics(base: str) -> dict[str, float]:
    """The server's counters, by name, summed over labels."""
    with urllib.request.urlopen(f"{base}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    out: dict[str, float] = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#"):
            key = name.partition("{")[0]
            out[key] = out.get(key, 0.0) + float(value)
    return out


@contextmanager
def running(words: Sequence[str], port: int, environment: Mapping[str, str], timeout: float = 600) -> Iterator[str]:
    """A server started by ``words``, while the block runs; its address. Raises ``RuntimeError`` with the end of its log
    where it ends before it listens, or does not listen in ``timeout`` seconds."""
    base = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        with log.open("wb") as out:
            server = subprocess.Popen(
                list(words), stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment},
                start_new_session=True,
            )  # fmt: skip
        try:
            _wait(server, base, log, timeout)
            yield base
        finally:
            _end(server)


def _wait(server: subprocess.Popen[bytes], base: str, log: Path, timeout: float) -> None:
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"the server did not listen within {timeout:.0f} s:\n{log.read_text()[-4000:]}")


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server with the processes that it started."""
    import signal

    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, how)
        except (ProcessLookupError, PermissionError):
            return
        try:
            server.wait(30)
            return
        except subprocess.TimeoutExpired:
            print("the server does not end; it is killed", file=sys.stderr)
