"""The public surface: imported when used, complete, and the same object by every way."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import tokenreduce as tr

INIT = Path(tr.__file__)


def in_a_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_nothing() -> None:
    code = "import sys, tokenreduce; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert in_a_fresh_python(code) == "[]"


def test_names_come_when_they_are_used_and_models_are_not_touched() -> None:
    code = (
        "import sys, tokenreduce as tr; tr.patch, tr.Evidence, tr.ToMe; "
        "print([m for m in ('torch', 'timm', 'transformers', 'open_clip') if m in sys.modules])"
    )
    assert in_a_fresh_python(code) == "['torch']"
    assert in_a_fresh_python("from tokenreduce import Reducer, ToMe; print(issubclass(ToMe, Reducer))") == "True"
    assert in_a_fresh_python("import tokenreduce as tr; print(tr.core.plan.Prune is tr.Prune, tr.zoo.__name__)") == (
        "True tokenreduce.zoo"
    )


def test_a_part_knows_the_registry_whatever_was_imported_first() -> None:
    code = 'from tokenreduce.core.reducer import Reducer; print(Reducer.from_json(\'{"method": "tome", "r": 3}\').r)'
    assert in_a_fresh_python(code) == "3"


@pytest.mark.parametrize("name", tr.__all__)
def test_every_public_name_is_there(name: str) -> None:
    found = getattr(tr, name)
    assert found is getattr(tr, name)
    assert name in dir(tr)
    assert getattr(found, "__name__", name).rpartition(".")[2] == name


def test_type_checkers_are_told_every_name() -> None:
    body = ast.parse(INIT.read_text(encoding="utf-8")).body
    told = next(node for node in body if isinstance(node, ast.If)).body
    names = [alias.asname or alias.name for node in told if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(names) == sorted(tr.__all__)
    for node in told:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            if alias.name != "zoo":
                module = __import__(str(node.module), fromlist=[alias.name])
                assert getattr(module, alias.name) is getattr(tr, alias.name)


def test_methods_pickle_by_their_own_module() -> None:
    assert pickle.loads(pickle.dumps(tr.ToMe(r=3))) == tr.ToMe(r=3)
    assert pickle.loads(pickle.dumps(tr.ToMe)) is tr.ToMe


def test_what_is_not_there_is_an_attribute_error() -> None:
    for name in ("Nothing", "cli", "demo", "_private"):
        code = f"import tokenreduce; print(hasattr(tokenreduce, {name!r}))"
        assert in_a_fresh_python(code) == "False"
