"""What language-stage methods mark by what the vision tower saw: on which columns marks are, and where they go."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from vlms import IMAGE, VIDEO, VLMS, encodes_before, prompts
from vlms_masked import CASES, FILMS, close, generate, layers_of

import tokenreduce as tr
from tokenreduce.adapters.language import find as vlm_adapter
from tokenreduce.algorithms.projector import saliency
from tokenreduce.core.plan import Identity
from tokenreduce.core.reducer import Reducer

KINDS = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl", "gemma3")


@dataclass(frozen=True)
class Marker(Reducer, stage="language", needs=("tower",), name=""):
    """Drops nothing; marks every token by its embedding, by ``factor``, and remembers the marks before ``layer``."""

    layer: int = 0
    factor: float = 1.0
    seen: ClassVar[dict[float, torch.Tensor]] = {}

    def acts_at(self, layer, depth):
        return layer == self.layer

    def tower_blocks(self):
        return (-1,)

    def tower_scores(self, evidence):
        assert saliency(evidence, -1).shape == evidence.x.shape[:2]
        return evidence.x.sum(-1) * self.factor

    def plan(self, evidence):
        self.seen[self.factor] = evidence.scores.clone()
        return Identity.like(evidence.x)


def embeds_of(vlm, inputs, **settings):
    """(rows and beams, L, C) what enters the first layer of the unpatched model in prefill."""
    found = []
    layer = layers_of(next(n for n, v in VLMS.items() if v is vlm), vlm.model)[0]
    hook = layer.register_forward_pre_hook(lambda m, args: found.append(args[0]))
    generate(vlm.model, inputs, **settings)
    hook.remove()
    return found[0]


def marked(vlm, inputs, *reducers, **settings):
    """The marks that a :class:`Marker` finds before its layer, and the trace."""
    Marker.seen.clear()
    with tr.patched(vlm.model, *(reducers or (Marker(),))):
        trace = generate(vlm.model, inputs, **settings)[2]
    return Marker.seen, trace


@pytest.mark.parametrize(("name", "case"), [(n, c) for n in VLMS for c in CASES if c != "video" or n in FILMS])
def test_marks_are_on_the_columns_of_their_tokens(name, case):
    """Text, padding, row ends and other tokens that stand for no patch have none."""
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES[case])
    settings = {"num_beams": 3} if case == "beams" else {}
    embeds = embeds_of(vlm, inputs, **settings)
    (got,) = marked(vlm, inputs, **settings)[0].values()
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    visual = visual.repeat_interleave(len(embeds) // len(visual), 0)
    blank = visual & (got == 0)
    newline = getattr(vlm.model.model, "image_newline", None)
    ends = torch.zeros_like(blank) if newline is None else visual & (embeds == newline).all(-1)
    if name == "video_llava":  # a video has class tokens of its frames
        assert int(blank.sum()) == 2 * int((inputs["input_ids"] == VIDEO).any(1).sum())
    else:
        assert torch.equal(blank, ends)
    close(got, torch.where(visual & ~blank, embeds.sum(-1), 0.0))
    assert got.any()


@pytest.mark.parametrize("cut", [1, 2])
def test_marks_follow_the_tokens_through_the_layers(cut):
    vlm = VLMS["llava"]
    inputs = prompts(vlm, CASES["unequal"])
    (full,) = marked(vlm, inputs)[0].values()
    (got,), trace = (lambda s, t: (s.values(), t))(*marked(vlm, inputs, Marker(layer=3), f"fastv:layer={cut},keep=0.4"))
    place, valid = trace.plans[0].representatives(), trace.plans[0].validity()
    want = full.gather(1, place)
    close(got, want if valid is None else torch.where(valid, want, 0.0))


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize(
    "spec", ["divprune:keep=0.4", "aim-merge:keep=0.5", "prumerge:keep=5", "visionzip:contextual=2,dominant=3"]
)
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_what_stands_for_several_has_the_highest_mark(name, spec, positions):
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["unequal"])
    (full,) = marked(vlm, inputs)[0].values()
    seen, trace = marked(vlm, inputs, f"{spec},positions={positions}", Marker(layer=2))
    (got,) = seen.values()
    step = trace.steps[0]
    want, several = full.clone(), 0
    for (rows, columns, plan), hosts in zip(step.parts, step.hosts, strict=True):
        to = plan.sources()[:, -columns.shape[1] :]
        for b in range(len(hosts)):
            for k, host in enumerate(hosts[b].tolist()):
                own = int(plan.representatives()[b, k]) - (plan.n - columns.shape[1])
                mine = {*columns[b, to[b] == k].tolist(), *columns[b, own : own + 1].tolist()}
                if host >= 0:
                    want[rows[b, 0], host] = full[rows[b, 0], list(mine)].max() if mine else 0.0  # a class token
                    several += len(mine) > 1
    assert bool(several) == ("divprune" not in spec)
    place = step.plan.representatives()
    kept = torch.where(step.plan.validity(), place, full.shape[1]) if step.plan.validity() is not None else place
    for b in range(len(full)):
        columns = sorted(i for i in kept[b].tolist() if i < full.shape[1])
        close(got[b, -len(columns) :], want[b, columns])


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl"])
def test_behind_a_method_in_the_tower(name):
    """Copies of what was merged have no marks, and go, as they do without anybody looking."""
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["unequal"])
    with tr.patched(vlm.model, "tome:keep=0.4"):
        want = generate(vlm.model, inputs)
    with tr.patched(vlm.model, "tome:keep=0.4", Marker()):
        got = generate(vlm.model, inputs)
    assert got[2].plans[-1] == want[2].plans[-1]
    assert torch.equal(got[1], want[1])
    (marks,) = Marker.seen.values()
    visual = (inputs["input_ids"] == IMAGE).gather(1, want[2].plans[-1].representatives())
    valid = want[2].plans[-1].validity()
    assert torch.equal(marks != 0, visual if valid is None else visual & valid)


def test_methods_have_scores_of_their_own():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, CASES["alone"])
    seen = marked(vlm, inputs, Marker(layer=1), Marker(layer=2, factor=-3.0))[0]
    close(seen[-3.0], seen[1.0] * -3)


# -- MustDrop's key set ------------------------------------------------------------------------------------------------
def test_the_key_set_stays_and_nothing_else():
    """Against the tower's own attention, eager: two of 16 tokens of every image."""
    vlm = VLMS["llava"]
    inputs = prompts(vlm, CASES["unequal"])
    tower = copy.deepcopy(vlm.model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        rows = tower(inputs["pixel_values"], output_attentions=True).attentions[-1][:, :, 0, 1:].mean(1)
    want = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    chosen = torch.zeros_like(rows, dtype=torch.bool).scatter(1, rows.topk(2).indices, True)
    want[inputs["input_ids"] == IMAGE] = chosen.flatten()
    # Nobody's share of the attention and no entry of it is 1.
    with tr.patched(vlm.model, tr.MustDrop(global_thr=1.0, individual_thr=1.0)):
        trace = generate(vlm.model, inputs)[2]
    plan = next(s.plan for s in trace.steps if s.stage == "language" and s.plan is not None)
    assert torch.equal((plan.sources() >= 0) & (inputs["input_ids"] == IMAGE), want)


@pytest.mark.parametrize("name", KINDS)
def test_padded_batches_and_beams_generate_what_single_samples_do(name):
    vlm = VLMS[name]
    inputs = prompts(vlm, ((9, "i"), (5, "i")))
    spec = "mustdrop:global_thr=0.05,individual_thr=0.05"
    far = generate(vlm.model, inputs)[1]
    with tr.patched(vlm.model, spec):
        sequences, logits, trace = generate(vlm.model, inputs)
        beams = generate(vlm.model, inputs, num_beams=2)[0]
        for b in range(2):
            real = inputs["attention_mask"][b].bool()
            words = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
            alone = {k: v[b : b + 1, real] if k in words else v.chunk(2)[b] for k, v in inputs.items()}
            got = generate(vlm.model, alone)
            assert torch.equal(got[0][0, -4:], sequences[b, -4:])
            close(got[1][0], logits[b])
            assert torch.equal(generate(vlm.model, alone, num_beams=2)[0][0, -4:], beams[b, -4:])
    assert [s for s in trace.steps if s.stage == "language" and s.plan is not None]
    assert float((far[:, 0] - logits[:, 0]).abs().max()) > 1e-2, "the reduction changes something"


@pytest.mark.parametrize("name", VLMS)
def test_keep_all_and_unpatch_are_bit_identical(name):
    vlm = VLMS[name]
    inputs = prompts(vlm, CASES["video"] if vlm.video else CASES["unequal"])
    before = generate(vlm.model, inputs)
    with tr.patched(vlm.model, "mustdrop:keep=1.0"):
        same = generate(vlm.model, inputs)
    with tr.patched(vlm.model, "mustdrop:keep=3"):
        reduced = generate(vlm.model, inputs)[2]
    assert [s for s in reduced.steps if s.stage == "language" and s.plan is not None]
    after = generate(vlm.model, inputs)
    for other in (same, after):
        assert torch.equal(other[0], before[0])
        assert torch.equal(other[1], before[1])
    assert not [k for m in vlm.model.modules() for k in vars(m) if "tokenreduce" in k]


@pytest.mark.parametrize("spec", ["mustdrop-merge:keep=8,window=2+mustdrop:keep=4", "visionzip:keep=6+mustdrop:keep=4"])
def test_behind_other_stages(spec):
    vlm = VLMS["llava"]
    inputs = prompts(vlm, ((9, "i"), (5, "i")))
    with tr.patched(vlm.model, spec):
        trace = generate(vlm.model, inputs)[2]
    text = int(inputs["attention_mask"][0].sum()) - 16
    assert trace.steps[-1].tokens == text + 4


# -- what cannot be ----------------------------------------------------------------------------------------------------
def test_refused_with_the_reason(monkeypatch):
    model = VLMS["llava"].model
    assert "mustdrop" in tr.describe(model).methods("language")
    with pytest.raises(ValueError, match="mustdrop looks at what the tower saw of every frame, of which tome:r=2"):
        tr.patch(VLMS["llava_onevision"].model, tr.ToMe(r=2, frames=4), tr.MustDrop())
    monkeypatch.setattr(vlm_adapter, "vision_of", lambda inner: None)
    assert "mustdrop" not in tr.describe(model).methods("language")
    with pytest.raises(
        ValueError,
        match=r"mustdrop needs attention of the vision tower, which .* does not have. Methods that fit: .*fastv",
    ):
        tr.patch(model, tr.MustDrop())
    with tr.patched(model, tr.MustDrop(keep_rate=0, keep=4)):
        assert generate(model, prompts(VLMS["llava"], CASES["alone"]))[2].plans


@pytest.mark.skipif(not encodes_before(), reason="this transformers takes no mm_encoder_outputs")
def test_features_from_elsewhere():
    vlm = VLMS["llava"]
    inputs = prompts(vlm, CASES["alone"])
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        strange = vlm.model.model.get_image_features(pixels)
        with tr.patched(vlm.model, tr.MustDrop(keep=4)):
            want = vlm.model(**inputs, pixel_values=pixels).logits
            mine = vlm.model.model.get_image_features(pixels)
            close(vlm.model(**inputs, mm_encoder_outputs={"image": mine}).logits, want)
            for other in (strange, BaseModelOutputWithPooling(pooler_output=strange.pooler_output)):
                with pytest.raises(
                    ValueError, match=r"mustdrop looks at what the vision tower saw, but .* made elsewhere"
                ):
                    vlm.model(**inputs, mm_encoder_outputs={"image": other})
        with tr.patched(vlm.model, tr.MustDrop(keep_rate=0, keep=4)):
            assert torch.isfinite(vlm.model(**inputs, mm_encoder_outputs={"image": strange}).logits).all()
