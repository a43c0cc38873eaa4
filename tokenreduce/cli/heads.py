"""``tokenreduce heads``: which KV heads of a model look far back, as a table for methods that treat them apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce.cli.options import AsJson, Dtype, LlmDevice
from tokenreduce.cli.shared import print_json
from tokenreduce.common.screen import console

if TYPE_CHECKING:
    from tokenreduce.algorithms.head_table import HeadTable

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="world-llava, a folder that save_pretrained wrote, or a Hub id.")],
    out: Annotated[
        Path | None, typer.Option(help="The table's file; by default in the model's folder, else NAME_heads.json here.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Random tokens in a block; 2500, or fewer if positions are.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="How often the block is repeated.")] = 4,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text file for DuoAttention's score, may be given again; random tokens without."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    device: LlmDevice = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure the KV heads of a model for razorattention and duoattention, and write the table that they take.

    Echo and induction (RazorAttention) need no data: random tokens, repeated. The score for DuoAttention is an
    approximation of its trained gates, on the texts given.
    """
    from tokenreduce.bench.vlms import load_vlm
    from tokenreduce.measure.heads import measure_heads

    place = _place(model) if out is None else out
    texts = [_read(file) for file in text or ()]
    loaded = load_vlm(model, device, dtype)
    ids = [loaded.processor.tokenizer(t, return_tensors="pt")["input_ids"][0] for t in texts]
    for file, one in zip(text or (), ids, strict=True):
        if not len(one):
            raise ValueError(f"--text {file} holds no text")
    table = measure_heads(loaded.model, tokens=tokens, repeats=repeats, texts=ids, seed=seed)
    table.save(place)
    if as_json:
        print_json({"file": str(place), **_facts(table)})
        return
    _present(table, place)


def _place(model: str) -> Path:
    """Beside the model, where it is a folder."""
    from tokenreduce.algorithms.head_table import FILE

    folder = Path(model.removeprefix("hf:")).expanduser()
    if folder.is_dir():
        return folder / FILE
    return Path(f"{model.removeprefix('hf:').replace('/', '--')}_heads.json")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {file} is no text in UTF-8: {error.reason}") from None
    except OSError as error:
        raise OSError(f"cannot read --text {file}: {error.strerror or error}") from error


def _facts(table: HeadTable) -> dict[str, Any]:
    return {
        "model": table.model, "layers": table.layers, "kv_heads": table.kv_heads, "probe": dict(table.probe),
        "scores": dict(table.scores),
    }  # fmt: skip


def _present(table: HeadTable, place: Path) -> None:
    from rich.table import Table

    from tokenreduce.core.specs import format_spec

    screen = console()
    probe = table.probe
    screen.say(
        f"{table.model}: {table.layers} layers of {table.kv_heads} KV heads, {probe['tokens']} random tokens "
        f"{probe['repeats']} times"
    )
    shown = Table("score", "best heads (layer.head)", "largest", "median", "smallest", box=None, pad_edge=False)
    for name in table.scores:
        ranked = table.ranked(name)
        best = ", ".join(f"{layer}.{head}" for _, (layer, head) in ranked[:8])
        numbers = (ranked[0][0], ranked[len(ranked) // 2][0], ranked[-1][0])
        shown.add_row(name, best, *(f"{value:.4g}" for value in numbers))
    screen.print(shown)
    specs = [format_spec(name, {"table": str(place)}) for name in ("razorattention", "duoattention")]
    screen.say(f"wrote {place}; use it as {' or '.join(specs)}")
