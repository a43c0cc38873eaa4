"""A server with OpenAI's protocol over real HTTP, without a model: it looks at the picture and names its colour.

A picture has :data:`TOKENS` visual tokens, or as many as ``tokenreduce_keep`` says, and with fewer than :data:`ENOUGH`
the server answers wrongly. What goes wrong is set by attributes.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

TOKENS, ENOUGH = 196, 16
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class FakeServer:
    """Runs in a thread while it is a context. ``requests`` are the bodies that it answered.

    ``fault(body, number)`` may return (status, JSON or text) in place of an answer to the ``number``-th chat request,
    or a number of seconds to sleep first; ``dies_after`` chat requests the socket closes.
    """

    def __init__(self, fault: Callable[[dict[str, Any], int], Any] | None = None, *, ours: bool = True,
                 dies_after: int | None = None, usage: bool = True) -> None:  # fmt: skip
        self.fault, self.ours, self.dies_after, self.usage = fault, ours, dies_after, usage
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.seen = 0
        self.most = self._now = 0
        self._lock = threading.Lock()

    def __enter__(self) -> FakeServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                models = [{"id": "tiny", "owned_by": "fake"}]
                outer._send(self, *((200, {"data": models}) if self.path == "/v1/models" else (404, "no such page")))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer._lock:
                    outer.seen += 1
                    number = outer.seen
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                try:
                    outer._chat(self, body, number)
                finally:
                    with outer._lock:
                        outer._now -= 1

            def log_message(self, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                pass  # a client that went away

        self._server = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @staticmethod
    def _send(handler: Any, status: int, made: Any, **headers: str) -> None:
        data = (made if isinstance(made, str) else json.dumps(made)).encode()
        handler.send_response(status)
        for name, value in {"content-length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    def _chat(self, handler: Any, body: dict[str, Any], number: int) -> None:
        if self.dies_after is not None and number > self.dies_after:
            handler.close_connection = True
            handler.connection.close()
            return
        wrong = self.fault(body, number) if self.fault else None
        if isinstance(wrong, float):
            time.sleep(wrong)
        elif wrong is not None:
            self._send(handler, *wrong)
            return
        image, text = body["messages"][0]["content"]
        picture = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
        pixel = picture.convert("RGB").getpixel((picture.width // 2, picture.height // 2))
        keep = (body.get("mm_processor_kwargs") or {}).get("tokenreduce_keep", 1.0) if self.ours else 1.0
        tokens = keep if isinstance(keep, int) else round(keep * TOKENS)
        said = min(COLOURS, key=lambda c: sum(abs(a - b) for a, b in zip(COLOURS[c], pixel, strict=True)))
        with self._lock:
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
        usage = {"prompt_tokens": tokens + len(text["text"].split()), "completion_tokens": 1}
        choice = {"message": {"content": said if tokens >= ENOUGH else "grey"}, "finish_reason": "stop"}
        self._send(handler, 200, {"choices": [choice], **({"usage": usage} if self.usage else {})})
