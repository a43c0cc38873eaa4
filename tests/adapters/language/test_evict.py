"""Keys that leave the cache, another number in every row, head and layer, against the full cache with them masked."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from vlms import IMAGE, VLMS, batch, encodes_before, prompts, skip_beams_of_several
from vlms_masked import close, layers_of

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_in, cache_of
from tokenreduce.algorithms.keys import keep_slots
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.reducer import METHODS

STEPS = 5


@dataclass(frozen=True)
class Scatter(CacheReducer, name="test-scatter"):
    """Another budget for every row, head and layer; decided right behind the layer, or ``together`` behind the last."""

    together: bool = False
    share: float = 0.5
    alike: bool = False
    beams: int = 1

    def moment(self):
        return "prompt" if self.together else "layer"

    def plan(self, evidence):
        stay = evidence.there.clone()
        for row in range(len(stay)):
            head = 0 if self.alike else row % evidence.kv_heads
            g = torch.Generator().manual_seed(1000 * evidence.layer + 10 * (row // evidence.kv_heads // self.beams) + head)
            visual = evidence.visual[row].nonzero().flatten()
            count = int(len(visual) * (self.share + (0 if self.alike else 0.1 * head + 0.05 * evidence.layer)))
            gone = visual[torch.randperm(len(visual), generator=g)[count:]]
            stay[row, gone] = False
        return keep_slots(stay, evidence)


@pytest.fixture(autouse=True, scope="module")
def forget():
    yield
    METHODS.pop("test-scatter", None)


class masked:  # noqa: N801 - used like open()
    """The unpatched model with the columns that ``gone`` (layer -> (B,Hkv,L) bool) marks hidden as keys in every call
    behind the prompt."""

    def __init__(self, layers, gone):
        self.layers, self.gone, self.hooks = layers, gone, []

    def hide(self, module, args, kwargs):
        attention, cache, stock = module.self_attn, cache_in(kwargs), kwargs.get("attention_mask")
        gone, q = self.gone.get(attention.layer_idx), args[0].shape[1]
        layer = cache.layers[attention.layer_idx]
        past = int(layer.get_seq_length())
        if gone is None or past == 0:
            return None
        slots, offset = layer.get_mask_sizes(q)
        if stock is None:
            stock = (torch.arange(slots) + offset <= past + torch.arange(q)[:, None])[None, None]
        elif stock.dtype != torch.bool:
            stock = stock == 0
        rows = gone.repeat_interleave(attention.num_key_value_groups, 1)
        rows = torch.cat([rows, torch.zeros(*rows.shape[:2], offset + slots, dtype=torch.bool)], 2)
        see = stock & ~rows[:, :, None, offset : offset + slots]
        if attention.config._attn_implementation == "eager":
            see = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
        kwargs["attention_mask"] = see
        return args, kwargs

    def __enter__(self):
        self.hooks = [m.register_forward_pre_hook(self.hide, with_kwargs=True) for m in self.layers]

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


class kept_plans:  # noqa: N801 - used like open()
    """What every layer's plan dropped, by layer, in columns of the prompt: (B,Hkv,L) bool."""

    def __init__(self, method, monkeypatch):
        self.gone, self.method, self.patch = {}, type(method), monkeypatch

    def __enter__(self):
        stock = self.method.plan

        def plan(method, evidence):
            made = stock(method, evidence)
            columns = evidence.columns
            gone = torch.zeros(len(columns), int(columns.max()) + 1, dtype=torch.bool)
            away = (made.sources() < 0) & evidence.there
            gone.scatter_(1, torch.where(away, columns, 0), away)
            for row in range(len(columns)):  # column 0 is text, which no plan drops
                assert not gone[row, 0]
            self.gone[evidence.layer] = gone.unflatten(0, (evidence.batch, evidence.kv_heads))
            return made

        self.patch.setattr(self.method, "plan", plan)
        return self.gone

    def __exit__(self, *error):
        self.patch.undo()


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
        assert gone and all(bool(g.any()) for g in gone.values())
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


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "paligemma", "gemma3"])
def test_a_later_turn_with_an_image(name, monkeypatch):
    vlm = VLMS[name]
    model = vlm.model
    inputs = prompts(vlm, CASES["several"])
    turn = torch.tensor([[0, 20, 21, 22], [30, 31, 32, 33]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])

    def run():
        with torch.no_grad():
            first = model(**inputs, use_cache=True)
            cache = cache_of(first)
            whole = torch.cat([inputs["attention_mask"], mask], 1)
            from tokenreduce.adapters.language.generation import cache_as

            more = {k: torch.zeros_like(turn) for k in ("token_type_ids",) if k in inputs}
            places = (torch.arange(60, 64) - 1 + mask.cumsum(1) - mask.sum(1, keepdim=True)).clamp(min=0)
            if name.startswith("qwen"):
                places = places.expand(3, -1, -1)
            more["position_ids"] = places
            second = model(input_ids=turn, attention_mask=whole, **cache_as(model, cache), **more)
            one = torch.ones(2, 1, dtype=torch.long)
            more = {k: v[..., -1:] + (k == "position_ids") for k, v in more.items()}
            third = model(
                input_ids=one * 40, attention_mask=torch.cat([whole, one], 1), **cache_as(model, cache), **more
            )
            return second.logits, third.logits

    with tr.patched(model, Scatter()), kept_plans(Scatter(), monkeypatch) as gone:
        got = run()
    with masked(layers_of(name, model), gone):
        want = run()
    close(got[0][mask.bool()], want[0][mask.bool()])
    close(got[1], want[1])


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
        from tokenreduce.adapters.language.generation import cache_as

        with torch.no_grad():
            first = model(**inputs, use_cache=True)
            mask = torch.cat([inputs["attention_mask"], one], 1)
            out = model(
                input_ids=new, attention_mask=mask, position_ids=last[:, None] + 1, **cache_as(model, cache_of(first))
            )
            return first.logits, out.logits, cache_of(first)

    with tr.patched(model, Scatter()), kept_plans(Scatter(), monkeypatch) as gone:
        first, got, cache = run()
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
    with tr.patched(vlm.model, "divprune:keep=0.75+fastv:layer=2,keep=0.5+knorm:keep=0.5"), tr.record(
        vlm.model, flops=False
    ) as trace:
        _, _, cache = answer(vlm.model, inputs)
    assert [s.layer for s in trace.cache] == [0, 1, 2, 3]
    assert all((s.kept <= s.before).all() for s in trace.cache)
    assert all(s.bytes_held < s.bytes_before for s in trace.cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == sorted(
        [layer.keys.shape[2] for layer in cache.layers], reverse=True
    )


def test_cropped_and_copied_caches(monkeypatch):
    from tokenreduce.adapters.language.generation import cache_as

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
    with pytest.raises(ValueError, match="both take keys out of the cache of layer 0"):
        tr.patch(model, "knorm:keep=0.5", "snapkv:keep=0.5")
    with pytest.raises(ValueError, match="chooses among cached tokens"):
        tr.patch(model, "knorm:keep=0.5", "dycoke-cache:layer=2")
    with pytest.raises(ValueError, match="acts at none"):
        tr.patch(model, "knorm:keep=0.5,skip=9")
    assert int(inputs["input_ids"].eq(IMAGE).sum()) == 16
    assert encodes_before() in (True, False)
    assert batch() is not None
