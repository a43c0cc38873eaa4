"""D2Pruner against the steps of its card in plain loops, and the prior that it divides by."""

from __future__ import annotations

import pytest
import torch
from mixed import LAYOUTS, RIGHT, kept_of, last_of, mixed, seen_by
from safetensors.torch import save_file
from vlms import VLMS, batch, llava, prompts

import tokenreduce as tr
from tokenreduce.measure.prior import attention_prior


def reference(evidence, layouts, b, keep, *, ratio=0.7, theta=0.8, weight=0.0, radius=2, block=False, prior=None):
    places = [i for i, c in enumerate(layouts[b]) if c == "v"]
    if keep >= len(places):
        return list(range(len(layouts[b])))
    a = seen_by(evidence, b, last_of(layouts[b]))
    where = evidence.place_of[b].tolist()
    score = {
        i: float(a[i]) / (float(prior[where[i][4] % len(prior)]) + 1e-7 if prior is not None else 1) for i in places
    }
    x = evidence.x[b].double()

    def near(i, j):
        s = (1 + float(x[i] @ x[j] / (x[i].norm() * x[j].norm()))) / 2
        same = where[i][:2] == where[j][:2]
        close = same and abs(where[i][2] - where[j][2]) <= radius and abs(where[i][3] - where[j][3]) <= radius
        return (1 - weight) * s + weight * close > theta

    order = sorted(places, key=lambda i: (-score[i], i))
    chosen = order[: int(ratio * keep)]
    closed = {j for i in chosen for j in places if near(i, j)} if block else set()
    for i in order:
        if len(chosen) < keep and i not in chosen and i not in closed:
            chosen.append(i)
            closed |= {j for j in places if near(i, j)}
    chosen += [i for i in order if i not in chosen][: keep - len(chosen)]
    return [i for i, c in enumerate(layouts[b]) if c != "v" or i in chosen]


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT, ("vtvvtvvt", "vvvvvvtt")], ids=str)
@pytest.mark.parametrize("keep", [2, 4, 6])
@pytest.mark.parametrize(
    "more",
    [{}, {"ratio": 0.0, "theta": 0.55}, {"ratio": 0.3, "theta": 0.5, "block": True},
     {"ratio": 0.2, "theta": 0.6, "weight": 0.5, "radius": 1}],
)  # fmt: skip
def test_is_the_choice_of_the_card(layouts, keep, more):
    evidence = mixed(layouts)
    method = tr.D2Pruner(
        keep=keep, pivot_ratio=more.get("ratio", 0.7), similarity_threshold=more.get("theta", 0.8),
        spatial_weight=more.get("weight", 0.0), radius=more.get("radius", 2), block_pivots=more.get("block", False),
    )  # fmt: skip
    plan = method.plan(evidence)
    for b in range(len(layouts)):
        assert kept_of(plan, b) == reference(evidence, layouts, b, keep, **more)


def test_a_prior_takes_the_bias_of_places_out(tmp_path):
    prior = torch.tensor([0.9, 0.001, 0.5, 0.2, 0.3, 0.05])
    save_file({"prior": prior}, tmp_path / "prior.safetensors")
    evidence = mixed(LAYOUTS)
    plan = tr.D2Pruner(keep=4, prior=str(tmp_path / "prior.safetensors")).plan(evidence)
    for b in range(2):
        assert kept_of(plan, b) == reference(evidence, LAYOUTS, b, 4, prior=prior)
    save_file({"prior": prior[:5]}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"images of 5 tokens.* has 6"):
        tr.D2Pruner(keep=4, prior=str(tmp_path / "other.safetensors")).plan(evidence)
    with pytest.raises(ValueError, match="no such file"):
        tr.D2Pruner(keep=4, prior="nowhere.safetensors").plan(evidence)


def test_equal_tokens_are_filled_up_by_importance():
    evidence = mixed(("vvvvvvt",))
    evidence.x[:] = 1.0
    plan = tr.D2Pruner(keep=4, pivot_ratio=0.0).plan(evidence)
    assert kept_of(plan, 0) == reference(evidence, ("vvvvvvt",), 0, 4, ratio=0.0)


def test_the_prior_of_a_model_is_its_mean_attention(tmp_path):
    model = llava()
    inputs = [batch("left", ((9, 1), (5, 2))), batch("left", ((7, 1),))]
    path = tmp_path / "prior.safetensors"
    prior = attention_prior(model, inputs, path, layer=2)
    rows = []
    model.set_attn_implementation("eager")
    for one in inputs:
        with torch.no_grad():
            maps = model(**one, output_attentions=True).attentions[1][:, :, -1].mean(1)
        for b, ids in enumerate(one["input_ids"]):
            rows += maps[b, ids == 99].split(16)
    torch.testing.assert_close(prior, torch.stack(rows).mean(0))
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), tr.patched(model, tr.D2Pruner(keep=5, prior=str(path), spatial_weight=0.5)):
        assert torch.isfinite(model.generate(**inputs[0], max_new_tokens=3, do_sample=False).float()).all()


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "llava"])
@pytest.mark.parametrize("before", [None, "divprune:keep=6", "ficoco-v:r=1", "prumerge:keep=5"])
def test_places_in_models(family, before):
    """Behind other methods, too, a token is where its representative was."""
    if before is not None and before.split(":")[0] not in tr.list_methods():
        pytest.skip("comes with its method")
    from tokenreduce.measure import prior as probe

    model, kind = VLMS[family].model, "i"
    inputs = prompts(VLMS[family], ((9, kind), (5, kind)))
    seen = []

    class Look(probe._Listen):
        def plan(self, evidence):
            seen.append(evidence.place_of)
            return super().plan(evidence)

    with torch.no_grad(), tr.patched(model, *([before] if before else []), Look(2)):
        model(**inputs)
    place = seen[0]
    there = place[..., 0] >= 0
    assert (there.sum(1) > 0).all()
    for b in range(2):
        mine = place[b, there[b]]
        assert len({tuple(p) for p in mine.tolist()}) == len(mine), "all are different places"
        assert (mine[:, 4] < mine[:, 5]).all()
        if before is None and family != "llava_next":
            columns = int(mine[:, 3].max()) + 1
            assert (mine[:, 2] * columns + mine[:, 3] == mine[:, 4]).all()


@pytest.mark.parametrize(
    "bad", [{"pivot_ratio": 1.5}, {"spatial_weight": -1.0}, {"eps": 0.0}, {"radius": -1}, {"layer": 0}]
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        tr.D2Pruner(**bad)
