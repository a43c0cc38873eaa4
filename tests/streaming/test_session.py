"""A stream against the same frames given as one video, and what a question leaves behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import vlm_folders
from PIL import Image
from typer.testing import CliRunner

import tokenreduce as tr
from tokenreduce.bench.vlms import load_vlm
from tokenreduce.measure.frames import frames_question
from tokenreduce.streaming import Stream

SAVE = {"qwen": vlm_folders.save_qwen, "onevision": vlm_folders.save_onevision}
ASK = "what is this ?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: save(root / name) for name, save in SAVE.items()}


@pytest.fixture(scope="module")
def models(folders):
    return {name: load_vlm(str(folder), "cpu", "auto") for name, folder in folders.items()}


def film(count, seed=0):
    g = np.random.default_rng(seed)
    return [Image.fromarray(g.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


every = pytest.mark.parametrize("name", SAVE)


@every
@pytest.mark.parametrize("count", [8, 12])
@pytest.mark.parametrize("fps", [1.0, 3.0])  # at 3 a unit of time is worth no whole number of positions
def test_without_a_cap_it_is_the_model_on_the_whole_video(name, count, fps, models):
    loaded, frames = models[name], film(count)
    inputs = frames_question(loaded, frames, ASK, times=[i / fps for i in range(count)]).inputs
    with torch.no_grad():
        out = loaded.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    running = Stream(loaded, "knorm:keep=100000", block=4, fps=fps)
    running.push(frames[:5])
    running.push(frames[5:])
    got = running.ask(ASK, max_new_tokens=6)
    assert list(got.ids) == out[0, inputs["input_ids"].shape[1] :].tolist()
    assert got.frames == count


@every
@pytest.mark.parametrize("method", ["knorm:keep=20", "snapkv:keep=20,window_size=4"])
def test_a_question_does_not_disturb_the_stream(name, method, models):
    quiet, asked = (Stream(models[name], method, block=4) for _ in range(2))
    frames = film(16)
    for start in range(0, 16, 4):
        quiet.push(frames[start : start + 4])
        asked.push(frames[start : start + 4])
        asked.ask("what red ?", max_new_tokens=5)
    for a, b in zip(quiet._cache.layers, asked._cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    assert quiet.ask(ASK).ids == asked.ask(ASK).ids


@every
def test_the_cap_holds_however_long_the_stream(name, models):
    running = Stream(models[name], "knorm:keep=24", block=4)
    sizes = set()
    for i in range(6):
        running.push(film(4, seed=i))
        if i > 1:  # what came before may be less than the cap
            sizes.add((running.keys, running.cache_bytes))
    assert len(sizes) == 1
    assert running.keys == 24
    assert running.frames == 24


@every
def test_what_is_kept_is_kept_as_it_was(name, models):
    """Keys of the first block are those that the whole video would have put there: rotated to their own places."""
    loaded, frames = models[name], film(8)
    whole, capped = Stream(loaded, "knorm:keep=100000", block=4), Stream(loaded, "knorm:keep=10", block=4)
    whole.push(frames[:4])
    capped.push(frames[:4])
    layer = 0
    full, kept = whole._cache.layers[layer].keys[0], capped._cache.layers[layer].keys[0]
    for head in range(len(kept)):
        at = torch.isin(whole._tokens[layer][head], capped._tokens[layer][head])
        assert torch.equal(full[head][at], kept[head])


def test_what_cannot_be_right_is_refused(models):
    loaded = models["qwen"]
    with pytest.raises(ValueError, match="give a multiple"):
        Stream(loaded, "knorm:keep=8", block=3)
    with pytest.raises(ValueError, match="does not thin a cache between blocks"):
        Stream(loaded, "dycoke-cache")
    with pytest.raises(ValueError, match="no frame has been pushed"):
        Stream(loaded, "knorm:keep=8").ask(ASK)
    with tr.patched(loaded.model, "knorm:keep=8"), pytest.raises(ValueError, match="the model is patched"):
        Stream(loaded, "knorm:keep=8")
    from vlms import VLMS

    with pytest.raises(TypeError, match="cannot take a stream"):
        tr.stream(VLMS["llava"].model, loaded.processor, "knorm:keep=8")
    running = Stream(loaded, "knorm:keep=8", block=4)
    running.push(film(4))
    with pytest.raises(ValueError, match="prompt is empty"):
        running.ask(" ")


def test_from_the_command_line(folders, tmp_path):
    from tokenreduce.cli import app

    for i, frame in enumerate(film(12)):
        frame.save(tmp_path / f"{i:03d}.png")
    args = ["ask-stream", str(folders["qwen"]), str(tmp_path), "--ask", ASK, "--at", "4,11", "--block", "4", "--device",
            "cpu", "--method", "knorm:keep=12", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    out = json.loads(result.output[result.output.index("{") :])
    assert [a["frames"] for a in out["answers"]] == [8, 12]
    assert {a["keys"] for a in out["answers"]} == {12}
    plain = CliRunner().invoke(app, args[:-1])
    assert "knorm:keep=12" in plain.output
    wrong = CliRunner().invoke(app, [*args[:5], "--at", "1000"])
    assert wrong.exit_code != 0


@every
def test_a_method_knows_the_slots_of_the_new_block(name, models, monkeypatch):
    """StreamMem's prototypes are of new frames alone: those whose slots have no running score yet."""
    from tokenreduce.video.cache.streammem import StreamMem

    own, seen = StreamMem._new_frames, []

    def watched(self, evidence):
        frame, count = own(self, evidence)
        newest = [int(evidence.frame_of[0, frame[0] == i].unique()) for i in range(int(count[0]))]
        seen.append((newest, int(evidence.frame_of.max())))
        return frame, count

    monkeypatch.setattr(StreamMem, "_new_frames", watched)
    running = Stream(models[name], "streammem:M=20", block=4)
    for turn in range(4):
        running.push(film(4, turn))
        assert running.keys == min(20, running.entry.tokens)
    units = 4 // running.entry.joined
    assert seen
    assert all(newest == list(range(last + 1 - units, last + 1)) for newest, last in seen)
    assert running.ask(ASK, max_new_tokens=3).keys == 20


@every
def test_frames_are_whole_in_the_newest_block(name, models):
    """InfiniPot-V counts a frame's slots by the newest one."""
    running = Stream(models[name], "infinipot-v:compress_frame_num=2,tar_ratio=0.6", block=4)
    for turn in range(4):
        running.push(film(4, turn))
        assert running.keys == 2 * (running.entry.tokens // running.entry.units)
