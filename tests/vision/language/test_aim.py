"""AIM's pruning against the steps of its card in plain loops."""

from __future__ import annotations

import pytest
import torch
from mixed import DIM, HEADS, KEY_HEADS, LAYOUTS, RIGHT, kept_of, last_of, mixed
from vlms import batch, llava

import tokenreduce as tr
from tokenreduce.core.evidence import Attention
from tokenreduce.vision.language.aim import AIM, _sharper


def importance(evidence, layout, b, tau=0.1, iters=5, d=0.0):
    """Step 7 of the card over the real tokens of one sample, in float64: place -> importance."""
    real = [i for i, c in enumerate(layout) if c != "."]
    n, total = len(real), [0.0] * len(real)
    for h in range(HEADS):
        q, k = evidence.queries[b, h].double(), evidence.keys[b, h // (HEADS // KEY_HEADS)].double()
        m = torch.zeros(n, n, dtype=torch.double)
        for r, i in enumerate(real):
            logits = torch.stack([q[i] @ k[j] / DIM**0.5 for j in real[: r + 1]])
            m[r, : r + 1] = (logits / tau).softmax(0)
        p = [1 / n] * n
        for _ in range(iters):
            p = [(1 - d) * sum(p[i] * float(m[i, j]) for i in range(n)) + d / n for j in range(n)]
        total = [t + v * v for t, v in zip(total, p, strict=True)]
    return {i: (t / HEADS) ** 0.5 for i, t in zip(real, total, strict=True)}


def reference(evidence, layouts, b, wanted, **settings):
    layout = layouts[b]
    score = importance(evidence, layout, b, **settings)
    if layout[last_of(layout)] == "v":
        score[last_of(layout)] = float("inf")
    best = sorted((i for i, c in enumerate(layout) if c == "v"), key=lambda i: (-score[i], i))[:wanted]
    return [i for i, c in enumerate(layout) if c != "v" or i in best]


@pytest.mark.parametrize("layouts", [LAYOUTS, RIGHT, ("ttvvvvtv", "vvvvvvvv"), ("vtvtvtt",)], ids=str)
@pytest.mark.parametrize("settings", [{}, dict(tau_imp=1.0, iters=2), dict(d=0.15)], ids=str)
def test_worked_example(layouts, settings):
    """8 layers: 4, 5 and 6 are read, and of V tokens 2V/3, V/3 and none are left."""
    plain = {"tau" if key == "tau_imp" else key: value for key, value in settings.items()}
    for layer, thirds in ((5, 2), (6, 1), (7, 0)):
        evidence = mixed(layouts, layer=layer, depth=8)
        plan = AIM(**settings).plan(evidence)
        for b, layout in enumerate(layouts):
            wanted = max(layout.count("v") * thirds // 3, int(layout[last_of(layout)] == "v"))
            assert kept_of(plan, b) == reference(evidence, layouts, b, wanted, **plain)


def test_published_schedule():
    assert [i for i in range(28) if AIM().acts_at(i, 28)] == list(range(15, 23))
    assert [i for i in range(32) if AIM(l1=13, l2=20).acts_at(i, 32)] == list(range(14, 22))
    for visual in (64, 21, 10, 3):
        prompt = ("t" + "v" * visual + "t",)
        for layer in range(15, 23):
            rate = max(0.0, 1 - (layer - 1 - 13) * 0.125)
            plan = AIM().plan(mixed(prompt, layer=layer, depth=28))
            assert plan.k == int(visual * rate + 2), "the official rounding"


def test_counts_are_of_the_entry():
    prompt = ("t" + "v" * 24 + "t",)
    plan = AIM().plan(mixed(("t" + "v" * 21 + "t",), layer=16, depth=28, prompt=prompt))
    assert plan.k == 18 + 2
    assert AIM().plan(mixed(("t" + "v" * 6 + "t",), layer=16, depth=28, prompt=prompt)).is_identity


def test_keep_is_reached_by_equal_steps():
    prompt = ("t" + "v" * 40 + "tt",)
    want = [35, 30, 25, 20, 15, 10, 5][:4]
    assert [AIM(keep=8, l1=0, l2=7).plan(mixed(prompt, layer=i, depth=9)).k - 3 for i in range(1, 9)] == [
        8 + 32 * (8 - i) // 8 for i in range(1, 9)
    ]
    assert [AIM(keep=20, l1=0, l2=3).plan(mixed(prompt, layer=i, depth=5)).k - 3 for i in range(1, 5)] == want
    assert AIM(keep=0.5, l1=0, l2=3).plan(mixed(prompt, layer=4, depth=5)).k - 3 == 20


def test_ties_go_to_the_lower_index():
    """Isolated tokens attend to themselves only, so that all are as important."""
    eye = torch.eye(6).expand(1, HEADS, 6, 6)
    evidence = mixed(("tvvvvt",), layer=3, attention=eye)
    assert AIM(keep=2).plan(evidence).representatives().tolist() == [[0, 1, 2, 5]]


def test_early_tokens_are_favoured():
    """Causal multiplication pushes the mass to the front: with equal logits importance falls with the place."""
    evidence = mixed(("vvvvvvt",), layer=3)
    evidence.keys.zero_()
    assert AIM(keep=3).plan(evidence).representatives().tolist() == [[0, 1, 2, 6]]


def test_a_whole_map_given_is_the_same_and_rows_are_refused():
    evidence = mixed(layer=3)
    whole = mixed(layer=3, attention=evidence.attention("all").nan_to_num())
    for keep in (1, 3, 6):
        assert AIM(keep=keep).plan(whole) == AIM(keep=keep).plan(evidence)
    rows = mixed(layer=3, attention=evidence.attention(evidence.last()))
    with pytest.raises(ValueError, match="needs attention of all 16 rows, not 1"):
        AIM(keep=3).plan(rows)


def test_one_head_at_a_time(monkeypatch):
    """No call asks for more than some rows of one head, or for keys behind them; in pieces the map is the same."""
    evidence, asked = mixed(("t" + "v" * 300 + "t",), layer=3), []
    stock = Attention.__call__

    def attention(self, rows="cls"):
        asked.append(stock(self, rows))
        return asked[-1]

    monkeypatch.setattr(Attention, "__call__", attention)
    plan = AIM(keep=9).plan(evidence)
    assert plan.k == 11
    assert {tuple(a.shape) for a in asked} == {(1, 1, 256, 256), (1, 1, 46, 302)}
    assert len(asked) == 2 * HEADS
    one = evidence.attention.head(3)
    torch.testing.assert_close(_sharper(one, evidence, 0.1, 7), _sharper(one, evidence, 0.1, 1000))
    logits = evidence.queries[0, 3] @ evidence.keys[0, 1].T / DIM**0.5
    ahead = torch.ones(302, 302, dtype=torch.bool).triu(1)
    want = (logits.masked_fill(ahead, float("-inf")) / 0.1).softmax(-1)
    torch.testing.assert_close(_sharper(one, evidence, 0.1)[0], want, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_in_a_model_no_visual_token_is_left():
    model, inputs = llava(8), batch("left", ((9, 1), (9, 1)))
    with tr.patched(model, AIM()), tr.record(model, flops=False) as trace:
        model(**inputs)
    assert trace.tokens == [9 + 10, 9 + 5, 9], "16 of each image, in thirds"
    uneven = batch("left", ((9, 1), (5, 2)))
    with tr.patched(model, AIM()):
        assert torch.isfinite(model(**uneven).logits).all()
        tokens = model.generate(**uneven, max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] == uneven["input_ids"].shape[1] + 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(l1=-1), "l1 is an int >= 0"),
        (dict(l1=5, l2=4), "l1 is at most l2"),
        (dict(tau_imp=0), "tau_imp is a temperature > 0"),
        (dict(iters=0), "iters is an int >= 1"),
        (dict(d=1), r"d is a share in \[0, 1\)"),
        (dict(keep=0), "keep"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AIM(**settings)


def test_bad_depth():
    for reducer, depth in ((AIM(l2=7), 8), (AIM(l1=7), 8), (AIM(), 1)):
        with pytest.raises(ValueError, match=f"layers 0 to {depth - 1}"):
            reducer.acts_at(0, depth)
    assert [i for i in range(2) if AIM().acts_at(i, 2)] == [1]


@pytest.mark.parametrize("kind", ["plain", "softcap", "scale", "hidden", "added", "sizes", "padding"])
def test_sharper_logits_are_the_same_by_every_way(kind):
    """From queries and keys the temperature goes into the logits; from softmax rows it comes back through a log."""
    g = torch.Generator().manual_seed(7)
    q, k = torch.randn(2, 1, 9, DIM, generator=g), torch.randn(2, 1, 9, DIM, generator=g)
    behind = torch.ones(9, 9, dtype=torch.bool).tril()
    band = (behind & behind.T.roll(2, 1)) | torch.eye(9, dtype=torch.bool)
    slope = torch.randn(1, 1, 9, 9, generator=g).masked_fill(~behind, torch.finfo(torch.float32).min)
    settings = {
        "softcap": dict(softcap=1.5), "scale": dict(scale=0.9), "hidden": dict(mask=band[None, None]),
        "added": dict(mask=slope, softcap=2.0), "sizes": dict(size=torch.randint(1, 5, (2, 9), generator=g)),
        "padding": dict(valid=torch.arange(9) >= torch.tensor([[0], [3]])),
    }.get(kind, {})  # fmt: skip
    one = tr.Evidence(torch.randn(2, 9, 4, generator=g), k, q, causal="mask" not in settings, **settings)
    rows = one.attention("all").double()
    want = (rows.log() / 0.3).softmax(-1)[:, 0]
    if one.valid is not None:
        want = want.masked_fill(~one.valid.unsqueeze(2), 0.0)
    torch.testing.assert_close(_sharper(one.attention, one, 0.3, 4).double(), want, rtol=1e-4, atol=1e-6)
