"""The page of all methods: every one is there, with its paper, its settings and what its docstring says."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from tokenreduce.bench.gallery.kept import Kept, Without, as_text, read_kept
from tokenreduce.cli import app
from tokenreduce.cli.method_pages import NEEDS, method_pages, method_pictures
from tokenreduce.cli.methods_page import anchor, methods_page, plain_words
from tokenreduce.core.registry import load_all

ROOT = Path(__file__).parents[2]


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


def test_every_method_has_a_page_with_its_stored_results() -> None:
    pages = method_pages((ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    assert set(pages) == {f"{anchor(name)}.md" for name in load_all()}
    page = pages["visionzip.md"]
    assert page.startswith("# visionzip\n")
    assert "https://arxiv.org/abs/2412.04467" in page
    assert "- `keep`: outputs in all" in page
    assert "- `tower`: queries and keys of blocks of the vision tower" in page
    assert re.search(r"^\| `visionzip:keep=0.25` \| 25.0 \| [\d.]+ ±[\d.]+ \|", page, re.M)
    assert ">random " in page, "the baseline is drawn beside it"
    assert "stroke-dasharray" in page
    assert "stroke-dasharray" not in pages["random.md"]
    assert all(set(kind.needs) <= set(NEEDS) for kind in load_all().values())


def test_a_method_without_results_says_so() -> None:
    assert all("has no row on the [results page]" in page for page in method_pages("").values())


def test_a_curve_goes_from_the_unreduced_model_down() -> None:
    page = "## a\n### 50 %\n| method | GMACs | FLOPs % | accuracy % |\n|---|---|---|---|\n"
    page += "| `unreduced` | 1 | 100.0 | 90.0 |\n"
    page += "| `tome:keep=0.5` | 1 | *50.0 | 80.0 ±1.0 |\n| `random:keep=0.5` (baseline) | 1 | 50.0 | 40.0 |\n"
    page += "\n| method | colour % |\n|---|---|\n| `tome:keep=0.5` | 3 |\n"
    drawn = method_pages(page)["tome.md"]
    points = re.findall(r'<polyline points="([^"]+)"', drawn)
    assert len(points) == 2
    (first, last), (other, low) = ([tuple(map(float, p.split(","))) for p in line.split()] for line in points)
    assert first == other
    assert first[0] < last[0] == low[0]
    assert first[1] < last[1] < low[1]


def test_a_page_shows_what_its_method_keeps_and_others_say_why_not() -> None:
    region = np.arange(196).reshape(14, 14)
    some, layers = np.where(region < 49, region, -1), np.where(region[None] < 98, [[[4]]], 0).repeat(6, 0)
    kept = {
        "tome": Kept("tome:keep=0.25", "world-vit", "scenes", (some, some, some)),
        "snapkv": Kept("snapkv:keep=0.5", "world-llava", "scenes", (layers,) * 3, 4, "With a note."),
        "minicache": Without("It drops nothing."),
    }
    pages, files = method_pages("", kept), method_pictures(kept)
    assert set(files) == {"pictures-scenes.webp", "pictures-clip.webp", "tome.webp", "snapkv.webp"}
    assert (
        "`tome:keep=0.25` in `world-vit`, of three scenes of the embedded world's test split, of which 49 of 196 tokens"
        in (pages["tome.md"])
    )
    assert "which 98 of 196 keys in a head, mean over layers and heads are left. With a note." in pages["snapkv.md"]
    assert "No picture: It drops nothing." in pages["minicache.md"]
    assert "No picture yet: `python -m tokenreduce.bench.gallery docs/kept.json` makes it." in pages["evit.md"]
    for name, page in pages.items():
        shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
        assert shown == (["pictures-scenes.webp", name.replace(".md", ".webp")] if name[:-3] in files_of(files) else [])
    # A method before the language model may look at the question; one inside an encoder cannot.
    assert "Asked was: *" in pages["snapkv.md"]
    assert "Asked" not in pages["tome.md"]


def files_of(files: dict[str, bytes]) -> set[str]:
    return {name.removesuffix(".webp") for name in files}


def test_the_command_writes_all_pages(tmp_path: Path) -> None:
    few = tmp_path / "kept.json"
    few.write_text(as_text({"tome": read_kept(ROOT / "docs" / "kept.json")["tome"]}))
    words = ["methods", "--pages", str(tmp_path / "m"), "--results", str(ROOT / "docs" / "results.md")]
    words += ["--kept", str(few)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "m").glob("*.md"))) == len(load_all())
    assert {f.name for f in (tmp_path / "m").glob("*.webp")} == {
        "tome.webp", "pictures-scenes.webp", "pictures-clip.webp"
    }  # fmt: skip
    few.write_text("[]")
    broken = CliRunner().invoke(app, words)
    assert broken.exit_code == 2
    assert "kept.json is not what" in " ".join(broken.stderr.split())
    wrong = CliRunner().invoke(app, [*words, "--stage", "encoder"])
    assert wrong.exit_code == 2
    assert "--pages writes pages of all methods" in wrong.stderr
