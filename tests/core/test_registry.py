from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import tokenreduce as tr
from tokenreduce.core import registry
from tokenreduce.core.reducer import STAGES
from tokenreduce.core.registry import get_class
from tokenreduce.core.specs import parse_spec, split_specs

ROOT = Path(__file__).parents[2]
PARTS = ("adapters", "demo", "video", "vision")
# The examples that CONTRIBUTING.md gives to authors of methods, so that they cannot rot: as they stand, each in a file.
PLUGINS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
NAMES = [re.search(r'name="(\w+)"', code).group(1) for code in PLUGINS]


def test_unknown_names_get_suggestions():
    with pytest.raises(ValueError, match="did you mean tome") as error:
        tr.get_method("tomee:r=3")
    assert "Known:" in str(error.value)
    with pytest.raises(ValueError, match=r"no setting 'rr'; did you mean r\?"):
        tr.get_method("tome:rr=3")
    with pytest.raises(ValueError, match="unknown stage 'brain'"):
        tr.list_methods(stage="brain")
    with pytest.raises(AttributeError, match="no attribute 'NoSuchThing'"):
        tr.NoSuchThing  # noqa: B018


@pytest.mark.parametrize("text", ["tome:r", "tome:=3", ":r=3", "tome:r=", "tome:r=3,,keep=2"])
def test_malformed_text_shows_the_form(text):
    with pytest.raises(ValueError, match="write method:setting=value"):
        tr.get_method(text)


def test_specs_are_read_and_written():
    assert parse_spec("a:r=3,keep=0.5,on=true,off=None,layers=[1,2],s=word") == (
        "a",
        {"r": 3, "keep": 0.5, "on": True, "off": None, "layers": (1, 2), "s": "word"},
    )
    assert split_specs("a:layers=[1,2]+b") == ["a:layers=[1,2]", "b"]
    assert tr.get_method("tome:r=4") == tr.ToMe(r=4)
    assert tr.parse("tome:r=4+tome_kth:k=3", tr.ToMe(r=1)) == (
        tr.ToMe(r=4),
        tr.get_method("tome_kth:k=3"),
        tr.ToMe(r=1),
    )
    with pytest.raises(ValueError, match="several methods"):
        tr.get_method("tome:r=4+tome_kth")
    with pytest.raises(TypeError, match="expected a reducer or text"):
        tr.parse(3)
    assert str(tr.ToMe(r=13, prop_attn=False)) == "tome:r=13,prop_attn=false"


def test_wildcards():
    assert tr.list_methods("tome*")[:1] == ["tome"]
    assert tr.list_methods("no*such") == []


def test_a_short_name_means_the_class_of_the_stage():
    """Baselines exist at several stages; their full names say which."""
    assert get_class("random") is get_class("random", "encoder") is tr.Random
    classes = {stage: get_class("random", stage) for stage in ("encoder", "projector", "language")}
    assert [kind.stage for kind in classes.values()] == list(classes)
    assert len(set(classes.values())) == 3
    for stage in ("projector", "language"):
        assert get_class(f"random@{stage}") is classes[stage]
        assert get_class(f"random@{stage}", "encoder") is classes[stage], "a full name is not overruled"
        assert classes[stage].name == f"random@{stage}"
    assert get_class("random@encoder") is tr.Random
    assert get_class("tome@encoder") is get_class("tome", "projector") is tr.ToMe, "there is only one"


def test_unknown_names_at_a_stage():
    with pytest.raises(ValueError, match=r"no method 'tome' at stage 'projector'; there are .*pool, .*uniform"):
        get_class("tome@projector")
    with pytest.raises(ValueError, match=r"no method 'rndom' at stage 'language'; there are .*random"):
        tr.get_method("rndom@language:keep=3")
    with pytest.raises(ValueError, match="unknown stage 'brain'"):
        get_class("random@brain")
    with pytest.raises(ValueError, match="unknown method 'poool'; did you mean pool"):
        get_class("poool", "projector")
    with pytest.raises(ValueError, match="random@projector has no setting 'sed'; did you mean seed"):
        tr.get_method("random:sed=3", "projector")


@pytest.mark.parametrize("stage", ["projector", "language"])
def test_texts_at_a_stage(stage):
    reducer = tr.get_method("random:keep=7,seed=2", stage)
    assert reducer.stage == stage
    assert reducer.spec() == f"random@{stage}:keep=7,seed=2"
    assert tr.get_method(reducer.spec()) == tr.get_method(reducer.spec(), "encoder") == reducer
    assert tr.Reducer.from_json(reducer.to_json()) == reducer
    assert tr.get_method("random:keep=7").stage == "encoder"
    both = tr.parse("random:keep=7,seed=2+fastv:keep=0.5", reducer, stage=stage)
    assert both == (reducer, tr.get_method("fastv:keep=0.5"), reducer)
    assert tr.parse("random@language:keep=7,seed=2+random:keep=0.5", stage="projector") == (
        tr.get_method("random:keep=7,seed=2", "language"),
        tr.get_method("random:keep=0.5", "projector"),
    )


def test_lists_have_full_names_and_short_ones_at_a_stage():
    assert tr.list_methods("random*") == ["random", "random@cache", "random@language", "random@projector"]
    assert tr.list_methods("*@projector") == ["random@projector", "resize@projector", "uniform@projector"]
    assert {"pool", "random", "resize", "uniform"} <= set(tr.list_methods(stage="projector"))
    assert "random" in tr.list_methods("r*", stage="language")
    for stage in STAGES:
        names = tr.list_methods(stage=stage)
        assert names == sorted(set(names))
        assert not any("@" in name for name in names)
        assert all(get_class(name, stage).stage == stage for name in names)
    assert len(tr.list_methods()) == sum(len(tr.list_methods(stage=stage)) for stage in STAGES)
    for name in tr.list_methods():
        assert get_class(name).name == name


@pytest.mark.parametrize("name", ["sparsifiner", "acm", "Adaptive-Computation-Modules"])
def test_what_needs_training_is_named(name):
    with pytest.raises(ValueError, match=f"'{name}' is not here: .*trained.*choose .*tome"):
        tr.get_method(f"{name}:keep=0.5")
    assert name.lower() not in tr.list_methods()


def test_json_names_its_method():
    with pytest.raises(ValueError, match="key 'method'"):
        tr.Reducer.from_json("{}")
    assert json.loads(tr.ToMe(r=3).to_json())["method"] == "tome"


def test_two_methods_cannot_share_a_name():
    with pytest.raises(ValueError, match="two methods are called 'tome'"):
        type("Other", (tr.Reducer,), {}, name="tome")
    with pytest.raises(TypeError, match="stage is one of"):
        type("Other", (tr.Reducer,), {}, name="other", stage="nowhere")


def test_importing_is_light():
    code = "import sys, tokenreduce; tokenreduce.list_methods(); print([m for m in HEAVY if m in sys.modules])"
    heavy = ("timm", "transformers", "open_clip", "decord", "gradio", "ray", "pandas", "torchvision", "matplotlib")
    out = subprocess.run([sys.executable, "-c", code.replace("HEAVY", repr(heavy))], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def run(*command: str, plugin, timeout=300) -> str:
    env = {**os.environ, "TOKENREDUCE_PLUGINS": str(plugin), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def plugins(tmp_path):
    for name, code in zip(NAMES, PLUGINS, strict=True):
        (tmp_path / f"{name}.py").write_text(code)
    return tmp_path


@pytest.mark.slow
def test_the_guides_methods_are_listed_and_work(plugins):
    code = "import tokenreduce as tr; print([n for n in tr.list_methods() if n in " + repr(NAMES) + "])"
    assert NAMES == ["loudest", "attended"]
    assert run("-c", code, plugin=plugins).strip() == str(sorted(NAMES))
    code = (
        "import tokenreduce as tr; loud, seen = tr.Loudest(keep=0.5), tr.get_method('attended:keep=5')\n"
        "print(loud.spec(), seen.spec(), tr.FasterVLM.choose.__code__.co_code == type(seen).choose.__code__.co_code)\n"
        "tr.get_method('loudest:keep=no')"
    )
    env = {**os.environ, "TOKENREDUCE_PLUGINS": str(plugins)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "loudest:keep=0.5 attended:keep=5 True"
    assert "ValueError: loudest: keep is an int or a float, not 'no'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "table"), [("loudest", "tests/test_invariants.py"), ("attended", "tests/test_projector_invariants.py")]
)
def test_the_guides_methods_pass_the_table(plugins, name, table):
    out = run("-m", "pytest", table, "-k", name, "-p", "no:cacheprovider", plugin=plugins)
    assert " passed" in out
    assert "skipped" not in out


SHIPPED = ("tokenreduce.vision.", "tokenreduce.video.")


def test_a_methods_page_in_the_code_names_its_paper():
    """The methods page and ``tokenreduce methods`` give ``paper``; whoever reads the file finds the same one."""
    papers = {name: kind for name in tr.list_methods() if (kind := get_class(name)).paper}
    papers = {name: kind for name, kind in papers.items() if kind.__module__.startswith(SHIPPED)}
    assert len(papers) > 45
    for name, kind in papers.items():
        assert re.fullmatch(r"\d{4}\.\d{5}", kind.paper), name
        assert kind.paper in f"{sys.modules[kind.__module__].__doc__} {kind.__doc__}", name


def test_installed_packages_bring_methods_by_entry_point(monkeypatch):
    from tokenreduce.core import registry

    loaded = []

    class Point:
        def load(self):
            loaded.append("mine")

    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(registry, "entry_points", lambda group: [Point()] if group == "tokenreduce.methods" else [])
    assert "tome" in tr.list_methods()
    assert loaded == ["mine"]


def test_a_plugin_that_is_not_there_is_an_error(tmp_path):
    env = {**os.environ, "TOKENREDUCE_PLUGINS": str(tmp_path / "missing.py")}
    code = "import tokenreduce as tr; tr.list_methods()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "TOKENREDUCE_PLUGINS names" in done.stderr


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("x = 1\ndef f(:\n    pass\n", 2, "SyntaxError: invalid syntax"),
        ("import os\n\n\ndef g():\n    raise RuntimeError('boom\\nmore')\n\n\ng()\n", 5, "RuntimeError: boom more"),
        ("import nosuchlibrary\n", 1, "ModuleNotFoundError: No module named 'nosuchlibrary'"),
        ("import json\njson.loads('{')\n", 2, "JSONDecodeError"),  # the line of the file, not of the library
        ("raise SystemExit(3)\n", 1, "SystemExit: 3"),
        ("assert False\n", 1, "AssertionError: no message"),
        (
            "from tokenreduce import Reducer\nclass X(Reducer, name='tome', stage='encoder'):\n    pass\n", 2,
            "two methods are called 'tome'",
        ),
    ],
)  # fmt: skip
def test_a_broken_plugin_is_named_with_its_line(tmp_path, monkeypatch, text, line, said) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    monkeypatch.chdir(tmp_path)
    for place in (file, Path("mine.py"), tmp_path):
        with pytest.raises(ImportError) as error:
            registry._import_plugin(place)
        message = str(error.value)
        assert f"{file}, line {line} cannot be loaded" in message
        assert said in message
        assert "TOKENREDUCE_PLUGINS" in message
        assert "\n" not in message
    assert "tokenreduce_plugin_mine" not in sys.modules


def test_a_plugin_that_is_no_python_file(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ImportError, match=r"mine.txt, which is no Python file"):
        registry._import_plugin(tmp_path / "mine.txt")
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe = 1\n")
    with pytest.raises(ImportError, match=r"bytes.py.* cannot be loaded: SyntaxError"):
        registry._import_plugin(tmp_path / "bytes.py")


def test_a_broken_entry_point_names_its_package() -> None:
    point = EntryPoint("mine", "nosuchpackage.methods", "tokenreduce.methods")
    with pytest.raises(ImportError, match=r"methods of nosuchpackage.methods .* ModuleNotFoundError"):
        registry._import_point(point)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"), [("budget", "core.budget"), ("scoring", "algorithms.scoring"), ("plan", "core.plan")]
)
def test_modules_are_found_by_their_old_names(old, new):
    """In a fresh process: the warning comes when the module is first loaded."""
    code = f"import warnings; warnings.simplefilter('error', DeprecationWarning); import tokenreduce.{old}"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"tokenreduce.{old} is tokenreduce.{new} now" in failed.stderr
    code = (
        f"import tokenreduce.{old} as a, tokenreduce.{new} as b; "
        "print([n for n in b.__all__ if getattr(a, n) is not getattr(b, n)])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_folder_of_code_is_a_package_of_the_wheel():
    folders = {str(p.parent.relative_to(ROOT)) for d in ("tokenreduce", *PARTS) for p in (ROOT / d).rglob("*.py")}
    named = {("tokenreduce." if f.split("/")[0] != "tokenreduce" else "") + f.replace("/", ".") for f in folders}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = text[text.index("packages = [") : text.index("[tool.setuptools.package-dir]")]
    listed = set(re.findall(r'"(tokenreduce[\w.]*)"', listed))
    assert named == listed
