"""Merging across frames inside the Qwen towers, whose patches are packed, against towers worked out unit by unit."""

from __future__ import annotations

import pytest
import torch
from vlms import VIDEO, VLMS, prompts
from vlms_masked import close, generate

import tokenreduce as tr
from tokenreduce.adapters.encoders.packed import Layout
from tokenreduce.core.plan import Identity, Merge, Prune
from tokenreduce.core.reducer import Reducer

NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
#: Two videos of four and two temporal positions of one size, and between them one of two of another.
GRIDS = torch.tensor([[4, 4, 8], [2, 8, 4], [2, 4, 8]])


class Fixed(Reducer):
    """Plans made by functions of layer and evidence, remembered with the evidence."""

    def __init__(self, make, frames=2, needs=(), prop=False):
        for key, value in {"make": make, "frames": frames, "asked": needs, "prop_attn": prop, "seen": []}.items():
            object.__setattr__(self, key, value)

    def required(self):
        return self.asked

    def acts_at(self, layer, depth):
        return layer in self.make

    def plan(self, evidence):
        plan = self.make[evidence.layer](evidence)
        self.seen.append((evidence.layer, evidence, plan))
        return plan

    def spec(self):
        return "fixed"


def _orders(evidence):
    g = torch.Generator().manual_seed(evidence.layer * 100 + evidence.n)
    return torch.stack([torch.randperm(evidence.n, generator=g) for _ in range(evidence.batch)])


def drop(evidence):
    return Prune(evidence.n, _orders(evidence)[:, : evidence.n * 2 // 3])


def ragged(evidence):
    keep = _orders(evidence)[:, : evidence.n * 2 // 3]
    valid = torch.ones_like(keep, dtype=torch.bool)
    valid[::2, 1] = False
    return Prune(evidence.n, keep, valid if evidence.valid is None else valid & evidence.valid.gather(1, keep))


def merge(evidence):
    """Half stay, a few join the first and the second, the rest is dropped; across windows and frames."""
    order, k = _orders(evidence), evidence.n // 2
    src = order[:, k : k + 5]
    return Merge(evidence.n, order[:, :k], src, torch.tensor([0, 0, 1, 0, 1])[: src.shape[1]].expand_as(src))


def nothing(evidence):
    return Identity.like(evidence.x)


def pixels(grids):
    return torch.randn(int(grids.prod(1).sum()), 96, generator=torch.Generator().manual_seed(3))


def tower_of(name):
    return VLMS[name].model.model.visual


def order_of(tower, grids):
    n = int(grids.prod(1).sum()) // 4
    if not hasattr(tower, "fullatt_block_indexes"):
        return torch.arange(n)
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

    return get_vision_window_index(grids, 2, tower.window_size, tower.patch_size)[0]


def turn(t, cos, sin):
    half = t.shape[-1] // 2
    return t * cos[:, :, None] + torch.cat([-t[..., half:], t[..., :half]], -1) * sin[:, :, None]


def reference(tower, grids, method):
    """What stands for every unit {(video, first frame of a group): {unit: token}} after the plans of ``method``, and
    what units see of each other {(group, unit): {unit: attention}} in the last block."""
    caught = []
    hooks = [
        b.register_forward_pre_hook(
            lambda block, args, kwargs: caught.append((args[0], kwargs["cu_seqlens"], kwargs["position_embeddings"])),
            with_kwargs=True,
        )
        for b in tower.blocks
    ]
    tower(pixels(grids), grid_thw=grids)
    for hook in hooks:
        hook.remove()
    place = order_of(tower, grids).argsort().tolist()
    x0 = caught[0][0].view(len(place), 4, -1)
    rope = [t.view(len(place), 4, -1) for t in caught[0][2]]
    groups, start, plans = [], 0, {}
    for layer, evidence, plan in method.seen:
        plans.setdefault(layer, {})[evidence.grid] = plan
    for t, h, w in grids.tolist():
        count = min(method.frames, t)
        for _ in range(t // count):
            shape = (count, h // 2, w // 2) if count > 1 else (h // 2, w // 2)
            number = count * h * w // 4
            row = sum(g["shape"] == shape for g in groups)
            units = {u: (x0[place[start + u]], 1.0, [u]) for u in range(number)}
            groups.append({"shape": shape, "row": row, "start": start, "units": units, "slots": list(units)})
            start += number
    rows = {}
    for i, block in enumerate(tower.blocks):
        edges = caught[i][1]
        for number, group in enumerate(groups):
            units = group["units"]

            def window(u, start=group["start"], edges=edges):
                return int((edges <= place[start + u] * 4).sum())

            fresh = {}
            for own in {window(u) for u in units}:
                ask = [u for u in units if window(u) == own]
                parts = {u: sum(window(m) == own for m in members) for u, (_, _, members) in units.items()}
                keys = [u for u in units if parts[u]]
                every = list(dict.fromkeys([*ask, *keys]))
                at = {u: j for j, u in enumerate(every)}
                x = torch.stack([units[u][0] for u in every])
                cos, sin = (torch.stack([t[place[group["start"] + u]] for u in every]) for t in rope)
                qkv = block.attn.qkv(block.norm1(x)).view(len(every), 4, 3, block.attn.num_heads, -1)
                q, k, v = turn(qkv[:, :, 0], cos, sin), turn(qkv[:, :, 1], cos, sin), qkv[:, :, 2]
                q, k, v = q[[at[u] for u in ask]], k[[at[u] for u in keys]], v[[at[u] for u in keys]]
                logits = torch.einsum("uihd,vjhd->huivj", q, k) * q.shape[-1] ** -0.5
                if method.prop_attn:
                    logits = logits + torch.tensor([float(parts[u]) for u in keys]).log()[:, None]
                a = logits.flatten(3).softmax(-1).view_as(logits)
                out = block.attn.proj(torch.einsum("huivj,vjhd->uihd", a, v).flatten(2))
                for j, u in enumerate(ask):
                    fresh[u] = (units[u][0] + out[j], *units[u][1:])
                    rows[number, u] = set(keys)
            units = {u: fresh[u] for u in units}
            plan = plans.get(i, {}).get(group["shape"])
            if plan is not None and not plan.is_identity:
                row, valid = group["row"], plan.validity()
                sources, named, left = plan.sources()[row].tolist(), [], {}
                for k, rep in enumerate(plan.representatives()[row].tolist()):
                    named.append(group["slots"][rep])
                    if valid is not None and not valid[row, k]:
                        named[-1] = None
                        continue
                    met = [units[group["slots"][j]] for j in range(len(sources)) if sources[j] == k]
                    total = sum(s for _, s, _ in met)
                    left[named[-1]] = (sum(f * s for f, s, _ in met) / total, total, [u for m in met for u in m[2]])
                units, group["slots"] = left, named
            group["units"] = {u: (f + block.mlp(block.norm2(f)), *more) for u, (f, *more) in units.items()}
    return [{u: tower.merger(f)[0] for u, (f, *_) in g["units"].items()} for g in groups], rows


@pytest.mark.parametrize("what", ["drop", "ragged", "merge", "merge twice", "merge without sizes"])
@pytest.mark.parametrize("frames", [2, 4])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_tower_on_units_of_several_frames_is_the_one_worked_out_by_hand(name, frames, what):
    tower = tower_of(name)
    make = {
        "drop": {0: drop, 1: drop}, "ragged": {0: ragged, 1: ragged}, "merge": {0: merge},
        "merge twice": {0: merge, 1: merge}, "merge without sizes": {0: merge},
    }[what]  # fmt: skip
    method = Fixed(make, frames, prop="merge" in what and "without" not in what)
    stock = tower(pixels(GRIDS), grid_thw=GRIDS).pooler_output
    with tr.patched(VLMS[name].model, method):
        got = tower(pixels(GRIDS), grid_thw=GRIDS).pooler_output
    tokens, _ = reference(tower, GRIDS, method)
    assert got.shape == stock.shape
    start, scale = 0, float(stock.abs().max())
    for group, number in zip(tokens, [16, 16, 16, 16] if frames == 2 else [32, 16, 16], strict=True):
        assert group
        for unit, token in group.items():
            torch.testing.assert_close(got[start + unit], token, rtol=1e-4, atol=1e-4 * scale)
        start += number
    assert start == len(got)
    assert float((got - stock).abs().max()) > 0.01 * scale


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_eager_attention(name, monkeypatch):
    tower = tower_of(name)
    with tr.patched(VLMS[name].model, Fixed({0: merge}, prop=True)):
        want = tower(pixels(GRIDS), grid_thw=GRIDS).pooler_output
        monkeypatch.setitem(vars(tower.config), "_attn_implementation_internal", "eager")
        close(tower(pixels(GRIDS), grid_thw=GRIDS).pooler_output, want)


@pytest.mark.parametrize("before", [nothing, merge, ragged])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_methods_see_what_windows_see(name, before):
    """Attention rows are over the units that the windows of a unit have a part in."""
    tower = tower_of(name)
    last = len(tower.blocks) - 1
    method = Fixed({0: before, last: nothing}, 2, ("attention",), prop=True)
    with tr.patched(VLMS[name].model, method):
        tower(pixels(GRIDS), grid_thw=GRIDS)
    _, rows = reference(tower, GRIDS, method)
    first = [e for layer, e, _ in method.seen if layer == 0]
    assert [e.grid for e in first] == [(2, 2, 4), (2, 4, 2)]
    assert [(e.batch, e.n, e.entry, e.grid[0]) for e in first] == [(3, 16, 16, 2), (1, 16, 16, 2)]
    groups = {(2, 2, 4): [0, 1, 3], (2, 4, 2): [2]}
    for at, (_, evidence, _) in enumerate(s for s in method.seen if s[0] == last):
        plan = method.seen[at][2] if method.seen[at][0] == 0 else None
        assert plan is not None
        for row, group in enumerate(groups[evidence.grid]):
            seen = evidence.attention("all")[row].sum(0) > 0
            units = plan.representatives()[row].tolist()
            there = [True] * len(units) if plan.validity() is None else plan.validity()[row].tolist()
            for i, u in enumerate(units):
                if there[i]:
                    assert {units[j] for j in seen[i].nonzero().flatten().tolist()} == rows[group, u]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_keep_everything_and_unpatch_are_bit_identical_and_pictures_are_alone(name):
    model, vlm = VLMS[name].model, VLMS[name]
    inputs, picture = prompts(vlm, ((9, "v"), (5, "v"))), prompts(vlm, ((9, "i"), (5, "i")))
    want = model(**inputs).logits
    with tr.patched(model, tr.ToMe(r=2)):
        image = model(**picture).logits
    for spec in ("tome:keep=1.0,frames=2", "vid-tldr:keep=1.0,frames=2"):
        with tr.patched(model, spec):
            assert torch.equal(model(**inputs).logits, want)
    with tr.patched(model, tr.ToMe(r=2, frames=2)):
        assert not torch.equal(model(**inputs).logits[:, -1], want[:, -1])
        assert torch.equal(model(**picture).logits, image), "an image is no video"
    assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("spec", ["tome:keep=0.4,frames=2", "vid-tldr:keep=0.4,frames=2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_generates_what_its_rows_do(name, spec):
    model = VLMS[name].model
    inputs = prompts(VLMS[name], ((9, "v"), (5, "v")))
    with tr.patched(model, spec):
        sequences, logits, _ = generate(model, inputs)
        for b in range(2):
            real = inputs["attention_mask"][b].bool()
            words = ("input_ids", "attention_mask", "mm_token_type_ids")
            alone = {k: v[b : b + 1, real] if k in words else v.chunk(2)[b] for k, v in inputs.items()}
            got = generate(model, alone)
            assert torch.equal(got[0][0, -4:], sequences[b, -4:])
            close(got[1][0], logits[b])


@pytest.mark.parametrize("keep", ["first frame", "last frame", "merged"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_frame_may_lose_all(name, keep):
    """What enters the language model are the places of the units that are left, in whichever frame."""
    model, n = VLMS[name].model, 8
    inputs = prompts(VLMS[name], ((9, "v"), (5, "v")))
    first, second = torch.arange(n).expand(2, -1), torch.arange(n, 2 * n).expand(2, -1)
    plan = {
        "first frame": Prune(2 * n, first), "last frame": Prune(2 * n, second),
        "merged": Merge(2 * n, first, second, torch.arange(n).expand(2, -1)),
    }[keep]  # fmt: skip
    with tr.patched(model, Fixed({0: lambda evidence: plan}, prop=True)), tr.record(model) as trace:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    (step,) = (s for s in trace.steps if s.stage == "projector")
    for b in range(2):
        places = (inputs["input_ids"][b] == VIDEO).nonzero().flatten()
        stay = [int(i) for i in places if int(step.plan.sources()[b, i]) >= 0]
        assert stay == places[:n].tolist() if keep != "last frame" else stay == places[n:].tolist()


def test_layout():
    made = Layout.of(GRIDS.tolist(), 2, None, "cpu", 2)
    assert made.shapes == ((2, 2, 4), (2, 4, 2))
    assert made.numbers == ((0, 1, 2, 3, 6, 7), (4, 5))
    assert [p.shape for p in made.places] == [(3, 16), (1, 16)]
    assert made.places[0][2].tolist() == list(range(48, 64))
    assert made.joint
    assert made.views == 8
    assert not Layout.of([[1, 4, 4]], 2, None, "cpu", 8).joint
    with pytest.raises(ValueError, match="a video of 4 temporal positions cannot be cut"):
        Layout.of(GRIDS.tolist(), 2, None, "cpu", 3)


def test_what_does_not_go_together_is_refused():
    model = VLMS["qwen2_vl"].model
    with pytest.raises(ValueError, match="embeddings"):
        tr.patch(model, tr.ToMe(r=1, frames=2), "visionzip:keep=4")
    with pytest.raises(ValueError, match="frame by frame"):
        tr.patch(model.model.visual, tr.ToMe(r=1, frames=2))
