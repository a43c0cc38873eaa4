"""Keys that leave the cache, another number in every row, head and layer, against the full cache with them masked."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from scattered import Scatter, kept_plans, masked
from talks import ROWS, conversation, stock_talks, talk
from vlms import VLMS, prompts, skip_beams_of_several
from vlms_masked import close, layers_of

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_as, cache_in, cache_of
from tokenreduce.algorithms.keys import keep_slots
from tokenreduce.core.cache_reducer import CacheReducer

STEPS = 5


def answer(model, inputs, **settings):
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True,
            **settings,
        )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1), cache_of(out)


CASES = {
    "unequal": ((9, "i"), (5, "ii")),
    "alone": ((7, "i"),),
    "several": ((8, "ii"), (6, "ii")),
    "beams": ((6, "ii"), (9, "i")),
    "video": ((5, "v"), (8, "iv")),
}


def check(name, case, settings, method, monkeypatch, attention=None):
    vlm = VLMS[name]
    model = vlm.model
    inputs = prompts(vlm, CASES[case])
    own = model.model.get_submodule(vlm.text).config._attn_implementation
    if attention not in (None, own):
        model.set_attn_implementation(attention)
    try:
        plain_ids, plain, _ = answer(model, inputs, **settings)
        with tr.patched(model, method), kept_plans(method, monkeypatch) as gone:
            ids, got, cache = answer(model, inputs, **settings)
        assert gone
        assert all(bool(g.any()) for g in gone.values())
        with masked(layers_of(name, model), gone):
            want_ids, want, full = answer(model, inputs, **settings)
        assert torch.equal(ids, want_ids)
        close(got, want)
        if "num_beams" not in settings:
            assert not torch.allclose(got, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
        assert all(m.keys.shape[2] < f.keys.shape[2] for m, f in zip(cache.layers, full.layers, strict=True)
                   if not getattr(m, "is_sliding", False))  # fmt: skip
        after_ids, after, _ = answer(model, inputs, **settings)
        assert torch.equal(after_ids, plain_ids)
        assert torch.equal(after, plain)
    finally:
        if attention not in (None, own):
            model.set_attn_implementation(own)


@pytest.mark.parametrize("name", VLMS)
@pytest.mark.parametrize("case", ["unequal", "beams", "video"])
def test_keys_that_left_are_as_if_masked(name, case, monkeypatch):
    settings = {"num_beams": 3} if case == "beams" else {}
    skip_beams_of_several(settings)
    if case == "video" and not VLMS[name].video:
        pytest.skip("takes no videos")
    check(name, case, settings, Scatter(together=case == "video", beams=settings.get("num_beams", 1)), monkeypatch)


@pytest.mark.parametrize("name", VLMS)
def test_eager_attention_too(name, monkeypatch):
    check(name, "several", {}, Scatter(), monkeypatch, "eager")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_one_row_without_padding_where_heads_keep_as_many_needs_no_mask(name, monkeypatch):
    check(name, "alone", {}, Scatter(alike=True), monkeypatch)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", VLMS)
def test_a_later_turn_with_a_new_image(name, rows, monkeypatch):
    model, turns = VLMS[name].model, conversation(name, *ROWS[rows])
    stock_talks(model, turns)
    warned = pytest.warns(UserWarning, match="later turn brings images")
    with tr.patched(model, Scatter()), kept_plans(Scatter(), monkeypatch) as gone, warned:
        got = talk(model, turns)
    with masked(layers_of(name, model), gone):
        want = talk(model, turns)
    real = prompts(VLMS[name], ROWS[rows][1])["attention_mask"].bool()
    assert torch.equal(got[0], want[0])  # the prompt's own prefill is untouched
    close(got[1][real], want[1][real])
    close(got[2], want[2])


def test_a_budget_for_everything_touches_nothing():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, CASES["unequal"])
    ids, want, full = answer(vlm.model, inputs)
    for spec in ("knorm:keep=1.0", "snapkv:keep=1.0", "snapkv:keep=1000"):
        with tr.patched(vlm.model, spec):
            got_ids, got, cache = answer(vlm.model, inputs)
        assert torch.equal(got_ids, ids)
        assert torch.equal(got, want)
        for mine, theirs in zip(cache.layers, full.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys)


def test_right_padding_is_put_in_order(monkeypatch):
    vlm = VLMS["llava"]
    model, inputs = vlm.model, prompts(vlm, CASES["unequal"], pad="right")
    last = inputs["attention_mask"].sum(1) - 1
    new, one = torch.tensor([[40], [41]]), torch.ones(2, 1, dtype=torch.long)

    def run():
        with torch.no_grad():
            first = model(**inputs, use_cache=True)
            mask = torch.cat([inputs["attention_mask"], one], 1)
            out = model(
                input_ids=new, attention_mask=mask, position_ids=last[:, None] + 1, **cache_as(model, cache_of(first))
            )
            return first.logits, out.logits, cache_of(first)

    with tr.patched(model, Scatter()), kept_plans(Scatter(), monkeypatch) as gone:
        first, got, _ = run()
    with masked(layers_of("llava", model), gone):
        want_first, want, _ = run()
    assert torch.equal(first, want_first)
    close(got, want)
    with tr.patched(model, "snapkv:keep=0.3,window_size=4"):  # judged by the last real tokens of each row
        both = run()[1]
    assert torch.isfinite(both).all()
    assert not torch.allclose(both, got)


def test_all_stages_in_one_patch():
    vlm = VLMS["qwen2_5_vl"]
    inputs = prompts(vlm, CASES["unequal"])
    with (
        tr.patched(vlm.model, "divprune:keep=0.75+fastv:layer=2,keep=0.5+knorm:keep=0.5"),
        tr.record(vlm.model, flops=False) as trace,
    ):
        _, _, cache = answer(vlm.model, inputs)
    assert [s.layer for s in trace.cache] == [0, 1, 2, 3]
    assert all((s.kept <= s.before).all() for s in trace.cache)
    assert all(s.bytes_held < s.bytes_before for s in trace.cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == sorted(
        [layer.keys.shape[2] for layer in cache.layers], reverse=True
    )


def test_cropped_and_copied_caches(monkeypatch):
    vlm = VLMS["llava"]
    model, inputs = vlm.model, prompts(vlm, CASES["several"])
    mask = inputs["attention_mask"]
    new = torch.tensor([[40, 41, 42], [43, 44, 45]])

    def run(crop):
        with torch.no_grad():
            cache = cache_of(model(**inputs, use_cache=True))
            cache = copy.deepcopy(cache)
            ones = torch.ones(2, 3, dtype=torch.long)
            model(input_ids=new, attention_mask=torch.cat([mask, ones], 1), **cache_as(model, cache))
            if crop:
                cache.crop(-2)
            whole = torch.cat([mask, ones[:, : 1 if crop else 3]], 1)
            last = torch.cat([whole, ones[:, :1]], 1)
            return model(input_ids=new[:, 1:2], attention_mask=last, **cache_as(model, cache)).logits

    for crop in (True, False):
        with tr.patched(model, Scatter()), kept_plans(Scatter(), monkeypatch) as gone:
            got = run(crop)
        with masked(layers_of("llava", model), gone):
            close(got, run(crop))


def test_what_cannot_be_right_is_refused():
    vlm = VLMS["llava"]
    model, inputs = vlm.model, prompts(vlm, CASES["alone"])
    with tr.patched(model, "knorm:keep=0.5"):
        with pytest.raises(ValueError, match="cannot lose any"):
            answer(model, inputs, cache_implementation="static")
        with pytest.warns(UserWarning, match="use_cache=False keeps no keys"), torch.no_grad():
            model(**inputs, use_cache=False)
    with torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
    new = {"input_ids": torch.tensor([[40]]), "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 1)}
    with tr.patched(model, "knorm:keep=0.5"), torch.no_grad():
        with pytest.warns(UserWarning, match="not filled by the patched model"):
            model(**new, **cache_as(model, cache))
        with pytest.raises(ValueError, match="NaN"):
            model(**{k: v * torch.nan if v.is_floating_point() else v for k, v in inputs.items()}, use_cache=True)
    with pytest.raises(ValueError, match="both take keys out of the cache of layer 0"):
        tr.patch(model, "knorm:keep=0.5", "snapkv:keep=0.5")
    with pytest.raises(ValueError, match="chooses among cached tokens"):
        tr.patch(model, "knorm:keep=0.5", "dycoke-cache:layer=2")
    with pytest.raises(ValueError, match="acts at none"):
        tr.patch(model, "knorm:keep=0.5,skip=9")


# -- while decoding --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Greedy(CacheReducer):
    """Every ``steps`` decode steps, another number of keys stays in every head: those with most attention so far."""

    steps: int = 2
    room: int = 12

    def every(self):
        return self.steps

    def required(self):
        return ("attention",)

    def score(self, evidence):
        mine = evidence.column_sums().sum(1)
        return mine if evidence.scores is None else mine + evidence.scores

    def plan(self, evidence):
        score, stay = self.score(evidence), evidence.last(1)
        for row in range(len(stay)):
            room = self.room + 2 * (row % evidence.kv_heads) + evidence.layer
            best = score[row].masked_fill(~evidence.there[row] | stay[row], -1.0).argsort(descending=True, stable=True)
            stay[row, best[: min(room, int(evidence.there[row].sum()) - 1)]] = True
        return keep_slots(stay, evidence)


Greedy.name = "greedy"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", VLMS)
def test_eviction_in_decode_is_as_if_masked_from_then_on(name, attention, monkeypatch):
    vlm = VLMS[name]
    model, inputs, stock = copy.deepcopy(vlm.model), prompts(vlm, CASES["several"]), Greedy.plan
    if attention == "eager":
        model.set_attn_implementation("eager")
    events = []  # (layer, step, sums (B*Hkv,N), columns, gone (B,Hkv,L))

    def plan(method, evidence):
        made = stock(method, evidence)
        away, columns = (made.sources() < 0) & evidence.there, evidence.columns
        gone = torch.zeros(len(columns), 80, dtype=torch.bool)
        gone.scatter_(1, torch.where(away, columns, 79), away)
        events.append((evidence.layer, evidence.step, gone.unflatten(0, (2, -1))))
        return made

    monkeypatch.setattr(Greedy, "plan", plan)
    with tr.patched(model, Greedy()):
        ids, got, _ = answer(model, inputs)
    assert {step for _, step, _ in events} == {0, 2, 4}
    length = inputs["input_ids"].shape[1]

    class Masked(masked):
        def hide(self, module, args, kwargs):
            at = module.self_attn.layer_idx
            past = int(cache_in(kwargs).layers[at].get_seq_length())
            before = [g for layer, step, g in events if layer == at and past and length + step <= past]
            self.gone = {at: torch.stack(before).any(0)} if before else {}
            return super().hide(module, args, kwargs)

    with Masked(layers_of(name, model), {}):
        want_ids, want, _ = answer(model, inputs)
    assert torch.equal(ids, want_ids)
    close(got, want)


def test_scores_are_what_the_model_attended():
    vlm = VLMS["llava"]
    model, inputs, seen = copy.deepcopy(vlm.model), prompts(vlm, CASES["unequal"]), []

    @dataclass(frozen=True)
    class Watch(Greedy):
        def plan(self, evidence):
            seen.append((evidence.layer, evidence.step, evidence.rows(), evidence.columns, evidence.scores))
            return super().plan(evidence) if evidence.step else keep_slots(evidence.there, evidence)

    Watch.name = "watch"
    with tr.patched(model, Watch(steps=1, room=500)):
        answer(model, inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_attentions=True
        )
    real = inputs["attention_mask"].bool()
    for layer, step, rows, _, _ in seen:
        want = out.attentions[step][layer]  # (B,H,Q,S)
        got = rows.unflatten(0, (2, 2)).flatten(1, 2)
        if step == 0:
            want = want * real[:, None, :, None]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    sums = {}
    for layer, step, rows, _, scores in seen:
        if step:
            torch.testing.assert_close(scores[:, :-1], sums[layer])
            assert (scores[:, -1] == 0).all()
        mine = rows.sum((1, 2))
        old = sums.get(layer)
        sums[layer] = mine if old is None else mine + torch.nn.functional.pad(old, (0, 1))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_beams_take_what_is_remembered_with_them(name):
    """Beams that came from one row answer as that row alone does, forced along the same tokens."""
    vlm = VLMS[name]
    model, inputs = vlm.model, prompts(vlm, CASES["alone"])
    with tr.patched(model, Greedy(steps=1, room=9)), torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, num_beams=4, num_return_sequences=4, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        kept = out.sequences[:, inputs["input_ids"].shape[1] :]
        for row, total in zip(kept, out.sequences_scores, strict=True):
            force = lambda b, ids, row=row, n=inputs["input_ids"].shape[1]: [int(row[min(len(ids) - n, STEPS - 1)])]
            alone = model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, prefix_allowed_tokens_fn=force, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            assert torch.equal(alone.sequences[0, -STEPS:], row)
            logs = torch.stack(alone.logits, 1).log_softmax(-1)[0].gather(1, row[:, None]).sum()
            torch.testing.assert_close(logs / STEPS, total, rtol=1e-3, atol=1e-4)


def test_drafts_and_decisions_in_decode_do_not_go_together():
    vlm = VLMS["llava"]
    with tr.patched(vlm.model, Greedy()), pytest.raises(ValueError, match="every decode step"):
        answer(vlm.model, prompts(vlm, CASES["alone"]), prompt_lookup_num_tokens=2)


def test_assisted_decoding_with_a_thinned_prompt_is_exact(monkeypatch):
    vlm = VLMS["llava"]
    inputs = prompts(vlm, CASES["alone"])
    with tr.patched(vlm.model, Scatter()):
        want = vlm.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        got = vlm.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(got, want)
