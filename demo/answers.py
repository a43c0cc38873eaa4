"""What the ask tab does with a question: put it to the model, and show the answers side by side."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from PIL import Image

from tokenreduce.bench.columns import in_bytes, seconds
from tokenreduce.core.auto import auto_of, is_auto
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import parse
from tokenreduce.demo.common import chosen
from tokenreduce.demo.image import in_flops
from tokenreduce.measure.frames import ask_frames
from tokenreduce.measure.generation import Comparison, Side
from tokenreduce.measure.kept import places
from tokenreduce.measure.question import ask

__all__ = ["LONGEST_QUESTION", "LONGEST_SPEC", "NAMES", "answers", "put", "reducers_from", "verdict"]

LONGEST_QUESTION, LONGEST_SPEC = 400, 300
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
    # The first embedded model knows no chat form: image and question are all it was trained on.
    prompt = f"{loaded.processor.image_token} {text}" if loaded.name == "world-llava" else text
    question = ask(loaded.processor, frames, prompt)
    return question, places(loaded.model, loaded.processor, question)


def answers(results: Sequence[Comparison], truth: str = "", question: str = "", notes: Sequence[str] = ()) -> str:
    """Answers and numbers side by side, as HTML: which of ``results`` is cheaper and who agrees in a sentence, and a
    table: unreduced, then each of ``results``; above it what was asked, so that nobody takes it for the answer to
    another question."""
    heads = ["", "unreduced", *(f"{name}: {r.spec}" for name, r in zip(NAMES, results, strict=False))]
    body = "".join(
        f'<tr class="r{i}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for i, line in enumerate(_lines(results, truth))
    )
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    said = dict.fromkeys([*notes, *(n for r in results for n in r.notes)])
    below = "".join(f"<p>Note: {html.escape(n)}</p>" for n in said)
    asked = f'<p class="small asked">Asked: {html.escape(question)}</p>' if question else ""
    short = f'<p class="headline">{html.escape(verdict(*results))}</p>' if len(results) == len(NAMES) else ""
    said_how = "In brackets: how many times fewer or faster. Times are medians of interleaved rounds."
    return (
        f'{asked}{short}<div class="wide"><table class="answers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        f'</table></div><p class="small">{said_how}</p>{below}'
    )


def _lines(results: Sequence[Comparison], truth: str) -> list[list[str]]:
    """The rows of the table, each with its name in front."""
    sides: list[Side] = [results[0].stock, *(r.reduced for r in results)]
    ratios = [None, *(r.ratios() for r in results)]

    def row(name: str, key: str, values: Sequence[str]) -> list[str]:
        cells = [values[0]]
        for value, ratio in zip(values[1:], ratios[1:], strict=True):
            times = ratio[key] if ratio else None
            cells.append(value + (f" ({times:.2f}x)" if times is not None else ""))
        return [name, *cells]

    said = ["answer", *(s.answer or "(nothing)" for s in sides)]
    right = [["right answer", truth, *("" for _ in results)]] if truth else []
    return [
        said, *right,
        ["same tokens as unreduced", "", *("yes" if r.agree else "no" for r in results)],
        row("visual tokens at the entry", "entry_tokens", [f"{s.layers[0]:,}" for s in sides]),
        row(f"visual tokens, mean of {len(sides[0].layers)} layers", "mean_layer_tokens",
            [f"{s.mean_tokens:,.1f}" for s in sides]),
        row("FLOPs of encoder and prefill", "flops", ["-" if s.flops is None else in_flops(s.flops) for s in sides]),
        row("time to the first token", "first_token_s", [seconds(s.first.median) for s in sides]),
        row("KV cache", "cache_bytes", [in_bytes(s.cache) for s in sides]),
    ]  # fmt: skip


def verdict(a: Comparison, b: Comparison) -> str:
    """Which of two reductions is cheaper, in FLOPs up to the first token and bytes of keys and values (times have
    noise), and whose answer is the unreduced model's, token for token."""
    shares = [[100 / (r.ratios()[key] or float("nan")) for r in (a, b)] for key in ("flops", "cache_bytes")]
    (fa, fb), (ka, kb) = [[f"{value:.0f} %" for value in pair] for pair in shares]
    less = [x - y for x, y in shares]
    if all(abs(d) < 0.5 for d in less):
        cheaper = f"A and B cost the same: {fa} of the FLOPs and {ka} of the KV cache"
    elif all(d < 0.5 for d in less) or all(d > -0.5 for d in less):
        name = NAMES[0] if sum(less) < 0 else NAMES[1]
        cheaper = f"{name} is cheaper: A takes {fa} of the FLOPs and {ka} of the KV cache, B {fb} and {kb}"
    else:
        few, small = (NAMES[0], NAMES[1]) if less[0] < 0 else (NAMES[1], NAMES[0])
        flops, cache = ((fa, fb), (kb, ka)) if few == NAMES[0] else ((fb, fa), (ka, kb))
        cheaper = (
            f"{few} takes fewer FLOPs ({flops[0]} against {flops[1]}), {small} a smaller KV cache ({cache[0]} against "
            f"{cache[1]})"
        )
    if a.agree and b.agree:
        return f"{cheaper}. Both give the unreduced model's answer."
    if a.agree or b.agree:
        yes, no = NAMES if a.agree else NAMES[::-1]
        return f"{cheaper}. {yes} gives the unreduced model's answer, {no} another one."
    same = "the same one" if a.reduced.ids == b.reduced.ids else "two different ones"
    return f"{cheaper}. Neither gives the unreduced model's answer; they give {same}."


def reducers_from(
    values: Sequence[Any], stages: Sequence[str], specs: Sequence[str | None] = ("", "")
) -> list[tuple[Reducer | str, ...]]:
    """The reducers of each column: those of its text in ``specs``, or, where that is empty, of its lists, from the
    ``values`` of all their controls. A text with ``auto`` stays one, for the model to say what it stands for.

    Raises ``ValueError`` that names the column for a text that is none, and for a column without a method.
    """
    each = 2 * len(stages)
    out: list[tuple[Reducer | str, ...]] = []
    for at, (name, spec) in enumerate(zip(NAMES, specs, strict=True)):
        mine = values[at * each : (at + 1) * each]
        made: list[Reducer | str] = [
            r for i, stage in enumerate(stages) for r in chosen(stage, mine[2 * i], mine[2 * i + 1])
        ]
        if text := (spec or "").strip():
            made = _parsed(name, text)
        if not made:
            raise ValueError(f"reduction {name} names no method; choose one")
        out.append(tuple(made))
    return out


def _parsed(name: str, text: str) -> list[Reducer | str]:
    if len(text) > LONGEST_SPEC:
        raise ValueError(f"the spec of reduction {name} has {len(text)} characters; at most {LONGEST_SPEC} are read")
    try:
        if is_auto(text):
            auto_of(text)
            return [text]
        return [*parse(text)]
    except (ValueError, TypeError) as error:
        # The names of all methods are on the page already, in its lists.
        said, cut, _ = str(error).partition(" Known: ")
        fix = " Empty the text to see the lists of all methods." if cut else ""
        raise ValueError(f"reduction {name}: {said}{fix}") from error
