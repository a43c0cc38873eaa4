"""Type hints of the public surface are complete for a user who checks strictly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

USE = Path(__file__).with_name("typed_use.py")


@pytest.mark.slow
def test_a_users_program_is_strictly_typed(tmp_path: Path) -> None:
    """Errors in that file alone count: they are those that a user would see."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        'import tokenreduce as tr\nreveal_type(tr.patch)\nx: int = tr.list_methods()\ntr.ToMe(keep="half")\n'
    )
    root = Path(__file__).parents[1]
    env = {**os.environ, "MYPYPATH": os.pathsep.join(str(root / ".editable" / part) for part in ("package", "parts"))}
    files = [str(USE), str(wrong)]
    command += ["--cache-dir", str(tmp_path / "cache"), *files]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    said = done.stdout.splitlines()
    assert [line for line in said if "typed_use.py" in line] == [], done.stdout + done.stderr
    mistakes = [line for line in said if "wrong.py" in line]
    assert any('Revealed type is "def [M' in line and "Any" not in line.partition("->")[2] for line in mistakes), said
    assert any("[assignment]" in line for line in mistakes), "tr.list_methods is typed"
    assert any("[arg-type]" in line for line in mistakes), "settings of methods are typed"
