"""The models of the second world: one encoder with three faces, lessons, packed questions and their scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import tokenreduce as tr

pytest.importorskip("timm")
pytest.importorskip("transformers")

from tokenreduce.zoo import (
    evaluation2,
    world2_batches,
    world2_films,
    world2_lessons,
    world2_words,
    world_llava2,
    world_vit,
    world_vit2,
)
from tokenreduce.zoo.clip_twin import clip_state, timm_state
from tokenreduce.zoo.training import Schedule
from tokenreduce.zoo.video_inputs import video_inputs
from tokenreduce.zoo.world2 import IMAGE_TYPES, VIDEO_TYPES, clip, scene
from tokenreduce.zoo.world2.questions import beside
from tokenreduce.zoo.world2.scenes import CELL_OF, CHARACTER_OF, PLATE_OF
from tokenreduce.zoo.world2.vocabulary import CHARACTERS
from tokenreduce.zoo.world_words import EOS, IMAGE

TINY = world2_lessons.Course(seen=40, keep=(24,), renumber=0.3, shift=0.3, long=0.5, scenes=2, questions=3)
WHOLE = replace(TINY, seen=784, keep=(784,), renumber=0.0, shift=0.0)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return world_vit2.grown(world_vit.build()).eval()


@pytest.fixture(scope="module")
def llava(vit):
    torch.manual_seed(1)
    model = world_llava2.build()
    model.model.vision_tower.load_state_dict(clip_state(vit.state_dict()))
    return model.eval()


# -- encoder -----------------------------------------------------------------------------------------------------------
def test_one_encoder_is_timm_clip_and_tower_bit_for_bit(vit, llava) -> None:
    x = world_vit.pixels(world2_batches.sights(1, batch=2, seed=0).pixels)
    clip_model = world_vit2.as_clip(vit)
    with torch.no_grad():
        pooled = vit.forward_head(vit.forward_features(x), pre_logits=True)
        assert torch.equal(clip_model(x).pooler_output, pooled)
        layer = clip_model(x, output_hidden_states=True).hidden_states[-2][:, 1:]
        tower = llava.model.vision_tower(x, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert torch.equal(layer, tower)
        trained, whole, _ = world_vit2.look(vit, x)
    torch.testing.assert_close(layer, trained[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole, pooled, atol=1e-5, rtol=1e-5)
    back = timm_state(clip_state(vit.state_dict()))
    assert all(torch.equal(v, back[k]) for k, v in vit.state_dict().items() if not k.startswith("head."))


def test_it_starts_as_the_first_encoder_with_positions_between_its_own() -> None:
    torch.manual_seed(3)
    old = world_vit.build()
    new = world_vit2.grown(old)
    assert torch.equal(new.blocks[2].attn.qkv.weight, old.blocks[2].attn.qkv.weight)
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0])
    with torch.no_grad():  # a table that rises from left to right still does, and half as steeply
        ramp = torch.arange(14.0).expand(14, 14).reshape(1, 196, 1).expand(-1, -1, 96)
        old.pos_embed[:, 1:] = ramp
    row = world_vit2.grown(old).pos_embed[0, 1:, 0].view(28, 28)[13]
    steps = row.diff()[4:-4]
    torch.testing.assert_close(steps, torch.full_like(steps, 0.5), atol=0.05, rtol=0)


def test_some_patches_are_seen_as_they_would_be_alone(vit) -> None:
    x = world_vit.pixels(world2_batches.sights(2, batch=2, seed=0).pixels)
    keep = torch.tensor([[3, 200, 783], [0, 5, 6]])
    with torch.no_grad():
        some, every = world_vit2.embed(vit, x, keep), world_vit2.embed(vit, x)
    assert torch.equal(some[:, 0], every[:, 0])
    assert torch.equal(some[:, 1:], every[:, 1:].gather(1, keep[..., None].expand(-1, -1, 96)))


def test_targets_say_what_is_in_the_picture() -> None:
    made = world2_batches.sights(0, batch=4, seed=5)
    keep = np.broadcast_to(np.arange(784), (4, 784)).copy()
    want = world_vit2.targets(made, keep, "cpu")
    rng = np.random.default_rng((22, 5, 0))
    for i, seed in enumerate(world2_batches.seeds("train", 4, rng)):
        s = scene(seed, **(world2_batches.SPARSE if i % 4 == 0 else world2_batches.FULL))
        assert np.array_equal(s.image, made.pixels[i])
        there = {world_vit2.LABELS[j] for j in want["labels"][i].nonzero().flatten().tolist()}
        digits = set("".join(s.document.rows)) if s.document else set()
        assert there == {t.kind for t in s.objects} | {c for sign in s.signs for c in sign.text} | digits
        ranks = want["rank"][i]
        assert ranks.max() == len(s.objects) - 1
        assert int(want["count"][i]) == len(s.objects)
        assert torch.equal(want["owned"][i], torch.from_numpy(s.labels.owners.ravel() >= 0))
    model, x = world_vit2.Pretraining(world_vit2.build()), world_vit.pixels(made.pixels)
    plain, looks = world_vit2.losses(model(x), want), world_vit2.losses(model(x, looks=True), want, looks=1.0)
    assert plain.isfinite()
    assert looks > plain


def test_where_the_class_token_should_look() -> None:
    """At places in the first layers; in the last ones at every thing and character as much, whatever its size."""
    grid = torch.arange(784)[None]
    owner = torch.full((1, 784), -1)
    owner[0, :30], owner[0, 100:102], owner[0, 200:260] = 0, CHARACTER_OF, CHARACTER_OF + PLATE_OF
    apart = -((grid // 28 - 13.5) ** 2 + (grid % 28 - 13.5) ** 2) / (2 * world_vit2.SPREAD**2)
    early = apart.log_softmax(-1)[None, :, None].expand(world_vit2.EARLY, 1, 3, -1)
    fair = torch.zeros(1, 784)
    fair[0, :30], fair[0, 100:102] = 0.5 / 30, 0.5 / 2
    alike = torch.zeros(1, 784)
    alike[owner >= 0] = 1 / int((owner >= 0).sum())

    def lost(late: torch.Tensor) -> float:
        rows = late.clamp(min=1e-9).log()[None, :, None].expand(world_vit2.LATE, 1, 3, -1)
        return float(world_vit2.looking(torch.cat([early, rows]), owner, grid))

    assert lost(fair) == pytest.approx(0, abs=1e-4)
    # A share by patches: 30 / 92 and 2 / 92 instead of a half each.
    assert lost(alike) == pytest.approx(-(np.log(30 / 92) + np.log(2 / 92)) / 2 - np.log(2), rel=1e-3)
    heads = torch.zeros(3, 784)
    heads[0, :30], heads[1, 100:102], heads[2, 300] = 1 / 30, 0.5, 1.0  # heads may share the work
    rows = heads.clamp(min=1e-9).log()[None, None].expand(world_vit2.LATE, 1, 3, -1)
    assert float(world_vit2.looking(torch.cat([early, rows]), owner, grid)) == pytest.approx(np.log(1.5), rel=1e-3)
    assert lost(fair) < float(world_vit2.looking(torch.cat([0 * early - np.log(784), rows]), owner, grid))


# -- lessons -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("long", [0.0, 1.0])
def test_lessons_show_everything_and_point_at_what_is_said(long: float) -> None:
    made = world2_lessons.lesson(3, course=replace(TINY, seen=160, keep=(96,), long=long, renumber=0, shift=0), seed=4)
    words = {i: w for w, i in world2_words.IDS.items()}
    rng = np.random.default_rng((24, 4, 3))
    rng.random()
    for i, seed in enumerate(world2_batches.seeds("train", 2, rng)):
        s = scene(seed)
        assert np.array_equal(made.pixels[i, 0], s.image)
        flat = made.seen[i][made.keep[i]]
        assert np.array_equal(made.positions[i], [0, *(1 + flat)])
        assert set(range(len(s.objects))) <= set(made.owners[i].tolist())
        for owner, shows, tells in zip(made.owners[i], made.shows[i], made.tells[i], strict=True):
            shown = [words[w] for w in shows if w >= 0]
            if 0 <= owner < CHARACTER_OF:
                assert shown[:2] == [s.objects[owner].kind, s.objects[owner].colour]
                told = dict(zip(world2_lessons.TELLS, tells, strict=True))
                assert (told["across"], told["down"]) == (s.objects[owner].x // 8, s.objects[owner].y // 8)
                sign = beside(s, s.objects[owner])
                if told["sign"] >= 0:
                    assert CHARACTERS[told["sign"]] == sign.text[0]
            elif owner >= CELL_OF:
                assert len(shown) == 3
        for asked, after, points in zip(made.words[i], made.next[i], made.points[i], strict=True):
            said = np.flatnonzero(after >= 0)
            assert after[said[-1]] == EOS
            assert np.array_equal(asked[said[1:]], after[said[:-1]])
            read = points[:, 1, 0]  # where the word itself is
            for place in np.flatnonzero((read >= 0) & (read < CHARACTER_OF)):
                thing = s.objects[read[place]]
                said = (thing.kind, thing.colour, "left", "right", "top", "bottom", "yes", "no")
                assert words[after[place]] in said
            for place in np.flatnonzero((read >= CHARACTER_OF) & (read < CELL_OF)):
                sign, letter = divmod(int(read[place]) - CHARACTER_OF, 10)
                assert words[after[place]] in (s.signs[sign].text[letter], s.signs[sign].colour)
            # Nothing is looked at first that is not there.
            assert set(points[:, 0, 0].tolist()) <= {-1, *np.unique(s.labels.owners).tolist()}


def test_lessons_of_clips_say_what_happens_to_every_token() -> None:
    course = replace(TINY, video=1.0, clips=3, keep_frame=(12,), renumber=0, shift=0, video_questions=8)
    made = world2_films.any_lesson(3, course=course, seed=4)
    words = {i: w for w, i in world2_words.IDS.items()}
    assert made.pixels.shape == (3, 16, 224, 224, 3)
    assert made.seen.shape == (48, 4 * 24)
    assert made.tells.shape == (3, 16 * 12, len(world2_lessons.TELLS))
    assert (made.prefix == IMAGE).sum() == 16 * 12
    rng = np.random.default_rng((26, 4, 3))
    for i, seed in enumerate(world2_batches.seeds("train", 3, rng)):
        c = clip(seed, frames=16)
        assert np.array_equal(made.pixels[i], c.frames)
        said = ""  # by the sign, as far as tokens have seen it
        for k, (owner, frame) in enumerate(zip(made.owners[i], made.frame[i], strict=True)):
            shown = [words[w] for w in made.shows[i, k] if w >= 0]
            if not 0 <= owner < CHARACTER_OF:
                said = c.sign_at(frame).text if CHARACTER_OF <= owner < CHARACTER_OF + PLATE_OF else said
                assert (made.tells[i, k] == -1).all()
                continue
            actor = c.objects[owner]
            assert shown[:2] == [actor.kind, actor.at(frame).colour]
            motion, event, rank, times, first, second, *still = made.tells[i, k]
            assert rank == owner
            assert times == sum(f <= frame for f, _ in actor.changes) - 1
            assert [*(CHARACTERS[n] if n < len(CHARACTERS) else "" for n in (first, second) if n >= 0)] == (
                [said[0], said[1:]] if said else []
            )
            assert still == [-1, -1, -1]
            before = actor.at(frame - 1)
            assert event == (1 if before is None else 2 if before.colour != shown[1] else 0)
            assert motion == (-1 if before is None else ("left", "right", "still").index(actor.motion))
        # A token of the last frame stands behind the words "frame" and the tokens of the frames before.
        last = made.positions[i][-12:] - (1 + 197 * 15) - 1
        assert np.array_equal(made.seen[16 * i + 15].reshape(-1, 4)[made.keep[16 * i + 15], 0],
                              last // 14 * 56 + last % 14 * 2)  # fmt: skip


def test_a_lesson_is_a_function_of_its_step() -> None:
    a, b, c = (world2_films.any_lesson(n, course=replace(TINY, video=0.5), seed=0) for n in (7, 7, 8))
    assert np.array_equal(a.words, b.words)
    assert np.array_equal(a.keep, b.keep)
    assert not np.array_equal(a.pixels, c.pixels)
    kinds = [world2_films.any_lesson(n, course=replace(TINY, video=0.5, clips=1), seed=0) for n in range(6)]
    assert {made.pixels.shape[1] for made in kinds} == {1, 16}


# -- packed questions --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("long", [0.0, 1.0])
def test_packed_questions_equal_single_ones_with_fewer_key_heads(vit, llava, long: float) -> None:
    """With all tokens at their own places a lesson is what a user's prompts are, one by one."""
    made = world2_lessons.lesson(0, course=replace(WHOLE, long=long, scenes=1, questions=2), seed=0)
    tuning = world_llava2.Tuning(llava, vit).eval()
    tensors = world_llava2._tensors(made, "cpu")
    with torch.no_grad():
        features = tuning.see(world_vit.pixels(made.pixels[:, 0]), tensors["seen"])
        hidden, _, attended, _ = tuning.read(features, tensors)
        logits = torch.nn.functional.linear(hidden, llava.lm_head.weight)
    processor = world2_words.processor()
    words = {i: w for w, i in world2_words.IDS.items()}
    llava.set_attn_implementation({"text_config": "eager"})
    for j in range(made.words.shape[1]):
        ids = made.words[0, j][made.words[0, j] > 0]
        text = " ".join(words[int(t)] for t in ids)
        inputs = processor(images=Image.fromarray(made.pixels[0, 0]), text=f"<image> {text}", return_tensors="pt")
        with torch.no_grad():
            out = llava(**inputs, output_attentions=True)
        torch.testing.assert_close(logits[0, j, : len(ids)], out.logits[0, -len(ids) :], atol=5e-3, rtol=1e-3)
        for k, layer in enumerate(world_llava2.POINT):
            own = out.attentions[layer][0, : world_llava2.POINTERS, -len(ids) :, 1:785].mean(0)
            torch.testing.assert_close(attended[0, j, : len(ids), :, k], own, atol=1e-4, rtol=1e-2)
    llava.set_attn_implementation({"text_config": "sdpa"})


def test_packed_questions_about_a_clip_equal_single_ones(vit, llava) -> None:
    """With all tokens a lesson is what :func:`video_inputs` makes of the clip."""
    course = replace(
        TINY, video=1.0, clips=1, seen_frame=196, keep_frame=(196,), renumber=0, shift=0, video_questions=1
    )
    made = world2_films.any_lesson(0, course=course, seed=0)
    tuning = world_llava2.Tuning(llava, vit).eval()
    tensors = world_llava2._tensors(made, "cpu")
    with torch.no_grad():
        out = tuning.read(tuning.see(world_vit.pixels(made.pixels[0]), tensors["seen"]), tensors)
        logits = torch.nn.functional.linear(out.hidden, llava.lm_head.weight)
    assert [tuple(told.shape) for told in out.told] == [(1, 16 * 196, n) for n in world2_lessons.TELLS.values()]
    words = {i: w for w, i in world2_words.IDS.items()}
    ids = made.words[0, 0][made.words[0, 0] > 0]
    inputs = video_inputs(llava, [made.pixels[0]], [" ".join(words[int(t)] for t in ids)])
    with torch.no_grad():
        single = llava(**inputs).logits[0, -len(ids) :]
    torch.testing.assert_close(logits[0, 0, : len(ids)], single, atol=5e-3, rtol=1e-3)


@pytest.mark.slow
def test_what_is_held_out_has_every_type_of_pictures_and_clips(vit, llava) -> None:
    done: list[tuple[int, int]] = []
    found = world_llava2.held_out(
        world_llava2.Tuning(llava, vit), batches=2, long=1, films=2, per_frame=12, progress=lambda *d: done.append(d)
    )
    assert done == [(i, 5) for i in range(1, 6)]
    assert set(found) >= {"all", "(pointing)", "(motion)", "(event)", "(rank)", "read", "list", "list_words", "order"}
    assert all(0 <= value <= 1 for value in found.values())


def test_pointing_is_the_share_of_attention_at_the_right_tokens() -> None:
    owners = torch.tensor([[[0, 1, -1, 9]]])
    points = torch.stack([owners, torch.full_like(owners, -1)], -1)  # (1,1,4,2)
    points = torch.stack([points, torch.zeros_like(points), torch.ones_like(points)], -1)
    made = {"owners": torch.tensor([[0, 0, 1, -1]]), "points": points, "frame": torch.zeros(1, 4, dtype=torch.long)}
    attended = torch.tensor([[[0.25, 0.25, 0.3, 0.2], [0.0, 0.0, 0.5, 0.0], [1, 0, 0, 0], [1, 0, 0, 0]]])[:, None]
    attended = attended[..., None].repeat(1, 1, 1, 1, 2)
    assert float(world_llava2.pointing(attended, made)) == pytest.approx(-np.log(0.5 + 1e-4), rel=1e-3)
    # The second look counts as much, and has words of its own.
    made["points"][0, 0, 2, 1, 0] = 0
    attended[0, 0, 2, :, 1] = torch.tensor([0.1, 0.1, 0.8, 0.0])
    want = -(2 * np.log(0.5 + 1e-4) + np.log(0.2 + 1e-4)) / 3
    assert float(world_llava2.pointing(attended, made)) == pytest.approx(want, rel=1e-3)
    none = {**made, "points": torch.full((1, 1, 4, 2, 3), -1)}
    assert float(world_llava2.pointing(attended, none)) == 0


def test_the_language_model_has_groups_of_query_heads(llava) -> None:
    text = llava.config.text_config
    assert (text.num_attention_heads, text.num_key_value_heads) == (6, 2)
    assert llava.lm_head.weight is llava.model.language_model.embed_tokens.weight
    assert max(world_llava2.POINT) < text.num_hidden_layers
    assert text.num_attention_heads // text.num_key_value_heads > world_llava2.POINTERS


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint_and_from_weights(tmp_path, vit, llava, monkeypatch) -> None:
    monkeypatch.setattr(world_llava2, "held_out", lambda *_, **__: {"all": 0.5})
    course = replace(TINY, long=0.5, video=0.5, clips=1, keep_frame=(8,), video_questions=2)
    stages = [world_llava2.Stage("a", Schedule(4, batch=2, lr=1e-3), course)]
    rows = []
    train = dict(encoder=vit, workers=0, stages=stages, save_every=2, report=rows.append)
    world_llava2.train(tmp_path / "one", **train, stop_after=0.0)
    one = world_llava2.train(tmp_path / "one", **train)
    two = world_llava2.train(tmp_path / "two", **train)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert rows[-1]["step"] == 4
    further = world_llava2.train(tmp_path / "three", **{**train, "start": one})
    assert not torch.equal(further.lm_head.weight, two.lm_head.weight)


# -- questions and their scores ----------------------------------------------------------------------------------------
def test_cases_are_the_same_every_time_and_of_every_type() -> None:
    a, b = (evaluation2.cases("test", 3, 36) for _ in range(2))
    assert [(c.text, c.answer) for c in a] == [(c.text, c.answer) for c in b]
    assert [c.type for c in a] == [*IMAGE_TYPES, *VIDEO_TYPES, *IMAGE_TYPES][:36]
    assert {evaluation2.size_of(c) for c in a if c.type == "read"} <= {6, 8, 10, 12, 16}
    for bad in (dict(split="tset"), dict(types=["oder"]), dict(questions=0), dict(types=[])):
        with pytest.raises(ValueError, match=r"unknown|questions is"):
            evaluation2.cases(**bad)


def test_evaluate_scores_words_and_elements_and_unpatches(llava, monkeypatch) -> None:
    """A model that always says the right thing but for the last word."""
    right = {c.text: c.answer for c in evaluation2.cases("test", 0, 36)}

    def answers(model, reading, some, tokens):
        return [" ".join(right[c.text].split()[:-1]) if c.type == "list" else c.answer for c in some]

    monkeypatch.setattr(evaluation2, "_answers", answers)
    out = tr.zoo.evaluate(llava, "divprune:keep=16", questions=36)
    assert out["accuracy"] == pytest.approx(35 / 36)
    assert out["image"] == pytest.approx(27 / 28)
    assert out["video"] == 1
    assert out["list"] == 0
    assert 0.3 < out["list_elements"] < out["list_words"] < 1
    assert out["read"] == out["read_elements"] == 1


def test_answers_come_from_generate(llava) -> None:
    for name in ("read", "read_at"):
        case = evaluation2.cases("test", 0, 1, [name])
        said = evaluation2._answers(llava, world2_words.processor(), case, 3)
        assert len(said) == 1
        assert set(said[0].split()) <= set(world2_words.IDS)
