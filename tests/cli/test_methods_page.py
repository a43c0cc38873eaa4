"""The page of all methods: every one is there, with its paper, its settings and what its docstring says."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from typer.testing import CliRunner

from tokenreduce.cli import app
from tokenreduce.cli.methods_page import anchor, methods_page, plain_words
from tokenreduce.core.registry import load_all


def test_every_method_is_on_the_page() -> None:
    page = methods_page()
    sections = re.split(r"^### ", page, flags=re.M)
    assert len(sections) == 1 + len(load_all())
    for section in sections[1:]:
        name = re.match(r"`([^`]+)` \{ #(\S+) \}", section)
        kind = load_all()[name[1]]
        assert name[2] == anchor(name[1])
        assert kind.title in section
        assert not kind.paper or kind.paper in section
        assert all(f"`{field}`" in section or f"{field}=" in section for field in (f.name for f in fields(kind)))
    links = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert links == {anchor(name) for name in load_all()}


def test_args_become_a_list_and_roles_words() -> None:
    section = re.split(r"^### ", methods_page(), flags=re.M)
    (tome,) = (s for s in section if s.startswith("`tome` "))
    assert "- `prop_attn`: attention logits get log(size)" in tome
    assert "As text: `r=0, inflect=0.0" in tome
    assert ":class:" not in "".join(section)
    assert "Args:" not in "".join(section)
    assert plain_words("see :func:`tokenreduce.a.b` and ``a\nb``") == "see `b` and `a\nb`"


def test_the_command_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "docs" / "methods.md"
    done = CliRunner().invoke(app, ["methods", "--markdown", str(file)])
    assert done.exit_code == 0, done.output
    assert file.read_text(encoding="utf-8") == methods_page()
    wrong = CliRunner().invoke(app, ["methods", "to*", "--markdown", str(file)])
    assert wrong.exit_code == 2
    assert "takes no pattern" in wrong.stderr
