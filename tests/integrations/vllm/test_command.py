"""Building the command of a server, and ``tokenreduce serve``, without vLLM."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from tokenreduce.cli import app
from tokenreduce.integrations.vllm import register
from tokenreduce.integrations.vllm.command import GROUP, check_installed, server
from tokenreduce.integrations.vllm.cpu_runner import mended
from tokenreduce.integrations.vllm.names import ARCHITECTURE, NATIVE, PRUNING_RATE


def config(kind="llava", **text):
    inside = SimpleNamespace(**text)
    return SimpleNamespace(
        model_type=kind, vision_config=SimpleNamespace(), get_text_config=lambda: inside, video_token_id=7
    )


QWEN = config("qwen2_5_vl", rope_parameters={"mrope_section": [16, 24, 24]})


def value(arguments, flag):
    return arguments[arguments.index(flag) + 1]


def test_a_server_with_a_method():
    made = server("/models/llava", config(), "fastervlm:keep=64", name="llava", port=8123, more=["--dtype", "bfloat16"])
    assert shlex.split(made.line)[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    assert made.words[2:] == shlex.split(made.line)[2:]
    said = list(made.arguments)
    assert json.loads(value(said, "--hf-overrides")) == {
        "architectures": [ARCHITECTURE],
        "tokenreduce": "fastervlm:keep=64",
    }
    assert "--trust-request-mm-kwargs" in said
    assert "--video-pruning-rate" not in said
    assert said[-2:] == ["--dtype", "bfloat16"]
    words = shlex.split(made.curl())
    assert words[1] == "http://127.0.0.1:8123/v1/chat/completions"
    body = json.loads(words[-1])
    assert body["model"] == "llava"
    assert body["mm_processor_kwargs"] == {"tokenreduce_keep": 0.5}


def test_a_model_with_places_as_positions_gets_the_rate_that_drops_nothing():
    said = list(server("qwen", QWEN, "divprune:keep=64").arguments)
    rate = float(value(said, "--video-pruning-rate"))
    assert rate == PRUNING_RATE
    assert 1 - rate == 1


def test_qwen3_vl_is_served_by_a_class_of_its_own():
    given = config("qwen3_vl", rope_parameters={"mrope_section": [24, 20, 20]})
    given.vision_config.deepstack_visual_indexes = [8, 16, 24]
    said = list(server("qwen", given, "divprune:keep=64").arguments)
    assert json.loads(value(said, "--hf-overrides"))["architectures"] == [NATIVE]
    assert float(value(said, "--video-pruning-rate")) == PRUNING_RATE


def test_a_server_without_a_method_is_stock():
    made = server("qwen", config("qwen3_vl"), None)
    assert not {"--hf-overrides", "--trust-request-mm-kwargs"} & set(made.arguments)
    assert "mm_processor_kwargs" not in made.curl()
    fixed = server("llava", config(), "divprune:keep=64", requests_may_choose=False)
    assert "--trust-request-mm-kwargs" not in fixed.arguments
    assert "mm_processor_kwargs" not in fixed.curl()


@pytest.mark.parametrize("word", ["--port", "--hf-overrides={}", "--video-pruning-rate"])
def test_arguments_that_are_ours_are_refused(word):
    with pytest.raises(ValueError, match=f"{word.partition('=')[0]} is set by tokenreduce serve"):
        server("llava", config(), "divprune:keep=64", more=[word])


def run(*words):
    return CliRunner().invoke(app, ["serve", *words])


def test_the_command_line_prints_what_it_would_start(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("TOKENREDUCE_CACHE", str(tmp_path))
    made = run(
        "world-llava", "--reduce", "divprune:keep=49", "--port", "8001", "--dry-run", "--", "--max-model-len", "512"
    )
    assert made.exit_code == 0, made.output
    line, _, _, curl = made.output.splitlines()
    assert str(tmp_path) in line
    assert line.endswith("--trust-request-mm-kwargs --max-model-len 512")
    assert shlex.split(curl)[0] == "curl"
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["world-llava", "--reduce", "cdpruner:keep=4", "--dry-run"], "looks at the question"),
        (["world-llava", "--reduce", "fastv", "--dry-run"], "acts inside the language model"),
        (["world-vit", "--reduce", "divprune", "--dry-run"], "classifies images"),
        (["nowhere/at-all", "--reduce", "divprune", "--dry-run"], "cannot read the config of nowhere/at-all"),
        (["world-llava", "--port", "0", "--dry-run"], "--port"),
    ],
)
def test_bad_input_is_one_message(words, said, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = run(*words)
    assert made.exit_code == 2
    assert said in " ".join(made.output.split())


def test_without_vllm_the_next_step_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'tokenreduce\[vllm\]'"):
        check_installed({})
    made = run("world-llava", "--reduce", "divprune:keep=49")
    assert made.exit_code == 2
    assert "needs vLLM, which is not installed here" in " ".join(made.output.split())


def test_a_plugin_that_would_not_be_loaded_is_an_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_installed({"VLLM_PLUGINS": "other, tokenreduce"})
    with pytest.raises(ImportError, match="leaves the plug-in out"):
        check_installed({"VLLM_PLUGINS": "other"})
    monkeypatch.setattr("tokenreduce.integrations.vllm.command.entry_points", lambda group: ())
    with pytest.raises(ImportError, match="does not find the plug-in"):
        check_installed({})


def test_the_entry_point_registers_once(monkeypatch):
    """With a registry in place of vLLM's: its real one is asked by make test-vllm."""
    (point,) = [p for p in entry_points(group=GROUP) if p.name == "tokenreduce"]
    assert point.load() is register
    known: dict[str, str] = {}
    registry = SimpleNamespace(get_supported_archs=lambda: known, register_model=known.__setitem__)
    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    vllm.ModelRegistry = registry
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    register()
    known[ARCHITECTURE] += "!"
    register()
    assert known == {
        ARCHITECTURE: f"tokenreduce.integrations.vllm.model:{ARCHITECTURE}!",
        NATIVE: f"tokenreduce.integrations.vllm.native:{NATIVE}",
    }


@pytest.mark.parametrize("able", [True, False])
def test_a_runner_notes_whether_its_model_prunes(able):
    class Runner:
        def load_model(self, more=1):
            self.loaded = more

        def get_model(self):
            return SimpleNamespace(supports_multimodal_pruning=able)

        model_config = SimpleNamespace(multimodal_config=SimpleNamespace(is_multimodal_pruning_enabled=lambda: True))

    Runner.load_model = mended(Runner.load_model)
    runner = Runner()
    runner.load_model(more=3)
    assert (runner.loaded, runner.is_multimodal_pruning_enabled) == (3, able)
