"""Methods inside the vision towers of the Qwen families, whose patches are packed over images and frames: against
towers worked out unit by unit in plain code, and in the whole models."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from vlms import IMAGE, VIDEO, VLMS, encodes_before, prompts
from vlms_masked import CASES, close, generate, hidden, layers_of

import tokenreduce as tr
from tokenreduce.adapters.encoders.packed import Layout, Packed, patchwise
from tokenreduce.algorithms.projector import Projector
from tokenreduce.algorithms.scoring import received_attention
from tokenreduce.core.plan import Chain, Identity, Merge, Pool, Prune
from tokenreduce.core.reducer import Reducer

NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
#: Two images of one size, and between them a video of two frames of another.
GRIDS = torch.tensor([[1, 8, 8], [2, 4, 12], [1, 8, 8]])


class Fixed(Reducer):
    """Plans made by functions of layer and evidence, remembered with the evidence."""

    def __init__(self, make, needs=(), site="middle", prop=False):
        for key, value in {"make": make, "asked": needs, "at": site, "prop_attn": prop, "seen": []}.items():
            object.__setattr__(self, key, value)

    def required(self):
        return self.asked

    def acting_position(self):
        return self.at

    def acts_at(self, layer, depth):
        return layer in self.make

    def plan(self, evidence):
        plan = self.make[evidence.layer](evidence)
        self.seen.append((evidence.layer, evidence, plan))
        return plan

    def spec(self):
        return "fixed"


class Seen(Projector):
    """Remembers its evidence and keeps everything; looks at every block."""

    whole = True

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "seen", [])

    def required(self):
        return ("tower",)

    def tower_blocks(self):
        return (0, 1)

    def plan(self, evidence):
        self.seen.append(evidence)
        return Identity.like(evidence.x)

    def spec(self):
        return "seen"


def _orders(evidence):
    g = torch.Generator().manual_seed(evidence.layer * 100 + evidence.n)
    return torch.stack([torch.randperm(evidence.n, generator=g) for _ in range(evidence.batch)])


def drop(evidence):
    """Other units in every view, in no order."""
    return Prune(evidence.n, _orders(evidence)[:, : evidence.n * 2 // 3])


def ragged(evidence):
    """Every second view keeps one unit less; so does what an earlier plan left out."""
    keep = _orders(evidence)[:, : evidence.n * 2 // 3]
    valid = torch.ones_like(keep, dtype=torch.bool)
    valid[::2, 1] = False
    return Prune(evidence.n, keep, valid if evidence.valid is None else valid & evidence.valid.gather(1, keep))


def merge(evidence):
    """Half stay, two join the first, one joins the second, and the rest is dropped; across windows."""
    order, k = _orders(evidence), evidence.n // 2
    src = order[:, k : k + 3]
    return Merge(evidence.n, order[:, :k], src, torch.tensor([0, 0, 1]).expand_as(src))


def nothing(evidence):
    return Identity.like(evidence.x)


def _tower(name):
    torch.manual_seed(0)
    if name == "windows":  # two blocks with windows of 2x2 units behind the first cut
        from transformers.models.qwen2_5_vl import Qwen2_5_VLVisionConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Kind

        config = Qwen2_5_VLVisionConfig(
            depth=4, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, window_size=16,
            out_hidden_size=32, fullatt_block_indexes=[2],
        )  # fmt: skip
        tower = Kind._from_config(config)
        with torch.no_grad():
            for p in tower.parameters():
                if p.dim() > 1:
                    p.mul_(10.0)
        return tower.eval()
    return VLMS[name].model.model.visual


TOWERS = ["qwen2_vl", "windows", "qwen3_vl"]


def pixels(grids):
    g = torch.Generator().manual_seed(3)
    return torch.randn(int(grids.prod(1).sum()), 96, generator=g)


def reference(tower, grids, plans, site="middle", prop=False, patches=None):
    """Tokens of every view that are left: {unit: token}, sizes {unit: size}, DeepStack tokens of the first layer,
    received attention {unit: mean over patches} of every block. ``plans`` [layer][shape] are batched over the views
    of a shape, in order."""
    caught = []

    def catch(block, args, kwargs):
        caught.append((args[0], kwargs["cu_seqlens"], kwargs["position_embeddings"]))

    hooks = [b.register_forward_pre_hook(catch, with_kwargs=True) for b in tower.blocks]
    stock = tower(pixels(grids) if patches is None else patches, grid_thw=grids)
    for hook in hooks:
        hook.remove()
    n = int(grids.prod(1).sum()) // 4
    index = torch.arange(n)
    if hasattr(tower, "fullatt_block_indexes"):
        from transformers.vision_utils import get_vision_window_index

        index = get_vision_window_index(grids, 2, tower.window_size, tower.patch_size)[0]
    place = [0] * n
    for at, unit in enumerate(index.tolist()):
        place[unit] = at
    x0 = caught[0][0].view(n, 4, -1)
    rope = [t.view(n, 4, -1) for t in caught[0][2]]
    views, start, count = [], 0, {}
    for t, h, w in grids.tolist():
        for _ in range(t):
            shape = (h // 2, w // 2)
            number = h * w // 4
            units = {u: (x0[place[start + u]], 1.0) for u in range(number)}
            views.append([shape, count.get(shape, 0), start, units])
            count[shape] = count.get(shape, 0) + 1
            start += number
    deep, received = [], []

    def turn(t, cos, sin):
        half = t.shape[-1] // 2
        return t * cos[:, :, None] + torch.cat([-t[..., half:], t[..., :half]], -1) * sin[:, :, None]

    def cut(layer):
        for view in views:
            shape, row, _, units = view[:4]
            if layer not in plans or plans[layer][shape].is_identity:
                continue
            slots = view[4] if len(view) > 4 else list(units)
            plan = plans[layer][shape]
            kept, valid = plan.representatives()[row].tolist(), plan.validity()
            sources = plan.sources()[row].tolist()
            out, named = {}, []
            for k, rep in enumerate(kept):
                named.append(slots[rep])
                if valid is not None and not valid[row, k]:
                    named[-1] = None
                    continue
                members = [units[slots[j]] for j in range(len(sources)) if sources[j] == k]
                total = sum(s for _, s in members)
                out[slots[rep]] = (sum(f * s for f, s in members) / total, total)
            view[3:] = [out, named]

    for i, block in enumerate(tower.blocks):
        if site == "before":
            cut(i)
        edges = caught[i][1]
        rows = {}
        for number, view in enumerate(views):
            shape, _, start, units = view[:4]
            groups = {}
            for u in units:
                at = place[start + u] * 4
                groups.setdefault(int((edges <= at).sum()), []).append(u)
            fresh = {}
            for group in groups.values():
                x = torch.stack([units[u][0] for u in group])
                cos, sin = (torch.stack([t[place[start + u]] for u in group]) for t in rope)
                qkv = block.attn.qkv(block.norm1(x)).view(len(group), 4, 3, block.attn.num_heads, -1)
                q, k, v = turn(qkv[:, :, 0], cos, sin), turn(qkv[:, :, 1], cos, sin), qkv[:, :, 2]
                logits = torch.einsum("uihd,vjhd->huivj", q, k) * q.shape[-1] ** -0.5
                if prop:
                    logits = logits + torch.tensor([units[u][1] for u in group]).log()[:, None]
                a = logits.flatten(3).softmax(-1).view_as(logits)
                out = block.attn.proj(torch.einsum("huivj,vjhd->uihd", a, v).flatten(2))
                for j, u in enumerate(group):
                    fresh[u] = (units[u][0] + out[j], units[u][1])
                    rows[number, u] = float(a.mean(0)[:, :, j].sum((0, 1)).mean()) / (4 * len(units))
            view[3] = {u: fresh[u] for u in units}
        received.append(rows)
        if site == "middle":
            cut(i)
        for view in views:
            view[3] = {u: (f + block.mlp(block.norm2(f)), s) for u, (f, s) in view[3].items()}
        if site == "after":
            cut(i)
        if hasattr(tower, "deepstack_merger_list"):
            merger = tower.deepstack_merger_list[list(tower.deepstack_visual_indexes).index(i)]
            deep.append([{u: merger(f)[0] for u, (f, _) in view[3].items()} for view in views])
    tokens = [{u: tower.merger(f)[0] for u, (f, _) in view[3].items()} for view in views]
    sizes = [{u: s for u, (_, s) in view[3].items()} for view in views]
    return tokens, sizes, deep, received, stock


def shapes_of(method, grids):
    """[layer][shape] -> plan, from what a method was asked: sizes in the order in which they appear."""
    order = list(dict.fromkeys((h // 2, w // 2) for _, h, w in grids.tolist()))
    out = {}
    for number, (layer, _, plan) in enumerate(method.seen):
        out.setdefault(layer, {})[order[number % len(order)]] = plan
    return out


@pytest.mark.parametrize("site", ["before", "middle", "after"])
@pytest.mark.parametrize("what", ["drop", "ragged", "merge", "merge twice", "merge without sizes", "one size"])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_tower_on_fewer_units_is_the_one_worked_out_by_hand(name, what, site):
    tower = _tower(name)
    make = {
        "drop": {0: drop, 1: drop}, "ragged": {0: ragged, 1: ragged}, "merge": {0: merge},
        "merge twice": {0: merge, 1: merge}, "merge without sizes": {0: merge},
        "one size": {0: lambda e: merge(e) if e.grid == (4, 4) else nothing(e)},
    }[what]  # fmt: skip
    prop = "merge" in what and "without" not in what
    method = Fixed(make, site=site, prop=prop)
    with tr.patched(tower, method):
        got = tower(pixels(GRIDS), grid_thw=GRIDS, output_hidden_states=True)
    plans = shapes_of(method, GRIDS)
    tokens, _, deep, _, stock = reference(tower, GRIDS, plans, site, prop)
    assert got.last_hidden_state.shape == stock.last_hidden_state.shape
    assert all(h.shape == stock.last_hidden_state.shape for h in got.hidden_states)
    scale = float(stock.pooler_output.abs().max())
    checks = [(got.pooler_output, tokens)]
    checks += list(zip(getattr(got, "deepstack_features", ()), deep, strict=True))
    start, changed = 0, 0.0
    for number, (h, w) in enumerate([(4, 4), (2, 6), (2, 6), (4, 4)]):
        for output, want in checks:
            mine = output[start : start + h * w]
            for unit, token in want[number].items():
                torch.testing.assert_close(mine[unit], token, rtol=1e-4, atol=1e-4 * scale)
        changed = max(changed, float((got.pooler_output - stock.pooler_output)[start : start + h * w].abs().max()))
        start += h * w
    assert changed > 0.01 * scale
    if what == "drop":  # what is gone holds the mean of what is left of the view
        first = tokens[0]
        gone = [u for u in range(16) if u not in first]
        mean = torch.stack(list(first.values())).mean(0)
        for u in gone:
            torch.testing.assert_close(got.pooler_output[u], mean, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_dropped_units_are_hidden_keys_of_the_unpatched_tower(name):
    """Only the stock modules: keys of units that are gone are hidden from the block behind the cut on."""
    tower = _tower(name)
    method = Fixed({0: drop})
    with tr.patched(tower, method):
        got = tower(pixels(GRIDS), grid_thw=GRIDS).pooler_output
    plans = shapes_of(method, GRIDS)[0]
    stay = torch.cat([(plans[s].sources()[i] >= 0) for s, i in [((4, 4), 0), ((2, 6), 0), ((2, 6), 1), ((4, 4), 1)]])
    order = torch.arange(len(stay))
    if name == "windows":
        from transformers.vision_utils import get_vision_window_index

        order = get_vision_window_index(GRIDS, 2, tower.window_size, tower.patch_size)[0]
    patches = stay[order].repeat_interleave(4)

    def hide(attn, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
        n = len(hidden_states)
        q, k, v = attn.qkv(hidden_states).view(n, 3, attn.num_heads, -1).permute(1, 0, 2, 3)
        cos, sin = (t[:, None] for t in position_embeddings)
        half = q.shape[-1] // 2
        q, k = (t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin for t in (q, k))
        part = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())
        see = ((part[:, None] == part) & patches) | torch.eye(n, dtype=torch.bool)
        out = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), see)
        return attn.proj(out[0].transpose(0, 1).flatten(1))

    for block in tower.blocks[1:]:
        block.attn.forward = hide.__get__(block.attn)
    try:
        want = tower(pixels(GRIDS), grid_thw=GRIDS).pooler_output
    finally:
        for block in tower.blocks[1:]:
            del block.attn.forward
    close(got[stay], want[stay])
    assert not torch.allclose(got[~stay], want[~stay], rtol=0.1)


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2"])
@torch.no_grad()
def test_other_attention_implementations(implementation, monkeypatch):
    """Flash attention where no unit has a size, sdpa behind merges; there is no flash kernel on a CPU."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def flash(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, scaling=None, **kwargs):
        assert attention_mask is None
        assert int(cu_seq_lens_q[-1]) == query.shape[2]
        assert max_length_q == int(cu_seq_lens_q.diff().max())
        calls.append(query.shape[2])
        part = torch.repeat_interleave(torch.arange(len(cu_seq_lens_q) - 1), cu_seq_lens_q.diff())
        see = part[:, None] == part
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, see, scale=scaling)
        return out.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    tower = _tower("windows")
    for mine in (Fixed({0: drop, 1: drop}, ("keys", "values")), Fixed({1: merge}, ("keys",), prop=True)):
        with tr.patched(tower, mine):
            want = tower(pixels(GRIDS), grid_thw=GRIDS).pooler_output
            monkeypatch.setitem(vars(tower.config), "_attn_implementation_internal", implementation)
            calls.clear()
            got = tower(pixels(GRIDS), grid_thw=GRIDS).pooler_output
            monkeypatch.setitem(vars(tower.config), "_attn_implementation_internal", "sdpa")
        close(got, want)
        if implementation != "eager":
            assert len(calls) == (2 if mine.prop_attn else 4)


# -- evidence ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_evidence_is_of_units(name):
    """Means over patches, and attention rows over the windows and units that are left."""
    tower = _tower(name)
    needs = ("keys", "queries", "values", "attention", "before")
    method = Fixed({0: drop, 1: nothing, 2: nothing}, needs)
    with tr.patched(tower, method):
        tower(pixels(GRIDS), grid_thw=GRIDS)
    caught = []
    hook = tower.blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: caught.append((args[0], block.attn.qkv(block.norm1(args[0])))), with_kwargs=True
    )
    tower(pixels(GRIDS), grid_thw=GRIDS)
    hook.remove()
    x, qkv = caught[0]
    order = torch.arange(len(x) // 4)
    if name == "windows":
        from transformers.vision_utils import get_vision_window_index

        order = get_vision_window_index(GRIDS, 2, tower.window_size, tower.patch_size)[0].argsort()
    first, second = (s for s in method.seen if s[0] == 0)
    keys = qkv.view(len(order), 4, 3, 2, -1)[order].mean(1)
    assert first[1].grid == (4, 4)
    assert second[1].grid == (2, 6)
    assert (first[1].batch, second[1].batch) == (2, 2)
    assert first[1].prefix == 0
    assert not first[1].cls
    close(first[1].queries[0], keys[:16, 0].transpose(0, 1))
    close(second[1].keys[1], keys[28:40, 1].transpose(0, 1))
    close(first[1].values[1], keys[40:, 2].transpose(0, 1))
    close(second[1].before[0], x.view(len(order), 4, -1)[order].mean(1)[16:28])
    if name == "windows":  # a unit sees its window only
        seen = first[1].attention("all")[0, 0] > 0
        at = torch.arange(16)
        window = at // 8 * 2 + at % 4 // 2
        assert torch.equal(seen, window[:, None] == window)
    else:
        assert (first[1].attention("all") > 0).all()
    later = [s[1] for s in method.seen if s[0] == 1]
    assert [e.n for e in later] == [10, 8]
    assert [e.entry for e in later] == [16, 12]
    assert all(e.attention.rope == "pre" for e in later)
    rows = later[0].attention("all")
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))


@pytest.mark.parametrize("what", ["ragged", "merge", "nothing"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_projector_methods_see_of_a_reduced_tower(name, what):
    """Received attention in the block behind the cut, of the units that are left, against the one by hand."""
    vlm = VLMS[name]
    inputs = prompts(vlm, ((6, "i"), (4, "i")))
    shown = Seen()
    method = Fixed({0: {"ragged": ragged, "merge": merge, "nothing": nothing}[what]}, prop=what == "merge")
    with tr.patched(vlm.model, method, shown), tr.record(vlm.model) as trace:
        vlm.model(**inputs)
    grids = inputs["image_grid_thw"]
    tower = vlm.model.model.visual
    plans = shapes_of(method, grids)

    _, sizes, _, received, _ = reference(tower, grids, plans, prop=what == "merge", patches=inputs["pixel_values"])
    step = next(s for s in trace.steps if s.stage == "projector")
    at = 0
    for evidence, (rows, columns, _) in zip(shown.seen, step.parts, strict=True):
        for i in range(evidence.batch):
            view = int(rows[i])
            placeholders = (inputs["input_ids"][view] == IMAGE).nonzero().flatten()
            units = [int((placeholders == c).nonzero()) for c in columns[i]]
            assert sorted(units) == sorted(sizes[view])
            for block in (0, 1):
                got = evidence.tower(block).per_token(received_attention)[i]
                want = torch.tensor([received[block][view, u] for u in units])
                # Means are over the units that a block sees.
                torch.testing.assert_close(got / got.sum(), want / want.sum(), rtol=1e-3, atol=1e-5)
            if what == "merge":
                assert evidence.size[i].tolist() == [sizes[view][u] for u in units]
            at += 1
    assert at == 2


# -- whole models ------------------------------------------------------------------------------------------------------
SPECS = [
    "tome:r=2", "pitome:keep=0.6", "evit:keep=0.5", "ats:keep=0.6", "dpcknn:keep=0.5", "mctf:keep=0.6", "tome_kth:k=2",
    "repshift:keep=0.5", "kmedoids:keep=0.5", "tofu:keep=0.5",
]  # fmt: skip
TOGETHER = [
    "tome:r=2+fastv:layer=2", "pitome:keep=0.6+fastervlm:keep=4,score=received+fastv:layer=2",
    "evit:keep=0.5+divprune:keep=3", "ats:keep=0.6+visionzip:keep=4+fastv:layer=1",
]  # fmt: skip


def state(model):
    """Everything that a patch could leave behind."""
    return {
        name: (type(m), set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("spec", ["tome:r=0", "evit:base_keep_rate=1.0", "pitome:keep=1.0+divprune:keep=1.0"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_changes_nothing(name, case, spec):
    vlm = VLMS[name]
    settings = {"num_beams": 2} if case == "beams" else {}
    inputs = prompts(vlm, CASES[case])
    before = state(vlm.model)
    ids, logits, _ = generate(vlm.model, inputs, **settings)
    with tr.patched(vlm.model, spec):
        got = generate(vlm.model, inputs, **settings)
    assert torch.equal(got[0], ids)
    assert torch.equal(got[1], logits)
    with tr.patched(vlm.model, "tome:r=2+fastv:layer=2"):
        assert "Block[tome:r=2]" in repr(vlm.model.model.visual)
        other = generate(vlm.model, inputs, **settings)
    assert not torch.equal(other[1], logits)
    assert state(vlm.model) == before
    assert torch.equal(generate(vlm.model, inputs, **settings)[1], logits)


@pytest.mark.skipif(not encodes_before(), reason="this transformers takes no mm_encoder_outputs")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_columns_of_dropped_units_are_hidden_from_the_language_model(name, case):
    """The unpatched model on the patched tower's features, with the columns of units that are gone as hidden keys."""
    vlm = VLMS[name]
    settings = {"num_beams": 2} if case == "beams" else {}
    inputs = prompts(vlm, CASES[case])
    inner = vlm.model.model
    with tr.patched(vlm.model, Fixed({0: ragged, 1: drop})):
        ids, logits, trace = generate(vlm.model, inputs, **settings)
        with torch.no_grad():
            features = {}
            if "pixel_values" in inputs:
                features["image"] = inner.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            if "pixel_values_videos" in inputs:
                features["video"] = inner.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    (step,) = [s for s in trace.steps if s.stage == "projector"]
    dropped = step.plan.sources() < 0
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    assert not (dropped & ~visual.repeat_interleave(len(dropped) // len(visual), 0)).any()
    total = visual.sum(1).repeat_interleave(len(dropped) // len(visual))
    left = total - dropped.sum(1)  # 16 units leave 10, then 6, some less where ragged; 8 leave 5, then 3
    assert ((left < total / 2) & (left >= total / 4)).all()
    plain = {k: v for k, v in inputs.items() if "pixel" not in k}
    with hidden(layers_of(name, vlm.model), dropped, 0):
        want = generate(vlm.model, {**plain, "mm_encoder_outputs": features}, **settings)
    assert torch.equal(want[0], ids)
    close(logits, want[1])


@pytest.mark.parametrize("spec", [*SPECS, *TOGETHER])
@pytest.mark.parametrize("name", NAMES)
def test_generation_in_a_batch_is_that_of_the_rows_alone(name, spec):
    vlm = VLMS[name]
    inputs = prompts(vlm, ((9, "i"), (5, "ii")))
    images, at = [1, 2], 0
    with tr.patched(vlm.model, spec):
        sequences, logits, _ = generate(vlm.model, inputs)
        beams = generate(vlm.model, inputs, num_beams=2)[0]
        for b in range(2):
            real = inputs["attention_mask"][b].bool()
            alone = {k: inputs[k][b : b + 1, real] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
            alone["image_grid_thw"] = inputs["image_grid_thw"][at : at + images[b]]
            alone["pixel_values"] = inputs["pixel_values"][at * 64 : (at + images[b]) * 64]
            at += images[b]
            got = generate(vlm.model, alone)
            assert torch.equal(got[0][0, -4:], sequences[b, -4:])
            close(got[1][0], logits[b])
            assert torch.equal(generate(vlm.model, alone, num_beams=2)[0][0, -4:], beams[b, -4:])


def _sizes(vlm, grids):
    """A prompt with images of other sizes than the usual, two in one row."""
    rows, g = [], torch.Generator().manual_seed(1)
    for row in grids:
        words = torch.randint(10, 90, (6 - len(row),), generator=g)
        parts = [words[:2]]
        for h, w in row:
            parts += [torch.tensor([97]), torch.full((h * w // 4,), IMAGE), torch.tensor([96])]
        rows.append(torch.cat([*parts, words[2:]]))
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    flat = torch.tensor([[1, h, w] for row in grids for h, w in row])
    return {
        "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).long(), "image_grid_thw": flat,
        "pixel_values": pixels(flat),
    }  # fmt: skip


@pytest.mark.parametrize("spec", ["tome:keep=0.5", "ats:keep=0.6", "pitome:keep=0.6+fastervlm:keep=0.5+fastv:layer=2"])
@pytest.mark.parametrize("name", NAMES)
def test_images_of_different_sizes(name, spec):
    vlm = VLMS[name]
    grids = [[(8, 8), (4, 12)], [(12, 4)], [(8, 8)]]
    inputs = _sizes(vlm, grids)
    images, patches = [0, 2, 3, 4], [0, 64 + 48, 64 + 96, 128 + 96]
    with tr.patched(vlm.model, spec):
        sequences, logits, trace = generate(vlm.model, inputs)
        for b in range(3):
            real = inputs["attention_mask"][b].bool()
            alone = {k: inputs[k][b : b + 1, real] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
            alone["image_grid_thw"] = inputs["image_grid_thw"][images[b] : images[b + 1]]
            alone["pixel_values"] = inputs["pixel_values"][patches[b] : patches[b + 1]]
            got = generate(vlm.model, alone)
            assert torch.equal(got[0][0, -4:], sequences[b, -4:])
            close(got[1][0], logits[b])
    if spec.startswith("tome"):
        step = next(s for s in trace.steps if s.stage == "projector")
        left = (step.plan.sources() >= 0) & (inputs["input_ids"] == IMAGE)
        assert left.sum(1).tolist() == [8 + 6, 6, 8]


@pytest.mark.parametrize("name", NAMES)
def test_frames_of_a_video(name):
    """Every frame is a view; a budget counts per frame."""
    vlm = VLMS[name]
    inputs = prompts(vlm, ((7, "v"),))
    spec = "tome:keep=0.5"
    with tr.patched(vlm.model, spec), torch.no_grad(), tr.record(vlm.model) as trace:
        vlm.model(**inputs)
    inside = [s for s in trace.steps if s.stage == "encoder"]
    assert inside[-1].tokens == 4
    assert inside[-1].plan.batch == 2
    (plan,) = (s.plan for s in trace.steps if s.stage == "projector")
    left = (plan.sources()[0] >= 0)[inputs["input_ids"][0] == VIDEO]
    assert [int(left[:8].sum()), int(left[8:].sum())] == [4, 4]
    with tr.patched(vlm.model, f"{spec}+divprune:keep=0.5+fastv:layer=2"):
        generate(vlm.model, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_work_falls_with_the_units(name):
    vlm = VLMS[name]
    inputs = prompts(vlm, ((7, "i"), (7, "i")))
    with torch.no_grad():
        with tr.record(vlm.model) as before:
            vlm.model(**inputs)
        tower = vlm.model.model.visual
        with tr.record(tower) as stock:
            tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        with tr.patched(vlm.model, "evit:tokens=8,drop_loc=[0]"):
            with tr.record(vlm.model) as after:
                vlm.model(**inputs)
            with tr.record(tower) as inside:
                tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    assert after.flops < 0.8 * before.flops
    assert inside.flops < 0.8 * stock.flops
    assert after.tokens == [8] * len(tower.blocks) + [inputs["input_ids"].shape[1] - 8]


def test_gradients_and_checkpointing():
    for name in NAMES:
        vlm = VLMS[name]
        inputs = prompts(vlm, ((7, "i"), (5, "ii")))
        model = copy.deepcopy(vlm.model).train()
        grads = []
        with tr.patched(model, "tome:r=2+divprune:keep=6+fastv:layer=2"):
            for checkpoint in (False, True):
                model.zero_grad()
                if checkpoint:
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                model(**inputs, use_cache=False).logits[:, -1].square().sum().backward()
                grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert float(grads[0]["model.visual.blocks.0.attn.qkv.weight"].abs().sum()) > 0
        assert grads[0].keys() == grads[1].keys()
        assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_threads_and_copies_of_a_patched_model():
    vlm = VLMS["qwen2_5_vl"]
    cases = [prompts(vlm, rows) for rows in (((9, "i"),), ((5, "ii"),), ((6, "v"),))]
    with tr.patched(vlm.model, "tome:r=2+fastervlm:keep=5,score=received"):
        want = [generate(vlm.model, i)[1] for i in cases]
        mine = copy.deepcopy(vlm.model)
        got = [None] * 3

        def work(i):
            got[i] = generate(vlm.model, cases[i])[1]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(generate(mine, cases[0])[1], want[0])
    tr.unpatch(mine)
    assert torch.equal(generate(mine, cases[0])[1], generate(vlm.model, cases[0])[1])


def test_what_can_act_where():
    model = VLMS["qwen2_5_vl"].model
    described = tr.describe(model)
    assert described.stages == ("language", "projector", "cache", "encoder")
    (tower,) = described.towers
    assert (tower.name, tower.prefix, tower.cls, tower.grid, tower.rope) == ("model.visual", 0, False, None, "pre")
    assert {"tome", "pitome", "evit"} <= set(described.methods("encoder"))
    assert "resize" not in described.methods("encoder")
    with pytest.raises(ValueError, match="use resize@projector"):
        tr.patch(model, "resize@encoder:keep=0.5")
    with pytest.raises(ValueError, match="smaller max_pixels"):
        tr.patch(model.model.visual, "resize:keep=0.5")
    with tr.patched(model, "tome:r=2"), pytest.raises(RuntimeError, match="run inside its forward"):
        model.model.visual.blocks[0](torch.zeros(4, 32), torch.tensor([0, 4]), (torch.zeros(4, 16), torch.zeros(4, 16)))
    assert tr.describe(model).active == ()


# -- plans on units and on patches -------------------------------------------------------------------------------------
@torch.no_grad()
def test_plans_on_patches_do_what_plans_on_units_do():
    e = tr.Evidence(torch.randn(2, 12, 3))
    size = torch.rand(2, 12) + 0.5
    pool = Pool(12, torch.rand(2, 5, 12), keep=torch.tensor([[0, 3, 4, 7, 9]]).expand(2, -1))
    x = torch.randn(2, 12, 4 * 3)
    plans = [drop(e), ragged(e), merge(e), pool, Identity.like(e.x)]
    plans.append(Chain(12, (plans[0], merge(tr.Evidence(torch.zeros(2, 8, 3))))))
    for plan in plans:
        mine = patchwise(plan, 4)
        own = size.repeat_interleave(4, 1)
        assert (mine.n, mine.k, mine.batch) == (48, plan.k * 4, 2)
        want = plan.reduce(x, size)
        got = mine.reduce(x.view(2, 48, 3), own)
        torch.testing.assert_close(got.reshape(want.shape), want)
        torch.testing.assert_close(mine.expand(got).reshape(2, 12, 12), plan.expand(want))
        assert torch.equal(mine.rows_at(torch.tensor([1])).sources()[0], mine.sources()[1])


def test_layout_and_windows():
    layout = Layout.of([[1, 4, 4], [2, 2, 4]], 2, torch.tensor([1, 3, 0, 2, 5, 4, 6, 7]), "cpu")
    assert layout.shapes == ((2, 2), (1, 2))
    assert layout.numbers == ((0,), (1, 2))
    assert layout.places[0].tolist() == [[2, 0, 3, 1]]
    assert layout.places[1].tolist() == [[5, 4], [6, 7]]
    packed = Packed.entry(layout)
    bounds = torch.tensor([0, 8, 16, 24, 32], dtype=torch.int32)
    assert packed.windows(bounds).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    x = torch.arange(32.0)[:, None]
    plans = [Prune(4, torch.tensor([[3, 1, 0]])), Prune(2, torch.tensor([[0], [1]]))]
    left, packed = packed.after(x, plans, False)
    assert packed.at.tolist() == [0, 1, 2, 5, 7]
    assert left[::4, 0].tolist() == [0, 4, 8, 20, 28]
    assert packed.bounds(bounds).tolist() == [0, 8, 12, 16, 20]
    assert packed.bounds(torch.tensor([0, 16, 24, 32])).tolist() == [0, 12, 16, 20]
    assert packed.windows(packed.bounds(torch.tensor([0, 16, 24, 32]))) is None
    assert packed.left(torch.tensor([0]))[0, ::4].tolist() == [True, True, False, True]
    assert packed.left(torch.tensor([2, 1]))[:, ::4].tolist() == [[False, True], [True, False]]
    assert packed.sizes(torch.tensor([0])) is None
