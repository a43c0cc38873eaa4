"""What documents name is there: files, folders, links, modules and what is in them, ``make`` targets, lines to read."""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import re
from pathlib import Path

import pytest

import tokenreduce as tr

ROOT = Path(__file__).parents[1]
#: A changelog tells of names that are gone.
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {ROOT / "CHANGELOG.md"})
ARCHITECTURE = ROOT / "docs" / "architecture.md"
#: The folders beside tokenreduce/ that are its subpackages.
ROOMS = ("adapters", "vision", "video", "demo")
TREE = ("tokenreduce", *ROOMS, "tests", "docs", "notebooks", "build_backend", ".ci")
#: Files that a reader is told to write.
TO_WRITE = {"vision/encoder/loudest.py", "tests/vision/encoder/test_loudest.py", "loudest.py", "test_loudest.py"}
#: Pages of the site that are made when it is built, see .ci/site_hooks.py.
MADE = {ROOT / "docs" / "methods.md"}
#: Words that look like names in the package and are none: groups of entry points.
GROUPS = {"tokenreduce.methods"}
#: The language stage is to be read in about this many lines.
LINES_TO_READ = 650


@functools.cache
def names_of_files() -> frozenset[str]:
    return frozenset(f.name for d in TREE for f in (ROOT / d).rglob("*.*"))


def missing_paths(text: str) -> list[str]:
    """Paths into the tree, and bare names of Python files, that do not exist."""
    tree = "|".join(map(re.escape, TREE))
    found = {path for path in re.findall(rf"(?<![\w./:-])((?:{tree})/[\w./-]*)", text) if "://" not in path} | set(
        re.findall(r"`([\w-]+\.py)`", text)
    )
    found = {path.rstrip(".") for path in found} - TO_WRITE
    return sorted(p for p in found if not ((ROOT / p).exists() if "/" in p else p in names_of_files()))


def missing_links(text: str, folder: Path) -> list[str]:
    """Targets of relative links that do not exist, headings among them."""
    out = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = folder / path if path else None
        page = text if file is None or not heading else file.read_text(encoding="utf-8") if file.exists() else ""
        if file is not None and file.resolve() in MADE:
            continue
        if (file is not None and not file.exists()) or (heading and heading not in headings(page)):
            out.append(target)
    return out


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def module_file(parts: list[str]) -> Path | None:
    """The file of module ``tokenreduce.<parts>``."""
    at = ROOT.joinpath(*parts) if parts and parts[0] in ROOMS else ROOT.joinpath("tokenreduce", *parts)
    return next((f for f in (at / "__init__.py", at.with_suffix(".py")) if f.exists()), None)


@functools.cache
def defined(file: Path, inside: str = "") -> frozenset[str]:
    """Names that a module, or a class in it, has."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    if inside:
        body = next((n.body for n in body if isinstance(n, ast.ClassDef) and n.name == inside), [])
    # Packages that import late tell type checkers what they have.
    body = [n for node in body for n in (node.body if isinstance(node, ast.If) else [node])]
    out: set[str] = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            out.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            out |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            out |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return frozenset(out)


def is_there(dotted: str) -> bool:
    """Whether ``tokenreduce.a.b.Name.member`` is a module, a name in one, or a member of a class; imports nothing."""
    parts = dotted.split(".")[1:]
    for cut in range(len(parts), -1, -1):
        file, rest = module_file(parts[:cut]), parts[cut:]
        if file is None:
            continue
        if not cut and rest:
            return hasattr(tr, rest[0])
        return not rest or (rest[0] in defined(file) and (len(rest) == 1 or rest[1] in defined(file, rest[0])))
    return False


def missing_names(text: str) -> list[str]:
    dotted = set(re.findall(r"\btokenreduce(?:\.[A-Za-z_]\w*)+", text))
    imported = {
        f"{module}.{name.strip()}"
        for module, names in re.findall(r"^\s*from (tokenreduce[\w.]*) import ([\w, ]+)$", text, re.M)
        for name in names.split(",")
    }
    files = {d for d in dotted if d.rpartition(".")[2] in ("py", "md", "toml", "safetensors", "json")}
    short = {f"tr.{n}" for n in re.findall(r"(?<![\w.])tr\.([A-Za-z]\w*)", text) if not hasattr(tr, n)}
    return sorted({d for d in (dotted | imported) - files if not is_there(d)} - GROUPS | short)


def missing_tests(text: str) -> list[str]:
    """Tests, ``tests/test_a.py::test_b``, that do not exist."""
    named = set(re.findall(r"(tests/[\w/]+\.py)::(\w+)", text))
    return sorted(f"{f}::{t}" for f, t in named if not (ROOT / f).exists() or t not in defined(ROOT / f))


def missing_targets(text: str) -> list[str]:
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    # In code only: "make" is a word of English, too.
    code = re.findall(r"`(make [\w -]+)`", text) + re.findall(r"^(make [\w -]+?) *(?:#.*)?$", text, re.M)
    return sorted({t for line in code for t in line.split()[1:] if not t.startswith("-")} - known)


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(d.relative_to(ROOT)) for d in DOCUMENTS])
def test_what_documents_name_is_there(document):
    text = document.read_text(encoding="utf-8")
    assert missing_paths(text) == []
    assert missing_links(text, document.parent) == []
    assert missing_names(text) == []
    assert missing_tests(text) == []
    assert missing_targets(text) == []


def test_what_is_not_there_is_found():
    assert missing_paths("`adapters/vlm.py`, `vision/encoder/tome.py`, `tokenreduce/core/` and `vlm_decode.py`.") == [
        "adapters/vlm.py", "vlm_decode.py",
    ]  # fmt: skip
    assert missing_links("[a](docs/no.md) [b](README.md#no) [c](https://x.org/no)", ROOT) == [
        "docs/no.md",
        "README.md#no",
    ]
    names = (
        "`tokenreduce.evidence_.X`, `tokenreduce.core.plan.Prune.kk`, `tokenreduce.core.plan.prune.Prune`, `tr.ToMee`"
    )
    assert missing_names(names + "\nfrom tokenreduce.core.plan import Prune, Pruned\n") == [
        "tokenreduce.core.plan.Prune.kk", "tokenreduce.core.plan.Pruned", "tokenreduce.evidence_.X", "tr.ToMee",
    ]  # fmt: skip
    assert missing_tests("`tests/test_docs.py::missing_tests`, tests/test_docs.py::test_no, tests/no.py::test_a") == [
        "tests/no.py::test_a", "tests/test_docs.py::test_no",
    ]  # fmt: skip
    assert missing_targets("`make lint imports`, make sense\nmake nothing   # a comment\n") == ["nothing"]


def test_the_picture_of_the_rooms_is_that_of_the_contracts():
    picture = re.search(r"```mermaid\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), re.S).group(1)
    contracts = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r'^type = "layers"\nlayers = \[(.*?)\]', contracts, re.M | re.S).group(1)
    rooms = [re.findall(r"tokenreduce\.\w+", line) for line in layers.splitlines() if line.strip()]
    places = [[picture.index(f'["{room}') for room in floor] for floor in rooms]
    assert all(max(above) < min(below) for above, below in itertools.pairwise(places))
    drawn = re.findall(r'\["(tokenreduce\.\w+)[<:"]', picture)
    assert sorted(drawn) == sorted(room for floor in rooms for room in floor)


def test_lines_to_read_are_as_many_as_said():
    rows = re.findall(r"^\| \[[\w./]+\]\(\.\./([\w./]+)\) \| (.+) \| (\d+) \|$", ARCHITECTURE.read_text("utf-8"), re.M)
    assert rows
    for path, what, said in rows:
        nodes = {getattr(n, "name", ""): n for n in ast.parse((ROOT / path).read_text(encoding="utf-8")).body}
        wanted = [nodes[name] for name in re.findall(r"`(\w+)`", what)]
        first = [min(n.lineno, *(d.lineno for d in n.decorator_list)) if n.decorator_list else n.lineno for n in wanted]
        count = sum(n.end_lineno - line + 1 for n, line in zip(wanted, first, strict=True))
        assert abs(count - int(said)) <= max(5, count // 8), f"{path}: {count} lines, not {said}"
    assert sum(int(said) for _, _, said in rows) <= LINES_TO_READ + 50


def test_every_answer_names_its_test():
    answers = re.split(r"^## ", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    assert len(answers) >= 10
    assert [a.partition("\n")[0] for a in answers if "tests/" not in a] == []


def test_how_to_make_a_model_faster_is_one_click_from_the_start():
    start = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (page, heading) = re.search(r"\[How do I make my Qwen2\.5-VL[^]]*\]\(([^)#]+)#([^)]+)\)", start).groups()
    guide = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert heading in headings(guide)
    answer = guide.partition("Qwen2.5-VL faster\n")[2].partition("\n## ")[0]
    assert "Qwen2_5_VLForConditionalGeneration.from_pretrained" in answer
    assert "tr.patch(model, " in answer


def test_the_picture_is_drawn_from_its_table():
    spec = importlib.util.spec_from_file_location("picture", ROOT / ".ci" / "picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    assert picture.TARGET.read_text(encoding="utf-8") == picture.draw(picture.PAGE.read_text(encoding="utf-8"))


def test_versions_and_days_agree():
    version = re.escape(tr.__version__)
    day = re.search(rf"^## \[{version}\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M).group(1)
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {version}$", cited, re.M)
    assert f"date-released: {day}\n" in cited


def test_methods_that_the_readme_names_are_there():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| stage | methods |")[2].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| (\w+ .*?) \| (.*) \|$", table, re.M))
    stages = {"inside a v": "encoder", "between en": "projector", "inside the": "language", "in the KV ": "cache"}
    assert len(rows) == len(stages)
    for place, names in rows.items():
        assert set(re.findall(r"`([\w-]+)`", names)) <= set(tr.list_methods(stage=stages[place[:10]])), place
