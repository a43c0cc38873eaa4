from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import PHOTOS, TIMM, WNIDS, bomb, crop, encoded, hf_classifier, image_folder, tiny_clip
from PIL import Image

from tokenreduce.bench.data import balanced, load_data
from tokenreduce.bench.models import load_model


@pytest.fixture(scope="module")
def four():
    """A classifier with four nameless outputs."""
    return load_model(TIMM + "&num_classes=4")


@pytest.fixture(scope="module")
def imagenet():
    return load_model(TIMM)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_model(f"open_clip:{tiny_clip(tmp_path_factory.mktemp('clip'))}/")


# -- digits ------------------------------------------------------------------------------------------------------------
def test_digits_arrive_as_the_training_tensors():
    from tokenreduce.zoo import digits

    data = load_data("digits", "test", load_model("digits-vit"))
    x, y = digits.load_data("test")
    batch = next(data.batches(50))
    assert torch.allclose(batch.x, x[:50], atol=1e-6)
    assert torch.equal(batch.y, y[:50])
    assert (len(data), data.classes, data.problems) == (1000, tuple("0123456789"), [])


def test_digits_do_not_fit_a_model_with_other_outputs(imagenet):
    with pytest.raises(ValueError, match=r"10 classes \(0, 1, .*has 1000 outputs.*Fix: use a model with"):
        load_data("digits", "test", imagenet)


# -- the generated world -----------------------------------------------------------------------------------------------
def test_scenes_carry_all_their_kinds(monkeypatch):
    from tokenreduce.bench import embedded_sources
    from tokenreduce.zoo.world import KINDS, SPLITS, scene

    monkeypatch.setattr(embedded_sources, "WORLD_SCENES", 40)
    model = load_model("world-vit")
    data = load_data("world", "test", model)
    assert (len(data), data.classes, data.notes) == (40, KINDS, [])
    for (_, x, label), seed in zip(data, SPLITS["test"], strict=False):
        made = scene(seed, objects=(3, 6))
        assert torch.equal(x, model.transform(Image.fromarray(made.image)))
        assert 3 <= len(made.objects) <= 6
        assert {KINDS[k] for k in label if k >= 0} == {t.kind for t in made.objects}
        assert len(label) == 6
    batch = next(data.batches(16))
    assert batch.y.shape == (16, 6)
    some = load_data("world", "test", model, limit=10)
    assert len(some) == 10
    assert set(some.items) < set(data.items)
    other = load_data("world", "val", model)
    assert other.items[0] == SPLITS["validation"][0]
    with pytest.raises(ValueError, match=r"world has no split 'exam'.*train, validation, test"):
        load_data("world", "exam", model)
    with pytest.raises(ValueError, match="18 classes"):
        load_data("world", "test", load_model("digits-vit"))


# -- limits ------------------------------------------------------------------------------------------------------------
def test_limit_is_balanced_seeded_and_in_order():
    labels = [0] * 50 + [1] * 5 + [2] * 20
    got = balanced(labels, 24, 0)
    counts = torch.bincount(torch.tensor([labels[i] for i in got])).tolist()
    assert counts[1] == 5  # all that there are
    assert sorted(counts) == [5, 9, 10]
    assert got == sorted(set(got)) == balanced(labels, 24, 0) != balanced(labels, 24, 1)
    few = [labels[i] for i in balanced(labels, 2, 0)]
    assert len(set(few)) == 2


def test_limits_are_validated_and_a_large_one_takes_all(tmp_path, four):
    root = str(image_folder(tmp_path, 2))
    assert [y for _, _, y in load_data(root, "test", four, limit=4)] == [0, 1, 2, 3]
    assert len(load_data(root, "test", four, limit=100)) == 8
    for bad in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match=r"limit is a number of images >= 1"):
            load_data(root, "test", four, limit=bad)


# -- folders -----------------------------------------------------------------------------------------------------------
def test_folder_order_is_the_label_order_when_the_number_fits(tmp_path, four):
    data = load_data(str(image_folder(tmp_path, 3)), "test", four)
    assert data.classes == PHOTOS
    assert data.labels == [i for i in range(4) for _ in range(3)]
    index, x, y = next(iter(data))
    assert (index, y) == (0, 0)
    assert torch.equal(x, four.transform(Image.open(tmp_path / "camera" / "0.jpg")))


def test_wordnet_ids_map_to_the_outputs_of_imagenet(tmp_path, imagenet):
    data = load_data(str(image_folder(tmp_path, 1, WNIDS)), "test", imagenet)
    assert [imagenet.wnids[y] for y in data.labels] == sorted(WNIDS)
    assert data.labels[0] == 0
    assert data.classes == imagenet.labels


def test_a_zero_shot_model_takes_imagenet_names_for_wordnet_ids_and_any_other_folder_names(tmp_path, clip):
    data = load_data(str(image_folder(tmp_path / "a", 1, WNIDS)), "test", clip)
    assert len(data.classes) == 1000
    assert [data.classes[y] for y in data.labels] == ["tench", "tabby cat", "space shuttle", "tea cup"]
    data = load_data(str(image_folder(tmp_path / "b", 1)), "test", clip)
    assert (data.classes, data.labels) == (PHOTOS, [0, 1, 2, 3])


def test_the_model_s_own_label_names_win_over_the_order(tmp_path):
    model = load_model(f"hf:{hf_classifier(tmp_path / 'm', ('Rocket', 'coffee', 'my-cat', 'camera', 'other'))}")
    data = load_data(str(image_folder(tmp_path / "d", 1, ("camera", "my_cat", "coffee", "rocket"))), "test", model)
    assert [model.labels[y] for y in data.labels] == ["camera", "coffee", "my-cat", "Rocket"]


def test_given_class_names(tmp_path, four):
    root = str(image_folder(tmp_path / "d", 1))
    file = tmp_path / "names.txt"
    file.write_text("\n".join(reversed(PHOTOS)))
    assert load_data(root, "test", four, classes=file).labels == [3, 2, 1, 0]
    titles = ["a man with a camera", "a cat", "a cup", "a rocket"]
    data = load_data(root, "test", four, classes=titles)
    assert (data.labels, data.classes) == ([0, 1, 2, 3], tuple(titles))
    with pytest.raises(ValueError, match=r"5 class names were given for the 4 outputs"):
        load_data(root, "test", four, classes=[*titles, "more"])
    eight = replace(four, num_classes=8)
    with pytest.raises(ValueError, match=r"4 classes, but 8 class names were given; not among them: rocket"):
        load_data(root, "test", eight, classes=[*PHOTOS[:3], *"abcde"])


@pytest.mark.parametrize("split", ["val", "test", "train"])
def test_splits_are_found_under_their_usual_names(tmp_path, four, split):
    image_folder(tmp_path / "val", 1)
    image_folder(tmp_path / "train", 2)
    data = load_data(str(tmp_path), split, four)
    assert len(data) == (8 if split == "train" else 4)
    assert data.notes == (["there is no split test; val is used"] if split == "test" else [])


def test_a_missing_split_lists_those_that_are_there(tmp_path, four):
    image_folder(tmp_path / "train", 1)
    with pytest.raises(ValueError, match=r"has no split 'test'; it has: train. Fix: --split train"):
        load_data(str(tmp_path), "test", four)


def test_wrong_class_folders_are_named(tmp_path, imagenet, clip):
    root = image_folder(tmp_path / "a", 1)
    with pytest.raises(ValueError, match=r"4 classes \(camera, chelsea.*1000 outputs.*WordNet ids.*--classes FILE"):
        load_data(str(root), "test", imagenet)
    image_folder(tmp_path / "b", 1, (*WNIDS[:2], "cats"))
    with pytest.raises(ValueError, match=r"mixes WordNet ids with other class folders: cats"):
        load_data(str(tmp_path / "b"), "test", imagenet)
    image_folder(tmp_path / "c", 1, (WNIDS[0], "n99999999"))
    with pytest.raises(ValueError, match=r"n99999999 are not among the 1000 ImageNet classes"):
        load_data(str(tmp_path / "c"), "test", imagenet)
    with pytest.raises(ValueError, match=r"one class only.*one folder too high"):
        load_data(str(image_folder(tmp_path / "d" / "all" / "sub", 1).parents[1]), "test", clip)


def test_empty_and_flat_folders_are_errors(tmp_path, four):
    with pytest.raises(ValueError, match=r"no class folders; the layout is"):
        load_data(str(tmp_path), "test", four)
    (tmp_path / "0.jpg").write_bytes(encoded("coffee", 0))
    with pytest.raises(ValueError, match=r"holds 1 image but no class folders"):
        load_data(str(tmp_path), "test", four)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"class folders \(cat\) but no image in them; images end in jpg"):
        load_data(str(tmp_path), "test", four)


def test_what_is_left_out_is_noted(tmp_path, four):
    root = image_folder(tmp_path, 1, PHOTOS[:3])
    (root / "zebra").mkdir()
    (root / "coffee" / "readme.txt").write_text("x")
    (root / "coffee" / ".hidden").write_text("x")
    (root / "loose.png").write_bytes(encoded("coffee", 0, "PNG"))
    data = load_data(str(root), "test", four)
    assert len(data) == 3
    assert sorted(data.notes) == [
        "1 file that is no image is left out: coffee/readme.txt",
        "1 image outside of class folders is left out: loose.png",
        "class folders without an image: zebra",
    ]


def test_unknown_places_list_the_kinds(tmp_path, four):
    with pytest.raises(
        ValueError, match=r"unknown data set 'imagnet': there is no such folder. Data sets are: digits, world"
    ):
        load_data("imagnet", "test", four)
    (tmp_path / "f.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it is a file"):
        load_data(str(tmp_path / "f.zip"), "test", four)
    with pytest.raises(ValueError, match=r"write hf:PATH"):
        load_data("hf:", "test", four)


# -- broken images -----------------------------------------------------------------------------------------------------
def spoil(root):
    """Every way in which an image can be broken; returns file -> word of the reason."""
    good = encoded("coffee", 9)
    (root / "coffee" / "truncated.jpg").write_bytes(good[: len(good) // 2])
    (root / "coffee" / "empty.jpg").write_bytes(b"")
    (root / "coffee" / "text.png").write_bytes(b"this is no image")
    (root / "chelsea" / "bomb.png").write_bytes(bomb())
    (root / "chelsea" / "missing.jpg").symlink_to(root / "nowhere.jpg")
    png = bytearray(encoded("chelsea", 1, "PNG"))
    png[60] ^= 255
    (root / "chelsea" / "flipped.png").write_bytes(bytes(png))
    return {
        "truncated.jpg": "truncated",
        "empty.jpg": "cannot identify",
        "text.png": "cannot identify",
        "bomb.png": "DecompressionBomb",
        "missing.jpg": "No such file",
        "flipped.png": "",
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_counted_and_listed_never_dropped_silently(tmp_path, four, workers):
    root = image_folder(tmp_path, 2)
    broken = spoil(root)
    data = load_data(str(root), "test", four)
    assert len(data) == 8 + len(broken)
    for _ in range(2):  # a second pass does not list them again
        batches = list(data.batches(3, workers))
        assert sum(len(b.y) for b in batches) == 8
        assert {p.path.rpartition("/")[2] for p in data.problems} == set(broken)
        assert len(data.problems) == len(broken)
    for problem in data.problems:
        assert broken[problem.path.rpartition("/")[2]] in problem.reason
    index = torch.cat([b.ids for b in batches])
    y = torch.cat([b.y for b in batches])
    assert [data.labels[i] for i in index] == y.tolist()
    assert all(data.items[i].name not in broken for i in index)
    assert torch.equal(torch.cat([b.x for b in batches]), torch.stack([x for _, x, _ in data]))


def test_batches_without_a_readable_image_do_not_stop_the_others(tmp_path, four):
    root = image_folder(tmp_path, 2)
    for i in range(2):
        (root / "camera" / f"{i}.jpg").write_bytes(b"")
    data = load_data(str(root), "test", four)
    assert [b.ids.tolist() for b in data.batches(2)] == [[2, 3], [4, 5], [6, 7]]
    assert len(data.problems) == 2


def test_images_of_different_sizes_say_how_to_go_on(tmp_path, four):
    def sizes(image):
        return torch.zeros(3, image.width, image.height)

    root = image_folder(tmp_path, 1)
    crop("coffee", 0, 40).save(root / "coffee" / "small.png")
    data = load_data(str(root), "test", replace(four, transform=sizes))
    with pytest.raises(ValueError, match=r"different sizes .*batch=1"):
        list(data.batches(8))


# -- Hugging Face ------------------------------------------------------------------------------------------------------
def hf(path, rows, features, splits=None):
    from datasets import Dataset, DatasetDict, Features

    made = Dataset.from_dict(rows, features=Features(features))
    (DatasetDict({s: made for s in splits}) if splits else made).save_to_disk(path)
    return f"hf:{path}"


def test_hf_data_set_with_class_names_and_a_broken_image(tmp_path, four):
    from datasets import ClassLabel, Value
    from datasets import Image as Picture

    images = [{"bytes": encoded(n, 0), "path": None} for n in PHOTOS]
    images[1] = {"bytes": b"broken", "path": None}
    rows = {"pixels": [*images, images[0]], "cls": [3, 2, 1, 0, -1], "id": list("abcde")}
    features = {"pixels": Picture(), "cls": ClassLabel(names=list(PHOTOS)), "id": Value("string")}
    name = hf(tmp_path / "d", rows, features, ["train", "validation"])
    data = load_data(name, "val", four)
    assert (len(data), data.labels, data.classes) == (4, [3, 2, 1, 0], PHOTOS)
    assert data.notes == ["there is no split val; validation is used"]
    batches = list(data.batches(4))
    assert batches[0].ids.tolist() == [0, 2, 3]
    assert [(p.path, p.reason.split(":")[0]) for p in data.problems] == [
        (f"{tmp_path}/d[4]", "the row has no label"),
        (f"{tmp_path}/d[1]", "UnidentifiedImageError"),
    ]
    assert len(load_data(str(tmp_path / "d"), "train", four)) == 4  # the kind is seen from the folder
    with pytest.raises(ValueError, match=r"no split 'test2'; it has: train, validation"):
        load_data(name, "test2", four)


def test_hf_labels_as_text_and_as_numbers(tmp_path, four, clip):
    from datasets import Image as Picture
    from datasets import Value

    images = [{"bytes": encoded(n, 0), "path": None} for n in PHOTOS]
    text = hf(
        tmp_path / "t", {"img": images, "label": list(reversed(PHOTOS))}, {"img": Picture(), "label": Value("string")}
    )
    assert load_data(text, "test", four).labels == [3, 2, 1, 0]
    number = hf(tmp_path / "n", {"image": images, "label": [0, 3, 1, 2]}, {"image": Picture(), "label": Value("int64")})
    data = load_data(number, "test", four)
    assert data.labels == [0, 3, 1, 2]
    assert "taken as output numbers" in data.notes[0]
    with pytest.raises(ValueError, match=r"no class names, which a zero-shot model needs. Fix: --classes FILE"):
        load_data(number, "test", clip)
    assert load_data(number, "test", clip, classes=list(PHOTOS)).classes == PHOTOS
    with pytest.raises(ValueError, match=r"labels up to 3, .* has 3 outputs"):
        load_data(number, "test", replace(four, num_classes=3))


def test_hf_columns_that_cannot_be_told_apart_are_listed(tmp_path, four):
    from datasets import ClassLabel, Value
    from datasets import Image as Picture

    image = {"bytes": encoded("coffee", 0), "path": None}
    name = hf(tmp_path / "a", {"left": [image], "right": [image], "label": [0]},
              {"left": Picture(), "right": Picture(), "label": ClassLabel(names=["a"])})  # fmt: skip
    with pytest.raises(ValueError, match=r"several columns of type Image.*left \(Image\), right \(Image\).*rename"):
        load_data(name, "test", four)
    name = hf(tmp_path / "b", {"image": [image], "score": [0.5]}, {"image": Picture(), "score": Value("float32")})
    with pytest.raises(ValueError, match=r"no columns of type ClassLabel"):
        load_data(name, "test", four)
    with pytest.raises(ValueError, match=r"is not a data set on disk.*save_to_disk"):
        load_data(f"hf:{tmp_path}", "test", four)


# -- shards ------------------------------------------------------------------------------------------------------------
def shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_shards_written_by_webdataset_by_pattern_wildcard_and_folder(tmp_path, four):
    import webdataset

    for s in range(2):
        with webdataset.TarWriter(str(tmp_path / f"s-{s:03}.tar")) as writer:
            for i, n in enumerate(PHOTOS):
                writer.write({"__key__": f"{s}/{i:04}", "jpg": encoded(n, s), "cls": i, "json": {"from": n}})
    for name in ("s-{000..001}.tar", "s-*.tar", ""):
        data = load_data(str(tmp_path / name), "test", four)
        assert (len(data), data.labels, data.problems) == (8, [0, 1, 2, 3] * 2, [])
    x = next(data.batches(8)).x
    assert torch.equal(x[5], four.transform(Image.open(io.BytesIO(encoded("chelsea", 1)))))
    assert "taken as output numbers" in data.notes[0]
    with pytest.raises(ValueError, match=r"there is no shard .*s-002.tar"):
        load_data(str(tmp_path / "s-{000..002}.tar"), "test", four)
    with pytest.raises(ValueError, match=r"there is no shard"):
        load_data(str(tmp_path / "x-*.tar"), "test", four)


def test_samples_that_cannot_be_used_are_listed(tmp_path, four):
    good = encoded("coffee", 0, "PNG")
    path = shard(tmp_path / "a.tar", [
        ("a.png", good), ("a.cls", b"1\n"),
        ("b.png", good), ("b.txt", b"a cup"),
        ("c.cls", b"2"),
        ("d.png", good), ("d.cls", b"cup"),
        ("e.png", good[:100]), ("e.cls", b"3"),
        ("f.small.png", good), ("f.png", good), ("f.cls", b"0"),
    ])  # fmt: skip
    data = load_data(str(path), "test", four)
    assert [b.y.tolist() for b in data.batches(8)] == [[1, 0]]
    reasons = {p.path.rpartition(":")[2]: p.reason for p in data.problems}
    assert reasons["b"].startswith("the sample has no .cls label; its parts: png, txt")
    assert reasons["c"].startswith("the sample has no image")
    assert reasons["d"] == "the label is b'cup', not the number of a class"
    assert "e.png" in reasons


def test_damaged_shards_give_what_comes_before_the_damage(tmp_path, four):
    path = shard(
        tmp_path / "a.tar",
        [(f"{i}.{e}", d) for i in range(3) for e, d in (("jpg", encoded("coffee", i)), ("cls", b"2"))],
    )
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        middle = tar.getmember("2.jpg").offset_data + 10
    path.write_bytes(data[:middle])
    got = load_data(str(path), "test", four)
    assert len(got) == 2
    assert "cannot be read after 1: it ends inside 2.jpg" in got.problems[0].reason
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"holds no usable image:\n  .*b.tar: the shard cannot be read"):
        load_data(str(tmp_path / "b.tar"), "test", four)
    shard(tmp_path / "c.tar", [])
    with pytest.raises(ValueError, match=r"holds no usable image; it is empty"):
        load_data(str(tmp_path / "c.tar"), "test", four)


# -- pictures of more than eight bits ----------------------------------------------------------------------------------
def test_sixteen_bits_are_scaled_and_values_without_a_range_are_listed(tmp_path, four):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    root = image_folder(tmp_path, 1)
    Image.fromarray(ramp.astype(np.uint16)).save(root / "camera" / "ramp.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(root / "camera" / "ramp.tif")
    Image.fromarray((ramp / 65).astype(np.float32)).save(root / "camera" / "wild.tif")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(root / "camera" / "nan.tif")
    seen = {}
    data = load_data(str(root), "test", replace(four, transform=lambda image: seen.setdefault(image.mode, image)))
    for item in range(len(data)):
        if data.items[item].name == "ramp.png":
            assert len(np.unique(np.asarray(data.read(item)))) == 256
            assert set(seen) == {"RGB"}
        seen.clear()
    data = load_data(str(root), "test", four)
    batch = next(iter(data.batches(16)))
    assert len(batch.y) == 6
    reasons = {p.path.rpartition("/")[2]: p.reason for p in data.problems}
    assert set(reasons) == {"wild.tif", "nan.tif"}
    assert "floats are read from 0 to 1" in reasons["wild.tif"]
    assert "NaN" in reasons["nan.tif"]
    alike = {data.items[i].name: x for i, x in zip(batch.ids.tolist(), batch.x, strict=True)}
    assert torch.allclose(alike["ramp.png"], alike["ramp.tif"], atol=0.02)
    assert alike["ramp.png"].std() > 0.3


def test_questions_open_their_pictures_alike(tmp_path):
    from tokenreduce.bench.questions import load_questions

    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "ramp.png")
    Image.fromarray((ramp / 65).astype(np.float32)).save(tmp_path / "wild.tif")
    lines = [{"image": name, "question": "what", "answer": "x"} for name in ("ramp.png", "wild.tif", "gone.png")]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    good, wild, gone = load_questions(str(tmp_path / "q.jsonl"))
    assert len(np.unique(np.asarray(good.open()))) == 256
    with pytest.raises(ValueError, match=r"^its values go from 0 to 1008"):
        wild.open()
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        gone.open()
