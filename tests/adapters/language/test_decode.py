"""Methods that choose again in decode, against a plain decoder that does the same one token at a time."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from decode_reference import Entries, decode
from vlms import VLMS, prompts, skip_beams_of_several
from vlms_masked import close, layers_of

import tokenreduce as tr
from tokenreduce.adapters.language.generation import cache_of

MODELS = ("llava", "qwen2_5_vl")
ROWS = {"unequal": ((9, "i"), (5, "ii")), "alone": ((7, "i"),), "none": ((9, "i"), (5, ""))}
STEPS = 7


def generate(model, inputs, steps=STEPS, **settings):
    with torch.no_grad(), tr.record(model, flops=False) as trace:
        out = model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
            output_logits=True, **settings,
        )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1), trace


def lazy(percent, visual):
    def choose(layer, row, memory):
        seen = sorted((v, c) for c, v in row.items() if c < len(visual) and visual[c])
        gone = math.floor(len(seen) * percent / 100)
        least = seen[gone][0] if gone < len(seen) else float("inf")
        return {c for c, v in row.items() if not (c < len(visual) and visual[c]) or v >= least}

    return choose


def dycoke(p, gate, reuse, visual):
    def choose(layer, row, memory):
        among = [c for c in row if c < len(visual) and visual[c]]
        a = torch.tensor([row[c] for c in among])
        text = set(row) - set(among)
        best = set(
            torch.tensor(among, dtype=torch.long)[a.argsort(descending=True, stable=True)].tolist()[
                : max(1, int(len(among) * (1 - p) + 1e-9)) if among else 0
            ]
        )
        before = memory.get("a")
        memory["a"] = a
        if before is not None and len(a) and float(torch.nn.functional.cosine_similarity(a, before, dim=0)) >= gate:
            memory["again"] = memory.get("again", 0) + 1
            best = memory["stay"] if reuse else set(among)
        memory["stay"] = best
        return text | best

    return choose


def compare(name, rows, spec, how, **settings):
    """The decoders of all samples, after their logits were found equal to the patched model's."""
    vlm = VLMS[name]
    inputs = prompts(vlm, ROWS[rows])
    plain = generate(vlm.model, inputs)[1]
    with tr.patched(vlm.model, spec), Entries(layers_of(name, vlm.model)) as entries:
        _, logits, trace = generate(vlm.model, inputs, **settings)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    made = []
    for b in range(len(ids)):
        visual = (ids[b] == 99) & real[b]
        want, decoder = decode(vlm.model, entries, b, real[b], visual, **how(visual))
        close(logits[b], want)
        made.append(decoder)
    assert float((plain[:, -1] - logits[:, -1]).abs().max()) > 1e-2, "the reduction changes something"
    return made, trace, inputs


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_lazyllm_brings_tokens_back_as_a_plain_decoder_does(name, rows):
    made, trace, inputs = compare(
        name,
        rows,
        "lazyllm:pruning_layers=[1,2,3],percentile=40",
        lambda visual: dict(bounds=(1, 2, 3), choose=lazy(40, visual), revive=True, prunes=True),
    )
    assert sum(int(s.back.sum()) for s in trace.decode) > 4, "tokens came back"
    assert len(trace.decode) == 3 * (STEPS - 1)
    for b, decoder in enumerate(made):
        visual = (inputs["input_ids"][b] == 99).tolist()
        for step, (layer, stay) in zip(trace.decode, decoder.log, strict=True):
            assert step.layer == layer
            assert step.seen[b].nonzero().flatten().tolist() == [
                c for c in sorted(stay) if c < len(visual) and visual[c]
            ]


def test_lazyllm_works_on_what_a_projector_method_left():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ROWS["unequal"])
    spec = "divprune:keep=8+lazyllm:pruning_layers=[1,3],percentile=50"
    with tr.patched(vlm.model, spec), Entries(layers_of("llava", vlm.model)) as entries:
        _, logits, trace = generate(vlm.model, inputs, steps=5)
    kept = trace.steps[0].plan.sources() >= 0
    real = inputs["attention_mask"].bool() & kept
    for b in range(2):
        visual = (inputs["input_ids"][b] == 99) & real[b]
        # The prompt's entries are of all columns, the tables too; those that a projector method dropped never enter.
        want, decoder = decode(
            vlm.model, entries, b, real[b], visual, bounds=(1, 3), choose=lazy(50, visual), revive=True, prunes=True
        )
        close(logits[b], want)
        assert all(len(k) <= int(real[b].sum()) + 4 for k in decoder.keys)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("gate", "reuse"), [(1.0, True), (0.9, True), (0.9, False)])
def test_dycoke_hides_what_a_plain_decoder_hides(name, rows, gate, reuse):
    spec = f"dycoke-cache:layer=2,p=0.6,gate={gate},reuse={str(reuse).lower()}"
    made, trace, _ = compare(
        name,
        rows,
        spec,
        lambda visual: dict(bounds=(2,), choose=dycoke(0.6, gate, reuse, visual), revive=False, prunes=False),
    )
    again = sum(d.memory[2].get("again", 0) for d in made)
    assert (again > 0) == (gate < 1), "the gate is open in some steps"
    assert len(trace.decode) == STEPS - 1
    assert not any(s.back.any() for s in trace.decode)


@pytest.mark.parametrize("spec", ["lazyllm:pruning_layers=[1,2],percentile=50", "dycoke-cache:layer=1,keep=5"])
@pytest.mark.parametrize(
    "settings", [dict(num_beams=3), dict(attn="eager"), dict(cache_implementation="static")], ids=str
)
def test_beams_eager_and_static_caches(spec, settings):
    """Beams carry what they remember with them: the best one's logits are a plain decoder's for its tokens."""
    skip_beams_of_several(settings)
    vlm = VLMS["llava"]
    model, settings = copy.deepcopy(vlm.model), dict(settings)
    if attn := settings.pop("attn", None):
        model.set_attn_implementation(attn)
    inputs = prompts(vlm, ((9, "i"), (6, "i")))
    if "static" in settings.values() and "lazyllm" in spec:
        with tr.patched(model, spec), pytest.raises(ValueError, match="static"):
            generate(model, inputs, **settings)
        return
    with tr.patched(model, spec):
        beams = generate(model, inputs, **settings)[0]
        forced = generate(model, inputs)
        if "num_beams" in settings:  # the tokens of the best beam, one by one, must be as likely as the search found
            out = model.generate(
                **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=3, output_scores=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            got = out.sequences_scores
            want = replay(model, inputs, out.sequences)
            close(got, want)
        else:
            assert torch.equal(beams, forced[0])
            # eager and sdpa agree with one another
            with tr.patched(copy.deepcopy(vlm.model), spec) as other:
                close(forced[1], generate(other, inputs)[1])


def replay(model, inputs, sequences):
    """Mean log-probability of the new tokens of ``sequences``, given to the model one by one."""
    length = inputs["input_ids"].shape[1]
    new, mask, cache, total = sequences[:, length:], inputs["attention_mask"], None, 0.0
    with torch.no_grad():
        out = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
        for t in range(new.shape[1]):
            total = total + out.logits[:, -1].log_softmax(-1).gather(1, new[:, t : t + 1])[:, 0]
            cache = cache_of(out)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            position = mask.sum(1, keepdim=True) - 1
            out = model(
                input_ids=new[:, t : t + 1], attention_mask=mask, position_ids=position, past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
    return total / new.shape[1]


@pytest.mark.parametrize("spec", ["lazyllm:keep=1.0", "dycoke-cache:layer=2,keep=1.0"])
@pytest.mark.parametrize("name", MODELS)
def test_keep_all_and_unpatch_are_bit_identical(name, spec):
    vlm = VLMS[name]
    inputs = prompts(vlm, ROWS["unequal"])
    want = generate(vlm.model, inputs)
    with tr.patched(vlm.model, spec):
        got = generate(vlm.model, inputs)
    again = generate(vlm.model, inputs)
    for a, b, c in zip(want[:2], got[:2], again[:2], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("spec", ["lazyllm:pruning_layers=[1,2],percentile=50", "dycoke-cache:layer=1,keep=5"])
def test_a_later_turn_sees_all_that_the_caches_hold_and_goes_on(spec):
    """Two turns in a padded batch are what every row alone gives."""
    vlm = VLMS["llava"]

    def turns(model, inputs, rows):
        out = model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True,
        )  # fmt: skip
        more = torch.tensor([[11, 12, 13], [14, 15, 16]])[rows]
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(more), 7, dtype=torch.long)], 1)
        ids = torch.cat([out.sequences, more], 1)
        return model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache_of(out), max_new_tokens=4, min_new_tokens=4,
            do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip

    both = prompts(vlm, ((9, "i"), (5, "i")))
    with torch.no_grad(), tr.patched(vlm.model, spec):
        together = turns(vlm.model, both, slice(None))
        for b in range(2):
            real = both["attention_mask"][b].bool()
            one = {k: both[k][b : b + 1, real] for k in ("input_ids", "attention_mask")}
            alone = turns(vlm.model, {**one, "pixel_values": both["pixel_values"][b : b + 1]}, slice(b, b + 1))
            close(torch.stack(together.logits, 1)[b], torch.stack(alone.logits, 1)[0])


def test_copies_of_a_cache_go_on_by_themselves():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((9, "i"),))
    mask = inputs["attention_mask"]

    def steps(cache, tokens):
        out, seen = [], mask
        for token in tokens:
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
            out.append(vlm.model(input_ids=torch.tensor([[token]]), attention_mask=seen, past_key_values=cache).logits)
        return torch.cat(out, 1)

    with torch.no_grad(), tr.patched(vlm.model, "lazyllm:pruning_layers=[1,2],percentile=50"):
        cache = cache_of(vlm.model(**inputs, use_cache=True))
        twin = copy.deepcopy(cache)
        first, second = steps(cache, [5, 6, 7]), steps(twin, [8, 9, 10])
        fresh = cache_of(vlm.model(**inputs, use_cache=True))
        assert torch.equal(second, steps(fresh, [8, 9, 10]))
        assert not torch.equal(first, second)


# -- what does not go together ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("llava", "lazyllm:pruning_layers=[1]+fastv:layer=3", "set revive=false or leave that out"),
        ("llava", "lazyllm:pruning_layers=[1]+dycoke-cache", "both choose again in decode"),
        ("gemma3", "lazyllm", "sliding windows"),
        ("gemma3", "dycoke-cache", "sliding windows"),
        ("llava", "dycoke-cache:layer=9", "layers 0 to 3"),
    ],
)
def test_refusals_name_the_reason(name, spec, message):
    model = VLMS[name].model
    with pytest.raises(ValueError, match=message):
        tr.patch(model, spec)
    assert "tokenreduce" not in repr(model)


def test_layers_cropped_by_themselves_are_noticed():
    """A cache can be cropped as a whole (test_vlm_assisted.py); its layers hold what only the whole knows."""
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((9, "i"),))
    with torch.no_grad(), tr.patched(vlm.model, "lazyllm:pruning_layers=[1,2],percentile=60"):
        out = vlm.model.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True
        )
        cache = cache_of(out)
        for layer in cache.layers:
            layer.crop(-1)
        mask = torch.ones(1, out.sequences.shape[1] - 1, dtype=torch.long)
        with pytest.raises(ValueError, match="crop the cache as a whole"):
            vlm.model(input_ids=torch.tensor([[5]]), attention_mask=mask, past_key_values=cache)
