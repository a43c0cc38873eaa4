"""What the first tab chooses from: stored runs, their budgets and methods, the words about a row, and the link."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from tokenreduce.bench.columns import cell, columns, label, misses, ordered
from tokenreduce.bench.finding import finding
from tokenreduce.bench.methods import UNREDUCED, is_baseline
from tokenreduce.bench.names import percent
from tokenreduce.bench.picture import spread
from tokenreduce.bench.plot import trade_plot
from tokenreduce.bench.runs import Run
from tokenreduce.demo.overview_pictures import Picture, makes, pictures_of
from tokenreduce.demo.store import Store
from tokenreduce.demo.stored import stored_runs

__all__ = [
    "BEST", "Asked", "best_at", "budgets_of", "choices_at", "drawn", "fitting", "headline", "link_of", "model_of",
    "python_of", "read_link", "row_of", "rows_at", "shell_of", "slider_of", "snapped", "start", "table_at", "title_of",
]  # fmt: skip

#: Stands for whichever method is best at the budget, also when that changes.
BEST = "best"
#: Columns of the small table beside the metric and what budgets are shares of.
SHOWN = ("hard", "found", "share", "speedup", "kv_share")
#: What a link may say.
LINK = ("run", "budget", "method", "picture", "question")
#: So many of the best methods are named in the plot, beside the chosen one and chance.
NAMED = 3


@dataclass(frozen=True)
class Asked:
    """What a visitor looks at: a run by its model, one of its budgets, a method of it or :data:`BEST`, the number of a
    picture, and of a language model the place of a question among those about it."""

    run: str
    budget: float
    method: str = BEST
    picture: int = 0
    question: int = 0


def fitting(store: Store) -> tuple[list[Run], str]:
    """The stored runs of models that are on the page, and why there is none ("" where there are some)."""
    there = {*store.images, *store.languages}
    try:
        found = stored_runs()
    except (ValueError, OSError) as error:
        return [], f"the stored rows cannot be shown: {error}"
    runs = [run for run in found if model_of(run) in there and budgets_of(run) and pictures_of(run)]
    if runs:
        return runs, ""
    have = ", ".join(map(model_of, found)) or "no model"
    return [], f"there are stored rows of {have}, and no such model on this page; the tab Measure makes rows of others"


def model_of(run: Run) -> str:
    """The name of the model that a run is about."""
    return str((run.info.get("settings") or {}).get("model"))


def title_of(run: Run) -> str:
    """How the page calls a run."""
    kind = "language model" if run.info.get("task") == "vlm" else "classifier"
    return f"{model_of(run)} ({kind})"


def budgets_of(run: Run) -> list[float]:
    """Budgets that methods were measured at, from mild to strong."""
    return sorted({r["budget"] for r in run.good if r.get("budget") is not None and r["id"] != UNREDUCED}, reverse=True)


def start(run: Run) -> Asked:
    """What is looked at first: the budget in the middle, its best method, the first picture."""
    budgets = budgets_of(run)
    return Asked(model_of(run), budgets[len(budgets) // 2], BEST, pictures_of(run)[0].number)


def rows_at(run: Run, budget: float) -> list[dict[str, Any]]:
    """Rows at a budget, best first; those that miss it stand behind the others."""
    return [r for r in ordered(run) if r.get("budget") == budget and r["id"] != UNREDUCED and not r.get("error")]


def best_at(run: Run, budget: float) -> dict[str, Any]:
    """The best row at a budget: of a method that meets it, of any method or of a baseline where there is none."""
    rows = rows_at(run, budget)
    mine = [r for r in rows if not is_baseline(r["method"])]
    return next((r for r in mine if not misses(r, run.axis)), (mine or rows)[0])


def row_of(run: Run, asked: Asked) -> dict[str, Any]:
    """The row that is looked at; the best one where the method has none at the budget."""
    rows = rows_at(run, asked.budget)
    return next((r for r in rows if r["method"] == asked.method), best_at(run, asked.budget))


def slider_of(run: Run) -> tuple[float, float, float]:
    """Least, greatest and step of a slider in percent on which every budget lies."""
    tenths = [round(1000 * b) for b in budgets_of(run)]
    step = math.gcd(*(t - tenths[-1] for t in tenths)) or 10
    return tenths[-1] / 10, tenths[0] / 10, step / 10


def snapped(run: Run, percent: float) -> float:
    """The budget that a slider at ``percent`` means: the nearest that was measured."""
    return min(budgets_of(run), key=lambda b: (abs(100 * b - percent), b))


def choices_at(run: Run, budget: float) -> list[tuple[str, str]]:
    """(label, method) of the rows at a budget for a dropdown, in front of them the best one, whichever it is."""
    first = best_at(run, budget)["method"]
    rows = rows_at(run, budget)
    told = [f"{r['method']} ({_value(run, r)}{', baseline' if is_baseline(r['method']) else ''})" for r in rows]
    return [(f"the best here: {first}", BEST), *zip(told, (r["method"] for r in rows), strict=True)]


def _value(run: Run, row: dict[str, Any]) -> str:
    column = next(c for c in columns([run]) if c.key == run.metric)
    return column.text(row[run.metric]) + (" %" if column.label.endswith("%") else "")


def headline(run: Run, budget: float) -> str:
    """The finding at a budget, or that there is none."""
    none = f"{100 * budget:.4g} % of the {run.axis.label}: no method was measured that meets this budget"
    return finding(run, budget) or none


def table_at(run: Run, budget: float) -> tuple[list[str], list[list[str]]]:
    """Headers and body of the small table; the first column is the method."""
    known, rows = {c.key: c for c in columns([run])}, rows_at(run, budget)
    keys = dict.fromkeys((run.metric, *SHOWN[:2], run.axis.key, *SHOWN[2:]))
    shown = [known[k] for k in keys if k in known and any(row.get(k) is not None for row in rows)]
    body = [[row["method"], *(cell(row, c, run.axis) for c in shown)] for row in rows]
    return ["method", *(c.label for c in shown)], body


def drawn(run: Run, asked: Asked, height: int = 430) -> Any:
    """The plot of a run: the budget as a line with the names of a few methods beside it, the chosen one thick."""
    figure = trade_plot(run, "flops" if run.axis.key == "share" else "cost", height=height)
    chosen = row_of(run, asked)["method"]
    for trace in figure.data:
        if trace.name == chosen:
            trace.update(line_width=4, marker_size=11)
        elif trace.name not in (UNREDUCED, "Pareto front"):
            trace.update(opacity=0.55)
    if whole := next((r for r in run.good if r["id"] == UNREDUCED), None):
        figure.add_annotation(
            text=f"unreduced {_value(run, whole)}", x=100, y=_scaled(run, whole), xanchor="right", yanchor="bottom",
            yshift=9, xshift=8, showarrow=False, font={"size": 12},
        )  # fmt: skip
    figure.add_vline(x=100 * asked.budget, line={"color": "#808080", "width": 1.5, "dash": "dash"})
    for text, x, y in _names(run, asked.budget, chosen):
        figure.add_annotation(
            text=text, x=x, y=y, xanchor="left", xshift=9, showarrow=False, font={"size": 12},
            bgcolor="rgba(255,255,255,0.8)", borderpad=0,
        )  # fmt: skip
    # Room above the lines for what is written there.
    values = [_scaled(run, r) for r in run.good if r.get(run.metric) is not None]
    room = max(values) - min(values) or 1.0
    figure.update_yaxes(range=[min(values) - 0.05 * room, max(values) + 0.15 * room])
    # What a visitor has zoomed into stays when the slider moves.
    figure.update_layout(
        showlegend=False, uirevision=model_of(run), margin={"t": 12, "b": 45, "l": 50, "r": 10},
    )  # fmt: skip
    return figure


def _scaled(run: Run, row: dict[str, Any]) -> float:
    """The metric of a row as the plot has it."""
    return float(row[run.metric]) * (100.0 if percent(run.metric) else 1.0)


def _names(run: Run, budget: float, chosen: str) -> list[tuple[str, float, float]]:
    rows = [r for r in rows_at(run, budget) if r.get(run.axis.key) is not None and not misses(r, run.axis)]
    mine = [r for r in rows if not is_baseline(r["method"])][:NAMED]
    mine += [r for r in rows if r not in mine and (r["method"] == chosen or r["method"].startswith("random"))]
    values, every = [_scaled(run, r) for r in mine], [_scaled(run, r) for r in run.good if run.metric in r]
    room = max(every) - min(every)
    places = spread(values, 0.06 * room, min(every) - 0.03 * room, max(every) + 0.1 * room)
    return [(r["method"], 100 * r[run.axis.key], y) for r, y in zip(mine, places, strict=True)]


def python_of(row: Mapping[str, Any]) -> str:
    """The line of Python that does what a row did."""
    return f'tr.patch(model, "{label(dict(row))}")'


def shell_of(run: Run, row: Mapping[str, Any], picture: Picture, question: int = 0) -> str:
    """The command that shows what the page shows, behind the one that makes the picture where there is one."""
    made, spec = makes(run, picture), shlex.quote(label(dict(row)))
    file = "scene.png" if made else "IMAGE.png"
    if run.info.get("task") == "vlm":
        asked = shlex.quote(picture.questions[question][0])
        line = f"tokenreduce generate {model_of(run)} --image {file} --prompt {asked} --reduce {spec}"
    else:
        line = f"tokenreduce show {model_of(run)} {file} --reduce {spec}"
    return "\n".join(filter(None, (made, line)))


def link_of(run: Run, asked: Asked, here: str = "") -> str:
    """The address of the page, ``here`` without a query, with what is looked at; the method by its name."""
    values: dict[str, Any] = {
        "run": asked.run, "budget": f"{asked.budget:g}", "method": row_of(run, asked)["method"],
        "picture": asked.picture,
    }  # fmt: skip
    if run.info.get("task") == "vlm":
        values["question"] = asked.question
    return f"{here}?{urlencode(values)}"


def read_link(runs: Sequence[Run], query: Mapping[str, str]) -> tuple[Asked, str]:
    """What a link asks for, and what of it is not there, "" where all is: the page's own choice takes its place."""
    # What begins with __ is Gradio's.
    strange = [key[:60] for key in query if key not in LINK and not key.startswith("__")]
    wrong = [f"the link has {key}, which means nothing here; a link has: {', '.join(LINK)}" for key in strange[:3]]
    known = {model_of(run): run for run in runs}
    run = known[_one_of(query, "run", {name: name for name in known}, model_of(runs[0]), wrong)]
    asked = start(run)
    budgets = {f"{b:g}": b for b in budgets_of(run)}
    given = dict(query)
    if (number := _number(given.get("budget"))) is not None:
        given["budget"] = f"{number:g}"
    asked = replace(asked, budget=_one_of(given, "budget", budgets, asked.budget, wrong))
    methods = {m: m for _, m in choices_at(run, asked.budget)}
    asked = replace(asked, method=_one_of(given, "method", methods, BEST, wrong))
    pictures = {str(p.number): p for p in pictures_of(run)}
    picture = _one_of(given, "picture", pictures, pictures_of(run)[0], wrong)
    questions = {str(i): i for i in range(len(picture.questions))} or {"0": 0}
    question = _one_of(given, "question", questions, 0, wrong)
    told = [*wrong, "In its place stands what the page opens with."] if wrong else []
    return replace(asked, picture=picture.number, question=question), "\n".join(told)


def _one_of(query: Mapping[str, str], key: str, known: Mapping[str, Any], default: Any, wrong: list[str]) -> Any:
    text = query.get(key)
    if text is None:
        return default
    if text not in known:
        wrong.append(f"the link asks for {key}={text[:60]}, which is not there; there are: {', '.join(known)}")
        return default
    return known[text]


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
