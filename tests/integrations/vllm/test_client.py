"""Asking a server over HTTP, and the table of what it did."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tokenreduce.integrations.vllm.client import ask, data_url, free_port, metrics, running
from tokenreduce.integrations.vllm.throughput import Cell, lines_of


class Handler(BaseHTTPRequestHandler):
    """Answers as an OpenAI-compatible server does; counts a token for each word, and 100 for each picture."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        picture, text = body["messages"][0]["content"]
        keep = body.get("mm_processor_kwargs", {}).get("tokenreduce_keep", 100)
        if keep == 0:
            return self.reply(400, {"error": {"message": "tokenreduce_keep is a number of tokens"}})
        assert picture["image_url"]["url"].startswith("data:image/png;base64,")
        usage = {"prompt_tokens": keep + len(text["text"].split()), "completion_tokens": body["max_tokens"]}
        return self.reply(200, {"choices": [{"message": {"content": "red"}}], "usage": usage})

    def do_GET(self):
        text = b'# HELP a\nvllm:prompt_tokens_total{engine="0"} 5\nvllm:prompt_tokens_total{engine="1"} 7.0\n'
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text)

    def reply(self, status, value):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def base():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_question_about_a_picture(base):
    picture = data_url(np.zeros((4, 4, 3), np.uint8))
    got = ask(base, "m", picture, "what is this", tokens=3)
    assert (got.text, got.prompt_tokens, got.completion_tokens) == ("red", 103, 3)
    assert ask(base, "m", picture, "what", keep=16).prompt_tokens == 17
    with pytest.raises(OSError, match=r"the server answered 400: .*tokenreduce_keep is a number"):
        ask(base, "m", picture, "what", keep=0)
    assert metrics(base) == {"vllm:prompt_tokens_total": 12}


def test_a_server_that_ends_is_an_error_with_its_log():
    words = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match=r"ended with status 3:\nno such model"), running(words, free_port(), {}):
        pass


def test_a_server_is_ended_with_the_block():
    port = free_port()
    code = "import http.server, pathlib, os, tempfile; os.chdir(tempfile.mkdtemp()); pathlib.Path('health').touch(); "
    code += f"http.server.test(http.server.SimpleHTTPRequestHandler, port={port}, bind='127.0.0.1')"
    words = [sys.executable, "-c", code]
    with running(words, port, {}, timeout=60) as address:
        assert address.endswith(str(port))
    with pytest.raises(OSError, match="refused"):
        metrics(address)


def test_the_table_compares_with_the_first_way():
    cells = [Cell("stock", 1, (1.0, 3.0, 2.0), 590), Cell("64 tokens", 1, (8.0, 9.0, 7.0), 78)]
    head, rows = lines_of(cells)
    assert head == ["", "prompt tokens", "requests/s, 1 at once"]
    assert rows == [["stock", "590", "2.00 (1.00-3.00)"], ["64 tokens", "78", "8.00 (7.00-9.00), 4.0x"]]
