"""What the tabs share: messages instead of crashes, uploads that are deleted, and a method with its budget."""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from tokenreduce.bench.turns import Place, Turns
from tokenreduce.core.reducer import Reducer, build
from tokenreduce.core.registry import get_class

__all__ = [
    "HEAVY",
    "NONE",
    "Slider",
    "WAITING",
    "chosen",
    "clear_at_once",
    "explain",
    "fault",
    "in_turn",
    "keep_slider",
    "literal",
    "message",
    "method_choices",
    "method_dropdown",
    "models",
    "received",
    "said",
    "short",
]

#: What bad input raises throughout the library; its text is written for the user.
EXPECTED = (ValueError, TypeError, ImportError, OSError)
NONE = "none"
#: Visitors that may wait for something; later ones are told to come back.
WAITING = 32
#: Events that compute. They line up in :func:`in_turn`, which tells a visitor how many are before; Gradio's own line
#: would tell nothing but a number in the corner.
HEAVY: dict[str, Any] = {"concurrency_id": "machine", "concurrency_limit": WAITING, "trigger_mode": "always_last"}


def models(names: Sequence[str]) -> list[tuple[str, str]]:
    """(label, name) for a dropdown; of a folder only its own name is shown."""
    return [(short(name), name) for name in names]


def short(name: str) -> str:
    """A model's name without the folders it lies in."""
    return Path(name).name if "/" in name else name


def literal(text: str) -> str:
    """``text`` so that HTML and Markdown both show it letter by letter, ``<image>``, ``*`` and ``_`` included."""
    # Entities for all but letters, digits and spaces: neither language sees a mark that it knows.
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in text)


def message(elem_id: str) -> gr.HTML:
    """Where a tab says what went wrong; it is given :func:`fault` or :func:`said`, never bare text."""
    return gr.HTML("", elem_id=elem_id, elem_classes="message")


def said(text: str) -> str:
    """Text as a message shows it, letter by letter."""
    return f"<p>{literal(text)}</p>" if text else ""


def fault(error: Exception) -> str:
    """:func:`explain` as a message shows it."""
    return said(explain(error))


def explain(error: Exception) -> str:
    """An error in words; a bug goes to the log with its traceback."""
    if isinstance(error, EXPECTED):
        return f"⚠ {str(error) or type(error).__name__}"
    logging.getLogger("tokenreduce.demo").exception("unexpected error", exc_info=error)
    return f"⚠ unexpected {type(error).__name__}: {error} (the server's log says more)"


def in_turn(turns: Turns, waits: Callable[[str], dict[Any, Any]]) -> Generator[dict[Any, Any], None, Place]:
    """Wait for the machine: ``place = yield from in_turn(...)``, then ``with place: ...``, without a yield in it.

    What ``waits`` makes of a sentence about the line is yielded where that takes long enough to be noticed.
    """
    place = turns.join()
    told = -1
    try:
        while not place.wait(0.5):
            if (ahead := place.ahead) != told:
                told = ahead
                yield waits(f"waiting for the machine: {ahead} before you")
    except BaseException:  # a visitor who leaves closes the generator: the line must go on
        place.leave()
        raise
    return place


def clear_at_once(triggers: Sequence[Any], outputs: Sequence[Any], running: Sequence[Any] = ()) -> None:
    """Empty ``outputs`` in the browser itself when one of ``triggers`` fires, and drop what is still ``running``.

    The server may be busy for others: what belongs to the old input must not stand there meanwhile.
    """
    nothing: dict[Any, str] = {gr.HTML: "''", gr.Markdown: "''", gr.Label: "({})"}
    empty = ", ".join(nothing.get(type(output), "null") for output in outputs)
    gr.on([*triggers], None, None, [*outputs], js=f"() => [{empty}]", show_progress="hidden")
    if running:
        gr.on([*triggers], None, None, None, cancels=[*running], show_progress="hidden")


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


def _within(slider: gr.Slider, payload: float | None) -> float:
    """What is typed on the way to a value, the 1 of 15 or nothing at all, is the nearest bound."""
    asked = slider.minimum if payload is None else payload
    return gr.Slider.preprocess(slider, max(slider.minimum, min(asked, slider.maximum)))


#: A slider as Gradio's, which raises out of its bounds and forgets what is typed behind the error. Gradio's metaclass
#: is gone round: it writes a ``.pyi`` beside the file of every subclass.
Slider: type[gr.Slider] = abc.ABCMeta.__new__(
    type(gr.Slider), "Slider", (gr.Slider,), {"preprocess": _within, "__module__": __name__}
)


def keep_slider(label: str, value: int, elem_id: str, **more: Any) -> gr.Slider:
    """A budget in percent."""
    return Slider(5, 100, value=value, step=5, label=label, elem_id=elem_id, **more)


def chosen(stage: str, name: str | None, percent: float) -> tuple[Reducer, ...]:
    """The method of a stage at its budget, () for none. Raises ``ValueError`` for a bad one."""
    if name is None or name == NONE:
        return ()
    return (build(get_class(name, stage), {"keep": float(percent) / 100}),)
