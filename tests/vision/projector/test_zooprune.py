"""ZOO-Prune against the steps of its card, in plain loops, and what enters the projectors of models."""

from __future__ import annotations

import copy

import pytest
import torch
from visual import ORIGINS, bent, visual
from vlms import IMAGE, VLMS, prompts

import tokenreduce as tr
from tokenreduce.core.plan import Identity


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(z, s, keep):
    """Order of choice on one image: embeddings (N,D), sensitivities (N,)."""
    z, n = z.double(), len(s)
    low, high = min(s), max(s)
    s = [(v - low) / (high - low) if high > low else 1.0 for v in s]
    chosen = [max(range(n), key=lambda i: (s[i], -i))]
    while len(chosen) < keep:
        rest = [i for i in range(n) if i not in chosen]
        near = {i: max(float(z[i] @ z[j] / (z[i].norm() * z[j].norm()).clamp(min=1e-12)) for j in chosen) for i in rest}
        chosen.append(max(rest, key=lambda i: (s[i] * max(1 - near[i], 0.0), -i)))
    return chosen


@pytest.mark.parametrize("origin", ["square", "wide", "units"])
@pytest.mark.parametrize("keep", [1, 5, 0.4])
def test_is_the_greedy_choice_of_the_card(origin, keep):
    e = visual(ORIGINS[origin])
    method = tr.ZOOPrune(keep=keep, m=4, h=0.1)
    u = noise(4, 6)
    u = u / u.norm(dim=1, keepdim=True)
    rows, want = e.through[0], method.total(e.n)
    for b in range(2):
        s = []
        for i in range(e.n):
            s.append(sum(float((bent(rows[b, i] + 0.1 * v) - bent(rows[b, i] - 0.1 * v)).norm()) / 0.2 for v in u) / 4)
        torch.testing.assert_close(method.sensitivity(e)[b], torch.tensor(s), rtol=1e-4, atol=1e-5)
        chosen = reference(e.projected[b], s, want)
        assert method.order(e)[b].tolist() == chosen
        assert method.plan(e).keep[b].tolist() == sorted(chosen)


def test_derivatives_are_what_small_steps_tend_to():
    e = visual()
    exact = tr.ZOOPrune(m=6, exact=True).sensitivity(e)
    torch.testing.assert_close(tr.ZOOPrune(m=6, h=0.01).sensitivity(e), exact, rtol=1e-2, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(tr.ZOOPrune(m=6, exact=True).sensitivity(e), exact)
    other = tr.ZOOPrune(m=6, seed=1).sensitivity(e)
    assert not torch.equal(other, tr.ZOOPrune(m=6).sensitivity(e))


def test_a_linear_projector_is_as_sensitive_everywhere():
    matrix = noise(5, 7)
    x = noise(1, 9, 7)
    e = tr.Evidence(x, through=(noise(1, 9, 5, seed=3), lambda r: r @ matrix))
    assert tr.ZOOPrune(keep=4, m=3, exact=True).order(e)[0].tolist() == reference(x[0], [1.0] * 9, 4)


def test_duplicates_come_last_and_are_chosen_once():
    x = noise(1, 4, 6).repeat(1, 3, 1)
    rows = noise(1, 12, 5)
    e = tr.Evidence(x, through=(rows, torch.tanh))
    order = tr.ZOOPrune(keep=9, m=3).order(e)[0].tolist()
    assert len(set(order)) == 9
    assert {i % 4 for i in order[:4]} == {0, 1, 2, 3}


def test_without_the_projector_it_says_what_is_missing():
    with pytest.raises(ValueError, match="through"):
        tr.ZOOPrune(keep=3).plan(tr.Evidence(noise(1, 9, 4)))


class Look(tr.ZOOPrune):
    seen: list = []

    def plan(self, evidence):
        Look.seen.append(evidence)
        return Identity.like(evidence.x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family", ["llava", "llava_next", "internvl", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
)
def test_what_enters_the_projector_becomes_the_embeddings(family, dtype):
    model = VLMS[family].model
    model = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    inputs = prompts(VLMS[family], ((9, "ii"), (5, "i")))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    Look.seen.clear()
    with torch.no_grad(), tr.patched(model, Look(keep=3)):
        model(**inputs)
        assert Look.seen
        for e in Look.seen:
            rows, project = e.through
            made = project(rows)
            assert made.dtype == torch.float32
            assert made.shape[:2] == rows.shape[:2] == e.x.shape[:2]
            if dtype == torch.float32:
                torch.testing.assert_close(made, e.projected, rtol=1e-3, atol=1e-3 * float(made.abs().max()))
            else:
                near = torch.nn.functional.cosine_similarity(made, e.projected.float(), dim=-1)
                assert float(near.min()) > 0.98
    assert sum(e.x.shape[0] for e in Look.seen) == 3


def test_hooks_on_the_projector_do_not_run_for_scores():
    model = VLMS["llava"].model
    inputs = prompts(VLMS["llava"], ((9, "i"), (5, "i")))
    calls = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda *a: calls.append(1))
    with torch.no_grad(), tr.patched(model, tr.ZOOPrune(keep=5, m=4)), tr.record(model, flops=False) as trace:
        model(**inputs)
    hook.remove()
    assert len(calls) == 1
    left = (trace.plans[0].sources() >= 0) & (inputs["input_ids"] == IMAGE)
    assert left.sum(1).tolist() == [5, 5]


@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "gemma3"])
def test_connectors_that_mix_tokens_are_refused(family):
    with pytest.raises(ValueError, match="Methods that fit"):
        tr.patch(VLMS[family].model, "zoo-prune:keep=4")


@pytest.mark.parametrize("bad", [{"m": 0}, {"h": 0.0}, {"seed": -1}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        tr.ZOOPrune(**bad)
