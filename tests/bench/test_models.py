from __future__ import annotations

import builtins
import json

import pytest
import torch
from pictures import PHOTOS, TIMM, hf_backbone, hf_classifier, hf_clip, photo, tiny_clip
from PIL import Image

import tokenreduce as tr
from tokenreduce.bench import zeroshot
from tokenreduce.bench.models import load_model


@pytest.fixture
def offline(monkeypatch):
    """Downloads fail at once instead of after retries."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def without(monkeypatch):
    """``without("timm")`` makes an import of it fail."""

    def hide(*names):
        real = builtins.__import__

        def fake(name, *args, **kwargs):
            if name.split(".")[0] in names:
                raise ImportError(f"No module named {name!r}", name=name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fake)
        import importlib

        module = importlib.import_module
        monkeypatch.setattr(
            importlib, "import_module", lambda name, *a: fake(name) if name.split(".")[0] in names else module(name, *a)
        )

    return hide


# -- names -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["", "resnet50", "tim:vit", "timm:", "hf:", "open_clip:"])
def test_unknown_names_list_the_valid_prefixes(name):
    named = r"digits-vit, world-vit, world-vit-2, world-clip-2, timm:NAME.*open_clip:NAME/TAG, hf:ID_OR_FOLDER"
    with pytest.raises(ValueError, match=named):
        load_model(name)


def test_near_misses_get_a_hint(tmp_path):
    with pytest.raises(ValueError, match=r"did you mean digits-vit"):
        load_model("digit-vit")
    with pytest.raises(ValueError, match=f"hf:{tmp_path}"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [("timm:vit", "timm", "timm"), ("open_clip:a/b", "open_clip", "open_clip"), ("hf:a", "transformers", "hf")],
)
def test_a_missing_library_names_its_extra(without, name, library, extra):
    without(library)
    with pytest.raises(ImportError, match=rf"{library} is not installed: pip install 'tokenreduce\[{extra}\]'"):
        load_model(name)


# -- timm --------------------------------------------------------------------------------------------------------------
def test_timm_random_weights_are_the_same_every_time_and_leave_random_numbers_alone():
    torch.manual_seed(1)
    want = torch.rand(1)
    torch.manual_seed(1)
    a, b, c = load_model(TIMM), load_model(TIMM), load_model(TIMM + "&seed=1")
    assert torch.equal(torch.rand(1), want)
    states = [m.model.state_dict()["head.weight"] for m in (a, b, c)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert a.notes == ("random weights (seed 0)",)


def test_timm_transform_has_the_size_that_the_model_was_built_with():
    m = load_model(TIMM)
    assert (m.kind, m.num_classes, m.input_size) == ("classifier", 1000, (3, 32, 32))
    assert m.wnids[0] == "n01440764"
    assert "tench" in m.labels[0]
    x = m.transform(photo("camera"))  # a grey photograph
    assert x.shape == (3, 32, 32)
    assert m.predict(x[None]).shape == (1, 1000)
    grey = load_model(TIMM + "&in_chans=1&num_classes=4")
    assert grey.transform(photo("coffee")).shape == (1, 32, 32)
    assert grey.wnids is None


def test_timm_without_a_head_gives_features():
    m = load_model(TIMM + "&num_classes=0")
    assert (m.kind, m.num_classes) == ("features", 0)
    assert m.predict(torch.randn(2, 3, 32, 32)).shape == (2, 48)


def test_timm_checkpoints_from_a_file_and_a_folder(tmp_path):
    import timm
    from safetensors.torch import save_file

    shape = dict(img_size=32, patch_size=8, depth=2, embed_dim=48, num_classes=5)
    model = timm.create_model("vit_tiny_patch16_224", **shape)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    options = "&".join(f"{k}={v}" for k, v in shape.items())
    x = torch.randn(1, 3, 32, 32)
    want = model.eval()(x)
    got = load_model(f"timm:vit_tiny_patch16_224@{tmp_path}/model.safetensors?{options}")
    assert torch.equal(got.predict(x), want)
    assert got.notes == ()
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "pretrained_cfg": {"label_names": list("abcde"), "num_classes": 5, "input_size": [3, 32, 32]},
        "model_args": {k: v for k, v in shape.items() if k != "num_classes"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = load_model(f"timm:vit_tiny_patch16_224@{tmp_path}")
    assert torch.equal(folder.predict(x), want)
    assert folder.labels == tuple("abcde")
    with pytest.raises(ValueError, match=f"holds vit_tiny_patch16_224; write timm:vit_tiny_patch16_224@{tmp_path}"):
        load_model(f"timm:vit_base_patch16_224@{tmp_path}")
    with pytest.raises(OSError, match=r"size mismatch.*\?num_classes=N"):
        load_model(f"timm:vit_tiny_patch16_224@{tmp_path}/model.safetensors?{options.replace('=5', '=6')}")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"cannot load the weights"):
        load_model(f"timm:vit_tiny_patch16_224@{tmp_path}/broken.safetensors?{options}")
    with pytest.raises(OSError, match=r"there is no checkpoint"):
        load_model(f"timm:vit_tiny_patch16_224@{tmp_path}/lost.safetensors")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("timm:vit_tiny_patch16_244", "did you mean vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224.foo", "Names with weights: .*augreg_in21k"),
        ("timm:vit_tiny_patch16_224?pretrained=false&colour=3", r"does not take these options \(colour\)"),
        ("timm:vit_tiny_patch16_224?img_size", r"\?option=value"),
    ],
)
def test_bad_timm_names_say_what_is_valid(name, word):
    with pytest.raises(ValueError, match=word):
        load_model(name)


def test_weights_that_cannot_be_had_are_an_error_with_the_ways_out(offline):
    with pytest.raises(OSError, match=r"cannot load the weights.*network.*@FILE.*pretrained=false"):
        load_model("timm:vit_tiny_patch16_224")
    with pytest.raises(OSError, match=r"cannot load the configuration.*save_pretrained"):
        load_model("hf:nobody/nothing")
    with pytest.raises(OSError, match=r"cannot load the weights.*open_clip:ViT-B-32@FILE"):
        load_model("open_clip:ViT-B-32/openai")


# -- zero-shot ---------------------------------------------------------------------------------------------------------
def test_open_clip_classifies_by_the_prompts_of_its_authors(tmp_path):
    import open_clip

    name = tiny_clip(tmp_path)
    m = load_model(f"open_clip:{name}/", classes=["cat", "space_rocket"])
    assert (m.kind, m.input_size, m.num_classes, m.labels) == ("zero-shot", (3, 32, 32), 2, ("cat", "space_rocket"))
    want = open_clip.build_zero_shot_classifier(
        m.model, open_clip.get_tokenizer(name), ["cat", "space rocket"], open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    assert torch.allclose(m.classifier, want, atol=1e-5)
    x = m.transform(photo("chelsea"))[None]
    with torch.no_grad():
        expected = 100 * m.model.encode_image(x, normalize=True) @ want
        assert torch.allclose(m.predict(x), expected, atol=1e-3)
    other = load_model(f"open_clip:{name}/?templates=one", classes=["cat", "space_rocket"])
    assert not torch.allclose(other.classifier, m.classifier, atol=1e-3)


def test_open_clip_weights_from_a_file(tmp_path):
    name = tiny_clip(tmp_path)
    m = load_model(f"open_clip:{name}/none")
    torch.save(m.model.state_dict(), tmp_path / "w.pt")
    x = torch.randn(1, 3, 32, 32)
    for text in (f"open_clip:{name}@{tmp_path}/w.pt?seed=7", f"open_clip:{name}/{tmp_path}/w.pt?seed=7"):
        again = load_model(text)
        assert torch.equal(again.forward(again.model, x), m.forward(m.model, x))
        assert again.notes == ()


def test_bad_open_clip_names_say_what_is_valid(tmp_path):
    name = tiny_clip(tmp_path)
    with pytest.raises(ValueError, match=r"did you mean .*ViT-B-32"):
        load_model("open_clip:ViT-B32/openai")
    with pytest.raises(ValueError, match=r"neither a file nor a tag of ViT-B-32; its tags: .*laion2b"):
        load_model("open_clip:ViT-B-32/opneai")
    with pytest.raises(ValueError, match=r"unknown templates 'two'; choose from openai, simple, one"):
        load_model(f"open_clip:{name}/?templates=two")
    with pytest.raises(ValueError, match=r"unknown option 'size'; valid options: image_size"):
        load_model(f"open_clip:{name}/?size=3")


def test_a_zero_shot_model_without_classes_says_so(tmp_path):
    m = load_model(f"open_clip:{tiny_clip(tmp_path)}/")
    with pytest.raises(ValueError, match=r"has no classes yet"):
        m.predict(torch.randn(1, 3, 32, 32))


def test_hf_clip_scores_as_the_model_itself_does(tmp_path):
    from transformers import CLIPTokenizer

    m = load_model(f"hf:{hf_clip(tmp_path)}?templates=one", classes=["cat", "cup"])
    x = torch.stack([m.transform(photo(n)) for n in PHOTOS])
    tokens = CLIPTokenizer.from_pretrained(tmp_path)(
        ["a photo of a cat.", "a photo of a cup."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        want = m.model(pixel_values=x, **tokens).logits_per_image / m.model.logit_scale.exp()
        assert torch.allclose(m.predict(x) / 100, want, atol=1e-5)
    with tr.patched(m.model, "tome:r=2"), torch.no_grad(), tr.record(m.model) as trace:
        m.predict(x)
    assert trace.tokens == [15, 13]


def test_hf_classifiers_and_backbones(tmp_path):
    m = load_model(f"hf:{hf_classifier(tmp_path / 'c')}")
    assert (m.kind, m.num_classes, m.labels, m.input_size) == ("classifier", 4, PHOTOS, (3, 32, 32))
    assert m.predict(m.transform(photo("camera"))[None]).shape == (1, 4)
    b = load_model(f"hf:{hf_backbone(tmp_path / 'b')}")
    x = torch.randn(2, 3, 32, 32)
    assert b.kind == "features"
    assert torch.equal(b.predict(x), b.model(x).pooler_output)


def test_hf_classifier_without_its_head_is_refused_not_randomly_filled(tmp_path):
    from safetensors.torch import load_file, save_file

    hf_classifier(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "classifier" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(OSError, match=r"lacks 2 weights \(classifier.bias, classifier.weight"):
        load_model(f"hf:{tmp_path}")


def test_class_names_of_a_classifier_must_fit_its_outputs():
    m = load_model(TIMM + "&num_classes=2", classes=["a", "b"])
    assert m.labels == ("a", "b")
    with pytest.raises(ValueError, match=r"2 outputs but 3 class names"):
        load_model(TIMM + "&num_classes=2", classes=["a", "b", "c"])


# -- class names -------------------------------------------------------------------------------------------------------
def test_class_names_from_a_file(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("tabby cat\n\n coffee mug \n")
    assert zeroshot.read_classes(str(file)) == ("tabby cat", "coffee mug")
    assert zeroshot.read_classes(None) is None
    assert len(zeroshot.read_classes("imagenet")) == 1000
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"holds no class name"):
        zeroshot.read_classes(file)
    file.write_text("a\nb\na\n")
    with pytest.raises(ValueError, match=r"names a more than once"):
        zeroshot.read_classes(file)
    with pytest.raises(ValueError, match=r"cannot read the class names 'nofile.txt'.*one name per line"):
        zeroshot.read_classes("nofile.txt")


def test_prompts_of_another_library_name_its_extra(without):
    without("open_clip")
    assert zeroshot.templates("one")[0]("cat") == "a photo of a cat."
    with pytest.raises(ImportError, match=r"templates=one needs none.*tokenreduce\[open_clip\]"):
        zeroshot.templates("openai")


def test_the_classifier_is_the_mean_of_normalised_prompt_features():
    table = {"x a": [3.0, 0.0], "x b": [0.0, 2.0], "y a": [0.0, 5.0], "y b": [1.0, 0.0]}
    got = zeroshot.classifier(
        lambda texts: torch.tensor([table[t] for t in texts]), "ab", ["x {}".format, "y {}".format], 3
    )
    assert torch.allclose(got, torch.full((2, 2), 0.5**0.5))


def test_the_embedded_model_needs_no_library_name():
    for name, classes, size in (("digits-vit", 10, (1, 28, 28)), ("world-vit", 18, (3, 112, 112))):
        m = load_model(name)
        assert (m.kind, m.num_classes, m.input_size, len(m.labels)) == ("classifier", classes, size, classes)
        x = m.transform(Image.new("L", (28, 28)))
        assert x.shape == size
        assert m.predict(x[None]).shape == (1, classes)
