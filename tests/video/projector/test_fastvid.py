"""FastVID against the steps of its card in plain loops, in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from visual import ORIGINS, frames, noise, visual
from vlms import VLMS, onevision_with_head, prompts

import tokenreduce as tr
from tokenreduce.algorithms.temporal import cut_by_similarity
from tokenreduce.core.plan import Mix
from tokenreduce.video.projector.fastvid import FastVID

WIDTH = 6


def film(count, rows, cols, scene=4, jitter=0.4, seed=0):
    """(T*n,C): scenes of ``scene`` similar frames, with a mean that differs from scene to scene."""
    n = rows * cols
    base = noise(-(-count // scene), n, WIDTH, seed=seed + 1) + 2 * noise(-(-count // scene), 1, WIDTH, seed=seed + 2)
    return (base.repeat_interleave(scene, 0)[:count] + jitter * noise(count, n, WIDTH, seed=seed)).flatten(0, 1)


def given(x, count, rows, cols, seed=0):
    """Evidence with given attention rows, as (B,H,1,N)."""
    g = torch.Generator().manual_seed(seed + 99)
    rows_of = torch.stack([torch.rand(2, 1, x.shape[1], generator=g) for _ in range(len(x))])
    return tr.Evidence(x, grid=(count, rows, cols), attention=rows_of)


def cosine(a, b):
    return float(a @ b / max(float(a.norm()), 1e-12) / max(float(b.norm()), 1e-12))


def segments_of(x, least, tau):
    t = len(x)
    alike = [cosine(x[i].mean(0), x[i + 1].mean(0)) for i in range(t - 1)]
    cuts = {i for i in range(t - 1) if alike[i] < tau}
    for i in sorted(range(t - 1), key=lambda i: (alike[i], i)):
        if len(cuts) + 1 < least:
            cuts.add(i)
    bounds = [0, *[i + 1 for i in sorted(cuts)], t]
    return list(itertools.pairwise(bounds)), alike


def shared(total, room):
    """Evenly, the first take the rest, and what one has no room for goes to the others: one by one, in turn."""
    out = [0] * len(room)
    while total and any(o < r for o, r in zip(out, room, strict=True)):
        low = min(o for o, r in zip(out, room, strict=True) if o < r)
        i = next(i for i, o in enumerate(out) if o == low and o < room[i])
        out[i] += 1
        total -= 1
    return out


def density_order(x, k=4):
    """Step 5: tokens (m,C), best first."""
    m, c = x.shape
    d = ((x[:, None] - x[None]).norm(dim=-1) / c**0.5).tolist()
    density = []
    for row in d:
        close = sorted(row)[: min(k, m)]
        density.append(2.718281828459045 ** -(sum(v * v for v in close) / len(close)))
    largest = max(max(row) for row in d)
    score = [
        density[i] * min((d[i][j] for j in range(m) if density[j] > density[i]), default=largest) for i in range(m)
    ]
    return sorted(range(m), key=lambda i: (-score[i], i))


def reference(x, score, t, keep, c=8, tau=0.9, ignore=None, share=0.4, step=4, beta=0.6, pool="all"):
    """(T*n,T*n) dense weights whose rows are zero for tokens that are not left, as step 1 to 7 and the docstring."""
    x = x.double().view(t, -1, x.shape[-1])
    n, out = x.shape[1], {}
    bounds, alike = segments_of(x, c, tau)
    for a, b in bounds:
        w = b - a
        budget = b * keep // t - a * keep // t
        ends = [f for f in range(a, b) if f == b - 1 or ignore is None or alike[f] < ignore]
        anchors = ends[::-1][::step]
        goals = dict.fromkeys(range(a, b), 0)  # context tokens of every frame
        if pool == "all":
            context = w * int(budget / w * share + 1e-9)
            room = n - min(n, -(-(budget - context) // len(ends)))
            goals |= dict.fromkeys(anchors, min(context // len(anchors), room))
        elif budget:
            for turn in range(max(int(budget * share + 1e-9), 1)):
                goals[anchors[turn % len(anchors)]] += 1
            if w > 1:
                goals = {f: min(goal, n // 2) for f, goal in goals.items()}
        others = [f for f in range(a, b) if f not in ends]
        left = budget - sum(goals.values())
        count = dict(zip(ends, shared(left, [n - goals[f] for f in ends]), strict=True))
        left -= sum(count.values())
        count |= dict(zip(others, shared(left, [n] * len(others)), strict=True))
        salient = set()
        for f in range(a, b):
            best = sorted(range(n), key=lambda j: (-float(score[f * n + j]), j))
            salient |= {(f, j) for j in best[: count[f]]}
        for f, j in salient:
            out[f * n + j] = {f * n + j: 1.0}
        rest = [(f, j) for f in range(a, b) for j in range(n) if (f, j) not in salient]
        for f in anchors:
            if not goals[f]:
                continue
            mine = [j for g, j in rest if g == f]
            targets = sorted(mine[i] for i in density_order(x[f, mine])[: goals[f]])
            joined = {j: [] for j in targets}
            for g, i in rest:
                if pool == "others" and g == f and i in targets:
                    continue
                joined[max(targets, key=lambda j: (cosine(x[g, i], x[f, j]), -j))].append(g * n + i)
            for j, members in joined.items():
                own = max(1 / (len(members) + 1), beta)
                entry = {f * n + j: own if members else 1.0}
                for i in members:
                    entry[i] = entry.get(i, 0.0) + (1 - own) / len(members)
                out[f * n + j] = entry
    return [(i, out[i]) for i in sorted(out)]


def check(plan, x, b, wanted, bit=1e-6):
    assert plan.representatives()[b].tolist() == [i for i, _ in wanted]
    dense = plan.matrix()[b]
    for j, (_, entries) in enumerate(wanted):
        row = torch.zeros(plan.n, dtype=torch.float64)
        for i, w in entries.items():
            row[i] = w
        torch.testing.assert_close(dense[j], row, rtol=1e-5, atol=bit)
        assert bool(plan.untouched()[b, j]) == (len(entries) == 1)
    torch.testing.assert_close(plan.reduce(x)[b].double(), dense @ x[b].double(), rtol=1e-4, atol=1e-5)


SETTINGS = [
    {}, {"pool": "others"}, {"dtm_p": 1}, {"dtm_p": 3, "dtm_beta": 0.0}, {"dyseg_ignore": 0.995}, {"dyseg_tau": -1.0},
    {"dyseg_c": 1, "dyseg_tau": -1.0, "pool": "others"}, {"stprune_d": 1.0}, {"stprune_d": 0.0}, {"dyseg_c": 100},
    {"dyseg_c": 2, "dyseg_tau": -1.0, "dyseg_ignore": 0.995, "dtm_p": 2},
    {"dyseg_c": 2, "dyseg_tau": -1.0, "dyseg_ignore": 0.995, "dtm_p": 2, "pool": "others"},
    {"stprune_d": 0.9, "dtm_p": 2, "pool": "others"}, {"stprune_d": 0.0, "dtm_p": 1, "pool": "others"},
]  # fmt: skip
NAMES = {
    "dyseg_c": "c", "dyseg_tau": "tau", "dyseg_ignore": "ignore", "stprune_d": "share", "dtm_p": "step",
    "dtm_beta": "beta", "pool": "pool",
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("t", "rows", "cols", "keep"), [(9, 3, 5, 0.3), (13, 4, 4, 0.25), (5, 3, 3, 31)])
def test_the_steps_of_the_card(settings, t, rows, cols, keep):
    x = torch.stack([film(t, rows, cols, seed=s) for s in (0, 5)])
    e = given(x, t, rows, cols)
    reducer = FastVID(keep, **{"dyseg_c": 3, **settings})
    plan = reducer.plan(e)
    named = {NAMES[k]: v for k, v in {"dyseg_c": 3, **settings}.items()}
    for b in range(2):
        score = e.attention("cls")[b].mean(0)[0].double()
        check(plan, x, b, reference(x[b], score, t, reducer.total(t * rows * cols), **named))


def test_the_film_has_all_cases():
    """The test above would say little if every frame were a segment, or none were grouped."""
    bounds, alike = segments_of(film(13, 4, 4).double().view(13, 16, -1), 3, 0.9)
    assert 3 <= len(bounds) < 8
    assert max(b - a for a, b in bounds) >= 3
    inside = [alike[f] for a, b in bounds for f in range(a, b - 1)]
    assert min(inside) < 0.995 < max(inside)


@pytest.mark.parametrize("t", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("keep", [1, 2, 5, 0.1, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("pool", ["all", "others"])
@pytest.mark.parametrize("tau", [-1.0, 0.9])
def test_keep_is_exact_and_in_order(t, keep, pool, tau):
    """Also where the official code runs out of tokens in an anchor frame, or has fewer frames than segments."""
    x = torch.stack([film(t, 3, 5, seed=s) for s in (0, 7)])
    for ignore in (None, 0.5):
        reducer = FastVID(keep, dyseg_c=2, dyseg_tau=tau, pool=pool, dyseg_ignore=ignore)
        plan = reducer.plan(given(x, t, 3, 5))
        assert plan.k == reducer.total(t * 15)
        if plan.is_identity:
            continue
        assert isinstance(plan, Mix)
        assert plan.validity() is None
        index = plan.representatives()
        assert (index[:, 1:] > index[:, :-1]).all()
        torch.testing.assert_close(plan.matrix().sum(-1), torch.ones(2, plan.k, dtype=torch.float64))


OTHERS = {"pool": "others"}


@pytest.mark.parametrize(
    ("settings", "alike", "n", "budget", "salients", "contexts"),
    [
        # Of 19 tokens per frame 7 are context: 56 in 8 frames with 2 anchors.
        ({}, [1.0] * 7, 196, 152, [12] * 8, [0, 0, 0, 28, 0, 0, 0, 28]),
        # 5 frames: anchors are the last and the first; 35 // 2 = 17 each and one more salient token.
        ({}, [1.0] * 4, 196, 95, [13, 12, 12, 12, 12], [17, 0, 0, 0, 17]),
        ({}, [], 196, 19, [12], [7]),
        ({"dtm_p": 1}, [1.0] * 2, 196, 57, [12] * 3, [7] * 3),
        # Half of 196 in 4 frames: 4 * 39 for one anchor, which beside 59 salient ones has room for 137.
        ({}, [1.0] * 3, 196, 392, [66, 65, 65, 59], [0, 0, 0, 137]),
        ({"stprune_d": 0.0}, [1.0] * 3, 9, 8, [2] * 4, [0] * 4),
        ({}, [1.0] * 3, 9, 1, [1, 0, 0, 0], [0] * 4),
        # Frames 0, 1 and 2, 3 are groups; only the last of each has tokens.
        ({"dyseg_ignore": 0.95}, [0.99, 0.9, 0.96], 20, 20, [0, 6, 0, 6], [0, 0, 0, 8]),
        ({"dyseg_ignore": 0.95, "dtm_p": 1}, [0.99, 0.9, 0.96], 20, 20, [0, 6, 0, 6], [0, 4, 0, 4]),
        # The last frames have no room for all: the others get what is left.
        ({"dyseg_ignore": 0.95}, [0.99, 0.9, 0.96], 6, 14, [1, 6, 1, 5], [0, 0, 0, 1]),
        # The other published arithmetic: int(152 * 0.4) = 60 of the whole segment.
        (OTHERS, [1.0] * 7, 196, 152, [12] * 4 + [11] * 4, [0, 0, 0, 30, 0, 0, 0, 30]),
        # int(98 * 0.4) = 39 for two anchors: the later one has the one that division leaves.
        (OTHERS, [1.0] * 4, 196, 98, [12, 12, 12, 12, 11], [19, 0, 0, 0, 20]),
        (OTHERS | {"dtm_p": 1}, [1.0] * 3, 196, 26, [4] * 4, [2, 2, 3, 3]),
        # At least one, also of so few that their share is none, and where the share is zero.
        (OTHERS, [1.0] * 3, 9, 2, [1, 0, 0, 0], [0, 0, 0, 1]),
        (OTHERS, [1.0] * 3, 9, 1, [0] * 4, [0, 0, 0, 1]),
        (OTHERS | {"stprune_d": 0.0}, [1.0] * 3, 9, 9, [2] * 4, [0, 0, 0, 1]),
        (OTHERS, [1.0] * 3, 9, 0, [0] * 4, [0] * 4),
        # 24 for one anchor of 20 tokens, which takes 10; the others are salient, as evenly as there is room.
        (OTHERS, [1.0] * 3, 20, 60, [14, 13, 13, 10], [0, 0, 0, 10]),
        (OTHERS | {"stprune_d": 0.9}, [1.0], 9, 12, [4, 4], [0, 4]),
        # A frame alone has no such limit.
        (OTHERS | {"stprune_d": 0.9}, [], 9, 8, [1], [7]),
        (OTHERS | {"dyseg_ignore": 0.95, "dtm_p": 1}, [0.99, 0.9, 0.96], 20, 23, [0, 7, 0, 7], [0, 4, 0, 5]),
    ],
)  # fmt: skip
def test_quotas(settings, alike, n, budget, salients, contexts):
    got = FastVID(**settings).quotas(torch.tensor(alike), len(alike) + 1, n, budget)
    assert got == (salients, contexts)
    assert sum(salients) + sum(contexts) == budget


def test_fewer_tokens_than_frames_are_spread_over_the_video():
    x = noise(1, 8 * 9, WIDTH)
    plan = FastVID(4).plan(given(x, 8, 3, 3))
    assert [i // 9 for i in plan.representatives()[0].tolist()] == [1, 3, 5, 7]


def test_a_token_feeds_every_anchor():
    """One still segment of 8 frames: two anchors; what is not salient has a part in a target of each."""
    t, n = 8, 16
    x = film(t, 4, 4, scene=8)[None]
    plan = FastVID(0.25, dyseg_c=1, dyseg_tau=-1.0).plan(given(x, t, 4, 4))
    weight = plan.matrix()[0]
    assert ((weight > 0).sum(0) <= 2).all()
    merged = (weight > 0).sum(1) > 1
    assert {int(plan.representatives()[0, j]) // n for j in merged.nonzero().flatten().tolist()} <= {3, 7}
    kept = plan.representatives()[0]
    own = {int(i) for i in kept if bool(plan.untouched()[0, kept.tolist().index(int(i))])}
    for i in range(t * n):
        if i not in own:
            assert int((weight[:, i] > 0).sum()) == 2
    assert torch.isclose(plan.reduce_size(None).sum(), torch.tensor(float(t * n)))
    assert (plan.sources()[0] >= 0).all()


def test_the_pool_may_leave_the_targets_out():
    x = film(4, 3, 4, scene=4)[None]
    e = given(x, 4, 3, 4)
    # Of 12 outputs 4 are context in both arithmetics: one of three in each of four frames, a third of the segment.
    both = [FastVID(12, stprune_d=0.34, dyseg_c=1, dyseg_tau=-1.0, pool=p).plan(e) for p in ("all", "others")]
    assert torch.equal(both[0].representatives(), both[1].representatives())
    merged = ~both[0].untouched()[0]
    assert merged.any()
    own = [p.matrix()[0, torch.arange(p.k), p.representatives()[0]][merged] for p in both]
    assert (own[0] > own[1] - 1e-9).all(), "a target that joins itself weighs more"
    assert (own[0] != own[1]).any()


def test_a_target_that_nothing_joins_is_untouched():
    """Both targets of the frame are the only tokens that are not salient."""
    x = noise(1, 6, WIDTH)
    e = tr.Evidence(x, grid=(1, 2, 3), attention=torch.tensor([6.0, 5, 4, 3, 2, 1]).view(1, 1, 1, 6))
    plan = FastVID(5, stprune_d=0.2, pool="others").plan(e)
    assert plan.representatives().shape == (1, 5)
    alone = FastVID(5, stprune_d=0.2).plan(e)
    # 4 salient ones; of the two others one is the target, and the other joins it.
    for p, weight in ((plan, 0.6), (alone, 0.6 + 0.2)):
        j = int((~p.untouched()[0]).nonzero())
        own = p.matrix()[0, j, p.representatives()[0, j]]
        torch.testing.assert_close(own, torch.tensor(weight, dtype=torch.float64), rtol=1e-6, atol=0)
    distinct = torch.eye(6)[None]
    e = tr.Evidence(distinct, grid=(1, 2, 3), attention=torch.rand(1, 1, 1, 6))
    for pool in ("all", "others"):
        p = FastVID(5, stprune_d=1.0, pool=pool).plan(e)
        assert int(p.untouched().sum()) >= 4, "one token joins one target; the others stay as they are"


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("origin", ["frames", "odd"])
def test_saliency_is_that_of_the_tower(cls, origin):
    """Attention inside every frame of the block whose output enters the projector, mean over heads."""
    o = ORIGINS["frames"] if origin == "frames" else frames(5, 3, 3)
    e = visual(o, batch=2, cls=cls)
    n, t = o.patches, o.views
    block = e.blocks[e.feature]
    for b in range(2):
        score = []
        for f in range(t):
            q, k = block.queries[b * t + f].double(), block.keys[b * t + f].double()
            rows = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1).mean(0)
            score += (rows[0, 1:] if cls else rows.mean(0)).tolist()
        assert len(score) == t * n
        check(FastVID(0.4).plan(e), e.x, b, reference(e.x[b], score, t, FastVID(0.4).total(t * n)))


@dataclass(frozen=True)
class Watching(FastVID):
    def choose(self, evidence, keep):
        SEEN.append(evidence)
        return super().choose(evidence, keep)


SEEN = []


def seen_in(vlm, **settings):
    """The evidence of one video of ``vlm``, and the plan on it."""
    SEEN.clear()
    inputs = prompts(vlm, ((9, "v"), (5, "v")))
    with torch.no_grad(), tr.patched(vlm.model, Watching(keep=10, **settings)), tr.record(vlm.model) as trace:
        vlm.model(**inputs)
    ((_, _, plan),) = trace.steps[0].parts
    return SEEN[0], plan, inputs["pixel_values_videos"]


def test_the_pooling_head_of_a_tower():
    """Saliency is the attention of the head's query, pooled like the tokens; frames are what the head makes of them."""
    vlm = onevision_with_head()
    evidence, plan, pixels = seen_in(vlm)
    tower = vlm.model.model.vision_tower
    head = getattr(tower, "head", None) or tower.vision_model.head
    with torch.no_grad():
        out = tower(pixels.flatten(0, 1))
        rows = head.attention(head.probe.expand(16, 1, -1), out.last_hidden_state, out.last_hidden_state)[1]
        pooled = vlm.model.model.apply_pooling(rows.mT.expand(-1, -1, 3))[..., 0]
    attention, vectors = evidence.pooling()
    torch.testing.assert_close(vectors, out.pooler_output.view(2, 8, -1))
    torch.testing.assert_close(attention, pooled.reshape(2, -1), atol=1e-5, rtol=1e-4)
    # Of 8 segments of one frame every one has a token, two have two: the most attended, and no context at such numbers.
    for b in range(2):
        best = [
            4 * t + int(i) for t in range(8) for i in attention[b, 4 * t : 4 * t + 4].topk(1 + (t in (3, 7))).indices
        ]
        assert plan.representatives()[b].tolist() == sorted(best)
    # One segment, where only frames that the next one's vector differs from have tokens.
    alike = [[cosine(v[t], v[t + 1]) for t in range(7)] for v in vectors]
    far = sum(sorted(alike[0])[2:4]) / 2
    got = FastVID(keep=10, dyseg_c=1, dyseg_tau=-1.0, dyseg_ignore=far, stprune_d=0.0).plan(evidence)
    for b in range(2):
        ends = [t for t in range(7) if alike[b][t] < far] + [7]
        counts = shared(10, [4] * len(ends))
        spread = [t for t, m in zip(ends, counts, strict=True) for _ in range(m)]
        if sum(counts) == 10:
            assert [i // 4 for i in got.representatives()[b].tolist()] == spread
    _, again, _ = seen_in(vlm, score="head")
    assert torch.equal(again.representatives(), plan.representatives())
    for settings in ({"score": "received"}, {"layer": -1}):
        evidence, other, _ = seen_in(vlm, **settings)
        assert evidence.pooling() is None
        assert not torch.equal(other.representatives(), plan.representatives())


def test_no_pooling_head():
    model = VLMS["llava_onevision"].model
    with pytest.raises(ValueError, match="pooling head of the vision tower, which the SiglipVisionModel"):
        tr.patch(model, FastVID(score="head"))
    assert FastVID().optional() == ("head",)
    assert FastVID(score="received").optional() == FastVID(layer=1).optional() == ()
    with pytest.raises(ValueError, match="needs head"):
        FastVID(keep=10, score="head").plan(visual(ORIGINS["frames"]))
    with pytest.raises(ValueError, match="not layer=1"):
        FastVID(score="head", layer=1)


def test_another_block_of_the_tower():
    e = visual(ORIGINS["frames"])
    assert FastVID(0.3, layer=0).plan(e) != FastVID(0.3).plan(e)
    assert FastVID(0.3, layer=-2).plan(e) == FastVID(0.3).plan(e)


def test_a_batch_is_its_samples():
    t = 9
    x = torch.stack([film(t, 3, 5, scene=s, seed=3) for s in (1, 4, 9)])
    e = given(x, t, 3, 5)
    together = FastVID(0.3).plan(e)
    for b in range(3):
        alone = FastVID(0.3).plan(tr.Evidence(x[b : b + 1], grid=(t, 3, 5), attention=e.attention("cls")[b : b + 1]))
        assert torch.equal(together.representatives()[b], alone.representatives()[0])
        torch.testing.assert_close(together.reduce(x)[b], alone.reduce(x[b : b + 1])[0])


@pytest.mark.parametrize("t", [1, 2, 3, 8])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("pool", ["all", "others"])
def test_flat_videos(t, value, pool):
    x = torch.full((1, t * 16, WIDTH), value)
    e = tr.Evidence(x, grid=(t, 4, 4), attention=torch.ones(1, 1, 1, t * 16))
    for keep in (1, 5, 0.5):
        plan = FastVID(keep, pool=pool).plan(e)
        torch.testing.assert_close(plan.reduce(x), torch.full((1, plan.k, WIDTH), value))
        assert len(set(plan.representatives()[0].tolist())) == plan.k
    if (
        t == 8
    ):  # ties go to the lower index: 8 segments (from the first cuts) of one frame, 5 salient and 3 context tokens
        first = FastVID(0.5, pool=pool).plan(e).representatives()[0].view(8, 8) - 16 * torch.arange(8)[:, None]
        assert torch.equal(first, torch.arange(8).expand(8, -1))


def test_cuts():
    s = torch.tensor([0.5, 0.95, 0.5, 0.85, 0.99])
    assert cut_by_similarity(s, 0.9, 1) == [(0, 1), (1, 3), (3, 4), (4, 6)]
    assert cut_by_similarity(s, 0.0, 2) == [(0, 1), (1, 6)], "the earlier of two ties"
    assert cut_by_similarity(s, 0.0, 1) == [(0, 6)], "no cut at all"
    assert cut_by_similarity(s, 0.6, 5) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 6)], "no cut is counted twice"
    assert cut_by_similarity(s, 0.0, 99) == [(i, i + 1) for i in range(6)], "at most as many as frames"
    assert cut_by_similarity(torch.tensor([]), 0.9, 8) == [(0, 1)]


def test_protected_tokens_stay_in_front():
    x = torch.cat([noise(1, 2, WIDTH, seed=9), film(8, 3, 5)[None]], 1)
    rows = torch.rand(1, 1, 1, 122, generator=torch.Generator().manual_seed(1))
    plan = FastVID(0.3).plan(tr.Evidence(x, grid=(8, 3, 5), protected=2, attention=rows))
    bare = FastVID(0.3).plan(tr.Evidence(x[:, 2:], grid=(8, 3, 5), attention=rows[..., 2:]))
    assert plan.k == bare.k + 2
    assert torch.equal(plan.representatives()[:, 2:], bare.representatives() + 2)
    assert torch.equal(plan.reduce(x)[:, :2], x[:, :2])
    torch.testing.assert_close(plan.reduce(x)[:, 2:], bare.reduce(x[:, 2:]))


def test_settings_of_the_card():
    m = FastVID()
    assert (m.keep, m.dyseg_c, m.dyseg_tau, m.dyseg_ignore, m.stprune_d, m.dtm_p, m.dtm_beta) == (
        0.10, 8, 0.9, None, 0.4, 4, 0.6,
    )  # fmt: skip
    assert m.positions == "original"
    assert FastVID(positions="compact").positions == "compact"
    for reducer in (m, FastVID(0.27, dyseg_tau=0.84, dyseg_ignore=0.95, pool="others")):
        assert tr.get_method(reducer.spec(), "projector") == reducer
        assert tr.Reducer.from_json(reducer.to_json()) == reducer


def test_not_a_number_is_refused():
    x = film(4, 3, 3)[None]
    e = given(x, 4, 3, 3)
    x[0, 7] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        FastVID().plan(e)


@pytest.mark.parametrize(
    ("name", "bad"),
    [("keep", 0), ("keep", None), ("dyseg_c", 0), ("dyseg_c", 2.0), ("dyseg_tau", 1.5), ("dyseg_tau", None),
     ("dyseg_ignore", -2), ("dyseg_ignore", True), ("stprune_d", -0.1), ("stprune_d", "half"), ("dtm_p", 0),
     ("dtm_beta", 1.1), ("pool", "some"), ("newlines", "rank"), ("positions", "some"), ("layer", "top"),
     ("score", "some")],
)  # fmt: skip
def test_bad_settings_are_refused(name, bad):
    with pytest.raises(ValueError, match=name):
        FastVID(**{name: bad})
