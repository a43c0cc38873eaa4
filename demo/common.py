"""What the tabs share: messages instead of crashes, uploads that are deleted, and a method with its budget."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from tokenreduce.core.reducer import Reducer, build
from tokenreduce.core.registry import get_class

__all__ = [
    "NONE",
    "chosen",
    "explain",
    "keep_slider",
    "message",
    "method_choices",
    "method_dropdown",
    "models",
    "received",
    "short",
]

#: What bad input raises throughout the library; its text is written for the user.
EXPECTED = (ValueError, TypeError, ImportError, OSError)
NONE = "none"
HEAVY: dict[str, Any] = {"concurrency_id": "machine", "concurrency_limit": 1, "trigger_mode": "always_last"}


def models(names: Sequence[str]) -> list[tuple[str, str]]:
    """(label, name) for a dropdown; of a folder only its own name is shown."""
    return [(short(name), name) for name in names]


def short(name: str) -> str:
    """A model's name without the folders it lies in."""
    return Path(name).name if "/" in name else name


def message(elem_id: str) -> gr.Markdown:
    """Where a tab says what went wrong."""
    return gr.Markdown("", elem_id=elem_id, elem_classes="message")


def explain(error: Exception) -> str:
    """An error as one line on the page; a bug goes to the log with its traceback."""
    if isinstance(error, EXPECTED):
        return f"⚠ {str(error) or type(error).__name__}"
    logging.getLogger("tokenreduce.demo").exception("unexpected error", exc_info=error)
    return f"⚠ unexpected {type(error).__name__}: {error} (the server's log says more)"


@contextlib.contextmanager
def received(paths: str | Sequence[str] | None) -> Iterator[list[Path]]:
    """The files of an upload, deleted behind the block whatever happens in it."""
    files = [Path(p) for p in ([paths] if isinstance(paths, str) else paths or [])]
    try:
        yield files
    finally:
        for file in files:
            with contextlib.suppress(OSError):
                file.unlink()
                file.parent.rmdir()  # one folder per upload, when nothing else is in it


def reads_question(name: str, stage: str) -> bool:
    """Whether a method's choice depends on the question."""
    kind = get_class(name, stage)
    return (stage == "language" and bool({"attention", "prompt"} & {*kind.needs})) or bool(
        {"text", "clip"} & {*kind.needs}
    )


def method_choices(stage: str, names: Sequence[str], optional: bool = False) -> list[tuple[str, str]]:
    """(label, name) of the methods of a stage for a dropdown."""
    out = [("none", NONE)] if optional else []
    for name in names:
        kind = get_class(name, stage)
        guided = ", reads the question" if reads_question(name, stage) else ""
        baseline = ", baseline" if not kind.paper else ""
        title = kind.title if kind.title.lower() != name else ""
        about = (title + guided + baseline).removeprefix(", ")
        out.append((f"{name} ({about})" if about else name, name))
    return out


def method_dropdown(stage: str, names: Sequence[str], value: str, elem_id: str, **more: Any) -> gr.Dropdown:
    optional = more.pop("optional", False)
    return gr.Dropdown(
        method_choices(stage, names, optional), value=value if value in names else (NONE if optional else names[0]),
        elem_id=elem_id, filterable=True, **more,
    )  # fmt: skip


def keep_slider(label: str, value: int, elem_id: str, **more: Any) -> gr.Slider:
    """A budget in percent."""
    return gr.Slider(5, 100, value=value, step=5, label=label, elem_id=elem_id, **more)


def chosen(stage: str, name: str | None, percent: float) -> tuple[Reducer, ...]:
    """The method of a stage at its budget, () for none. Raises ``ValueError`` for a bad one."""
    if name is None or name == NONE:
        return ()
    return (build(get_class(name, stage), {"keep": float(percent) / 100}),)
