"""The editable install as a user has it: from the folder above a clone called ``tokenreduce``, and from others."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEFT_OUT = (
    ".git",
    ".venv*",
    ".editable",
    "build",
    "dist",
    "runs",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
)
USE = "import tokenreduce as tr\nimport tokenreduce.vision\nfrom tokenreduce.video import read_frames\n"
PLACES = "print(tr.__file__, tokenreduce.vision.__file__, tr.ToMe(r=3), sep='\\n')\n"

slow = pytest.mark.slow


def run(home: Path, *command: str, cwd: Path | None = None, rc: int = 0, **extra: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TOKENREDUCE_PLUGINS")} | extra
    python = home / "env" / "bin" / "python"
    done = subprocess.run([python, *command], capture_output=True, text=True, cwd=cwd or home, env=env, timeout=300)
    assert done.returncode == rc, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the clone, and an environment that has it and shares this one's other packages."""
    if os.name != "posix":
        pytest.skip("lays an environment out as on Linux and macOS")
    home = tmp_path_factory.mktemp("home").resolve()
    shutil.copytree(ROOT, home / "tokenreduce", ignore=shutil.ignore_patterns(*LEFT_OUT))
    venv.create(home / "env", with_pip=False, symlinks=True)
    site = next((home / "env" / "lib").glob("python3*")) / "site-packages"
    shared = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "shared.pth").write_text("\n".join(shared) + "\n")
    run(
        home, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation",
        "--no-index", "-e", "tokenreduce",
    )  # fmt: skip
    return home


@slow
@pytest.mark.parametrize("place", [".", "elsewhere", "tokenreduce", "tokenreduce/vision"])
def test_python_finds_the_files_of_the_clone_from_any_folder(home, place):
    (home / place).mkdir(exist_ok=True)
    clone = home / "tokenreduce"
    wanted = [str(clone / "tokenreduce" / "__init__.py"), str(clone / "vision" / "__init__.py"), "tome:r=3"]
    assert run(home, "-c", USE + PLACES, cwd=home / place).splitlines() == wanted


@slow
def test_a_script_and_a_test_beside_the_clone(home):
    (home / "script.py").write_text(USE + PLACES)
    assert run(home, "script.py").splitlines()[-1] == "tome:r=3"
    assert run(home, str(home / "script.py"), cwd=Path("/")).splitlines()[-1] == "tome:r=3"
    (home / "test_mine.py").write_text(USE + "def test_it():\n    assert str(tr.ToMe(r=3)) == 'tome:r=3'\n")
    assert "1 passed" in run(home, "-m", "pytest", "-p", "no:cacheprovider", "test_mine.py")
    assert "1 passed" in run(home, "-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib", "test_mine.py")


@slow
@pytest.mark.parametrize("place", [".", "elsewhere"])
def test_mypy_knows_the_package_and_its_parts(home, place):
    pytest.importorskip("mypy")
    (home / place).mkdir(exist_ok=True)
    file = home / place / "typed.py"
    file.write_text(USE + "reveal_type(tr.ToMe(r=3))\nreveal_type(read_frames('a.mp4'))\ntr.ToMe(nonsense=1)\n")
    # The package's own imports are not the point here, and take a minute to read.
    (home / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,numpy.*,PIL.*]\nfollow_imports = skip\n")
    told = run(home, "-m", "mypy", "--config-file", str(home / "mypy.ini"), "typed.py", cwd=home / place, rc=1)
    assert '"tokenreduce.vision.encoder.tome.ToMe"' in told
    assert '"tokenreduce.video.reading.Frames"' in told
    assert 'Unexpected keyword argument "nonsense"' in told
    assert "Found 1 error in 1 file" in told


@slow
def test_a_new_method_appears_without_another_install(home):
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S).group(1)
    file = home / "tokenreduce" / "vision" / "encoder" / "loudest.py"
    file.write_text(code)
    try:
        assert "loudest" in run(home, "-m", "tokenreduce", "methods", "loud*", COLUMNS="200")
    finally:
        file.unlink()
    assert "loudest" not in run(home, "-m", "tokenreduce", "methods", COLUMNS="200")


@slow
def test_another_whole_package_first_on_the_path_is_taken_whole(home):
    """A wheel on PYTHONPATH, or another clone as working folder: never one's core with the other's methods."""
    other = home / "other" / "tokenreduce"
    shutil.copytree(home / "tokenreduce", other)
    (other / "vision" / "mark.py").write_text("HERE = True\n")
    code = (
        "import tokenreduce, tokenreduce.vision as v, tokenreduce.vision.mark; print(tokenreduce.__file__, v.__file__)"
    )
    wanted = f"{other / 'tokenreduce' / '__init__.py'} {other / 'vision' / '__init__.py'}"
    assert run(home, "-c", code, cwd=other).strip() == wanted


def _finder():
    spec = importlib.util.spec_from_file_location("finder", ROOT / "build_backend" / "tokenreduce_editable.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_finder_yields_to_a_whole_package_but_not_to_a_folder(tmp_path, monkeypatch):
    import tokenreduce  # noqa: F401 - a part is looked for when its package is there

    finder = _finder().Finder(str(ROOT), ("vision",))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    folder = tmp_path / "tokenreduce"
    folder.mkdir()
    assert finder.find_spec("tokenreduce").origin == str(ROOT / "tokenreduce" / "__init__.py")
    assert finder.find_spec("tokenreduce.vision").origin == str(ROOT / "vision" / "__init__.py")
    assert finder.find_spec("tokenreduce.core.plan") is None
    assert finder.find_spec("vision") is None
    sys.path_importer_cache.pop(str(tmp_path), None)
    (folder / "__init__.py").write_text("")
    assert finder.find_spec("tokenreduce").origin == str(folder / "__init__.py")


def test_a_clone_that_is_gone_is_a_missing_module(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert _finder().Finder(str(tmp_path / "gone"), ("vision",)).find_spec("tokenreduce") is None


def test_the_backend_names_the_parts_that_the_wheel_maps():
    table = re.search(r"\[tool\.setuptools\.package-dir\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S)
    mapped = dict(re.findall(r'"tokenreduce\.(\w+)" = "(\w+)"', table.group(1)))
    text = (ROOT / "build_backend" / "tokenreduce_build.py").read_text()
    parts = re.search(r"^PARTS = \((.*)\)$", text, re.M).group(1)
    assert {name: name for name in re.findall(r'"(\w+)"', parts)} == mapped
