"""The page of all methods in Markdown, made of the docstrings: ``tokenreduce methods --markdown FILE``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenreduce.core.reducer import Reducer

__all__ = ["STAGES", "anchor", "methods_page", "plain_words", "section"]

STAGES = {
    "encoder": "Inside a vision encoder",
    "projector": "Between vision encoder and language model",
    "language": "Inside the language model",
    "cache": "In the KV cache",
    "diffusion": "Inside a denoiser of a diffusion model",
}
HEAD = """# Methods

Every method that is installed, by the stage where it acts: what it does, its settings with their defaults, and where
code and paper differ. The page is made of the docstrings with `{command}`.

A method is written as text, `tome:r=16`, or as an object, `tr.ToMe(r=16)`; several are joined, `a+b`. Names that
several stages share are written with their stage, `random@projector`, where the stage does not follow from the place.
"""


def methods_page(command: str = "tokenreduce methods --markdown FILE") -> str:
    """The page; ``command`` is what it says it was made with. Raises what loading the methods raises."""
    from tokenreduce.core.reducer import STAGES as KNOWN
    from tokenreduce.core.registry import load_all

    parts = [HEAD.format(command=command)]
    for stage in KNOWN:
        kinds = {name: kind for name, kind in sorted(load_all().items()) if kind.stage == stage}
        if not kinds:
            continue
        parts.append(f"## {STAGES.get(stage, stage)}\n\nStage `{stage}`.\n\n| name | method | paper |\n|---|---|---|")
        parts[-1] += "".join(
            f"\n| [`{name}`](#{anchor(name)}) | {kind.title} | {_paper(kind)} |" for name, kind in kinds.items()
        )
        parts += [section(name, kind) for name, kind in kinds.items()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def anchor(name: str) -> str:
    """The anchor of a method's heading."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower())


def _paper(kind: type[Reducer]) -> str:
    return f"[{kind.paper}](https://arxiv.org/abs/{kind.paper})" if kind.paper[:1].isdigit() else kind.paper or "-"


def section(name: str, kind: type[Reducer], heading: bool = True) -> str:
    """What there is to say of a method, under a heading or without one."""
    from tokenreduce.cli.catalogue import defaults_of
    from tokenreduce.core.specs import format_spec

    given = defaults_of(kind)
    spec = f"`{kind.__name__}({', '.join(f'{k}={v!r}' for k, v in given.items())})`"
    text = format_spec(name, given).partition(":")[2].replace(",", ", ")
    lines = [f"### `{name}` {{ #{anchor(name)} }}"] if heading else []
    lines.append(f"**{kind.title}**, {_source(kind)}: {spec}")
    if text:
        lines.append(f"As text: `{text}`")
    lines += _told(inspect.getdoc(kind) or "")
    return "\n\n".join(lines)


def _source(kind: type[Reducer]) -> str:
    return f"arXiv {_paper(kind)}" if kind.paper[:1].isdigit() else kind.paper or "a baseline"


def _told(doc: str) -> Iterator[str]:
    """The paragraphs of a docstring, with ``Args:`` as a list."""
    for block in plain_words(doc).split("\n\n"):
        head, _, rest = block.partition("\n")
        if head != "Args:":
            yield block
            continue
        entries: list[str] = []
        for line in inspect.cleandoc(rest).splitlines():
            if line[:1].isspace() and entries:
                entries[-1] += f" {line.strip()}"
            else:
                names, _, said = line.partition(":")
                entries.append(f"- {', '.join(f'`{n.strip()}`' for n in names.split(','))}:{said}")
        yield "\n".join(entries)


def plain_words(doc: str) -> str:
    """Docstring markup as Markdown: roles become the last word of what they name.

    >>> plain_words("see :class:`~tokenreduce.core.plan.Pool` and ``keep``")
    'see `Pool` and `keep`'
    """
    doc = re.sub(r":[a-z]+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", doc)
    return re.sub(r"``(.+?)``", r"`\1`", doc, flags=re.S)
