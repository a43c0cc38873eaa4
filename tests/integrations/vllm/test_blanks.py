"""Row ends and class tokens, counted before an image is encoded, are those that a model makes and a patch sees."""

from __future__ import annotations

from types import SimpleNamespace as Config
from typing import Any

import numpy as np
import pytest
import torch
import vlm_folders
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlms import VLMS, prompts

import tokenreduce as tr
from tokenreduce.adapters.language.alone import Item, reduce_features, row_ends, watch_features, watched
from tokenreduce.core.undo import Undo
from tokenreduce.integrations.vllm.blanks import blanks
from tokenreduce.integrations.vllm.counts import kept, method_of

TILES = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
#: (rows, columns) in pixels: full crops, padded rows, padded columns, several tiles.
SIZES = [(32, 64), (24, 64), (100, 65), (60, 45), (50, 30), (25, 85), (32, 32), (96, 24), (32, 80)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[Any, Any]]:
    place = tmp_path_factory.mktemp("tiles")
    folders = {
        "llava_onevision": vlm_folders.save_onevision(place / "ov", 32, 4, tiles=TILES, most=2, narrow=0.2),
        "llava_next": vlm_folders.save_llava_next(place / "next", 32, 4, tiles=TILES),
    }
    return {
        name: (AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder))
        for name, folder in folders.items()
    }


def pictures(sizes) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def whole(inputs: Any) -> int:
    return int(torch.isin(inputs["input_ids"], torch.tensor([vlm_folders.IMAGE, vlm_folders.VIDEO])).sum())


def features(model: Any, kind: str, inputs: Any) -> tuple[list[Any], list[torch.Tensor]]:
    """What calls of the tower saw, and the features of every item."""
    given = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    with watched() as calls, torch.no_grad():
        out = getattr(model.model, f"get_{kind}_features")(**given, return_dict=True).pooler_output
    return calls, list(out)


def left_of(model: Any, reducer: tr.Reducer, inputs: Any) -> torch.Tensor:
    """What enters the language model at visual columns when it is patched."""
    seen: list[torch.Tensor] = []
    text = model.model.language_model
    with tr.patched(model, reducer), tr.record(model) as trace, torch.no_grad():
        handle = text.layers[0].register_forward_pre_hook(
            lambda layer, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
    visual = torch.isin(inputs["input_ids"][0], torch.tensor([vlm_folders.IMAGE, vlm_folders.VIDEO]))
    plan = trace.plans[0] if trace.plans else None
    return seen[0][0][visual if plan is None else visual[plan.representatives()[0].sort().values]]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", ["llava_onevision", "llava_next"])
def test_row_ends_are_those_that_the_model_writes(family, size, made):
    model, processor = made[family]
    inputs = processor(images=pictures([size]), text="<image> what", return_tensors="pt")
    (x,) = features(model, "image", inputs)[1]
    ends = int((x == model.model.image_newline).all(-1).sum())
    assert ends > 0
    assert row_ends(model.config, size) == (whole(inputs), ends)
    assert blanks(model.config, "image", whole(inputs), inputs["image_sizes"][0].tolist()) == ends


def test_a_video_has_one_behind_its_last_frame(made):
    model, processor = made["llava_onevision"]
    film = np.zeros((3, 32, 32, 3), dtype=np.uint8)
    inputs = processor(videos=[film], text="<video> what", return_tensors="pt", do_sample_frames=False)
    (x,) = features(model, "video", inputs)[1]
    assert len(x) == whole(inputs) == 3 * 16 + 1
    assert blanks(model.config, "video", len(x)) == int((x == model.model.image_newline).all(-1).sum()) == 1


SPECS = [
    "divprune:keep=9", "divprune:keep=9,newlines=drop", "divprune:keep=9,newlines=rank", "fastervlm:keep=0.3",
    "visionzip:keep=10", "visionzip:keep=10,newlines=drop", "uniform:keep=7", "pool:keep=12",
    "divprune:keep=5000", "divprune:keep=5000,newlines=drop", "uniform:keep=5000",
]  # fmt: skip
#: Two images with as many tokens in LLaVA-NeXT, and 24 and 8 row ends among them; and others.
PAIRS = [((96, 24), (32, 80)), ((100, 65), (25, 85))]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llava_onevision", "llava_next"])
def test_as_many_stay_as_in_a_patched_model_and_the_same(family, spec, made):
    model, processor = made[family]
    cases = [("image", dict(images=pictures(pair), text="<image> and <image> what")) for pair in PAIRS]
    if family == "llava_onevision":
        film = np.random.default_rng(1).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
        cases.append(("video", dict(videos=[film], text="<video> what", do_sample_frames=False)))
    for kind, given in cases:
        check(model, method_of(spec), kind, processor(**given, return_tensors="pt"))


@pytest.mark.parametrize("spec", ["dycoke", "vidcom2:keep=9", "vidcom2:keep=9,newlines=drop"])
def test_methods_across_frames_see_no_row_end_and_leave_images(spec, made):
    model, processor = made["llava_onevision"]
    film = np.random.default_rng(1).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    for kind, given in (
        ("video", dict(videos=[film], text="<video> what", do_sample_frames=False)),
        ("image", dict(images=pictures([(60, 45)]), text="<image> what")),
    ):
        check(model, method_of(spec), kind, processor(**given, return_tensors="pt"), 6 if kind == "video" else 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crops_of_llava_next_are_full_grids_whatever_padding_they_lose(size, made):
    model, processor = made["llava_next"]
    check(model, method_of("resize:keep=20"), "image", processor(
        images=pictures([size]), text="<image> what", return_tensors="pt"
    ))  # fmt: skip


def test_images_of_one_length_with_other_row_ends_are_no_batch(made):
    """Requests may ask for other numbers: 9 tokens beside 24 row ends are as many as 25 beside 8."""
    model, processor = made["llava_next"]
    reducer: Any = method_of("divprune:keep=9")
    undo = Undo((reducer,))
    try:
        watch_features(model, reducer, undo)
        inputs = processor(images=pictures(PAIRS[0]), text="<image> and <image> what", return_tensors="pt")
        (seen,), (first, second) = features(model, "image", inputs)
        items = [Item(first, 33, seen, 0), Item(second, 33, seen, len(first))]
        assert len(first) == len(second)
        together = reduce_features(items, "image", reducer, compact=True)
        alone = [reduce_features([item], "image", reducer, compact=True)[0] for item in items]
    finally:
        undo.revert()
    newline = model.model.image_newline
    assert [int((kept.rows == newline).all(-1).sum()) for kept in together] == [24, 8]
    for mine, other in zip(together, alone, strict=True):
        assert torch.equal(mine.places, other.places)


def check(model: Any, reducer: Any, kind: str, inputs: Any, frames: int = 1) -> None:
    """That counts made beforehand, and the rows that are left by them, are those of the patched model."""
    want, undo = left_of(model, reducer, inputs), Undo((reducer,))
    try:
        found = watch_features(model, reducer, undo)
        (seen,), rows = features(model, kind, inputs)
        items, at = [], 0
        for i, x in enumerate(rows):
            size = inputs["image_sizes"][i].tolist() if kind == "image" and "image_sizes" in inputs else None
            blank = blanks(model.config, kind, len(x), size)
            items.append(Item(x, kept(reducer, len(x), modality=kind, frames=frames, blank=blank), seen, at))
            at += len(x)
        assert sum(item.keep for item in items) == len(want)
        with torch.no_grad():
            left = reduce_features(items, kind, reducer, compact=True, projector=found.vision.projector)
    finally:
        undo.revert()
    torch.testing.assert_close(torch.cat([k.rows for k in left]), want)


def test_a_processor_with_other_grids_is_refused(made):
    config = made["llava_next"][0].config
    with pytest.raises(ValueError, match=r"image of 32 x 64 pixels has 200 tokens by the model's config and 199 by"):
        blanks(config, "image", 199, (32, 64))
    with pytest.raises(ValueError, match="does not say the size of an image"):
        blanks(config, "image", 200)
    with pytest.raises(ValueError, match="packs no crops of an image"):
        row_ends(Config(model_type="llava"), (32, 64))


def test_class_tokens_stay_beside_what_is_kept():
    vlm = VLMS["llava"]
    config = vlm.model.config
    assert blanks(config, "image", 16) == blanks(config, "image", 17) == 0
    assert blanks(Config(model_type="internvl"), "image", 17) == 0
    video = Config(model_type="video_llava", vision_config=config.vision_config)
    assert blanks(video, "video", 3 * 17) == 3
    config.vision_feature_select_strategy = "full"
    try:
        inputs = prompts(vlm, ((7, "i"),))
        at = int((inputs["input_ids"][0] == vlm_folders.IMAGE).nonzero()[0])
        for name, more in (("input_ids", vlm_folders.IMAGE), ("attention_mask", 1), ("mm_token_type_ids", 1)):
            if name in inputs:
                row = inputs[name]
                inputs[name] = torch.cat([row[:, :at], torch.full_like(row[:, :1], more), row[:, at:]], 1)
        assert whole(inputs) == 17
        assert (blanks(config, "image", 16), blanks(config, "image", 17)) == (0, 1)
        for spec in ("divprune:keep=5", "divprune:keep=5,newlines=drop"):
            check(vlm.model, method_of(spec), "image", inputs)
    finally:
        config.vision_feature_select_strategy = "default"
