"""One OpenAI-compatible server over HTTP: what it serves, and one chat completion with tries and a time limit."""

from __future__ import annotations

import asyncio
import os
import random
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Client", "RefusedError", "Reply", "UnreachableError", "check_url"]

#: Answers that another try may change: too many requests, and a server that is starting, restarting or overloaded.
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
#: Seconds that a server's Retry-After is honoured at most.
LONGEST_PAUSE = 60.0


class RefusedError(ValueError):
    """The server understood a request and said no; another try would get the same."""


class UnreachableError(OSError):
    """No answer after all tries: nobody listens, the connection breaks, time runs out, or errors do not end."""


@dataclass(frozen=True)
class Reply:
    """A chat completion. Token counts are the server's own (``usage``), None where it gives none; ``cut`` says that
    the answer ran into its limit; ``latency_s`` is of the try that was answered, of ``tries``, begun at ``began``
    (seconds since the epoch)."""

    text: str
    prompt_tokens: int | None
    answer_tokens: int | None
    cut: bool
    latency_s: float
    began: float
    tries: int


def check_url(url: str) -> str:
    """``url`` without a slash at its end. Raises ``ValueError`` for what is no http(s) address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"--server is an address such as http://127.0.0.1:8000/v1, not {url!r}")
    return url.rstrip("/")


@dataclass
class Client:
    """A server at ``url`` (with its ``/v1``), used as an async context.

    Args:
        concurrency: connections at once.
        timeout: seconds for one try of one request.
        tries: how often a request is sent before :class:`UnreachableError`.
        pause: seconds before the second try; doubled for each further one, with some chance in it.

    The key of the environment variable ``OPENAI_API_KEY`` is sent where it is set, and stored nowhere.
    Raises ``ImportError`` that names the extra where httpx is missing.
    """

    url: str
    concurrency: int = 32
    timeout: float = 120.0
    tries: int = 4
    pause: float = 0.5
    _http: Any = field(default=None, init=False, repr=False)

    async def __aenter__(self) -> Client:
        try:
            import httpx
        except ImportError as error:
            raise ImportError("httpx is not installed: pip install 'tokenreduce[server]'") from error
        key = os.environ.get("OPENAI_API_KEY")
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(self.timeout, connect=min(10.0, self.timeout)),
            limits=httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """What the server serves, as it lists it; [] where it has no such list."""
        try:
            made, _, _, _ = await self._send("GET", "/models")
        except RefusedError:
            return []
        listed = made.get("data") if isinstance(made, dict) else None
        return [m for m in listed or [] if isinstance(m, dict) and isinstance(m.get("id"), str)]

    async def chat(self, body: dict[str, Any]) -> Reply:
        """The first choice of a chat completion.

        Raises :class:`RefusedError` with the server's own words, also for an answer that is no chat completion, and
        :class:`UnreachableError`.
        """
        made, latency, began, tries = await self._send("POST", "/chat/completions", body)
        try:
            choice = made["choices"][0]
            text = choice["message"]["content"]
            usage = made.get("usage") or {}
            counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise RefusedError(f"the answer is no chat completion ({type(error).__name__}: {error})") from error
        prompt, answer = (c if isinstance(c, int) and not isinstance(c, bool) else None for c in counts)
        cut = choice.get("finish_reason") == "length"
        return Reply("" if text is None else str(text), prompt, answer, cut, latency, began, tries)

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[Any, float, float, int]:
        """JSON, seconds, begin and number of tries of the first answer that is one."""
        import httpx

        said = ""
        for number in range(1, self.tries + 1):
            began, clock = time.time(), time.perf_counter()
            wait = self.pause * 2 ** (number - 1) * (0.5 + random.random())
            try:
                answer = await self._http.request(method, self.url + path, json=body)
                seconds = time.perf_counter() - clock
            except httpx.TimeoutException:
                said = f"no answer within {self.timeout:g} s"
            except httpx.TransportError as error:
                said = str(error) or type(error).__name__
            else:
                if answer.status_code == 200:
                    return _json(answer), seconds, began, number
                said = f"HTTP {answer.status_code}: {_message(answer)}"
                if answer.status_code not in AGAIN:
                    raise RefusedError(said)
                wait = max(wait, _retry_after(answer))
            if number < self.tries:
                await asyncio.sleep(wait)
        raise UnreachableError(f"{self.url} does not answer after {self.tries} tries: {said}")


def _json(answer: Any) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise RefusedError(
            f"the answer is no JSON: {answer.text[:120]!r}; is the address that of the API (.../v1)?"
        ) from error


def _message(answer: Any) -> str:
    """What an error says, in OpenAI's form or another, on one line."""
    try:
        made = answer.json()
    except ValueError:
        made = answer.text
    for key in ("error", "message", "detail"):
        if isinstance(made, dict) and made.get(key):
            made = made[key]
    return " ".join(str(made).split())[:400] or "no message"


def _retry_after(answer: Any) -> float:
    try:
        return min(LONGEST_PAUSE, max(0.0, float(answer.headers.get("retry-after", 0))))
    except ValueError:  # a date
        return 0.0
