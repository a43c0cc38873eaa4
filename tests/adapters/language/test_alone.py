"""Tokens chosen outside of a model's own forward are those that a patched model has before its language model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vlms import VLMS, prompts

import tokenreduce as tr
from tokenreduce.adapters.language.alone import Item, reduce_features, watch_features, watched
from tokenreduce.core.undo import Undo

CASES = [
    ("llava", "i", "divprune:keep=5"),
    ("llava", "ii", "fastervlm:keep=5"),
    ("llava", "i", "visionzip:keep=6"),
    ("llava", "i", "vispruner:keep=0.5"),
    ("llava", "i", "prumerge:keep=5"),
    ("llava", "i", "zoo-prune:keep=5"),
    ("internvl", "ii", "divprune:keep=3"),
    ("qwen2_5_vl", "ii", "visionzip:keep=5"),
    ("qwen2_5_vl", "v", "divprune:keep=7"),
    ("qwen2_5_vl", "v", "dycoke"),
    ("qwen2_vl", "v", "vidcom2:keep=7"),
    ("llava_next", "i", "divprune:keep=9"),
]


def entered(model, reducer, inputs):
    """What enters the first decoder layer of the patched model at visual columns, and which columns these were."""
    seen = []

    def note(layer, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    visual = torch.isin(inputs["input_ids"][0], torch.tensor([98, 99]))
    with tr.patched(model, reducer), tr.record(model) as trace, torch.no_grad():
        handle = model.model.language_model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            model(**inputs)
        finally:
            handle.remove()
    columns = trace.plans[0].representatives()[0].sort().values
    mine = visual[columns]
    return seen[0][0][mine], columns[mine], visual.nonzero().flatten()


@pytest.mark.parametrize(("family", "kinds", "spec"), CASES)
def test_the_same_tokens_as_in_a_patched_model(family, kinds, spec):
    model = VLMS[family].model
    reducer = tr.get_method(spec, "projector")
    inputs = prompts(VLMS[family], ((7, kinds),))
    want, columns, visual = entered(model, reducer, inputs)
    kind = "video" if "v" in kinds else "image"
    undo = Undo((reducer,))
    watch_features(model, reducer, undo)
    try:
        function = getattr(model.model, f"get_{kind}_features")
        given = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
        with watched() as calls, torch.no_grad():
            rows = [r.flatten(0, -2) for r in function(**given, return_dict=True).pooler_output]
        (seen,) = calls
        frames = int(inputs["video_grid_thw"][0, 0]) if kind == "video" else 1
        items, at = [], 0
        for x in rows:
            blank = sum(int((e.origin.view < 0).sum()) for e in seen.entries) // len(rows)
            keep = reducer.fixed_count(len(x) - blank, frames) + blank
            items.append(Item(x, keep, seen, at))
            at += len(x)
        flat = "qwen" not in family
        with torch.no_grad():
            through = getattr(model.model, "multi_modal_projector", None)
            kept = reduce_features(items, kind, reducer, compact=flat, projector=through)
    finally:
        undo.revert()
    torch.testing.assert_close(torch.cat([k.rows for k in kept]), want)
    starts = torch.tensor([i.first for i in items])
    places = torch.cat([k.places + s for k, s in zip(kept, starts, strict=True)])
    assert torch.equal(visual[places], columns)


def test_a_method_that_leaves_another_number_is_an_error():
    model = VLMS["llava"].model

    class Liar(type(tr.get_method("divprune"))):
        def choose(self, evidence, keep):
            return super().choose(evidence, keep + 1)

    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    assert len(reduce_features([Item(x, 4)], "image", tr.get_method("divprune"), compact=True)[0].rows) == 4
    with pytest.raises(ValueError, match=r"was to leave 4 of 16 tokens and left \[5\]"):
        reduce_features([Item(x, 4)], "image", Liar(keep=4), compact=True)
    with pytest.raises(TypeError, match="no image/video language model"):
        watch_features(model.model.vision_tower, replace(tr.get_method("divprune"), keep=4), Undo())
