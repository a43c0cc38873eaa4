"""The HTML page of one or several runs: everything in one file, readable without a network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenreduce.bench.columns import INTERNAL, Column, again, cell, columns, compact, failure, label, notes, ordered
from tokenreduce.bench.finding import finding
from tokenreduce.bench.methods import UNREDUCED, is_baseline
from tokenreduce.bench.picture import need
from tokenreduce.bench.plot import trade_axes, trade_plot
from tokenreduce.bench.runs import OTHER_OUT, Run
from tokenreduce.bench.task import Axis
from tokenreduce.common.files import write_text
from tokenreduce.common.words import counted

__all__ = ["write_html"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --soft: #555; --line: #e4e4e4; --code: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --paper: #16181c; --soft: #a8a8a8; --line: #33363c; --code: #22252b; }
  .plotly-graph-div text { fill: #c8c8c8 !important; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1240px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.lead { color: var(--soft); margin-top: 0; }
.finding { font-size: 1.15rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th { text-align: right; border-bottom: 2px solid var(--soft); padding: 3px 9px; white-space: nowrap; }
table.rows th { cursor: pointer; }
td { text-align: right; padding: 2px 9px; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th.l, td.l { text-align: left; }
td.w { white-space: normal; }
tr.first td { border-top: 1px solid var(--soft); }
tr.base td { color: var(--soft); }
tr.top td { font-weight: 600; }
tr.error td { color: #d04050; }
pre { background: var(--code); padding: .7rem 1rem; overflow-x: auto; font-size: 13px; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
"""
_SORT = """
document.querySelectorAll('table.rows').forEach(t => t.querySelectorAll('th').forEach((h, i) => h.onclick = () => {
  const body = t.tBodies[0], rows = [...body.rows], up = h.dataset.up !== '1';
  t.querySelectorAll('th').forEach(o => delete o.dataset.up); h.dataset.up = up ? '1' : '0';
  const key = r => { const v = r.cells[i].dataset.v; return v === '' || isNaN(v) ? v : +v; };
  rows.sort((a, b) => { const x = key(a), y = key(b), n = typeof x === 'number', m = typeof y === 'number';
    return n !== m ? (n ? -1 : 1) : (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); });
  rows.forEach(r => { r.classList.remove('first'); body.append(r); });
}));
"""


def write_html(runs: Sequence[Run], path: str | Path, command: str = "") -> Path:
    """One page with everything in it, readable without a network: plots with hover, rows, settings, notes, problems.

    ``command`` rebuilds the page; each run's own command is printed beside its settings. Raises ``ImportError``
    without plotly.
    """
    need("plotly", "the HTML report")
    parts = [f"<h1>tokenreduce: {_e(', '.join(run.folder.name for run in runs))}</h1>"]
    included = False
    for run in runs:
        settings = run.info.get("settings", {})
        what = " on ".join(str(settings[k]) for k in ("model", "data") if settings.get(k))
        done = counted(len(run.good), "row") + (f", {len(run.errors)} failed" if run.errors else "")
        done += f", {len(run.missing)} still to be measured" if run.missing else ""
        if len(runs) > 1:
            parts.append(f"<h2>{_e(run.folder.name)}</h2>")
        parts.append(
            f'<p class="lead">{_e(what or run.info.get("task", ""))}: {done}; '
            f"started {_e(run.info.get('started', '?'))}</p>"
        )
        if said := finding(run):
            parts.append(f'<p class="finding">{_e(said)}</p>')
        for figure in _figures(run):
            parts.append(figure.to_html(full_html=False, include_plotlyjs=not included, config={"displaylogo": False}))
            included = True
        parts.append("<h2>Rows</h2><p>Click a heading to sort. Grey rows are the baselines that every table shows.</p>")
        parts.append(_html_rows(run))
        if told := notes(run):
            listed = "".join(f"<li>{_e(line)}</li>" for line in told)
            parts.append(f"<details><summary>{counted(len(told), 'note')}</summary><ul>{listed}</ul></details>")
        parts += [_html_errors(run)]
        for title, key in (("Settings", "settings"), ("Versions", "versions"), ("Hardware", "hardware")):
            if run.info.get(key):
                parts.append(f"<h2>{title}</h2>{_html_pairs(_flat(run.info[key]))}")
        if again(run):
            parts.append(f"<h2>Made by</h2><pre>{_e(again(run))}</pre>")
    if command:
        parts.append(f"<p>This page again, from the rows:</p><pre>{_e(command)}</pre>")
    parts.append(_html_legend(columns(runs)))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>tokenreduce: {_e(', '.join(r.folder.name for r in runs))}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts) + f"<script>{_SORT}</script></body></html>\n"
    )  # fmt: skip
    return write_text(path, page, OTHER_OUT)


def _e(value: Any) -> str:
    return html.escape(str(value))


def _figures(run: Run) -> list[Any]:
    return [trade_plot(run, axis) for axis in trade_axes(run) if axis in ("cost", "speedup")]


def _html_rows(run: Run) -> str:
    shown = columns([run])
    extra = sorted(
        {k for r in run.good for k, v in r.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        - {c.key for c in shown}
        - {*INTERNAL, *(f"{c.key}_stderr" for c in shown)}
    )
    head = '<th class="l">budget</th><th class="l">method</th>'
    head += "".join(f'<th title="{_e(c.help)}">{_e(c.label)}</th>' for c in shown)
    head += "".join(f"<th>{_e(k)}</th>" for k in extra)
    body: list[str] = []
    before: Any = None
    for row in ordered(run):
        budget = row.get("budget")
        kinds = ["first"] if budget != before else []
        kinds += ["top"] if row["id"] == UNREDUCED else ["base"] if is_baseline(row["method"]) else []
        before = budget
        share = "" if row["id"] == UNREDUCED or budget is None else f"{100 * budget:.4g} %"
        cells = [_td(share, budget, "l"), _td(label(row), label(row), "l")]
        if row.get("error"):
            kinds.append("error")
            cells.append(f'<td class="l w" data-v="" colspan="{len(shown) + len(extra)}">{_e(failure(row))}</td>')
        else:
            cells += [_td(_full(row, c, run.axis), _key(row.get(c.key))) for c in shown]
            cells += [_td("-" if row.get(k) is None else f"{row[k]:.6g}", row.get(k)) for k in extra]
        body.append(f'<tr class="{" ".join(kinds)}">{"".join(cells)}</tr>')
    rows = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="wide"><table class="rows">{rows}</table></div>'


def _td(text: str, key: Any, kind: str = "") -> str:
    """A cell; ``key`` is what the column sorts by."""
    return f'<td class="{kind}" data-v="{"" if key is None else _e(key)}">{_e(text)}</td>'


def _full(row: dict[str, Any], column: Column, axis: Axis) -> str:
    value = row.get(column.key)
    return compact(value, whole=True) if column.text is compact and value is not None else cell(row, column, axis)


def _key(value: Any) -> Any:
    return value[-1] if isinstance(value, list) and value else value


def _html_pairs(pairs: dict[str, str]) -> str:
    rows = "".join(f'<tr><td class="l">{_e(k)}</td><td class="l w">{_e(v)}</td></tr>' for k, v in pairs.items())
    return f'<div class="wide"><table>{rows}</table></div>'


def _html_errors(run: Run) -> str:
    return "".join(
        f"<details><summary>error in {_e(r['id'])}</summary><pre>{_e(r.get('traceback') or r['error'])}</pre></details>"
        for r in run.errors
    )


def _html_legend(shown: Sequence[Column]) -> str:
    return f"<h2>Columns</h2>{_html_pairs({c.label: c.help for c in shown})}"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            text = ", ".join(str(v) for v in value) if isinstance(value, list) else str(value)
            out[prefix + key] = "-" if value is None else text
    return out
