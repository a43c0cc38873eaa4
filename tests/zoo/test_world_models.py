"""The models of the generated world: their training, their three faces, and questions packed behind one picture."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import tokenreduce as tr
from tokenreduce.zoo import ahead, training

pytest.importorskip("timm")
pytest.importorskip("transformers")

from tokenreduce.zoo import evaluation, packing, world_batches, world_lessons, world_llava, world_vit, world_words
from tokenreduce.zoo.clip_twin import clip_state, timm_state
from tokenreduce.zoo.stages import fit_stages
from tokenreduce.zoo.training import Schedule
from tokenreduce.zoo.video_inputs import video_inputs
from tokenreduce.zoo.world.clips import clip
from tokenreduce.zoo.world.questions import ask
from tokenreduce.zoo.world.scenes import scene
from tokenreduce.zoo.world.vocabulary import COLOURS, KINDS, SPLITS, TEXTURES, WORDS

TINY = world_lessons.Course(
    keep=(8, 12), keep_frame=(4,), renumber=0.3, shift=0.3, video=0.5, scenes=2, clips=1, questions=3, video_questions=3
)
STAGES = (
    world_llava.Stage("one", Schedule(steps=3, batch=2, warmup=1), replace(TINY, video=0.0)),
    world_llava.Stage("two", Schedule(steps=4, batch=2, warmup=1, seed=1), TINY),
)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return world_vit.build().eval()


@pytest.fixture(scope="module")
def llava(vit):
    torch.manual_seed(0)
    model = world_llava.build().eval()
    model.model.vision_tower.load_state_dict(clip_state(vit.state_dict()))
    tuning = world_llava.Tuning(model)
    made = world_batches.pictures(0, batch=4, seed=0)
    world_llava.prepare(tuning, tuning.see(world_vit.pixels(made.pixels)))
    return model.requires_grad_(True)


def logits_of(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


# -- encoder -----------------------------------------------------------------------------------------------------------
def test_one_encoder_is_timm_clip_and_tower_bit_for_bit(vit, llava) -> None:
    x = world_vit.pixels(world_batches.pictures(1, batch=3, seed=0).pixels)
    clip_model = world_vit.as_clip(vit)
    with torch.no_grad():
        pooled = vit.forward_head(vit.forward_features(x), pre_logits=True)
        assert torch.equal(clip_model(x).pooler_output, pooled)
        layer = clip_model(x, output_hidden_states=True).hidden_states[-2][:, 1:]
        tower = llava.model.vision_tower(x, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert torch.equal(layer, tower)
        trained, whole, rows = world_vit.look(vit, x, 2)
        clip_model.set_attn_implementation("eager")
        early = clip_model(x, output_attentions=True).attentions
    assert torch.equal(layer, trained[:, 1:])
    for row, attention in zip(rows, early[:2], strict=True):
        patches = attention[:, :, 0, 1:]
        torch.testing.assert_close(row.exp(), patches / patches.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole, pooled, atol=1e-5, rtol=1e-5)  # the last block computes one row only
    back = timm_state(clip_state(vit.state_dict()))
    assert all(torch.equal(v, back[k]) for k, v in vit.state_dict().items() if not k.startswith("head."))


def test_the_position_table_starts_with_the_place_and_half_as_strong_as_the_patches() -> None:
    torch.manual_seed(0)
    fresh = world_vit.build()
    x = world_vit.pixels(world_batches.pictures(0, batch=4, seed=0).pixels)
    world_vit.prepare(fresh, x)
    with torch.no_grad():
        strength = fresh.patch_embed(x).std()
    table = fresh.pos_embed.detach()[0, 1:]
    assert 0.45 < table.std() / strength < 0.55
    grid = table.view(14, 14, -1)
    near = torch.nn.functional.cosine_similarity(grid[:, :-1], grid[:, 1:], dim=-1).mean()
    far = torch.nn.functional.cosine_similarity(grid[:, :7], grid[:, 7:], dim=-1).mean()
    assert near > far + 0.2


def test_targets_of_the_class_token_are_those_of_the_things() -> None:
    made = world_batches.pictures(3, batch=6, seed=1, moving=2)
    want = world_vit._targets(made, "cpu")
    for i in range(6):
        pairs = {(k, c) for k, c in zip(made.kinds[i].flat, made.colours[i].flat, strict=True) if k >= 0}
        assert {divmod(int(p), len(COLOURS)) for p in want["pairs"][i].nonzero()} == pairs
        assert {int(k) for k in want["kinds"][i].nonzero()} == {k for k, _ in pairs}
        assert {int(c) for c in want["colours"][i].nonzero()} == {c for _, c in pairs}
    assert want["count"].tolist()[4:] == [-1, -1]
    assert want["row"][0, :15].tolist() == [0] * 14 + [1]
    assert 0 <= int(want["background"].min()) <= int(want["background"].max()) < len(TEXTURES)


def test_early_attention_is_by_place_when_it_is_the_gaussian() -> None:
    at = torch.arange(14) - 6.5
    bell = (-(at[:, None] ** 2 + at[None] ** 2) / (2 * 5.0**2)).flatten().log_softmax(0)
    assert float(world_vit.early(bell.expand(2, 3, 4, -1))) == pytest.approx(0, abs=1e-6)
    flat = torch.full((196,), -torch.tensor(196.0).log())
    assert float(world_vit.early(flat)) == pytest.approx(float((bell.exp() * (bell - flat)).sum()), rel=1e-4)


def test_settling_asks_for_nothing_but_places_of_the_teacher_itself(vit) -> None:
    x = world_vit.pixels(world_batches.pictures(1, batch=3, seed=0).pixels)
    other = copy.deepcopy(vit)
    with torch.no_grad():
        other.blocks[3].mlp.fc1.weight.mul_(3)
        places = float(world_vit.early(torch.stack(world_vit.look(vit, x, world_vit.EARLY)[2])))
        assert float(world_vit.settling(vit, vit, x)) == pytest.approx(places, rel=1e-5)
        changed = float(world_vit.settling(other, vit, x))
    # The first layers are the same, what comes behind them is not.
    assert changed - places > 0.01 * places


def train_vit(folder, monkeypatch, stops, workers=0):
    stages = (
        world_vit.Stage("names", Schedule(steps=3, batch=6, warmup=1)),
        world_vit.Stage("places", Schedule(steps=2, batch=6, warmup=1, seed=1)),
    )
    monkeypatch.setattr(world_vit, "STAGES", stages)
    monkeypatch.setattr(world_vit, "held_out", lambda model, **_: {"kind": 0.5})
    monkeypatch.setattr(world_vit, "accuracy", lambda model, *a, **k: 0.25)
    monkeypatch.setattr(world_vit, "fit_stages", functools.partial(fit_stages, save_every=1))
    folder.mkdir()
    rows: list[dict] = []
    for stop in stops:

        def report(row, stop=stop):
            rows.append(row)
            if row["step"] == stop:
                raise KeyboardInterrupt

        try:
            model = world_vit.train(folder, workers=workers, report=report)
        except KeyboardInterrupt:
            continue
    return model, rows


@pytest.mark.slow
def test_encoder_training_killed_in_between_ends_as_if_it_had_not_been(tmp_path, monkeypatch) -> None:
    whole, rows = train_vit(tmp_path / "a", monkeypatch, [None])
    parts, _ = train_vit(tmp_path / "b", monkeypatch, [2, 3, None], workers=1)
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5]
    lines = [json.loads(r) for r in (tmp_path / "b" / "curve.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == [1, 2, 3, 4, 5]
    assert training.progress(tmp_path / "b")[0] == 5


# -- words, processor, generate ----------------------------------------------------------------------------------------
def test_every_question_and_answer_is_made_of_known_words() -> None:
    tokenizer = world_words.tokenizer()
    for seed in range(60):
        for made in (scene(seed, copy_colour=0.45), clip(seed)):
            for q in ask(made, seed, 6):
                ids = tokenizer(q.text.capitalize() + "?")["input_ids"]
                assert ids == [world_words.BOS, *world_words.encode(q.text)]
                assert tokenizer.decode(ids, skip_special_tokens=True) == q.text
                assert q.answer in WORDS
    assert tokenizer.convert_tokens_to_ids(list(WORDS)) == [world_words.IDS[w] for w in WORDS]
    assert len(tokenizer) <= world_words.SIZE


def test_saved_folder_loads_with_plain_transformers_and_generates_the_same(llava, tmp_path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = world_words.processor()
    image = Image.fromarray(scene(4).image)
    inputs = processor(images=image, text="<image> what color is the star", return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 1 + 196 + 5)
    torch.testing.assert_close(inputs["pixel_values"][0], world_vit.WorldTransform()(image), atol=1e-6, rtol=0)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the star"}]}]
    assert processor.apply_chat_template(turn) == "<image> what color is the star"
    llava.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, loaded = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    again = loaded(images=image, text="<image> what color is the star", return_tensors="pt")
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in inputs.items()}
    assert loaded.apply_chat_template(turn) == "<image> what color is the star"
    assert torch.equal(logits_of(model, **again), logits_of(llava, **inputs))
    out = model.generate(**again)
    assert 1 <= out.shape[1] - 202 <= 2
    assert int(out[0, 202]) == int(logits_of(llava, **inputs)[0, -1].argmax())


def test_clips_are_frames_pooled_to_49_tokens(llava) -> None:
    a, b = clip(3).frames, clip(4).frames[:5]
    alone = video_inputs(llava, [a], ["what thing comes last"])
    assert alone["input_ids"].shape == (1, 1 + 8 * 50 + 4)
    visual = torch.stack(list(alone["mm_encoder_outputs"]["image"].pooler_output))
    with torch.no_grad():
        full = torch.stack(list(llava.get_image_features(world_vit.pixels(a), return_dict=True).pooler_output))
    by_hand = torch.stack([full[:, [i, i + 1, i + 14, i + 15]].mean(1) for i in (0, 2, 28, 30)], 1)
    torch.testing.assert_close(visual[:, [0, 1, 7, 8]], by_hand, atol=1e-4, rtol=1e-4)
    expected = logits_of(llava, **alone)[0, -1]
    both = video_inputs(llava, [a, b], ["what thing comes last", "which way does move the star"])
    assert both["attention_mask"].sum(1).tolist() == [405, 257]
    out = llava.generate(**both, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(out.logits[0][0], expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="one question per clip"):
        video_inputs(llava, [a], [])
    with pytest.raises(ValueError, match=r"\(T,H,W,3\)"):
        video_inputs(llava, [a[0]], ["what thing comes last"])


# -- packed questions --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("video", [False, True])
def test_packed_questions_equal_single_ones(llava, video: bool) -> None:
    """With all tokens at their own places a lesson is what a user's prompts are, one by one."""
    course = replace(TINY, keep=(196,), keep_frame=(49,), renumber=0.0, shift=0.0)
    made = world_lessons.lesson(0, course=course, seed=0, video=video)
    tuning = world_llava.Tuning(llava).eval()
    with torch.no_grad():
        features = tuning.see(world_vit.pixels(made.pixels.reshape(-1, 112, 112, 3)))
        logits = tuning.read(features, world_llava._tensors(made, "cpu"), made.pixels.shape[1])[0]
    processor = world_words.processor()
    words = {i: w for w, i in world_words.IDS.items()}
    for i, frames in enumerate(made.pixels):
        for j in range(made.words.shape[1]):
            ids = made.words[i, j, : made.last[i, j] + 1]
            text = " ".join(words[int(t)] for t in ids)
            if video:
                single = logits_of(llava, **video_inputs(llava, [frames], [text]))
            else:
                inputs = processor(images=Image.fromarray(frames[0]), text=f"<image> {text}", return_tensors="pt")
                single = logits_of(llava, **inputs)
            torch.testing.assert_close(logits[i, j, : len(ids)], single[0, -len(ids) :], atol=2e-3, rtol=1e-3)


def test_packing_keeps_gaps_in_positions_and_taps_the_prefix(llava) -> None:
    language = llava.model.language_model
    torch.manual_seed(1)
    prefix, questions = torch.randn(2, 7, 128) * 0.3, torch.randn(2, 3, 4, 128) * 0.3
    positions = torch.tensor([[0, 2, 3, 9, 11, 12, 30]]).expand(2, -1)
    places = torch.tensor([40, 41, 42, 43]).expand(2, 3, -1)
    with torch.no_grad():
        hidden, tapped = packing.packed(language, prefix, positions, questions, places, taps=(1, 3))
        for j in range(3):
            out = language(
                inputs_embeds=torch.cat([prefix, questions[:, j]], 1),
                position_ids=torch.cat([positions, places[:, j]], 1), output_hidden_states=True,
            )  # fmt: skip
            torch.testing.assert_close(hidden[:, j], out.last_hidden_state[:, 7:], atol=1e-4, rtol=1e-4)
            for behind, x in zip((1, 3), tapped, strict=True):
                torch.testing.assert_close(x, out.hidden_states[behind + 1][:, :7], atol=1e-4, rtol=1e-4)


# -- lessons -----------------------------------------------------------------------------------------------------------
def test_lessons_say_what_the_tokens_show_and_where_they_stand() -> None:
    course = replace(TINY, keep=(60,), renumber=0.0, shift=0.0)
    made = world_lessons.lesson(5, course=course, seed=2, video=False)
    words = {i: w for w, i in world_words.IDS.items()}
    rng = np.random.default_rng((2, 5))
    rng.random()
    scenes = [scene(s, copy_colour=course.copy_colour) for s in world_batches.seeds("train", 2, rng)]
    for i, s in enumerate(scenes):
        assert np.array_equal(made.pixels[i, 0], s.image)
        things = set(np.flatnonzero(s.kinds.flat >= 0))
        assert things <= set(made.keep[i])
        assert made.positions[i].tolist() == [0, *(made.keep[i] + 1)]
        for at, shows in zip(made.keep[i], made.shows[i], strict=True):
            named = [words.get(int(w)) for w in shows]
            if at in things:
                side = "left" if at % 14 < 7 else "right", "top" if at // 14 < 7 else "bottom"
                assert named == [KINDS[s.kinds.flat[at]], COLOURS[s.colours.flat[at]], *side]
            else:
                assert named == [s.background, None, None, None]
    assert made.text.tolist() == [197, 197]
    compact = world_lessons.lesson(5, course=replace(course, renumber=1.0), seed=2, video=False)
    assert compact.positions[0].tolist() == list(range(61))
    assert compact.text.tolist() == [61, 61]


def test_lessons_of_clips_know_motion_and_entry() -> None:
    course = replace(TINY, keep_frame=(49,), renumber=0.0, shift=0.0, clips=3)
    made = world_lessons.lesson(1, course=course, seed=0, video=True)
    rng = np.random.default_rng((0, 1))
    rng.random()
    for i, seed in enumerate(world_batches.seeds("train", 3, rng)):
        film = clip(seed)
        frame = made.keep[i] // 49
        for t in range(8):
            here = made.new[i][(frame == t) & (made.new[i] >= 0)]
            new = any(o.entry == t for o in film.objects)
            assert (1 in here) == new
        for o in film.objects:
            motion = made.motion[i][(frame > o.entry) & (made.shows[i, :, 0] == world_words.IDS[o.kind])]
            assert world_lessons.MOTIONS.index(o.motion) in motion
    assert made.positions[0, :3].tolist() == [0, 1, 2]
    assert made.positions[0, 51] == 51
    assert made.text[0] == 401


def test_batches_made_by_processes_are_the_same_and_come_in_order() -> None:
    import functools

    make = functools.partial(world_batches.pictures, batch=2, seed=0)
    with ahead.Ahead(make, 6, workers=1) as stream:
        for step in (3, 4, 5):
            assert np.array_equal(stream(step).pixels, make(step).pixels)
        with pytest.raises(ValueError, match="step 6 is next, not 2"):
            stream(2)
    with pytest.raises(ValueError, match="workers"):
        ahead.Ahead(make, 6, workers=-1)


# -- training of the language model ------------------------------------------------------------------------------------
def train_llava(folder, vit, stops):
    folder.mkdir()
    for stop in stops:

        def report(row, stop=stop):
            if row["step"] == stop:
                raise KeyboardInterrupt

        try:
            model = world_llava.train(folder, encoder=vit, stages=STAGES, save_every=1, workers=0, report=report)
        except KeyboardInterrupt:
            continue
    return model


@pytest.mark.slow
def test_language_training_killed_within_a_stage_or_between_two_ends_the_same(tmp_path, vit, monkeypatch) -> None:
    monkeypatch.setattr(world_llava, "held_out", lambda *_, **__: {"all": 0.5})
    whole = train_llava(tmp_path / "a", vit, [None])
    parts = train_llava(tmp_path / "b", vit, [2, 3, 5, None])
    assert all(torch.equal(v, parts.state_dict()[k]) for k, v in whole.state_dict().items())
    tower = whole.model.vision_tower.state_dict()
    assert all(torch.equal(v, tower[k]) for k, v in clip_state(vit.state_dict()).items())
    assert training.progress(tmp_path / "b")[0] == 7
    first = world_llava.build().model.language_model.layers[0].mlp.up_proj.weight
    assert not torch.equal(whole.model.language_model.layers[0].mlp.up_proj.weight, first)


def test_held_out_accuracy_counts_by_type(llava) -> None:
    course = replace(TINY, keep=(196,), keep_frame=(49,), renumber=0.0, shift=0.0)
    out = world_llava.held_out(world_llava.Tuning(llava), batches=1, course=course)
    assert set(out) <= {"all", *evaluation.IMAGE_TYPES, *evaluation.TWO_HOP}
    assert 0 <= out["all"] < 0.7  # not trained


# -- evaluation --------------------------------------------------------------------------------------------------------
def test_questions_are_the_same_every_time_and_of_every_type() -> None:
    a, b = evaluation.cases(questions=40), evaluation.cases(questions=40)
    assert [(c.text, c.answer, c.about.seed) for c in a] == [(c.text, c.answer, c.about.seed) for c in b]
    assert {c.type for c in a} == {t for group in evaluation.KINDS_OF_TYPES.values() for t in group}
    assert all(c.about.seed in SPLITS["test"] for c in a)
    assert [c.text for c in a] != [c.text for c in evaluation.cases(questions=40, seed=1)]
    with pytest.raises(ValueError, match="validation"):
        evaluation.cases(split="val")
    with pytest.raises(ValueError, match=r"colour_off.*colour_of"):
        evaluation.cases(types=["colour_off"])
    with pytest.raises(ValueError, match="1 or more"):
        evaluation.cases(questions=0)


def test_evaluate_patches_counts_and_unpatches(llava) -> None:
    before = {k: v.clone() for k, v in llava.state_dict().items()}
    plain = tr.zoo.evaluate(llava, questions=18)
    assert list(plain)[:4] == ["accuracy", "image", "two_hop", "video"]
    types = {t for group in evaluation.KINDS_OF_TYPES.values() for t in group}
    assert set(plain) == {"accuracy", "image", "two_hop", "video", *types}
    for reducers in (["visionzip:keep=64"], ["tome:r=8", "fastv:layer=2,keep=0.5"]):
        assert set(tr.zoo.evaluate(llava, *reducers, questions=18)) == set(plain)
    assert "forward" not in vars(llava.model)
    assert tr.zoo.evaluate(llava, questions=18) == plain
    assert all(torch.equal(v, llava.state_dict()[k]) for k, v in before.items())


def test_evaluate_counts_right_answers(llava, monkeypatch) -> None:
    """A model that says "yes" whatever is asked is right exactly where the answer is yes."""
    asked = evaluation.cases(questions=24, types=["exist", "relation", "appear"])
    yes = world_words.IDS["yes"]

    class Yes(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, **inputs):
            assert inputs["logits_to_keep"] == 1
            one = torch.zeros(len(inputs["input_ids"]), 1, world_words.SIZE)
            one[..., yes] = 1
            return type("Out", (), {"logits": one})()

    monkeypatch.setattr(evaluation, "video_inputs", lambda model, clips, texts, processor: {"input_ids": texts})
    out = evaluation.evaluate(Yes(), questions=24, types=["exist", "relation", "appear"])
    for name in ("exist", "relation", "appear"):
        mine = [c.answer == "yes" for c in asked if c.type == name]
        assert out[name] == sum(mine) / len(mine)
    assert out["accuracy"] == sum(c.answer == "yes" for c in asked) / 24


# -- as weights of the package -----------------------------------------------------------------------------------------
def test_exported_models_come_back_ready(vit, llava, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(world_vit, "facts", lambda model: {"accuracy": 0.25})
    monkeypatch.setattr(world_llava, "facts", lambda model: {"accuracy": 0.5})
    tr.zoo.export(vit, "world-vit", {"steps": 1}, folder=tmp_path)
    tr.zoo.export(llava, "world-llava", {"steps": 2}, folder=tmp_path)
    seer, speaker = (tr.zoo.load(n, folder=tmp_path) for n in ("world-vit", "world-llava"))
    assert seer.labels == KINDS
    assert seer.processor is None
    assert (seer.tokenizer, speaker.tokenizer) == (None, speaker.processor.tokenizer)
    tower = speaker.model.model.vision_tower.state_dict()
    assert all(torch.equal(v, tower[k]) for k, v in clip_state(seer.model.state_dict()).items())
    image = Image.fromarray(scene(1).image)
    inputs = speaker.processor(images=image, text="<image> how many things are there", return_tensors="pt")
    assert speaker.model.generate(**inputs).shape[1] > inputs["input_ids"].shape[1]
    assert speaker.model.lm_head.weight is speaker.model.model.language_model.embed_tokens.weight
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < 12e6
    with pytest.raises(ValueError, match="world-llava, world-llava-2, world-vit"):
        tr.zoo.load("world-lava", folder=tmp_path)
