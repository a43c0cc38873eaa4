from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import tokenreduce as tr
from tokenreduce.zoo import digits
from tokenreduce.zoo.photo import DigitTransform, as_digit


def pixels(n: int) -> tuple[np.ndarray, torch.Tensor]:
    x, y = digits.load_data("test")
    return ((x[:n, 0] * digits.STD + digits.MEAN) * 255).round().to(torch.uint8).numpy(), y[:n]


def test_splits_are_disjoint_and_cover_all_5000_digits():
    train, test = digits.load_data("train"), digits.load_data("test")
    assert (len(train[1]), len(test[1])) == (4000, 1000)
    assert torch.bincount(torch.cat([train[1], test[1]])).tolist() == [500] * 10
    one = {t.numpy().tobytes() for t in train[0]}
    assert not any(t.numpy().tobytes() in one for t in test[0])
    with pytest.raises(ValueError, match="train or test"):
        digits.load_data("val")


def test_augmentation_keeps_shape_and_background_and_depends_on_its_generator_alone():
    x = digits.load_data("train")[0][:8]
    a, b = (digits.augment(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == x.shape
    assert not torch.allclose(a, x, atol=0.1)
    assert a.min() >= x.min() - 1e-4


def test_a_few_steps_of_training_can_be_interrupted_and_continue_exactly(tmp_path, monkeypatch):
    from tokenreduce.zoo.training import Schedule, fit

    schedule = Schedule(steps=4, batch=8, warmup=2)

    def loss(model, step, generator):
        x, y = digits.load_data("train")
        pick = torch.randint(len(y), (8,), generator=generator)
        return torch.nn.functional.cross_entropy(model(x[pick]).float(), y[pick])

    def run(folder, stops):
        torch.manual_seed(0)
        for stop in stops:
            model = digits.build()
            torch.manual_seed(0)
            for row in fit(model, loss, schedule, folder / "c.pt", save_every=2):
                if row["step"] == stop:
                    break
        return model.state_dict()

    torch.manual_seed(0)
    first = digits.build().state_dict()
    monkeypatch.setattr(digits, "build", lambda original=digits.build: _with(original(), first))
    whole, halves = run(tmp_path / "a", [4]), run(tmp_path / "b", [2, 4])
    assert all(torch.equal(whole[k], halves[k]) for k in whole)
    assert not torch.equal(whole["head.weight"], first["head.weight"])
    with pytest.raises(ValueError, match="another schedule"):
        next(fit(digits.build(), loss, Schedule(steps=9), tmp_path / "a" / "c.pt"))


def _with(model, state):
    model.load_state_dict(state)
    return model


def test_a_28_pixel_digit_passes_unchanged_and_a_dark_one_is_inverted():
    raw, _ = pixels(5)
    x = digits.load_data("test")[0]
    for i, digit in enumerate(raw):
        assert torch.allclose(DigitTransform()(Image.fromarray(digit)), x[i], atol=1e-6)
        assert np.array_equal(as_digit(Image.fromarray(255 - digit)), digit)


def photograph(digit: np.ndarray, generator: np.random.Generator) -> Image.Image:
    """Dark ink on light, noisy, unevenly lit paper, somewhere in a larger picture, as colour."""
    ink = np.asarray(Image.fromarray(digit).resize((130, 130), Image.Resampling.BICUBIC), dtype=np.float32)
    paper = np.linspace(200, 235, 300)[None] + generator.normal(0, 4, (240, 300))
    y, x = generator.integers(10, 100), generator.integers(10, 160)
    paper[y : y + 130, x : x + 130] -= ink * 0.7
    return Image.fromarray(np.clip(paper, 0, 255).astype(np.uint8)).convert("RGB")


def test_photographs_of_digits_are_read_nearly_as_well_as_the_scans():
    raw, y = pixels(100)
    z = tr.zoo.load("digits-vit")
    generator = np.random.default_rng(0)
    x = torch.stack([z.transform(photograph(d, generator)) for d in raw])
    with torch.no_grad():
        assert (z.model(x).argmax(-1) == y).float().mean() >= 0.95


def test_transparent_and_empty_pictures():
    ink = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (28, 10, 32, 50))
    got = as_digit(ink)  # black ink on nothing: a one
    assert got[4:24, 13:15].min() > 200
    assert got[:, :11].max() == got[:, 17:].max() == 0
    assert as_digit(Image.new("RGB", (40, 30), "white")).max() == 0


def test_the_digit_is_scaled_into_20_pixels_and_centred_by_mass():
    picture = np.zeros((90, 200), dtype=np.uint8)
    picture[10:80, 30:90] = 255  # 70 x 60: 20 x 17 pixels
    got = as_digit(Image.fromarray(picture))
    rows, cols = np.flatnonzero(got.any(1)), np.flatnonzero(got.any(0))
    assert (rows[0], rows[-1]) == (4, 23)
    assert (len(cols), cols[0]) == (17, 6)
