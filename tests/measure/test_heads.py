"""Scores of KV heads against whole attention maps of the models themselves, in plain loops."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from vlms import VLMS

import tokenreduce as tr
from tokenreduce.measure import heads
from tokenreduce.measure.heads import echo_and_induction, measure_heads, on_the_fly

FAMILIES = [
    "llava", "llava_next_window", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "paligemma2",
    "gemma3",
]  # fmt: skip


def build(name, kind="eager"):
    torch.manual_seed(0)
    model = VLMS[name].build()
    model.set_attn_implementation(kind)
    return model


def reference(model, ids, front, block, repeats, groups):
    """echo, induction: [layer][KV head], of attention maps that the model returns."""
    out = model.get_decoder()(input_ids=ids, output_attentions=True, use_cache=False)
    both = []
    for attention in out.attentions:
        found = []
        for head in attention[0]:
            echo = induction = 0.0
            for p in range(front + block, front + block * repeats):
                for m in range(1, repeats):
                    if p - m * block >= front:
                        echo += float(head[p, p - m * block])
                        induction += float(head[p, p - m * block + 1])
            found.append((echo / (block * (repeats - 1)), induction / (block * (repeats - 1))))
        both.append(
            [[max(one) for one in zip(*found[h : h + groups], strict=True)] for h in range(0, len(found), groups)]
        )
    return both


@pytest.mark.parametrize("name", FAMILIES)
def test_echo_and_induction(name):
    model = build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parts = heads._parts(model)
    ids, probe = heads._probe(parts, 9, 3, 0)
    table = measure_heads(model, tokens=9, repeats=3)
    groups = parts.config.num_attention_heads // table.kv_heads
    with torch.no_grad():
        want = reference(model, ids, probe["front"], 9, 3, groups)
    for layer in range(table.layers):
        for h in range(table.kv_heads):
            for name_, value in zip(("echo", "induction"), want[layer][h], strict=True):
                assert table.scores[name_][layer][h] == pytest.approx(value, abs=1e-6)
    assert table.model == type(model).__name__
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "tokenreduce" not in repr(vars(parts.layers[0].self_attn)), "nothing is left on the model"


@pytest.mark.parametrize("name", ["llava", "llava_next_window", "qwen2_5_vl"])
def test_implementations_agree(name):
    eager, sdpa = (measure_heads(build(name, kind), tokens=9, repeats=3).scores for kind in ("eager", "sdpa"))
    for score, rows in eager.items():
        torch.testing.assert_close(torch.tensor(rows), torch.tensor(sdpa[score]), rtol=1e-4, atol=1e-6)


def test_an_attention_that_copies_scores_one():
    """Every token attends to its occurrence one block ago, or to the token behind that."""
    front, block, repeats = 1, 5, 4
    n = front + block * repeats
    for offset in (0, 1):
        rows = torch.zeros(1, n, n)
        for p in range(front + block, n):
            rows[0, p, p - block + offset] = 1.0
        echo, induction = echo_and_induction(lambda a, b, rows=rows: rows[:, a:b], front, block, repeats)
        assert (float(echo), float(induction)) == (1 - offset, offset)


def rotated(x, position, theta=10000.0):
    """One vector at a position, the two halves of it turned."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = torch.tensor(position * theta ** (-2 * i / len(x)), dtype=torch.double)
        a, b = x[i], x[i + half]
        out[i], out[i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def test_on_the_fly():
    """The mean query at the last position on the mean key at all of them, for two texts."""
    model = VLMS["llava"].build()
    texts = [torch.tensor([5, 9, 30, 7, 7, 12]), torch.tensor([40, 3, 21])]
    table = measure_heads(model, tokens=9, repeats=3, texts=texts)
    text, span = model.get_decoder(), 28  # as many positions as the probe has
    for layer in range(4):
        attention, norm = text.layers[layer].self_attn, text.layers[layer].input_layernorm
        total = [0.0, 0.0]
        for ids in texts:
            with torch.no_grad():
                states = text(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states[layer]
                x = norm(states)[0]
                q = attention.q_proj(x).view(len(ids), 4, 8).double().mean(0)
                k = attention.k_proj(x).view(len(ids), 2, 8).double().mean(0)
            for h in range(4):
                at = rotated(q[h], span - 1)
                weights = torch.stack([at @ rotated(k[h // 2], p) / 8**0.5 for p in range(span)]).softmax(0)
                area = sum(float(weights[: i + 1].sum()) for i in range(span)) / span
                total[h // 2] += area / 2 / len(texts)
        assert table.scores["on_the_fly"][layer] == pytest.approx(total, rel=1e-4)
    assert table.probe["texts"] == [6, 3]


def test_even_and_local_attention():
    """Even attention over positions has half the area; all of it on the last position the least."""
    same = on_the_fly(torch.zeros(2, 4), torch.ones(1, 4), lambda x: x.expand(-1, 100, -1), 1.0)
    assert float(same) == pytest.approx(0.505)

    def last(x):
        return x.expand(-1, 100, -1) * (torch.arange(100) == 99)[:, None] * 30.0

    assert float(on_the_fly(torch.ones(2, 4), torch.ones(1, 4), last, 1.0)) == pytest.approx(0.01, abs=1e-4)


def test_a_text_model_and_its_seed():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=41, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    table = measure_heads(model)
    assert table.probe == {
        "tokens": 10, "repeats": 4, "front": 1, "ids": [0, 50], "seed": 0, "texts": [],
    }, "as many as fit"  # fmt: skip
    assert measure_heads(model) == table
    assert measure_heads(model, seed=1) != table
    ids, _ = heads._probe(heads._parts(model), None, 4, 0)
    assert int(ids[0, 0]) == 1
    assert len(set(ids[0, 1:11].tolist())) == 10, "each once"
    assert not {0, 1, 2} & set(ids[0, 1:].tolist())
    assert ids[0, 1:11].tolist() == ids[0, 31:41].tolist()


def test_the_table_goes_into_the_methods(tmp_path):
    model = VLMS["llava"].build()
    path = measure_heads(model, tokens=9, repeats=3).save(tmp_path / "heads.json")
    for spec in (f"razorattention:table={path},induction=0.3", f"duoattention:table={path}"):
        method = tr.get_method(spec)
        method.check_model("LlavaForConditionalGeneration", 4, 2)
        assert 0 < len(method.whole_heads()) < 8


def test_bad_input():
    model = VLMS["llava"].build()
    for settings, message in (
        ({"repeats": 1}, "repeats"), ({"tokens": 1}, "too short"), ({"tokens": 900}, "too long"),
        ({"texts": [torch.zeros(2, 3, dtype=torch.long)]}, "token ids"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            measure_heads(model, **settings)
    with pytest.raises(ValueError, match="no decoder of transformers"):
        measure_heads(torch.nn.Linear(2, 2))
    tr.patch(model, "fastv:layer=2,keep=0.5")
    with pytest.raises(ValueError, match="unpatch"):
        measure_heads(model)
