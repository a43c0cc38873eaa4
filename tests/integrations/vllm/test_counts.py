"""How many tokens stay, and what is refused, without an engine."""

from __future__ import annotations

import doctest
from types import SimpleNamespace as Config

import pytest

import tokenreduce as tr
from tokenreduce.core.registry import get_class
from tokenreduce.integrations.vllm import counts
from tokenreduce.integrations.vllm.counts import check_runs, fitting, kept, method_of, requested, shortened
from tokenreduce.integrations.vllm.families import family_of
from tokenreduce.integrations.vllm.names import ARCHITECTURE, KEEP, NATIVE


@pytest.mark.parametrize(
    ("spec", "n", "how", "left"),
    [
        ("divprune:keep=49", 196, {}, 49),
        ("divprune:keep=49", 20, {}, 20),
        ("divprune:keep=0.25", 10, {}, 3),
        ("divprune:keep=49", 196, {"keep": 16}, 16),
        ("divprune:keep=49", 196, {"keep": 0.5}, 98),
        ("divprune:keep=49", 196, {"keep": 1000}, 196),
        ("visionzip:dominant=54,contextual=10", 576, {}, 64),
        ("visionzip:dominant=54,contextual=10", 576, {"keep": 32}, 32),
        ("otprune:keep=0.5", 9, {}, 4),
        ("gprune:keep=0.5", 9, {}, 4),
        ("random:keep=4", 64, {}, 4),
        ("divprune:keep=10", 1024, {"tiles": 4}, 40),
        ("vidcom2:keep=10", 64, {}, 64),
        ("vidcom2:keep=10", 64, {"modality": "video", "frames": 4}, 10),
        ("flashvid:keep=16,expansion=1.25", 64, {"modality": "video", "frames": 4}, 20),
        ("flashvid:keep=16,expansion=1.25", 64, {"modality": "video", "frames": 4, "keep": 16}, 16),
        ("dycoke:dycoke_k=0.5", 64, {"modality": "video", "frames": 4}, 16 + 3 * 8),
        ("vcast:keep=3,official_totals=true,min_k=4", 64, {"modality": "video", "frames": 4, "keep": 2}, 16),
        ("prumerge:keep=8", 64, {}, 8),
        ("divprune:keep=49", 200, {"blank": 8}, 57),
        ("divprune:keep=49", 200, {"blank": 8, "keep": 0.5}, 96 + 8),
        ("divprune:keep=49", 200, {"blank": 8, "keep": 1000}, 200),
        ("divprune:keep=49,newlines=drop", 200, {"blank": 8}, 49),
        ("divprune:keep=1.0,newlines=drop", 200, {"blank": 8}, 192),
        ("divprune:keep=0.5,newlines=rank", 200, {"blank": 8}, 100),
        ("vidcom2:keep=10", 65, {"modality": "video", "frames": 4, "blank": 1}, 11),
        ("vidcom2:keep=10,newlines=drop", 200, {"blank": 8}, 200),
    ],
)
def test_the_number_follows_from_size_and_settings(spec, n, how, left):
    assert kept(method_of(spec), n, **how) == left


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("fastv:layer=2,keep=0.5", "acts inside the language model"),
        ("tome:r=8", "acts inside the vision tower"),
        ("snapkv:keep=0.5", "takes keys out of the cache"),
        ("cdpruner:keep=64", "looks at the question"),
        ("trim:keep=64", "looks at the question"),
        ("prumerge", "finds out how many tokens it leaves"),
        ("visionzip:keep=64+fastv:layer=2,keep=0.5", "names several methods"),
        ("", "is text such as"),
        (None, "is text such as"),
        ("divprun:keep=4", "did you mean divprune"),
        ("divprune:keep=0", "keep is a number of tokens"),
    ],
)
def test_what_vllm_has_no_place_for_is_refused(spec, said):
    with pytest.raises(ValueError, match=said):
        method_of(spec)


def test_every_method_before_the_language_model_fits_or_reads_the_question():
    names = set(tr.list_methods(stage="projector"))
    reading = {n for n in names if {"text", "clip"} & set(get_class(n, "projector")(keep=4).required())}
    assert set(fitting()) == names - reading
    assert {"divprune", "fastervlm", "visionzip", "vidcom2"} <= set(fitting())


@pytest.mark.parametrize("bad", [0, -1, 1.5, 0.0, True, "16", [4]])
def test_a_request_with_a_bad_number_is_refused(bad):
    with pytest.raises(ValueError, match=f"{KEEP} is a number of tokens"):
        requested({KEEP: bad})


def test_a_request_may_say_one_thing():
    assert requested({}) is None
    assert requested({"num_crops": 4, KEEP: 16}) == 16
    with pytest.raises(ValueError, match=rf"unknown key 'tokenreduce_kep'.*{KEEP}"):
        requested({"tokenreduce_kep": 16})


def test_placeholders_go_from_the_end_of_each_tile():
    assert doctest.testmod(counts).failed == 0
    tiles = [9, *[1] * 4, 5, *[1] * 4, 5, *[1] * 4, 8]
    assert shortened(tiles, 1, 6, tiles=3) == [9, 1, 1, 5, 1, 1, 5, 1, 1, 8]
    assert shortened(tiles, 1, 12, tiles=3) == tiles
    with pytest.raises(ValueError, match="does not come in 3 tiles"):
        kept(method_of("divprune:keep=4"), 10, tiles=3)


def test_an_image_is_one_run_of_placeholders_or_tiles():
    check_runs([7, 1, 1, 1, 8], 1)
    check_runs([1, 1, 5, 1, 1], 1, tiles=2)
    check_runs([1, 1, 1, 1], 1, tiles=2)
    for tiles in (1, 4):
        with pytest.raises(ValueError, match="stand in 2 runs"):
            check_runs([1, 1, 5, 1, 1], 1, tiles)


def config(kind="llava", *, text=None, vision=None, **more):
    text = Config(**(text or {}))
    return Config(model_type=kind, vision_config=Config(**(vision or {})), get_text_config=lambda: text, **more)


MROPE = {"rope_parameters": {"mrope_section": [16, 24, 24]}}
QWEN3 = config("qwen3_vl", text=MROPE, vision={"deepstack_visual_indexes": [5]}, video_token_id=7)
WINDOWS = {"layer_types": ["full_attention", "sliding_attention"]}


def test_families_are_read_off_a_config():
    llava = family_of(config())
    assert (llava.name, llava.axes, llava.tiled, llava.videos) == ("llava", False, False, False)
    qwen = family_of(config("qwen2_5_vl", text=MROPE, video_token_id=7))
    assert (qwen.axes, qwen.videos) == (True, True)
    assert family_of(config("internvl")).tiled
    assert not family_of(config(text={"sliding_window": 4096, "use_sliding_window": False})).axes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            config("qwen3_vl_moe", text=MROPE, vision={"deepstack_visual_indexes": [5]}),
            "qwen3_vl_moe cannot be served.*DeepStack",
        ),
        (config("llava_next_video"), "row ends"),
        (config("gemma3"), "see each other both ways"),
        (config(text=WINDOWS), "sliding windows"),
        (config(text={"sliding_window": 4096}), "sliding windows"),
        (Config(model_type="llama", vision_config=None), "no image/video language model"),
    ],
)
def test_models_that_cannot_be_right_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        family_of(given)


@pytest.mark.parametrize(
    ("given", "spec", "said"),
    [
        (config("qwen2_5_vl", text=MROPE, video_token_id=7), "divprune:positions=compact", "positions='compact'"),
        (config(), "divprune:positions=original", "positions='original'"),
        (config(), "vidcom2:keep=16", "takes a video as single images"),
        (QWEN3, "zoo-prune:keep=16", r"does not show \(through\); methods that fit: .*divprune.*vidcom2.*visionzip"),
        (QWEN3, "fastervlm:keep=16,score=cls", r"does not show \(tower, cls\); methods that fit"),
        (QWEN3, "divprune:positions=compact", "positions='compact'"),
        (config("llava_onevision"), "resize:keep=16", "takes full grids.*choose pool"),
        (config("llava_next"), "adaptvision:keep=16,newlines=rank", "row ends are in none"),
        (config("llava_next"), "uniform:keep=16,newlines=rank", "row ends are in none"),
        (config("llava_onevision"), "zoo-prune:keep=16", "how the projector makes every token"),
    ],
)
def test_settings_that_a_model_cannot_have_are_refused(given, spec, said):
    with pytest.raises(ValueError, match=said):
        family_of(given).check(method_of(spec))


def test_a_model_with_deepstack_has_a_class_of_its_own():
    qwen, llava = family_of(QWEN3), family_of(config())
    assert (qwen.axes, qwen.videos, qwen.architecture, llava.architecture) == (True, True, NATIVE, ARCHITECTURE)
    qwen.check_class(NATIVE)
    for spec in ("divprune:keep=16", "vidcom2:keep=16", "visionzip:keep=16"):
        qwen.check(method_of(spec))
    for family, wrong in ((qwen, ARCHITECTURE), (llava, NATIVE)):
        with pytest.raises(ValueError, match=f"is served by {family.architecture}: .* not {wrong}"):
            family.check_class(wrong)
