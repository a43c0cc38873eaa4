"""ColPali and ColQwen2: fewer vectors per page, and those that stay are what masking would give."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from vlms import VLMS, prompts
from vlms_masked import close, hidden

import tokenreduce as tr

INNER = {"colpali": "paligemma", "colqwen2": "qwen2_vl"}


@functools.lru_cache(maxsize=2)
def build(name):
    import transformers as hf

    config = copy.deepcopy(VLMS[INNER[name]].model.config)
    kinds = {
        "colpali": (hf.ColPaliConfig, hf.ColPaliForRetrieval),
        "colqwen2": (hf.ColQwen2Config, hf.ColQwen2ForRetrieval),
    }
    torch.manual_seed(0)
    model = kinds[name][1](kinds[name][0](vlm_config=config, embedding_dim=16))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(10.0)
    return model.eval()


def pages(name, rows=((9, "i"), (5, "i"))):
    inputs = prompts(VLMS[INNER[name]], rows, "right")
    inputs.pop("mm_token_type_ids", None)
    if name == "colqwen2" and "pixel_values" in inputs:  # its processor pads the patches of every page
        inputs["pixel_values"] = inputs["pixel_values"].view(len(rows), 64, 96)
    return inputs


def vectors(model, inputs, **more):
    with torch.no_grad():
        return model(**inputs, **more).embeddings


@pytest.mark.parametrize(
    "spec", ["divprune:keep=0.3,positions=original", "fopru:keep=0.3,positions=original", "fastv:layer=1,keep=0.3"]
)
@pytest.mark.parametrize("name", INNER)
def test_vectors_are_those_of_the_tokens_that_are_left(name, spec):
    model, inputs = build(name), pages(name)
    query = vectors(model, pages(name, ((6, ""),)))[0]
    with tr.patched(model, spec), tr.record(model, flops=False) as trace:
        got = vectors(model, inputs)
    (plan,) = trace.plans
    to = plan.sources()
    with hidden(model.vlm.language_model.layers, to < 0, int("fastv" in spec)):
        want = vectors(model, inputs)
    assert got.shape == (2, plan.k, 16)
    assert plan.k < want.shape[1]
    real = inputs["attention_mask"].bool() & (to >= 0)
    for i, there in enumerate(real):
        kept = there.nonzero().flatten()
        close(got[i, to[i, kept]], want[i, kept])
        rest = torch.ones(plan.k, dtype=torch.bool).index_fill(0, to[i, kept], False)
        assert not got[i, rest].any(), "padding is zeros"
    score = torch.einsum("qd,bkd->bqk", query, got).amax(-1).sum(-1)
    close(score, torch.einsum("qd,bkd->bqk", query, want * real.unsqueeze(-1)).amax(-1).sum(-1))


@pytest.mark.parametrize("name", INNER)
def test_nothing_changes_where_nothing_goes(name):
    model, inputs, query = build(name), pages(name), pages(name, ((6, ""), (4, "")))
    page, words = vectors(model, inputs), vectors(model, query)
    with tr.patched(model, "divprune:keep=1.0"):
        assert torch.equal(vectors(model, inputs), page)
    with tr.patched(model, "divprune:keep=0.3"):
        assert torch.equal(vectors(model, query), words)
        short = vectors(model, inputs)
        assert short.shape[1] < page.shape[1]
        with torch.no_grad():
            assert torch.equal(model(**inputs, return_dict=False)[0], short)
            assert torch.equal(copy.deepcopy(model)(**inputs).embeddings, short)
            free = {k: v for k, v in inputs.items() if k != "attention_mask"}
            assert model(**free).embeddings.abs().sum(-1).gt(0).sum() > short.abs().sum(-1).gt(0).sum()
    assert torch.equal(vectors(model, inputs), page)
    assert not [k for m in model.modules() for k in vars(m) if "tokenreduce" in k or k.startswith("get_")]


@pytest.mark.parametrize("name", INNER)
def test_a_reduced_tower_and_several_layers(name):
    model, inputs = build(name), pages(name)
    for spec in ("tome:r=2", "pyramiddrop", "tome:r=2+divprune:keep=4"):
        with tr.patched(model, spec), tr.record(model, flops=False) as trace:
            got = vectors(model, inputs)
        assert got.shape[1] == trace.tokens[-1] < inputs["input_ids"].shape[1]
        assert got.isfinite().all()


def test_what_cannot_be_served_is_refused():
    import transformers as hf

    with pytest.raises(ValueError, match="stage cache, which is not available on ColPali"):
        tr.patch(build("colpali"), "dycoke-cache")
    text = {"model_type": "gemma", **VLMS["paligemma"].model.config.text_config.to_dict()}
    robot = hf.PI0ForConditionalGeneration(
        hf.PI0Config(vlm_config=copy.deepcopy(VLMS["paligemma"].model.config), dit_config=text)
    )
    for spec in ("divprune:keep=0.3", "fastv:layer=1,keep=0.3", "tome:r=2"):
        with pytest.raises(ValueError, match="PI0Model is not supported: its action expert"):
            tr.patch(robot, spec)
    about = tr.describe(robot)
    assert "no method acts" in str(about)
    assert not any(about.methods(stage) for stage in about.stages)
    assert not [k for m in robot.modules() for k in vars(m) if "tokenreduce" in k]
