"""What a release must be: ``make release-check``.

Builds sdist and wheel, looks into the wheel, installs it without extras into a fresh environment, and uses it there:
the import costs nothing beside torch, the command line answers, and what an extra brings is asked for by name.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "release-check"
DIST = ROOT / "dist"
MOST_BYTES = 30 << 20
MOST_IMPORT_S = 0.1
#: What may stand at the top of the wheel.
TOP = re.compile(r"tokenreduce/|tokenreduce-[\d.]+\.dist-info/")
#: What is tried without extras, and the extra that must be named. IMAGE, FILM, FOLDER and SHARDS are made for it.
LACKING = {
    "describe timm:vit_tiny_patch16_224?pretrained=false": "timm",
    "describe open_clip:ViT-B-32/openai": "open_clip",
    "describe hf:FOLDER": "hf",
    "describe world-llava": "hf",
    "describe digits-vit": "bench",
    "bench vlm --out runs": "bench",
    "stream FILM": "video",
    "demo": "demo",
}
DATA = """
from types import SimpleNamespace
from tokenreduce.bench.data import load_data
load_data("hf:FOLDER", "test", SimpleNamespace(transform=None, labels=None, wnids=None, num_classes=0))
"""
IMPORT = """
import sys, time, torch
start = time.perf_counter()
import tokenreduce
first = time.perf_counter() - start
tokenreduce.patch, tokenreduce.Evidence, tokenreduce.Plan
whole = time.perf_counter() - start
assert not {"timm", "transformers", "open_clip", "decord", "gradio"} & set(sys.modules)
print(first, whole, tokenreduce.__version__, tokenreduce.__file__)
"""


def main() -> None:
    """Every step in turn; the first that fails ends the program with what is wrong."""
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # an earlier build's files would go into the wheel
    for old in (*DIST.glob("*.whl"), *DIST.glob("*.tar.gz")):
        old.unlink()
    version = _version()
    _documents(version)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    say(run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist).strip())
    _contents(wheel, version)
    try:
        python = _fresh(wheel)
        _imports(python, version)
        _commands(python, version)
        _extras(python)
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
    say(f"{wheel.name} and {sdist.name} are in {DIST.relative_to(ROOT)}/")


def _version() -> str:
    tree = ast.parse((ROOT / "tokenreduce" / "__init__.py").read_text(encoding="utf-8"))
    found = [n for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__version__"]
    return str(ast.literal_eval(found[0].value))


def _documents(version: str) -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    dated = re.search(rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$", changes, re.M)
    need(dated is not None, f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD'")
    need(f"\nversion: {version}\n" in cited, f"CITATION.cff names another version than {version}")
    need(f"\ndate-released: {dated[1]}\n" in cited, "CITATION.cff and CHANGELOG.md name different days")
    say(f"version {version} of {dated[1]} in CHANGELOG.md and CITATION.cff")


def _contents(wheel: Path, version: str) -> None:
    need(wheel.stat().st_size <= MOST_BYTES, f"{wheel.name} has {wheel.stat().st_size:,} bytes")
    names = zipfile.ZipFile(wheel).namelist()
    strange = [n for n in names if not TOP.match(n) or "/tests/" in n or n.endswith((".pyc", ".ipynb"))]
    need(not strange, f"the wheel holds {strange[:5]}")
    there = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tokenreduce").rglob("*.py")}
    for room in ("adapters", "demo", "video", "vision"):
        there |= {f"tokenreduce/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / room).rglob("*.py")}
    data = ("py.typed", "zoo/weights/digits-vit.safetensors", "demo/stored/world-vit-2.jsonl")
    there |= {f"tokenreduce/{f}" for f in data}
    there |= {f"tokenreduce-{version}.dist-info/{f}" for f in ("METADATA", "entry_points.txt", "licenses/LICENSE")}
    lost = sorted(there - set(names))
    need(not lost, f"the wheel lacks {lost[:5]}: is the package listed in pyproject.toml?")
    say(f"{len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB, none of them a test")


def _fresh(wheel: Path) -> Path:
    venv.create(WORK / "env", with_pip=True)
    python = WORK / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    say("installing into a fresh environment (torch and all, some minutes)")
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel)
    return python


def _imports(python: Path, version: str) -> None:
    # The best of some: the first time compiles bytecode, and others use the machine, too.
    told = [run(python, "-c", IMPORT).split() for _ in range(5)]
    first, whole = (min(float(t[i]) for t in told) for i in (0, 1))
    need(told[0][2] == version, f"the installed package says {told[0][2]}")
    need(str(WORK) in told[0][3], f"the package was imported from {told[0][3]}")
    need(first < MOST_IMPORT_S, f"import tokenreduce takes {first:.3f} s beside torch")
    say(f"import tokenreduce: {first:.3f} s beside torch; with patch, plans and evidence {whole:.3f} s")


def _commands(python: Path, version: str) -> None:
    need(run(python, "-m", "tokenreduce", "--version").split() == ["tokenreduce", version], "--version")
    need("Usage" in run(python, "-m", "tokenreduce", "--help"), "--help")
    need("tome" in run(python, "-m", "tokenreduce", "methods", "to*"), "methods")
    need("wrote" in run(python, "-m", "tokenreduce", "scene", "scene.png"), "scene")
    say("the command line answers")


def _extras(python: Path) -> None:
    folder = WORK / "empty"
    (folder / "FOLDER").mkdir()
    (folder / "FOLDER" / "config.json").write_text('{"model_type": "vit"}')
    (folder / "FILM").write_bytes(bytes(1000))
    tried = [([*line.split()], extra) for line, extra in LACKING.items()]
    for words, extra in tried:
        said = run(python, "-m", "tokenreduce", *words, rc=2)
        need(f"pip install 'tokenreduce[{extra}]'" in said, f"tokenreduce {' '.join(words)} says: {said[-300:]}")
    said = run(python, "-c", DATA, rc=1)
    need("pip install 'tokenreduce[data]'" in said, f"a data set without datasets says: {said[-300:]}")
    say(f"{len(tried) + 1} things that need an extra name it: {', '.join(sorted({*LACKING.values(), 'data'}))}")


def run(*command: object, rc: int = 0) -> str:
    """What a program prints, run in an empty folder; ends this one where the status is another than ``rc``."""
    (WORK / "empty").mkdir(parents=True, exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TOKENREDUCE_PLUGINS")}
    env = {**clean, "HF_HUB_OFFLINE": "1", "TOKENREDUCE_CACHE": "", "COLUMNS": "200"}
    done = subprocess.run(
        [str(c) for c in command], cwd=WORK / "empty", env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    shown = " ".join(map(str, command[1:]))
    need(done.returncode == rc, f"{shown} ended with {done.returncode}: {done.stdout[-3000:]}")
    return done.stdout


def need(good: bool, message: str) -> None:
    """End with ``message`` unless ``good``."""
    if not good:
        sys.exit(f"release-check: {message}")


def say(text: str) -> None:
    """Progress."""
    print(f"release-check: {text}", flush=True)


if __name__ == "__main__":
    main()
