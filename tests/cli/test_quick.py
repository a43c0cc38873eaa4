"""What is asked of the command line before any work is answered without torch, and commands are one table."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tokenreduce.cli import commands
from tokenreduce.cli.commands import COMMANDS, GROUPS, Lazy, Tree

#: Loading one of these takes longer than the whole answer may.
HEAVY = ("torch", "numpy", "PIL", "transformers", "timm", "pandas", "matplotlib", "gradio")
QUESTIONS = [
    ["--help"],
    ["--version"],
    [],
    ["bench"],
    ["nonsense"],
    ["bench", "vision", "--limit", "many"],
    ["describe"],
    ["show", "a", "b", "--nonsense"],
    *([*entry.name.split(), "--help"] for entry in COMMANDS),
]


def loaded(code: str, **env: str) -> set[str]:
    told = f"import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {code}"
    clean = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, env=clean, check=False)
    assert "Traceback" not in done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("words", QUESTIONS, ids=" ".join)
def test_answers_load_nothing_heavy(words: list[str]) -> None:
    modules = loaded(f"sys.argv[1:] = {words!r}; from tokenreduce.cli import main; main()")
    assert "tokenreduce.cli" in modules
    assert not modules.intersection(HEAVY)


@pytest.mark.parametrize(("typed", "position"), [("tokenreduce ", "1"), ("tokenreduce bench v", "2")])
def test_completion_loads_nothing_heavy(typed: str, position: str) -> None:
    modules = loaded(
        "sys.argv[:] = ['tokenreduce']; from tokenreduce.cli import main; main()",
        _TOKENREDUCE_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=position,
    )  # fmt: skip
    assert "tokenreduce.cli" in modules
    assert not modules.intersection(HEAVY)


def test_a_command_imports_its_own_module_alone() -> None:
    modules = loaded("sys.argv[1:] = ['scene', '--help']; from tokenreduce.cli import main; main()")
    assert {"tokenreduce.cli.scene", "tokenreduce.cli.commands"} <= modules
    others = {entry.module for entry in COMMANDS} - {"tokenreduce.cli.scene"}
    assert not modules.intersection(others)


def test_a_new_command_is_a_module_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    from typer.testing import CliRunner

    module = types.ModuleType("tokenreduce.cli.ask_stream")
    module.command = lambda: print("asked")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(commands, "COMMANDS", (*COMMANDS, commands.Entry("ask-stream", "film.mp4")))
    import typer

    app = typer.Typer(cls=Tree)
    app.callback()(lambda: None)
    assert CliRunner().invoke(app, ["ask-stream"]).output == "asked\n"
    assert "Example: tokenreduce ask-stream film.mp4" in CliRunner().invoke(app, ["ask-stream", "--help"]).output


def test_the_tree_holds_every_command() -> None:
    top, bench = Lazy(), Lazy("bench ")
    first = list(dict.fromkeys(entry.name.split()[0] for entry in COMMANDS))
    assert list(top) == first
    assert set(GROUPS) == {name for name in first if top.entries[name] is None}
    assert list(bench) == ["vision", "vlm", "video"]
    assert len(bench) == 3
    assert "vlm" in bench
    assert "vlm" not in top
    bench["mine"] = "a command"
    assert (list(bench)[-1], bench["mine"]) == ("mine", "a command")
    del bench["mine"]
    assert "mine" not in bench
    with pytest.raises(KeyError):
        bench["mine"]
