"""What the ask tab does with a question: put it to the model, and show the answers side by side."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from PIL import Image

from tokenreduce.bench.columns import in_bytes, seconds
from tokenreduce.core.reducer import Reducer
from tokenreduce.demo.common import chosen
from tokenreduce.measure.frames import ask_frames
from tokenreduce.measure.generation import Comparison, Side
from tokenreduce.measure.kept import places
from tokenreduce.measure.question import ask

__all__ = ["LONGEST_QUESTION", "NAMES", "answers", "put", "reducers_from"]

LONGEST_QUESTION = 400
#: What the page calls the two reductions.
NAMES = ("A", "B")


def put(loaded: Any, frames: Sequence[Image.Image], video: bool, text: str) -> tuple[Any, Any]:
    """The question as the model takes it, and where its visual tokens lie. Raises ``ValueError`` for an empty or too
    long one and what the processor refuses."""
    text = " ".join(text.split())
    if not text:
        raise ValueError("the question is empty; ask something about the picture")
    if len(text) > LONGEST_QUESTION:
        raise ValueError(f"the question has {len(text)} characters; at most {LONGEST_QUESTION} are read")
    if not frames:
        raise ValueError("there is no picture yet; choose an example or upload one")
    if video:
        return ask_frames(loaded, frames, text)
    # The embedded model knows no chat form: image and question are all it was trained on.
    prompt = f"{loaded.processor.image_token} {text}" if loaded.name == "world-llava" else text
    question = ask(loaded.processor, frames, prompt)
    return question, places(loaded.model, loaded.processor, question)


def answers(results: Sequence[Comparison], truth: str = "", question: str = "") -> str:
    """Answers and numbers side by side, as an HTML table: unreduced, then each of ``results``; above it what was
    asked, so that nobody takes it for the answer to another question."""
    heads = ["", "unreduced", *(f"{name}: {r.spec}" for name, r in zip(NAMES, results, strict=True))]
    sides: list[Side] = [results[0].stock, *(r.reduced for r in results)]
    ratios = [None, *(r.ratios() for r in results)]

    def row(name: str, key: str, values: Sequence[str]) -> list[str]:
        cells = [values[0]]
        for value, ratio in zip(values[1:], ratios[1:], strict=True):
            times = ratio[key] if ratio else None
            cells.append(value + (f" ({times:.2f}x)" if times is not None else ""))
        return [name, *cells]

    said = ["answer", *(s.answer or "(nothing)" for s in sides)]
    same = ["same tokens as unreduced", "", *("yes" if r.agree else "no" for r in results)]
    rows = [
        said, same,
        row("visual tokens at the entry", "entry_tokens", [f"{s.layers[0]:,}" for s in sides]),
        row(f"visual tokens, mean of {len(sides[0].layers)} layers", "mean_layer_tokens",
            [f"{s.mean_tokens:,.1f}" for s in sides]),
        row("time to the first token", "first_token_s", [seconds(s.first.median) for s in sides]),
        row("KV cache", "cache_bytes", [in_bytes(s.cache) for s in sides]),
    ]  # fmt: skip
    if truth:
        rows.insert(1, ["right answer", truth, *("" for _ in results)])
    body = "".join(
        f'<tr class="r{i}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for i, line in enumerate(rows)
    )
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    notes = "".join(f"<p>Note: {html.escape(n)}</p>" for n in dict.fromkeys(n for r in results for n in r.notes))
    asked = f'<p class="small asked">Asked: {html.escape(question)}</p>' if question else ""
    said_how = "In brackets: how many times fewer or faster. Times are medians of interleaved rounds."
    return (
        f'{asked}<div class="wide"><table class="answers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f'</div><p class="small">{said_how}</p>{notes}'
    )


def reducers_from(values: Sequence[Any], stages: Sequence[str]) -> list[tuple[Reducer, ...]]:
    """The reducers of each column from the values of all its controls."""
    each = 2 * len(stages)
    out = []
    for at, name in enumerate(NAMES):
        mine = values[at * each : (at + 1) * each]
        made = [r for i, stage in enumerate(stages) for r in chosen(stage, mine[2 * i], mine[2 * i + 1])]
        if not made:
            raise ValueError(f"reduction {name} names no method; choose one")
        out.append(tuple(made))
    return out
