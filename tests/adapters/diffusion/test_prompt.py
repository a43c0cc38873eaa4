"""Composite tokens of a prompt: sums of what the text encoder says, in their places, to an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusion")

from denoisers import pipeline

from tokenreduce.adapters.diffusion.prompt import composite_embeds
from tokenreduce.algorithms.composite import composite_plan

PROMPT = "a cat with Red hat and a dog with blue scarf"
BIND = {"cat": "red hat", "dog": ["blue", "scarf"]}


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def embeds(pipe, prompt):
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


def of_words(pipe, prompt):
    """Places of every word's tokens, by tokenising word by word."""
    found, at = {}, 1
    for word in prompt.lower().split():
        n = len(pipe.tokenizer(word)["input_ids"]) - 2
        found.setdefault(word, []).append(list(range(at, at + n)))
        at += n
    return found, at


def test_a_composite_token_is_a_sum_in_the_nouns_place(pipe):
    places, _ = of_words(pipe, PROMPT)
    assert len(places["scarf"][0]) > 1, "a word of several tokens"
    whole = embeds(pipe, PROMPT)
    zero = composite_embeds(pipe, PROMPT, BIND, noun_weight=1.1, attribute_weight=1.2)["prompt_embeds"]
    drop = composite_embeds(pipe, PROMPT, BIND, noun_weight=1.1, attribute_weight=1.2, absorbed="drop")["prompt_embeds"]
    wanted, gone = whole.clone(), []
    for noun, words in (("cat", ("red", "hat")), ("dog", ("blue", "scarf"))):
        first, *rest = places[noun][0]
        others = [i for word in words for i in places[word][0]]
        wanted[:, first] = 1.1 * whole[:, [first, *rest]].sum(1) + 1.2 * whole[:, others].sum(1)
        gone += [*rest, *others]
    wanted[:, gone] = 0
    torch.testing.assert_close(zero, wanted)
    kept = [i for i in range(whole.shape[1]) if i not in gone]
    torch.testing.assert_close(drop, wanted[:, kept])
    untouched = [i for i in kept if i not in (places["cat"][0][0], places["dog"][0][0])]
    assert torch.equal(zero[:, untouched], whole[:, untouched])


def test_nothing_bound_is_the_prompt(pipe):
    for absorbed in ("zero", "drop"):
        assert torch.equal(composite_embeds(pipe, PROMPT, {}, absorbed=absorbed)["prompt_embeds"], embeds(pipe, PROMPT))


def test_end_tokens_are_those_of_the_shorter_prompt(pipe):
    _, end = of_words(pipe, PROMPT)
    made = composite_embeds(pipe, PROMPT, BIND, ends="a cat and a dog")["prompt_embeds"]
    assert torch.equal(made[:, end:], embeds(pipe, "a cat and a dog")[:, end:])
    assert torch.equal(made[:, :end], composite_embeds(pipe, PROMPT, BIND)["prompt_embeds"][:, :end])
    with pytest.raises(ValueError, match="more tokens than the prompt"):
        composite_embeds(pipe, "a cat", {}, ends=PROMPT)


@pytest.mark.parametrize("absorbed", ["zero", "drop"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_to_an_image(pipe, absorbed, guidance):
    def image(**prompt):
        run = {"num_inference_steps": 2, "output_type": "np", "height": 16, "width": 16, "guidance_scale": guidance}
        return pipe(**prompt, **run, generator=torch.Generator().manual_seed(0)).images

    plain, nothing = image(prompt=PROMPT), image(**composite_embeds(pipe, PROMPT, {}, absorbed=absorbed))
    np.testing.assert_array_equal(plain, nothing)
    bound = image(**composite_embeds(pipe, PROMPT, BIND, absorbed=absorbed))
    assert np.isfinite(bound).all()
    assert np.abs(bound - plain).max() > 1e-6


@pytest.mark.parametrize(
    ("prompt", "bind", "more", "said"),
    [
        (PROMPT, {"cow": "red"}, {}, "'cow' occurs 0 times"), (PROMPT, {"cat": "with"}, {}, "'with' occurs 2 times"),
        (PROMPT, {"cat": "red", "dog": "red"}, {}, "two composite tokens"), (PROMPT, {"cat": " "}, {}, "occurs 0"),
        (PROMPT, {"ca": "red"}, {}, "'ca' occurs 0 times"), (PROMPT, BIND, {"absorbed": "keep"}, "'zero' or 'drop'"),
        (PROMPT * 3, {}, {}, "make it shorter"),
    ],
)  # fmt: skip
def test_what_cannot_be_bound_is_said(pipe, prompt, bind, more, said):
    with pytest.raises(ValueError, match=said):
        composite_embeds(pipe, prompt, bind, **more)


def test_other_pipelines_and_places_are_refused(pipe):
    with pytest.raises(TypeError, match="not UNet2DConditionModel"):
        composite_embeds(pipe.unet, PROMPT, BIND)
    with pytest.raises(ValueError, match="place 9 is not among the 5"):
        composite_plan(5, [([1], [9])])
    with pytest.raises(ValueError, match="has a noun"):
        composite_plan(5, [([], [1])])
