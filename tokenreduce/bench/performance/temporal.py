"""What temporal methods cost: ``python -m tokenreduce.bench.performance.temporal``, for docs/performance.md.

Two questions. Does a plan's time grow with the frames or with their square: the time of every method's plan on random
embeddings of 1,000 to 100,000 tokens, and the exponent of its growth over the larger half. And is it small beside what
it saves: its time as a share of the time by which the prefill of a LLaVA-OneVision-shaped model (Qwen2, frames of
14x14 tokens) gets shorter, stock prefills of both lengths timed in the same rounds.

Random embeddings of frames that are alike in part, as those of films are: a plan does not look at what they mean, but
some methods work more where nothing is alike.
"""

from __future__ import annotations

import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from tokenreduce.bench.performance.sections import command_of, splice
from tokenreduce.common.files import writing
from tokenreduce.common.pinned import pin
from tokenreduce.common.words import counted, speak_everywhere
from tokenreduce.core.evidence import Evidence, ImageEvidence, Origin
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import get_class, list_methods
from tokenreduce.measure.timing import interleaved, synchronise

__all__ = ["SIZES", "Prefill", "Row", "Shape", "evidence", "exponent", "markdown", "measure", "methods", "prefills"]

#: Rows and columns of a frame's tokens: 27x27 of SigLIP, halved by LLaVA-OneVision's pooling.
SIDE = 14
TOKENS = (1_000, 3_000, 10_000, 30_000, 100_000)
#: Width of the vision tower and its heads, of which one block is shown.
TOWER, HEADS = 1152, 16
#: Share of a frame's embedding that is the frame before's.
ALIKE = 0.8
GOAL = 0.02


@dataclass(frozen=True)
class Shape:
    """A Qwen2 language model: width, layers, heads, heads of keys, MLP width."""

    width: int
    layers: int
    heads: int
    keys: int
    mlp: int


#: ``small`` is the 0.5B model's width with a third of its layers, for a CPU; 7b is LLaVA-OneVision-7B's.
SIZES = {
    "tiny": Shape(64, 2, 4, 2, 128), "small": Shape(896, 8, 14, 2, 4864), "0.5b": Shape(896, 24, 14, 2, 4864),
    "7b": Shape(3584, 28, 28, 4, 18944),
}  # fmt: skip


@dataclass(frozen=True)
class Prefill:
    """Seconds of the stock language model on ``long`` and on ``short`` visual tokens, round by round."""

    long: tuple[float, ...]
    short: tuple[float, ...]

    @property
    def saved(self) -> float:
        """Median over rounds. Raises ``ValueError`` where the shorter one is no faster: too few tokens to tell."""
        saved = statistics.median(a - b for a, b in zip(self.long, self.short, strict=True))
        if saved <= 0:
            raise ValueError("the prefill on fewer tokens is no faster here; take a larger --prefill or more --rounds")
        return saved


@dataclass(frozen=True)
class Row:
    """One method: seconds of a plan by number of tokens, what was ``kept`` of the largest, and what went wrong."""

    method: str
    seconds: dict[int, float]
    kept: int = 0
    error: str = ""


def methods(wanted: Sequence[str] = ()) -> list[str]:
    """Names of the methods before the language model that look across frames and have a budget, without those that
    need the question's CLIP features. Raises ``ValueError`` for a name that is none of them."""
    kinds = {n: get_class(n, "projector") for n in list_methods(stage="projector")}
    found = [n for n, k in kinds.items() if k.temporal and "clip" not in k.needs]  # type: ignore[attr-defined]
    unknown = [w for w in wanted if w not in found]
    if unknown:
        raise ValueError(f"no temporal method {', '.join(unknown)}; there are {', '.join(found)}")
    return [n for n in found if not wanted or n in wanted]


def evidence(frames: int, width: int, device: torch.device | str = "cpu", seed: int = 0) -> ImageEvidence:
    """A video of ``frames`` frames of 14x14 tokens, each 0.8 of the frame before, and the class-token attention of one
    block of its tower, all random."""
    n = SIDE * SIDE
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(frames, n, width, generator=g)
    for t in range(1, frames):
        x[t] = ALIKE * x[t - 1] + math.sqrt(1 - ALIKE**2) * x[t]
    at = torch.arange(n)
    place = torch.stack([at // SIDE, at % SIDE], 1)
    one = Origin(at[:, None], None, n, torch.zeros(n, dtype=torch.long), place, (SIDE, SIDE))
    heads = [torch.randn(frames, HEADS, n, TOWER // HEADS, generator=g) for _ in range(2)]
    keys, queries = (h.to(device) for h in heads)
    block = Evidence(keys.transpose(1, 2).flatten(2), keys, queries, cls=False, layer=0, depth=1)
    return ImageEvidence(
        x.reshape(1, frames * n, width).to(device), one.repeat(frames), blocks={0: block}, feature=0, tower_depth=1,
    )  # fmt: skip


def exponent(seconds: dict[int, float]) -> float | None:
    """p of time ~ tokens^p, fitted to the larger half of the sizes; None for fewer than two.

    >>> exponent({1: 9.0, 10: 1.0, 100: 10.0}), exponent({10: 1.0})
    (1.0, None)
    """
    sizes = sorted(seconds)[len(seconds) // 2 :] if len(seconds) > 2 else sorted(seconds)
    if len(sizes) < 2:
        return None
    x, y = [math.log(s) for s in sizes], [math.log(seconds[s]) for s in sizes]
    slope: float = statistics.linear_regression(x, y).slope
    return round(slope, 6)


def measure(
    names: Sequence[str],
    tokens: Sequence[int] = TOKENS,
    keep: float = 0.25,
    width: int = 896,
    rounds: int = 3,
    device: str = "cpu",
    done: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Seconds of the plan of every method at every number of tokens (frames are whole, so a little less or more), the
    median of ``rounds`` after a warm-up. A method that fails gives a row with its error."""
    rows = []
    seconds: dict[str, dict[int, float]] = {name: {} for name in names}
    kept, errors = dict.fromkeys(names, 0), dict.fromkeys(names, "")
    for wanted in tokens:
        seen = evidence(max(2, round(wanted / SIDE**2)), width, device)
        for name in names:
            if errors[name]:
                continue
            try:
                reducer: Reducer = get_class(name, "projector")(keep=keep)  # type: ignore[call-arg]
                times = []
                for round_ in range(rounds + 1):
                    synchronise(device)
                    began = time.perf_counter()
                    with torch.no_grad():
                        plan = reducer.plan(seen)
                    synchronise(device)
                    times += [time.perf_counter() - began] if round_ else []
                seconds[name][seen.n] = max(statistics.median(times), 1e-9)
                kept[name] = plan.k
            except Exception as error:
                lines = str(error).splitlines()
                errors[name] = f"{type(error).__name__}: {lines[0] if lines else ''}"
        del seen
    for name in names:
        rows.append(Row(name, seconds[name], kept[name], errors[name]))
        done(rows[-1])
    return rows


def prefills(
    shape: Shape, tokens: int, keep: float, rounds: int = 3, text: int = 32, device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Prefill:  # fmt: skip
    """The language model of ``shape`` with random weights on ``tokens`` visual tokens and on the share ``keep`` of
    them, ``text`` more tokens each, in turns. Raises ``ImportError`` that names the extra without transformers."""
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError as error:
        raise ImportError("the prefill needs transformers: pip install 'tokenreduce[hf]'") from error
    config = Qwen2Config(
        hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.keys, intermediate_size=shape.mlp, vocab_size=1024,
        max_position_embeddings=max(32_768, tokens + text),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Qwen2ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()

    def run(x: Tensor) -> None:
        model(inputs_embeds=x, use_cache=True, logits_to_keep=1)

    counts = {"long": tokens + text, "short": max(1, round(tokens * keep)) + text}
    inputs = {name: torch.randn(1, n, shape.width, device=device, dtype=dtype) for name, n in counts.items()}
    calls = {name: partial(run, x) for name, x in inputs.items()}
    times = interleaved(calls, rounds, 1, device)
    return Prefill(times["long"].times, times["short"].times)


# -- showing -----------------------------------------------------------------------------------------------------------
def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def cells(rows: Sequence[Row], at: int = 0, saved: float = 0.0) -> tuple[list[str], list[list[str]]]:
    """Header and lines; with ``saved`` seconds of prefill at ``at`` tokens, the plan's share of them there."""
    sizes = sorted({n for row in rows for n in row.seconds})
    head = ["method", *(f"{n:,} tokens" for n in sizes), "time ~ tokens^"]
    head += [f"of the prefill saved at {at:,}"] if saved else []
    lines = []
    for row in rows:
        if row.error:
            lines.append([row.method, row.error, *[""] * (len(head) - 2)])
            continue
        slope = exponent(row.seconds)
        line = [row.method, *(_time(row.seconds[n]) if n in row.seconds else "" for n in sizes)]
        line.append("" if slope is None else f"{slope:.2f}")
        if saved:
            share = row.seconds[at] / saved
            line.append(f"{share:.2%}" + ("" if share <= GOAL else " (above 2 %)"))
        lines.append(line)
    return head, lines


def markdown(name: str, rows: Sequence[Row], at: int, saved: float, about: str, command: str) -> str:
    """A section for a page, between markers that carry ``name``."""
    head, lines = cells(rows, at, saved)
    text = [f"<!-- vlm-performance {name}: begin -->", f"`{command}`", "", about, ""]
    text += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    text += ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines]
    return "\n".join([*text, f"<!-- vlm-performance {name}: end -->"]) + "\n"


def _picture(rows: Sequence[Row], path: Path) -> None:
    from tokenreduce.bench.picture import need

    need("matplotlib", "the picture")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if row.seconds:
            sizes = sorted(row.seconds)
            axes.loglog(sizes, [row.seconds[n] for n in sizes], marker="o", label=row.method)
    axes.set_xlabel("visual tokens")
    axes.set_ylabel("seconds of one plan")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    with writing(path, "choose another place with --picture") as partial:
        figure.savefig(partial, dpi=150)


def main(
    wanted: Annotated[str | None, typer.Option("--methods", help="'holitom,evs'; all by default")] = None,
    tokens: Annotated[str, typer.Option(help="visual tokens of the videos")] = ",".join(map(str, TOKENS)),
    keep: Annotated[float, typer.Option(help="share of the tokens that stays")] = 0.25,
    shape: Annotated[str, typer.Option(help=f"language model of the prefill: {', '.join(SIZES)}")] = "small",
    prefill: Annotated[int, typer.Option(help="tokens of the prefill, one of --tokens; 0: not timed")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="timed rounds")] = 3,
    device: str = "cpu",
    picture: Annotated[Path | None, typer.Option(help="draw the times, .png or .svg")] = None,
    page: Annotated[
        Path | None, typer.Option("--markdown", help="file whose marked section is replaced, or a new one")
    ] = None,
) -> None:
    """Plan time of every temporal method by number of tokens, and as a share of the prefill that it saves."""
    speak_everywhere()
    sizes = [int(t) for t in tokens.replace(",", " ").split()]
    if shape not in SIZES or not sizes or min(sizes) < 1:
        raise typer.BadParameter(f"--shape is one of {', '.join(SIZES)}, and --tokens are numbers above 0")
    if prefill and prefill not in sizes:
        raise typer.BadParameter(f"--prefill is one of --tokens ({tokens}) or 0, not {prefill}")
    names = methods([] if wanted is None else wanted.replace(",", " ").split())
    size, kind = SIZES[shape], torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    rows = measure(
        names, sizes, keep, size.width, rounds, device,
        lambda row: print(row.method, row.error or " ".join(_time(s) for s in row.seconds.values()), file=sys.stderr),
    )  # fmt: skip
    at = max(2, round(prefill / SIDE**2)) * SIDE**2 if prefill else 0
    timed = prefills(size, at, keep, rounds, device=device, dtype=kind) if prefill else None
    saved = 0.0 if timed is None else timed.saved
    where = f"CPU, {torch.get_num_threads()} thread(s)"
    if torch.device(device).type == "cuda":
        where = torch.cuda.get_device_name(device)
    about = (
        f"{where}; torch {torch.__version__}, Python {platform.python_version()}; random embeddings of width "
        f"{size.width}, frames of {SIDE}x{SIDE} tokens, each {ALIKE} of the frame before; {100 * keep:g} % of the "
        f"tokens stay; median of {counted(rounds, 'round')} after a warm-up."
    )
    if timed is not None:
        about += (
            f" Prefill: Qwen2 with {size.layers} layers of width {size.width}, {str(kind).removeprefix('torch.')}, "
            f"{_time(statistics.median(timed.long))} on {at:,} visual tokens, {_time(saved)} saved."
        )
    given = command_of("temporal", sys.argv[1:])
    section = markdown("temporal", rows, at, saved, about, given)
    print(section)
    if page is not None:
        splice(page, "temporal", section)
    if picture is not None:
        _picture(rows, picture)


if __name__ == "__main__":
    pin()
    typer.run(main)
