"""The command that starts vLLM's OpenAI-compatible server with a method, and what to ask it."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from tokenreduce.integrations.vllm.counts import method_of
from tokenreduce.integrations.vllm.families import Family, family_of
from tokenreduce.integrations.vllm.names import KEEP, PRUNING_RATE, SETTING

__all__ = ["INSTALL", "Server", "check_installed", "server"]

#: The module behind ``vllm serve``, which works without the script as well.
MODULE = "vllm.entrypoints.openai.api_server"
GROUP = "vllm.general_plugins"
INSTALL = (
    "tokenreduce serve needs vLLM, which is not installed here. vLLM pins its own torch and transformers, so give it "
    "an environment of its own: python -m venv serve && serve/bin/pip install 'tokenreduce[vllm]' (NVIDIA GPUs; for "
    "CPUs see docs/serving.md)"
)


@dataclass(frozen=True)
class Server:
    """What starts a server: the arguments behind ``python -m``, and the model that requests name."""

    model: str
    arguments: tuple[str, ...]
    host: str
    port: int
    reduced: bool

    @property
    def line(self) -> str:
        """The command, quoted for a shell."""
        return shlex.join(["python", "-m", MODULE, *self.arguments])

    @property
    def words(self) -> list[str]:
        """The command for this Python."""
        return [sys.executable, "-m", MODULE, *self.arguments]

    def run(self) -> None:
        """Become the server: this process ends with it."""
        sys.stdout.flush()
        os.execv(sys.executable, self.words)

    def curl(self, url: str = "URL_OF_AN_IMAGE") -> str:
        """A line that asks the server about an image, and keeps another number of tokens where it has a method."""
        body: dict[str, Any] = {
            "model": self.model, "max_tokens": 32,
            "messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"},
            ]}],
        }  # fmt: skip
        if self.reduced:
            body["mm_processor_kwargs"] = {KEEP: 0.5}
        shown = "127.0.0.1" if self.host in ("", "0.0.0.0", "::") else self.host
        address = f"http://{shown}:{self.port}/v1/chat/completions"
        return shlex.join(["curl", address, "-H", "Content-Type: application/json", "-d", json.dumps(body)])


def server(
    source: str,
    config: Any,
    reduce: str | None,
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    more: Sequence[str] = (),
    requests_may_choose: bool = True,
) -> Server:
    """The server of the model in ``source`` (a folder or a Hub id) with ``config``.

    Args:
        reduce: the method; None serves the model as it is, in vLLM's own class.
        name: what requests call the model; ``source`` by default.
        more: arguments that are handed to vLLM as they are.
        requests_may_choose: whether a request may say how many tokens stay.

    Raises ``ValueError`` for what cannot be served, and for arguments in ``more`` that are ours.
    """
    name = name or source
    arguments = ["--model", source, "--served-model-name", name, "--host", host, "--port", str(port)]
    if reduce is not None:
        reducer, family = method_of(reduce), family_of(config)
        family.check(reducer)
        arguments += _reducing(reduce, family, requests_may_choose)
    _check_more(more, reduce is not None)
    return Server(name, (*arguments, *more), host, port, reduce is not None and requests_may_choose)


def _reducing(reduce: str, family: Family, requests_may_choose: bool) -> list[str]:
    overrides = {"architectures": [family.architecture], SETTING: reduce}
    out = ["--hf-overrides", json.dumps(overrides)]
    if family.axes:
        out += ["--video-pruning-rate", repr(PRUNING_RATE)]
    return [*out, "--trust-request-mm-kwargs"] if requests_may_choose else out


def _check_more(more: Sequence[str], reduced: bool) -> None:
    ours = {"--model", "--served-model-name", "--host", "--port"}
    if reduced:
        ours |= {"--hf-overrides", "--video-pruning-rate", "--trust-request-mm-kwargs"}
    for word in more:
        flag = word.partition("=")[0]
        if flag in ours:
            raise ValueError(
                f"{flag} is set by tokenreduce serve; use its own options, or start vLLM by hand (docs/serving.md)"
            )


def check_installed(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ``ImportError`` with the next step where vLLM is missing, or would not load the plug-in."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(INSTALL)
    if not any(point.name == "tokenreduce" for point in entry_points(group=GROUP)):
        raise ImportError(
            f"vLLM does not find the plug-in: this tokenreduce is not installed with its entry point ({GROUP}); "
            f"install it with pip (a clone: pip install -e .)"
        )
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and "tokenreduce" not in [name.strip() for name in allowed.split(",")]:
        raise ImportError(f"VLLM_PLUGINS={allowed!r} leaves the plug-in out; add tokenreduce to it, or unset it")
