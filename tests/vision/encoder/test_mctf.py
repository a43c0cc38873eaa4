"""MCTF against the card, written down as loops over the tokens of one sample."""

from __future__ import annotations

import math

import pytest
import torch
from support import evidence, images, tiny_vit

import tokenreduce as tr

F64 = torch.float64


def attention_map(x, keys, queries, size):
    """Softmax map (H,N,N) of one sample with the log-size bias."""
    bias = 0 if size is None else size.double().log()
    return torch.stack(
        [
            torch.softmax(q.double() @ k.double().T / math.sqrt(k.shape[1]) + bias, -1)
            for q, k in zip(queries, keys, strict=True)
        ]
    )


def reference(x, a, size, r, p, m):
    """The card's steps for one sample: x (N,C), map a (H,N,N), size (N,) or None, prefix p.

    Returns groups (members of every output, in output order), values, sizes and the reduced map.
    """
    n = x.shape[0]
    x, a = x.double(), a.double()
    received = [float(a[:, :, j].mean()) for j in range(n)]
    free = range(p, n)
    evens, odds = [i for i in free if i % 2 == 0], [i for i in free if i % 2]
    u = [(1 / g) / max(1 / g for g in received) for g in received]
    v = None if size is None else [(1 / s) / max(1 / s for s in size.tolist()) for s in size.tolist()]

    def score(i, j):
        s = 1.0
        if m.tau_sim:
            cosine = float(x[i] @ x[j] / (x[i].norm() * x[j].norm()))
            s *= ((cosine + 1) / 2) ** (1 / m.tau_sim)
        if m.tau_info:
            s *= (u[i] * u[j]) ** (1 / m.tau_info)
        if m.tau_size and v is not None:
            s *= (v[i] * v[j]) ** (1 / m.tau_size)
        return s

    scores = {(i, j): score(i, j) for i in evens for j in odds}
    groups = {i: [i] for i in range(n)}
    first = r // 2 if m.bidirection else r
    best = {i: max(odds, key=lambda j: (scores[i, j], -j)) for i in evens} if odds else {}
    ranked = sorted(best, key=lambda i: (-scores[i, best[i]], i))
    for i in ranked[:first]:
        groups[best[i]] += groups.pop(i)
    stay = sorted(ranked[first:])
    if m.bidirection:
        column = {j: max(stay, key=lambda i: (scores[i, j], -i)) for j in odds}
        order = sorted(odds, key=lambda j: (-scores[column[j], j], j))
        for j in order[: r - first]:
            groups[column[j]] += groups.pop(j)
        behind = order[r - first :]
    else:
        behind = odds
    members = [groups[i] for i in [*range(p), *stay, *behind]]
    ones = torch.ones(n, dtype=F64)
    mass = ones if size is None else size.double()
    w = {0: mass, 1: mass / mass.max() * torch.tensor(received, dtype=F64), 2: mass, 3: ones}[m.pooling]
    rows = torch.stack([a[:, :, g].sum(-1) for g in members], -1)  # (H,N,K)

    def mean(t, g):
        return (t[g] * w[g].view(-1, *[1] * (t.dim() - 1))).sum(0) / w[g].sum()

    value = torch.stack([x[g].amax(0) if m.pooling == 2 else mean(x, g) for g in members])
    reduced = torch.stack([torch.stack([mean(h, g) for g in members]) for h in rows])
    return members, value, torch.stack([mass[g].sum() for g in members]), reduced


VARIANTS = [
    {},
    {"bidirection": False},
    {"pooling": 0},
    {"pooling": 2},
    {"pooling": 3, "tau_sim": 0},
    {"tau_info": 1, "tau_size": 2},
    {"tau_info": 0, "tau_size": 0},
    {"bidirection": False, "pooling": 2},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize(("n", "prefix", "r"), [(17, 1, 7), (16, 0, 5), (21, 2, 9), (24, 5, 1), (12, 1, 2)])
@pytest.mark.parametrize("sized", [False, True])
def test_agrees_with_the_card(settings, n, prefix, r, sized):
    m = tr.MCTF(r=r, layers=(0,), **settings)
    size = torch.randint(1, 5, (2, n)).float() if sized else None
    e = evidence(n=n, prefix=prefix, size=size)
    plan = m.plan(e)
    got, sizes = plan.reduce(e.x, size), plan.reduce_size(size)
    reduced = plan.reduce_attention(e.attention("all"), size)
    for b in range(2):
        s = None if size is None else size[b]
        a = attention_map(e.x[b], e.keys[b], e.queries[b], s)
        members, value, mass, given = reference(e.x[b], a, s, r, prefix, m)
        assert len(members) == plan.k == n - r
        source = plan.sources()[b].tolist()
        assert [sorted(g) for g in members] == [[i for i in range(n) if source[i] == k] for k in range(n - r)]
        torch.testing.assert_close(got[b].double(), value, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sizes[b].double(), mass)
        torch.testing.assert_close(reduced[b].double(), given, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reduced.sum(-1), torch.ones_like(reduced[..., 0]))


def made(x, received, r, prefix=0, **settings):
    """The plan for one sample whose tokens receive the given attention, the same from every query."""
    x = torch.tensor(x, dtype=torch.float32)[None]
    n = x.shape[1]
    rows = torch.tensor(received, dtype=torch.float32).view(1, 1, 1, n).expand(1, 1, n, n)
    e = tr.Evidence(x, attention=rows, protected=prefix)
    return tr.MCTF(r=r, layers=(0,), floor=1, **settings).plan(e), e


def test_worked_example_a_token_that_received_moves_on_with_its_sources():
    # Rows: 0 and 1 equal, 2 near them, 3 opposite. r=2: one even token moves, then one odd token.
    plan, e = made([[1.0, 0], [1, 0], [0.9, 0.1], [-1, 0]], [0.1, 0.2, 0.3, 0.4], 2)
    # First 0 -> 1 (cosine 1); then, of the even ones, only 2 is left: 1 -> 2 and takes 0 along.
    assert plan.sources().tolist() == [[0, 0, 0, 1]]
    assert plan.representatives().tolist() == [[2, 3]]
    want = (0.1 * 1 + 0.2 * 1 + 0.3 * 0.9) / 0.6
    assert plan.reduce(e.x)[0, 0, 0].item() == pytest.approx(want, abs=1e-6)
    assert plan.reduce_size(None).tolist() == [[3.0, 1.0]]


def test_little_attended_tokens_fuse_first():
    x = [[1.0, 0], [1, 0], [1, 0], [1, 0]]
    plan, _ = made(x, [0.4, 0.3, 0.1, 0.2], 1, bidirection=False)
    assert plan.src.tolist() == [[2]]  # of the even ones the less attended
    assert plan.sources().tolist() == [[0, 1, 2, 2]]  # into the less attended odd one


def test_small_tokens_fuse_first():
    x = torch.ones(1, 4, 2)
    e = tr.Evidence(x, attention=torch.full((1, 1, 4, 4), 0.25), size=torch.tensor([[3.0, 2, 1, 5]]))
    plan = tr.MCTF(r=1, bidirection=False, floor=1).plan(e)
    assert plan.src.tolist() == [[2]]
    assert plan.sources().tolist() == [[0, 1, 1, 2]]


def test_ties_go_to_the_lower_position():
    plan, _ = made([[1.0, 0]] * 6, [1 / 6] * 6, 3)
    # 0 -> 1; the odd ones then all like 2 best: 1 (with 0) and 3 go there; 4 and 5 stay.
    assert plan.sources().tolist() == [[0, 0, 0, 0, 1, 2]]


def test_a_token_that_nobody_attends_to_is_no_nan():
    plan, e = made([[1.0, 0], [1, 0], [0, 1], [0.1, 1]], [0.0, 0.0, 0.5, 0.5], 2)
    assert torch.isfinite(plan.reduce(e.x)).all()
    assert plan.sources()[0].tolist()[:2] == [plan.sources()[0, 0].item()] * 2


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_prefix_is_left_alone_in_both_halves(prefix):
    x = torch.randn(1, 20, 4)
    x[:, prefix:] = x[:, :1]  # everything looks like the class token
    x[:, :prefix] = x[:, :1]
    e = tr.Evidence(x, attention=torch.full((1, 1, 20, 20), 0.05), protected=prefix)
    plan = tr.MCTF(r=7).plan(e)
    assert plan.representatives()[0, :prefix].tolist() == list(range(prefix))
    assert torch.equal(plan.reduce(x)[:, :prefix], x[:, :prefix])
    assert plan.reduce_size(None)[0, :prefix].tolist() == [1.0] * prefix


def test_a_mask_protects_as_the_prefix_does():
    plain = evidence(n=17, prefix=2)
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[:, :2] = True
    masked = evidence(n=17, prefix=0)
    masked.protected = mask
    a, b = tr.MCTF(r=6).plan(plain), tr.MCTF(r=6).plan(masked)

    def groups(plan):
        return [{tuple((row == k).nonzero().flatten().tolist()) for k in range(plan.k)} for row in plan.sources()]

    assert groups(a) == groups(b)


@pytest.mark.parametrize(
    ("n", "r", "left"),
    [(9, 4, 9), (10, 0.35, 10), (12, 4, 10), (40, 39, 21), (197, 0.35, 129), (197, 16, 181), (12, 0.35, 9), (3, 5, 3)],
)
@pytest.mark.filterwarnings("ignore:mctf")
def test_counts_floor_and_cap_of_the_card(n, r, left):
    assert tr.MCTF(r=r).plan(evidence(n=n, prefix=1)).k == left


def test_clamped_counts_are_reported():
    with pytest.warns(UserWarning, match="mctf: some layers remove fewer"):
        tr.MCTF(r=39).plan(evidence(n=40))
    with tr.record(torch.nn.Identity(), flops=False) as trace:
        tr.MCTF(r=39).plan(evidence(n=40, layer=2))
    assert trace.notes == ["mctf: 39 tokens to remove, 19 removed at layer 2 (40 tokens, 1 protected)"]


@pytest.mark.filterwarnings("error")
def test_keep_goes_below_the_floor_by_equal_ratios():
    left = []
    n = 17
    for layer in range(12):
        m = tr.MCTF(keep=2)
        e = evidence(n=n, layer=layer, depth=12, entry=17)
        n = m.plan(e).k
        left.append(n - 1)
    assert left == [16] * 3 + [8] * 3 + [4] * 3 + [2] * 3


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.filterwarnings("ignore:mctf")
def test_tiny_inputs(n, prefix):
    e = evidence(n=n, prefix=prefix, depth=1)
    assert tr.MCTF(r=1, floor=1).plan(e).k == n - (n - prefix >= 2)
    assert tr.MCTF(keep=1, layers=(0,)).plan(e).k == n - (n - prefix >= 2)


@pytest.mark.parametrize(
    "settings", [{}, {"bidirection": False}, {"pooling": 3}, {"pooling": 0}, {"pooling": 2}], ids=str
)
@pytest.mark.parametrize(
    "empty",
    [range(6, 16), range(9, 16), [0, 2, 4], [0, 3], [1, 5, 9], range(1, 16, 2), range(1, 16), [0, *range(2, 16)]],
    ids=str,
)
def test_slots_without_a_token_never_reach_a_real_one(settings, empty):
    """Every second sample has empty slots; with r=7 some of them must go in places without an empty partner."""
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, list(empty)] = False
    m = tr.MCTF(r=7, floor=1, **settings)
    e = evidence(n=16, prefix=0, valid=valid)
    plan = m.plan(e)
    assert torch.equal(m.plan(evidence(n=16, prefix=0, valid=valid, size=valid.float())).sources(), plan.sources())
    spoilt = torch.where(valid[..., None], e.x, 1e4)
    there = plan.gather(valid)
    torch.testing.assert_close(plan.reduce(e.x)[there], plan.reduce(spoilt)[there])
    if set(empty) != set(range(1, 16, 2)):  # there, every real token is even and has no real partner at all
        assert there[1][plan.sources()[1][valid[1]]].all(), "a real token was lost in an empty slot"


def test_samples_do_not_see_each_other():
    m = tr.MCTF(r=6)
    both = m.plan(evidence(n=19, size=torch.arange(1.0, 39).view(2, 19)))
    for i in range(2):
        rows = slice(i, i + 1)
        alone = m.plan(evidence(n=19, rows=rows, size=torch.arange(1.0, 39).view(2, 19)[rows]))
        assert torch.equal(both.sources()[rows], alone.sources())


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"r": -1}, "r is"),
        ({"r": 1.0}, "r is"),
        ({"r": True}, "r is"),
        ({"r": 3, "keep": 0.5}, "not both"),
        ({"tau_info": -1}, "tau_info"),
        ({"one_step_ahead": 3}, "one_step_ahead"),
        ({"pooling": 4}, "pooling"),
        ({"floor": -1}, "floor"),
        ({"layers": (3, -1)}, "layers"),
        ({"keep": 2.0}, "keep"),
    ],
)
def test_bad_settings(settings, word):
    with pytest.raises(ValueError, match=word):
        tr.MCTF(**settings)


def test_acts_where_it_says():
    assert [i for i in range(12) if tr.MCTF().acts_at(i, 12)] == [3, 6, 9]
    assert [i for i in range(12) if tr.MCTF(r=16, layers=tuple(range(1, 12))).acts_at(i, 12)] == list(range(1, 12))
    assert not any(tr.MCTF(r=0).acts_at(i, 12) for i in range(12))
    with pytest.raises(ValueError, match="layers"):
        tr.MCTF(layers=(3, 12)).acts_at(0, 12)
    assert [tr.MCTF(one_step_ahead=i).acting_position() for i in range(3)] == ["after", "before", "before"]
    assert [tr.MCTF(one_step_ahead=i).forwards_attention for i in range(3)] == [False, True, False]
    assert tr.MCTF(one_step_ahead=2, pooling=0, tau_info=0).required() == ()
    assert tr.MCTF(one_step_ahead=1, pooling=0, tau_info=0).required() == ("attention",)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_block_runs_as_the_card_says(mode):
    """Two fusing layers of a real model against blocks computed by hand with the reference's plain map."""
    model, x = tiny_vit(), images()
    m = tr.MCTF(r=7, layers=(1, 3), one_step_ahead=mode)
    with torch.no_grad(), tr.patched(model, m), tr.record(model, flops=False) as trace:
        got = model(x)
    assert trace.tokens == [37, 30, 30, 23, 23, 23]
    with torch.no_grad():
        rows = []
        for one in x.split(1):
            y = model._pos_embed(model.patch_embed(one))
            size = None
            for i, block in enumerate(model.blocks):
                attn, given = block.attn, None

                def heads(z, part, attn=attn):
                    qkv = attn.qkv(z).view(1, z.shape[1], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
                    return qkv[part]

                def full(y, size, block=block, heads=heads):
                    z = block.norm1(y)
                    return attention_map(y[0], heads(z, 1)[0], heads(z, 0)[0], size).float()

                a = full(y, size)
                if i in m.layers and mode:
                    _, value, mass, given = reference(y[0], a, size, 7, 1, m)
                    y, size = value.float()[None], mass.float()
                    a = given.float() if mode == 1 else full(y, size)
                out = a[None] @ heads(block.norm1(y), 2)
                y = y + attn.proj(out.transpose(1, 2).flatten(2))
                y = y + block.mlp(block.norm2(y))
                if i in m.layers and not mode:
                    _, value, mass, _ = reference(y[0], a, size, 7, 1, m)
                    y, size = value.float()[None], mass.float()
            rows.append(model.head(model.norm(y)[:, 0]))
    torch.testing.assert_close(got, torch.cat(rows), rtol=1e-3, atol=1e-3)
