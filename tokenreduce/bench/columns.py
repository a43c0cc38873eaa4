"""How rows are shown: the columns that tables share, their labels, and the order of rows."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenreduce.bench.groups import MARKS, misses
from tokenreduce.bench.methods import UNREDUCED
from tokenreduce.bench.names import label, metric_label, percent
from tokenreduce.bench.runs import Run
from tokenreduce.bench.task import FLOPS, Axis
from tokenreduce.bench.times import within_noise
from tokenreduce.common.words import are, counted

__all__ = [
    "COLUMNS", "Column", "again", "cell", "columns", "compact", "failure", "in_bytes", "label", "misses", "notes",
    "ordered", "seconds",
]  # fmt: skip


def _share(value: Any) -> str:
    return f"{100 * value:.1f}"


def _count(value: Any) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


def compact(tokens: Sequence[int], whole: bool = False) -> str:
    """Tokens after each layer on few characters; runs of equal numbers are folded, long lists cut in the middle.

    >>> compact([50, 50, 46, 46, 42, 26])
    '50>46>42>26'
    >>> compact([197, 181, 165, 149, 133, 117, 101])
    '197>181>..>101'
    >>> compact([50, 50, 46], whole=True)
    '50 50 46'
    """
    if whole:
        return " ".join(str(t) for t in tokens)
    steps = [t for i, t in enumerate(tokens) if i == 0 or t != tokens[i - 1]]
    shown = [str(t) for t in steps]
    return ">".join(shown if len(shown) <= 4 else [*shown[:2], "..", shown[-1]])


def seconds(value: float) -> str:
    """
    >>> seconds(0.0123), seconds(2.5)
    ('12.3 ms', '2.50 s')
    """
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def in_bytes(value: float) -> str:
    """
    >>> in_bytes(512), in_bytes(21_500), in_bytes(3e9)
    ('512 B', '21.5 kB', '3.00 GB')
    """
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:,.0f} B" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"


@dataclass(frozen=True)
class Column:
    """How one key of a row is shown. ``drop`` orders what a narrow terminal leaves out (0: never, high: first)."""

    key: str
    label: str
    text: Callable[[Any], str]
    help: str
    drop: int = 0


#: Columns in the order of the table; a column stands where any row has its key. Tasks add theirs here.
COLUMNS: tuple[Column, ...] = (
    Column("tokens", "tokens", compact, "tokens after each layer, prefix tokens included", 3),
    Column("final_tokens", "end", _count, "tokens after the last layer", 5),
    Column("mean_tokens", "mean", _count, "mean tokens over the layers", 8),
    Column("encoder_tokens", "patches", _count, "patches that leave the vision encoder, per question", 8),
    Column("visual_tokens", "entry", _count, "visual tokens that enter the language model, per question", 3),
    Column("layer_tokens", "by layer", compact, "visual tokens in each layer of the language model", 7),
    Column("mean_visual_tokens", "mean visual", _count,
           "visual tokens of a question, mean over the layers of the language model", 6),
    Column("prompt_tokens", "prompt", _count, "prompt tokens of a request by the server's count, text included", 2),
    Column("prompt_share", "prompt %", _share, "prompt tokens in percent of those with all visual tokens"),
    Column("gmacs", "GMACs", lambda v: f"{v:.2f}" if v >= 1 else f"{v:.4f}", "giga multiply-adds per input", 4),
    Column("flops", "FLOPs", lambda v: f"{v / 1e9:.3f} G", "operations per input, two per multiply-add", 9),
    Column("visual_share", "visual %", _share,
           "visual tokens, mean over the layers of the language model, in percent of the unreduced model's"),
    Column("share", "FLOPs %", _share, "FLOPs in percent of the unreduced model"),
    Column("accuracy", "accuracy %", _share, "share of right answers in percent, with its standard error"),
    Column("found", "found %", _share, "share of the labels of a scene that are among its highest logits, percent", 2),
    Column("top1", "top-1 %", _share, "top-1 accuracy in percent, with its standard error"),
    Column("top5", "top-5 %", _share, "top-5 accuracy in percent", 6),
    Column("hard", "hard %", _share,
           "share of right answers among samples that `resize` does not answer at the same cost, percent", 1),
    Column("simple", "simple %", _share, "the same among samples that `resize` answers", 7),
    Column("agreement", "agree %", _share, "share of inputs with the unreduced model's answer", 2),
    Column("kv_share", "KV %", _share, "bytes of keys and values behind the prefill, percent of the unreduced model's"),
    Column("forced_agreement", "long agree %", _share,
           "tokens of the unreduced model's long answers that would have come, percent, with the standard error", 1),
    Column("perplexity", "perplexity", lambda v: f"{v:.3g}", "of the unreduced model's long answers", 2),
    Column("speedup", "speed-up", lambda v: f"{v:.2f}x",
           "clock time of the stock model over this one: interleaved, median of per-round ratios; of the unreduced "
           "model the interval of its own ratio, the floor of noise; ≈ inside that floor, and where a row's interval "
           "(speedup_low, speedup_high) includes 1"),
    Column("first_token_s", "first token", seconds,
           "time to the first token of one question, vision encoder and prefill: the unreduced model's median, "
           "and that over the speed-up", 4),
    Column("latency_p50_s", "p50", seconds, "time of one request, median", 2),
    Column("latency_p90_s", "p90", seconds, "time of one request, which 90 % do not exceed", 4),
    Column("latency_p99_s", "p99", seconds, "time of one request, which 99 % do not exceed", 3),
    Column("requests_per_s", "req/s", lambda v: f"{v:.2f}", "requests answered per second"),
    Column("answer_tokens", "answer", _count, "tokens of an answer by the server's count", 9),
    Column("tower_s", "tower", seconds,
           "time of the vision tower with its projector on one question, likewise", 5),
    Column("decode_s", "decode", seconds, "time to read the frames of one clip from its file, median over clips", 9),
    Column("frames", "frames", _count, "frames of a clip that the model sees", 9),
    Column("tokens_per_frame", "per frame", _count,
           "visual tokens that enter the language model, per frame of the clip", 5),
    Column("cache_bytes", "KV", in_bytes, "bytes of keys and values after the prefill of one question, all layers", 3),
    Column("images_per_s", "img/s", _count, "images per second: the unreduced model's times the speed-up", 3),
    Column("peak_mb", "peak MB", _count, "peak memory of one forward above what was held before it", 4),
    Column("reduction_share", "own %", _share, "share of the forward spent on making and applying plans", 7),
)  # fmt: skip
#: Of a task that has question types, one column each behind the others: ``accuracy_<type>``.
BY_TYPE = "accuracy_"
KNOWN = {c.key: c for c in COLUMNS}
#: Keys of a row that are not results.
INTERNAL = ("id", "method", "budget", "spec", "settings", "notes", "problems", "error", "traceback", "wall_s", MARKS)


def ordered(run: Run) -> list[dict[str, Any]]:
    """Rows as tables show them: the unreduced model, then budget by budget from mild to strong, best first.

    Rows that miss their budget stand behind those that meet it, and errors behind both.
    """

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        first = row["id"] != UNREDUCED
        value = row.get(run.metric)
        budget = row.get("budget")
        group = (first, budget is None, -(budget or 0))
        return (*group, bool(row.get("error")), misses(row, run.axis), value is None, -(value or 0), row["id"])

    return sorted(run.rows, key=place)


def columns(runs: Sequence[Run]) -> list[Column]:
    """The known columns that occur, with the metric of a task that has no column of its own."""
    keys = {key for run in runs for row in run.good for key, value in row.items() if value is not None}
    out = [c for c in COLUMNS if c.key in keys]
    for metric in dict.fromkeys(run.metric for run in runs):
        if metric in keys and metric not in KNOWN:
            text = _share if percent(metric) else lambda v: f"{v:.3f}"
            label = metric_label(metric) + (" %" if percent(metric) else "")
            at = next((i + 1 for i, c in enumerate(out) if c.key == "share"), len(out))
            out.insert(at, Column(metric, label, text, metric_label(metric)))
    kinds = dict.fromkeys(k for run in runs for row in run.good for k in row if k.startswith(BY_TYPE))
    for key in kinds:
        if not key.endswith("_stderr") and key in keys:
            name = key.removeprefix(BY_TYPE)
            out.append(Column(key, f"{name} %", _share, f"accuracy on questions of type {name} in percent", 20))
    return out


def cell(row: dict[str, Any], column: Column, axis: Axis = FLOPS) -> str:
    """The text of one cell, "-" where there is no value; a metric brings its standard error, a missed budget a star."""
    value = row.get(column.key)
    if value is None:
        return "-"
    if column.key == axis.key and misses(row, axis):
        return f"*{column.text(value)}"
    error = row.get(f"{column.key}_stderr")
    if column.key == "speedup" and row.get("id") == UNREDUCED and row.get("speedup_high") is not None:
        return f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}x"
    if column.key == "speedup" and within_noise(row):
        return f"≈{column.text(value)}"
    return column.text(value) + (f" ±{column.text(error)}" if error is not None else "")


def failure(row: dict[str, Any]) -> str:
    """The first line of a row's error, "" where there is none."""
    return str(row["error"]).splitlines()[0] if row.get("error") else ""


def notes(run: Run, brief: bool = False) -> list[str]:
    """What the rows, the errors and unusable inputs have to say, a line each; ``brief`` cuts long lists."""
    said: dict[str, list[str]] = {}
    for row in ordered(run):
        mine = said.setdefault(label(row), [])
        mine += [str(n) for n in row.get("notes") or [] if str(n) not in mine]
    who: dict[tuple[str, ...], list[str]] = {}  # rows that say the same share a line
    for name, texts in said.items():
        who.setdefault(tuple(texts), []).append(name)
    lines = []
    for told, names in who.items():
        long = brief and len(told) > 2 and UNREDUCED not in names  # what is said there holds for all rows
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        cut = f" (and {counted(len(told) - 1, 'more note')} in report.html)" if long else ""
        lines += [f"{shown}: {text}{cut}" for text in (told[:1] if cut else told)]
    lines += [f"{row['id']} failed: {failure(row)}" for row in run.errors]
    problems = run.info.get("problems") or []
    if problems:
        lines.append(f"{counted(len(problems), 'input')} could not be used, left out of every row:")
        listed = problems[:5] if brief else problems
        lines += [f"  {p.get('path', '?')}: {p.get('reason', '?')}" for p in listed]
        if len(listed) < len(problems):
            lines.append(f"  and {len(problems) - len(listed)} more, all listed in report.html")
    if run.missing:
        points = counted(len(run.info.get("points", [])), "row")
        lines.append(f"{len(run.missing)} of {points} {are(len(run.missing))} still to be measured")
    if run.repaired:
        lines.append(run.repaired)
    return lines


def again(run: Run) -> str:
    """The command that made the run."""
    command = run.info.get("command") or ""
    return command if isinstance(command, str) else shlex.join(command)
