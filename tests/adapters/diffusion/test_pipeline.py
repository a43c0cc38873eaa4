"""A random-weight Stable Diffusion pipeline, from a prompt to an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusion")

from denoisers import pipeline

import tokenreduce as tr


def image(pipe, **settings):
    made = pipe(
        "a cat with red hat", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0),
        **{"height": 16, "width": 24, **settings},
    )  # fmt: skip
    return made.images


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


@pytest.mark.parametrize(
    "settings",
    [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 3}, {"num_images_per_prompt": 2, "guidance_scale": 0.0},
     {"height": 24, "width": 16}, {"height": 8, "width": 40}],
)  # fmt: skip
def test_from_prompt_to_image(pipe, settings):
    stock = image(pipe, **settings)
    assert tr.patch(pipe, "tomesd:ratio=0.5,merge_crossattn=true") is pipe
    try:
        with tr.record(pipe) as trace:
            merged = image(pipe, **settings)
        assert np.array_equal(merged, image(pipe, **settings)), "the same image again"
    finally:
        assert tr.unpatch(pipe) is pipe
    assert merged.shape == stock.shape
    assert np.isfinite(merged).all()
    assert np.abs(merged - stock).max() > 1e-5
    rows, columns = (settings.get(side, size) // 2 for side, size in (("height", 16), ("width", 24)))
    assert {s.grid for s in trace.steps} == {(rows, columns)}
    assert len(trace.steps) == 2 * 3, "two steps, three blocks of the latent's size"
    draws = {tuple(p.keep[0].sort().values.tolist()) for p in trace.plans}
    assert len(draws) > 2
    assert np.array_equal(image(pipe, **settings), stock)


def test_keep_all_is_the_same_image(pipe):
    stock = image(pipe)
    with tr.patched(pipe, "tomesd:ratio=0,max_downsample=8") as same:
        assert same is pipe
        assert np.array_equal(image(pipe), stock)


def test_a_factory_of_pipelines(pipe):
    @tr.reduce_tokens("tomesd")
    def build():
        return pipe

    assert [r.spec() for r in tr.describe(build()).active] == ["tomesd"]
    tr.unpatch(pipe)


def test_a_pipeline_says_what_fits(pipe):
    assert "UNet2DConditionModel" in str(tr.describe(pipe))
    assert tr.describe(pipe).methods() == ["tomesd"]
    with pytest.raises(ValueError, match="stage encoder"):
        tr.patch(pipe, "tome:r=2")
    with pytest.raises(ValueError, match="not patched"):
        tr.unpatch(pipe)
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, or a pipeline"):
        tr.patch("a cat", "tomesd")


def test_a_pipeline_without_a_unet_is_refused(pipe):
    from diffusers import DiTPipeline

    other = DiTPipeline(transformer=pipe.text_encoder, vae=pipe.vae, scheduler=pipe.scheduler)
    with pytest.raises(TypeError, match=r"DiTPipeline has no UNet.*AutoencoderKL"):
        tr.patch(other, "tomesd")
