"""The table of methods in its cache: the same as the registry's, and never older than what it was made from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tokenreduce as tr
from tokenreduce.cli import catalogue as page

PLUGIN = """
from dataclasses import dataclass
from tokenreduce import Reducer
from beside import KEEP

@dataclass(frozen=True)
class Mine(Reducer, name="mine", stage="encoder", title="{title}"):
    keep: float = KEEP

    def plan(self, evidence):
        raise NotImplementedError
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENREDUCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def listed(*plugins: Path, **env: str) -> tuple[dict[str, dict], bool]:
    """What ``tokenreduce methods --json`` prints in a process of its own, and whether that loaded torch."""
    code = (
        "import sys; from tokenreduce.cli import app; app(['methods', '--json'], standalone_mode=False); "
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    own = {"OMP_NUM_THREADS": "1", "TOKENREDUCE_PLUGINS": os.pathsep.join(map(str, plugins))}
    path = {"PYTHONPATH": os.pathsep.join(str(p.parent) for p in plugins)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **own, **path, **env},
        check=True,
    )
    return {each["name"]: each for each in json.loads(done.stdout)["methods"]}, done.stderr.strip() == "True"


def test_the_table_is_that_of_the_registry_and_needs_no_torch_the_second_time(cache: Path) -> None:
    first, loaded = listed()
    assert loaded
    assert len(list(cache.iterdir())) == 1
    second, loaded = listed()
    assert not loaded
    assert second == first
    assert set(first) <= set(tr.list_methods())  # tests define methods, too
    assert {name for name in tr.list_methods() if _shipped(name)} == set(first)
    assert first["tome"]["settings"]["r"] == 0


def _shipped(name: str) -> bool:
    from tokenreduce.core.registry import get_class

    return get_class(name).__module__.startswith(("tokenreduce.vision.", "tokenreduce.video."))


@pytest.mark.slow
def test_a_plugin_that_changed_is_read_again(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plugins"
    folder.mkdir()
    file, beside = folder / "mine.py", folder / "beside.py"
    beside.write_text("KEEP = 0.5\n")
    file.write_text(PLUGIN.format(title="Old"))
    assert listed(file)[0]["mine"]["title"] == "Old"
    assert not listed(file)[1]
    file.write_text(PLUGIN.format(title="New title"))
    assert listed(file)[0]["mine"]["title"] == "New title"
    beside.write_text("KEEP = 0.25 \n")
    assert listed(file)[0]["mine"]["settings"]["keep"] == 0.25
    assert "mine" not in listed()[0]


def test_files_folders_and_entry_points_decide(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "methods" / "a.py"
    file.parent.mkdir()
    file.write_text("")
    origin = {"files": page._files([str(file)]), "dirs": page._dirs([str(file.parent)])}
    place = tmp_path / "table.json"
    place.write_text(json.dumps({"key": page._key(), **origin, "table": {"methods": []}}))
    assert page._kept(place, page._key()) == {"methods": []}
    assert page._kept(place, [*page._key(), "other"]) is None
    (file.parent / "b.py").write_text("")
    assert page._kept(place, page._key()) is None
    (file.parent / "b.py").unlink()
    assert page._kept(place, page._key()) == {"methods": []}
    file.unlink()
    assert page._kept(place, page._key()) is None
    place.write_text("no json")
    assert page._kept(place, page._key()) is None


@pytest.mark.parametrize("own", ["", "/dev/null/nowhere"])
def test_without_a_place_for_it_everything_works(own: str) -> None:
    assert "tome" in listed(TOKENREDUCE_CACHE=own)[0]


def test_classes_that_no_file_has_are_listed(cache: Path) -> None:
    tr.list_methods()
    assert {each["name"] for each in page.catalogue()["methods"]} == set(tr.list_methods())
    assert not cache.exists()
