"""CLIP as a source of text evidence, on a tiny random CLIP whose tokenizer has one token per letter."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionModel

from tokenreduce.adapters.language.projector.clip_text import joint_space, question_texts

LENGTH, WIDTH, JOINT = 12, 20, 6
LETTERS = "abcdefghijklmnopqrstuvwxyz?.,'"


def write_tokenizer(folder):
    vocab = {}
    for token in [*LETTERS, *[f"{c}</w>" for c in LETTERS], "<|startoftext|>", "<|endoftext|>"]:
        vocab[token] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return vocab


def tiny(eos: int, words: int) -> CLIPModel:
    text = dict(
        vocab_size=words, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, eos_token_id=eos, bos_token_id=words - 2, pad_token_id=1,
    )  # fmt: skip
    vision = dict(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=JOINT)).eval()
    with torch.no_grad():  # a fresh norm would hide whether it is applied
        model.vision_model.post_layernorm.weight.normal_()
        model.vision_model.post_layernorm.bias.normal_()
    return model


@pytest.fixture(scope="module", params=["end token", "highest id"])
def clip(request, tmp_path_factory):
    """Both rules by which checkpoints find the end of a text: their end token, or (configs with 2) the highest id."""
    folder = tmp_path_factory.mktemp("clip")
    vocab = write_tokenizer(folder)
    model = tiny(len(vocab) - 1 if request.param == "end token" else 2, len(vocab))
    model.save_pretrained(folder)
    return str(folder), model, CLIPTokenizer.from_pretrained(folder)


def features(model, tokenizer, text):
    with torch.no_grad():
        return model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output[0]


def pooled(model, ids):
    """The text features of one row of ids, by the model itself."""
    with torch.no_grad():
        return model.get_text_features(input_ids=torch.tensor([ids])).pooler_output[0]


def test_patches_are_those_of_the_model(clip):
    """The class token of the last block, led through the same two layers, is CLIP's own image embedding."""
    name, model, _ = clip
    space = joint_space(name)
    with torch.no_grad():
        states = model.vision_model(torch.randn(2, 3, 16, 16), output_hidden_states=True)
        own = model.visual_projection(states.pooler_output)
    torch.testing.assert_close(space.patches(states.last_hidden_state[:, :1])[:, 0], own)
    before = states.hidden_states[-2][:, 1:]
    with torch.no_grad():
        want = model.visual_projection(model.vision_model.post_layernorm(before))
    got = space.patches(before)
    assert got.shape == (2, 16, JOINT)
    assert torch.equal(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = space.patches(before.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, space.patches(before.bfloat16().float()))


def test_another_tower_is_an_error_that_names_the_fix(clip):
    space = joint_space(clip[0])
    with pytest.raises(ValueError, match=r"tower of width 20, .* have 24: name the CLIP model .* or set clip=None"):
        space.patches(torch.randn(1, 4, 24))


@pytest.mark.parametrize("long", ["wrap", "cut", "truncate"])
def test_short_questions_are_the_models_own_text_features(clip, long):
    name, model, tokenizer = clip
    questions = ["a cat?", "what is it", "aaaaaaaaaa"]  # the last one is as long as the tower takes
    out, valid = joint_space(name).texts(questions, long)
    assert out.shape == (3, 1, JOINT)
    assert valid.tolist() == [[True]] * 3
    for b, q in enumerate(questions):
        torch.testing.assert_close(out[b, 0], features(model, tokenizer, q))


def test_long_questions(clip):
    name, model, tokenizer = clip
    space, question = joint_space(name), "where is the red dog, on a mat?"
    ids = tokenizer(question, add_special_tokens=False)["input_ids"]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert len(ids) == 24
    wrapped, valid = space.texts(["a cat", question, ""], "wrap")
    assert valid.tolist() == [[True, False, False], [True] * 3, [False] * 3]
    assert (wrapped[~valid] == 0).all()
    for m in range(3):
        piece = [start, *ids[10 * m : 10 * m + 10], end]
        torch.testing.assert_close(wrapped[1, m], pooled(model, piece))
    truncated, _ = space.texts([question, "a cat"], "truncate")
    torch.testing.assert_close(truncated[:, 0], torch.stack([wrapped[1, 0], wrapped[0, 0]]))
    own = tokenizer(question, truncation=True, max_length=LENGTH)["input_ids"]
    torch.testing.assert_close(truncated[0, 0], pooled(model, own))
    # CDPruner's steps: all ids, zeros up to a multiple of the length, segments.
    padded = [start, *ids, end]
    padded += [0] * (-len(padded) % LENGTH)
    cut, valid = space.texts([question, "a cat"], "cut")
    assert valid.tolist() == [[True, True, True], [True, False, False]]
    for m in range(3):
        torch.testing.assert_close(cut[0, m], pooled(model, padded[LENGTH * m : LENGTH * (m + 1)]))
    assert not torch.allclose(cut[0], wrapped[1])


def test_a_question_is_the_same_alone_and_in_a_batch(clip):
    space = joint_space(clip[0])
    together, _ = space.texts(["a cat", "where is the red dog, on a mat?"])
    torch.testing.assert_close(space.texts(["a cat"])[0][0, 0], together[0, 0])


def test_nothing_asked(clip):
    space = joint_space(clip[0])
    for questions in (["", "  "], []):
        out, valid = space.texts(questions)
        assert out.shape == (len(questions), 1, JOINT)
        assert not valid.any()
        assert not out.any()
    with pytest.raises(ValueError, match="long is one of"):
        space.texts(["a"], "drop")


def test_loaded_once_and_without_the_vision_tower(clip):
    space = joint_space(clip[0])
    assert joint_space(clip[0], torch.device("cpu")) is space
    assert not any(p.requires_grad for part in (space.text, space.visual, space.norm) for p in part.parameters())
    assert not space.text.training
    assert space.length == LENGTH
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        space.texts(["long " * 30])


def test_what_is_no_clip_model_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path), str(tmp_path / "absent"), "no-one/has-this"):
        with pytest.raises(ValueError, match=r"cannot be loaded .* give the Hub id or the folder"):
            joint_space(name)
    words = len(write_tokenizer(tmp_path))
    model = tiny(words - 1, words)
    vision = tmp_path / "vision"
    CLIPVisionModel(model.config.vision_config).save_pretrained(vision)
    with pytest.raises(ValueError, match="is a model of type 'clip_vision_model', not 'clip'"):
        joint_space(str(vision))
    bare = tmp_path / "bare"
    model.save_pretrained(bare)
    with pytest.raises(ValueError, match="has no tokenizer"):
        joint_space(str(bare))
    partial = tmp_path / "partial"
    partial.mkdir()
    write_tokenizer(partial)
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("text_projection")}
    model.save_pretrained(partial, state_dict=kept)
    with pytest.raises(ValueError, match=r"lacks weights: text_projection\.weight"):
        joint_space(str(partial))


class Letters:
    """A language model's tokenizer: ids are code points, 0 to 9 are special."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i) for i in ids if not (skip_special_tokens and i < 10))


def prompt(*texts):
    rows = [[ord(c) for c in t] for t in texts]
    longest = max(map(len, rows))
    return torch.tensor([[0] * (longest - len(r)) + r for r in rows])


def test_questions_of_a_batch_of_prompts():
    ids = prompt("USER: \x05\x05what?\x02 ASSISTANT:", "USER: left \x05\x05 right? ASSISTANT:", "USER: \x05")
    columns = torch.zeros_like(ids, dtype=torch.bool)
    for row, pieces in enumerate((["what?\x02"], ["left ", " right?"], [])):
        text = "".join(map(chr, ids[row].tolist()))
        for piece in pieces:
            start = text.index(piece)
            columns[row, start : start + len(piece)] = True
    assert question_texts(ids, columns, Letters()) == ["what?", "left right?", ""]


def test_answer_formats_are_cut_off():
    texts = (
        "Is it red?\nAnswer the question using a single word or phrase.",
        "Which?\nA. one\nB. two\nAnswer with the option's letter from the given choices directly.\n",
        "Answer the question using a single word or phrase. Why?",
    )
    ids = prompt(*texts)
    columns = ids > 0
    want = ["Is it red?", "Which?\nA. one\nB. two", texts[2]]
    assert question_texts(ids, columns, Letters()) == want
    assert question_texts(ids, columns, Letters(), drop=())[0] == texts[0]
    with pytest.raises(ValueError, match=r"both \(batch, length\), not \(3, "):
        question_texts(ids, columns[:, 1:], Letters())


def test_methods_read_it(clip):
    """Patches and texts are what CDPruner and TRIM ask for; a sample without a question is one without text there."""
    from visual import ORIGINS, noise

    from tokenreduce.core.evidence import ImageEvidence
    from tokenreduce.core.registry import get_method

    space, tower = joint_space(clip[0]), noise(2, 16, WIDTH, seed=1)
    text, _ = space.texts(["a cat", ""])
    for name in ("cdpruner", "trim"):
        method = get_method(f"{name}:keep=5,clip=some/clip")
        e = ImageEvidence(noise(2, 16, 8), ORIGINS["square"], features=tower, clip=(space.patches(tower), text))
        e = e.in_vision(False) if method.space == "vision" else e
        plain = get_method(f"{name}:keep=5")
        plan = method.plan(e)
        assert torch.equal(plan.representatives()[1], plain.plan(e).representatives()[1])
        assert not torch.equal(plan.representatives()[0], plain.plan(e).representatives()[0])
