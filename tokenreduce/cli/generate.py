"""``tokenreduce generate``: one question about images or a video, answered without and with fewer visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce.cli.options import Dtype, LlmDevice
from tokenreduce.cli.shared import open_image, picture_format, print_json, quiet_bars, save_picture
from tokenreduce.common.screen import complain, console
from tokenreduce.common.words import counted

if TYPE_CHECKING:
    from tokenreduce.measure.generation import Comparison
    from tokenreduce.measure.kept import Place
    from tokenreduce.measure.question import Question
    from tokenreduce.video.reading import Frames as Film

__all__ = ["command"]

Model = Annotated[
    str, typer.Argument(help="world-llava, world-llava-2, a Hub id, or a folder with model and processor.")
]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="What to ask about the images or the video.")]
Reduce = Annotated[
    str,
    typer.Option(help="Methods, 'divprune:keep=0.3+fastv:layer=2,keep=0.5'; a tuned.json; a target, auto:flops=0.5."),
]
Images = Annotated[list[Path] | None, typer.Option("--image", "-i", help="An image file; may be repeated.")]
Video = Annotated[
    Path | None, typer.Option("--video", "-v", help="A video file, an animated picture or a folder of frames.")
]
Frames = Annotated[
    int | None,
    typer.Option(min=1, help="Frames of the video, spread evenly; 8 by default, 16 for world-llava-2."),
]
Fps = Annotated[float | None, typer.Option(help="Frames per second of the video, in place of --frames.")]
Rate = Annotated[float | None, typer.Option(help="Frames per second of a folder of frames; --fps, or 1.")]
Answer = Annotated[int, typer.Option(min=1, help="Longest answer, and what every timed round decodes.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed rounds.")]
Show = Annotated[Path | None, typer.Option(help="Draw the visual tokens that stay over the images.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def command(
    model: Model,
    prompt: Prompt,
    reduce: Reduce,
    image: Images = None,
    video: Video = None,
    frames: Frames = None,
    fps: Fps = None,
    rate: Rate = None,
    max_new_tokens: Answer = 32,
    device: LlmDevice = "auto",
    dtype: Dtype = "auto",
    rounds: Rounds = 3,
    show: Show = None,
    as_json: Json = False,
) -> None:
    """Answer a question about images or a video without and with a reduction: text, tokens, speed and KV cache.

    The prompt goes through the processor's chat template, images first. Without one it becomes USER: <image> ...
    ASSISTANT: for LLaVA and image tokens above the prompt otherwise; a prompt that has image tokens is taken as it is.
    """
    # Whatever can be wrong without the model is looked at before it is loaded.
    _check(prompt, reduce, show)
    if bool(image) == (video is not None):
        raise ValueError("give --image (it may be repeated) or --video, and not both")
    if video is None and not (frames is fps is rate is None):
        raise ValueError("--frames, --fps and --rate are for --video")
    pictures = [open_image(path) for path in image or []]
    film = None if video is None else _film(video, model, frames, fps, rate)
    quiet_bars()
    from tokenreduce.bench.vlms import load_vlm
    from tokenreduce.measure.generation import compare
    from tokenreduce.measure.kept import draw_kept

    loaded = load_vlm(model, device, dtype)
    question, where = _asked(loaded, pictures, film, prompt, show is not None)
    _check_words(loaded.processor.tokenizer, question)
    result = compare(loaded.model, loaded.processor, question, reduce, max_new_tokens=max_new_tokens, rounds=rounds)
    if show is not None and where is not None:
        save_picture(draw_kept(result, where), show, "--show")
    if film is not None:
        _tell_film(film, video)
    about = {"model": model, "device": str(loaded.device), "dtype": str(loaded.dtype).removeprefix("torch.")}
    if as_json:
        shown = {} if show is None else {"show": str(show)}
        print_json({**about, **result.to_dict(), **shown})
        return
    _present(result, about)
    if show is not None:
        console().say(f"wrote {show}")


def _check(prompt: str, reduce: str, show: Path | None) -> None:
    from tokenreduce.core.auto import auto_of, is_auto
    from tokenreduce.core.registry import parse
    from tokenreduce.core.tuned import is_tuned

    if is_auto(reduce):
        auto_of(reduce)
    elif not is_tuned(reduce) and not parse(reduce, stage="projector"):
        raise ValueError("--reduce names no method; tokenreduce methods lists them")
    if not prompt.strip():
        raise ValueError("--prompt is empty; ask something about the image")
    if show is not None:
        picture_format(show, "--show")


def _asked(
    loaded: Any, pictures: list[Any], film: Film | None, prompt: str, show: bool
) -> tuple[Question, list[Place] | None]:
    """The question as the model takes it and, for ``show`` and for films, where the visual tokens lie."""
    from PIL import Image

    from tokenreduce.measure.frames import ask_frames
    from tokenreduce.measure.kept import places
    from tokenreduce.measure.question import ask

    if film is None:
        question = ask(loaded.processor, pictures, prompt)
        return question, places(loaded.model, loaded.processor, question) if show else None
    question, where = ask_frames(loaded, [Image.fromarray(f) for f in film.frames], prompt, times=film.times.tolist())
    if show and not where:
        raise ValueError(f"--show cannot tell where the tokens of this {type(loaded.model).__name__}'s frames lie")
    return question, where


def _film(path: Path, model: str, frames: int | None, fps: float | None, rate: float | None) -> Any:
    from tokenreduce.video import read_frames

    if frames is not None and fps is not None:
        raise ValueError("give --frames or --fps, not both")
    if fps is not None:
        return read_frames(path, fps=fps, rate=rate)
    return read_frames(path, n=frames or _usual(model), rate=rate)


def _usual(model: str) -> int:
    """Frames that a model is shown where nothing is said."""
    from tokenreduce import zoo
    from tokenreduce.bench.vlms import EMBEDDED
    from tokenreduce.measure.clip_form import USUAL, clip_form

    return clip_form(zoo.processor(model)).frames if model in EMBEDDED else USUAL


def _tell_film(film: Film, path: Path | None) -> None:
    span = f"{film.times[0]:.1f} to {film.times[-1]:.1f} s"
    part = f"{len(film)} of {counted(film.count, 'frame')}, {span}, by {film.reader}"
    for line in (f"{path}: {part}", *film.warnings):
        complain(line)


def _check_words(tokenizer: Any, question: Question) -> None:
    """Say so when the prompt has words that the tokenizer cannot tell from each other: the answer is a guess then."""
    from tokenreduce.measure.question import unknown_words

    if strange := unknown_words(tokenizer, question):
        complain(f"the model does not know: {', '.join(strange)}")


def _present(result: Comparison, about: dict[str, str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    out = console()
    answers = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in ("answer without reduction", f"answer with {result.spec}"):
        answers.add_column(Text(head), overflow="fold", ratio=1)
    sides = result.stock, result.reduced
    answers.add_row(*(Text(s.answer or "(nothing)") for s in sides))
    out.print(answers)
    out.say(_agreement(result))
    out.print()
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in ("", "without", "with", "ratio"):
        table.add_column(head, justify="left" if not head else "right", overflow="fold")
    for row in _rows(result):
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)
    rounds = counted(result.rounds, "interleaved round")
    out.say(
        f"ratio above 1: fewer, smaller or faster; those of times are medians over {rounds} after a warm-up, with "
        f"their interval in brackets, ≈ where it includes 1 (within noise); without is the median time, with that over "
        f"the ratio; on {about['device']} in {about['dtype']}",
        "dim",
    )
    for note in result.notes:
        out.say(f"note: {note}", "dim")


def _agreement(result: Comparison) -> str:
    a, b = len(result.stock.ids), len(result.reduced.ids)
    if result.agree:
        return f"token ids agree: all {a}"
    return f"token ids differ from token {result.common + 1} on, of {a} without and {b} with reduction"


def _key_rows(result: Comparison) -> list[tuple[str, str, str, str]]:
    """Keys that methods of the cache stage left; of those that came there, which methods in front of it left, and not
    of what the stock model holds."""
    rows = []
    for one in result.cached:
        what = f"keys of a head behind the prompt, mean over {counted(one.layers, 'layer')} ({one.method})"
        rows.append((what, "", f"{one.kept:,.1f} of {one.before:,.1f}", ""))
        if one.last is not None:
            rows.append((f"keys of a head behind the answer ({one.method})", "", f"{one.last:,.1f}", ""))
    return rows


def _rows(result: Comparison) -> list[tuple[str, str, str, str]]:
    from tokenreduce.bench.columns import in_bytes, seconds

    a, b, ratio, speed = result.stock, result.reduced, result.ratios(), result.speedups()

    def times(key: str) -> str:
        if (found := speed.get(key)) is not None:
            return f"{found.cell} ({found.interval})"
        return "-" if ratio[key] is None else f"{ratio[key]:.2f}x"

    def whole(value: int | None) -> str:
        return "-" if value is None else f"{value:,}"

    def both(name: str) -> tuple[str, str]:
        return in_bytes(getattr(a, name)), in_bytes(getattr(b, name))

    entry = a.layers[0]
    rows = [("patches, vision encoder", whole(a.encoder), whole(b.encoder), times("encoder_tokens"))]
    if not any(s.layer is None for s in result.sites):
        rows.append(("visual tokens, language model's entry", whole(entry), whole(b.layers[0]), times("entry_tokens")))
    for site in result.sites:
        place = "language model's entry" if site.layer is None else f"from layer {site.layer} on"
        share = f"{entry / site.after:.2f}x" if site.after else "-"
        rows.append((f"visual tokens, {place} ({site.method})", whole(entry), whole(site.after), share))
    for layer, method, seen, back in result.looked:
        share = f"{entry / seen:.2f}x" if seen else "-"
        came = f", {back:,.1f} of them back" if back else ""
        rows.append(
            (f"visual tokens a new token sees, layer {layer} on ({method})", whole(entry), f"{seen:,.1f}{came}", share)
        )
    layers = f"visual tokens, mean over {counted(len(a.layers), 'layer')}"
    rows += [
        (layers, f"{a.mean_tokens:,.1f}", f"{b.mean_tokens:,.1f}", times("mean_layer_tokens")),
    ]
    clock = result.clock()
    if (first := clock["first_token_s"]) is not None:
        rows.append(("time to first token", seconds(first[0]), seconds(first[1]), times("first_token_s")))
    if (step := clock["step_s"]) is not None:
        rows.append(("decoding", *(f"{1 / s:,.1f} tokens/s" for s in step), times("tokens_per_s")))  # type: ignore[arg-type]
    rows += _key_rows(result)
    rows.append(("KV cache after prefill", in_bytes(a.cache), in_bytes(b.cache), times("cache_bytes")))
    if result.cached:
        rows.append(("KV cache at the prefill's peak", *both("cache_peak"), times("cache_peak_bytes")))
        rows.append(("KV cache behind the answer", *both("cache_end"), times("cache_end_bytes")))
    return rows
