"""Every block of code in the README and on the site runs, as it stands there, or says why not.

A fenced block names its language. ``python`` blocks of a page run from top to bottom in one namespace, ``shell`` blocks
line by line, in a folder where the files are that pages speak of. A comment above a block changes that::

    <!-- not run: the reason, for people -->
    <!-- slow -->

Names of large models become small ones with random weights (:data:`SMALL`), in one place and nowhere else.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")})
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)
MARK = re.compile(r"<!-- (not run: (?P<reason>[^\n]+)|(?P<slow>slow)) -->\s*$")
#: Languages of blocks that nobody runs.
OTHER = {"text", "json", "mermaid", "html", "toml", "yaml", "dockerfile"}
#: What programs of a shell line are run; others must be marked.
PROGRAMS = {"tokenreduce", "python"}
#: Large models, by what pages call them, and what stands for them here. LLAVA and QWEN are folders.
SMALL = {
    "timm:vit_base_patch16_224": "timm:vit_tiny_patch16_224?pretrained=false&img_size=64&depth=6",
    "timm:deit_small_patch16_224": "timm:vit_tiny_patch16_224?pretrained=false&img_size=64&depth=6",
    'timm.create_model("vit_base_patch16_224", pretrained=True)': (
        'timm.create_model("vit_tiny_patch16_224", depth=6)'
    ),
    'open_clip.create_model_and_transforms("ViT-B-16", "laion2b_s34b_b88k")': (
        'open_clip.create_model_and_transforms("ViT-B-32", None)'
    ),
    "llava-hf/llava-1.5-7b-hf": "LLAVA",
    "Qwen/Qwen2.5-VL-7B-Instruct": "QWEN",
    'dtype="bfloat16"': 'dtype="float32"',
    '"cuda"': '"cpu"',
    "--budgets 0.75,0.5": "--budgets 0.75 --limit 2 --repeats 1 --methods tome",
    "--frames 32": "--frames 4",
    "r=16": "r=4",
    "r=13": "r=3",
    "layer=18": "layer=2",
}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    reason: str = ""
    slow: bool = False


@functools.cache
def blocks(page: Path) -> tuple[Block, ...]:
    return tuple(_blocks(page, page.read_text(encoding="utf-8")))


def _blocks(page: Path, text: str) -> Iterator[Block]:
    for found in FENCE.finditer(text):
        mark = MARK.search(text[: found.start()].rstrip() + "\n") if found else None
        line = text[: found.start()].count("\n") + 1
        indent = len(found["indent"])
        code = "".join(row[indent:] if row.strip() else row for row in found["code"].splitlines(keepends=True))
        yield Block(page, line, found["language"], code, (mark and mark["reason"]) or "", bool(mark and mark["slow"]))


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runs(page: Path, slow: bool) -> bool:
    """Whether a page has code for the quick run, or for the slow one."""
    live = [b for b in blocks(page) if b.language in ("python", "shell") and not b.reason]
    return bool(live) and (any(b.slow for b in live) if slow else any(not b.slow for b in live))


# -- what pages speak of -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny local folders for hub ids."""
    pytest.importorskip("transformers")
    from vlm_folders import save_llava, save_qwen

    home = tmp_path_factory.mktemp("models")
    return {"LLAVA": save_llava(home / "llava"), "QWEN": save_qwen(home / "qwen")}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: cat.jpg, film.mp4, questions.jsonl, photos/, weights and plug-ins of nobody."""
    from films import film

    def picture(seed: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (80, 96, 3), dtype=np.uint8))

    picture(0).save(tmp_path / "cat.jpg")
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            picture(i).save(tmp_path / "photos" / name / f"{i}.jpg")
    pytest.importorskip("av")
    film(tmp_path / "film.mp4", 12, rate=4)
    lines = ['{"image": "cat.jpg", "question": "what is this", "answer": "cat"}'] * 2
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


def small(code: str, models: dict[str, Path]) -> str:
    """``code`` with small models instead of large ones."""
    for large, little in SMALL.items():
        code = code.replace(large, str(models.get(little, little)))
    return code


def namespace(place: Path) -> dict[str, Any]:
    """What every page may use without making it."""
    generator = torch.Generator().manual_seed(0)
    return {
        "images": torch.randn(2, 3, 224, 224, generator=generator),
        "image": Image.open(place / "cat.jpg").convert("RGB"),
        "x": torch.randn(1, 17, 8, generator=generator),
        "k": torch.randn(1, 17, 8, generator=generator),
    }


def run_shell(code: str) -> None:
    """Commands of ours, in this process; a line ends in ``\\`` where the next belongs to it."""
    from tokenreduce.cli import app
    from tokenreduce.vision.imagenet import app as imagenet

    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        trains = words[:2] == ["tokenreduce", "train"]
        assert not trains or "--minutes" in words, f"{line}: give it --minutes, or mark the block as not run"
        if words[:3] == ["python", "-m", "tokenreduce.vision.imagenet"]:
            done = CliRunner().invoke(imagenet, words[3:])
        elif words[0] == "tokenreduce":
            done = CliRunner().invoke(app, words[1:])
        else:
            raise AssertionError(f"{words[0]} is not run: mark the block with <!-- not run: reason -->")
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"


def run_page(page: Path, place: Path, models: dict[str, Path], slow: bool) -> None:
    """All blocks before the last that this run is about, since later ones build on earlier ones."""
    live = [b for b in blocks(page) if b.language in ("python", "shell") and not b.reason and (slow or not b.slow)]
    space = namespace(place)
    for block in live:
        code = small(block.code, models)
        try:
            if block.language == "shell":
                run_shell(code)
            else:
                exec(compile("\n" * block.line + code, str(block.page), "exec"), space)
        except Exception as error:
            raise AssertionError(f"{named(block.page)}, block at line {block.line}: {error!r}\n{code}") from error


@pytest.mark.parametrize("page", [p for p in PAGES if runs(p, slow=False)], ids=named)
def test_code_runs(page: Path, place: Path, models: dict[str, Path]) -> None:
    run_page(page, place, models, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if runs(p, slow=True)], ids=named)
def test_slow_code_runs(page: Path, place: Path, models: dict[str, Path]) -> None:
    run_page(page, place, models, slow=True)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=named)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        where = f"{named(page)}, line {block.line}"
        assert block.language in {"python", "shell"} | OTHER, f"{where}: name the language"
        if block.language == "shell" and not block.reason:
            words = {shlex.split(w)[0] for w in block.code.replace("\\\n", " ").splitlines() if w.strip()}
            assert words <= PROGRAMS, f"{where}: {words - PROGRAMS} must be marked as not run"


def test_what_is_marked_is_found() -> None:
    text = "a\n<!-- not run: needs a GPU -->\n```shell\nmake x\n```\n"
    text += "<!-- slow -->\n\n```python\n1 / 0\n```\n```text\n```\n"
    found = list(_blocks(ROOT / "README.md", text))
    assert [(b.language, b.reason, b.slow, b.line) for b in found] == [
        ("shell", "needs a GPU", False, 3), ("python", "", True, 8), ("text", "", False, 11),
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="is not run"):
        run_shell("make x\n")
    with pytest.raises(AssertionError, match="give it --minutes"):
        run_shell("tokenreduce train world-vit --out runs/x\n")
    with pytest.raises(AssertionError, match="unknown model"):
        run_shell("tokenreduce describe nonsense\n")
