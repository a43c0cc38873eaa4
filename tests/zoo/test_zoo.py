from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import tokenreduce as tr
from tokenreduce.zoo import digits, weights


def test_the_embedded_vit_reads_held_out_digits_as_its_card_says():
    z = tr.zoo.load("digits-vit")
    assert not z.model.training
    assert next(z.model.parameters()).dtype == torch.float32
    assert digits.accuracy(z.model) == z.card["accuracy"] >= 0.95
    assert z.card["steps"] == digits.SCHEDULE.steps
    assert z.card["parameters"] == sum(p.numel() for p in z.model.parameters())


def test_labels_are_the_digits_and_loading_leaves_random_numbers_alone():
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    assert tr.zoo.load("digits-vit").labels == tuple("0123456789")
    assert torch.equal(torch.rand(2), want)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"no embedded model 'digit-vit'.*digits-vit"):
        tr.zoo.load("digit-vit")
    with pytest.raises(ValueError, match="digits-vit"):
        tr.zoo.export(nn.Linear(2, 2), "mine", {})


def test_export_rounds_to_half_and_loading_gives_these_weights_back(tmp_path):
    model = digits.build().eval()
    card = tr.zoo.export(model, "digits-vit", {"steps": 3, "command": "c"}, folder=tmp_path)
    assert json.loads((tmp_path / "digits-vit.json").read_text()) == card
    assert (card["steps"], card["dtype"]) == (3, "float16")
    z = tr.zoo.load("digits-vit", folder=tmp_path)
    assert card["accuracy"] == digits.accuracy(z.model)
    for name, value in model.state_dict().items():
        assert torch.equal(z.model.state_dict()[name], value.half().float())
    assert weights.stored(tmp_path) == ["digits-vit"]


def test_damaged_missing_and_foreign_weights_are_errors_with_a_fix(tmp_path):
    weights.save(nn.Linear(3, 2), "m", {}, tmp_path)
    with pytest.raises(ValueError, match="m does not fit Linear"):
        weights.load(nn.Linear(2, 2), "m", tmp_path)
    file = tmp_path / "m.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(OSError, match=r"damaged: sha256.*pip install --force-reinstall"):
        weights.load(nn.Linear(3, 2), "m", tmp_path)
    file.unlink()
    with pytest.raises(OSError, match=r"missing.*reinstall"):
        weights.load(nn.Linear(3, 2), "m", tmp_path)
    (tmp_path / "m.json").write_text("{}")
    with pytest.raises(OSError, match=r"card .* damaged"):
        weights.load(nn.Linear(3, 2), "m", tmp_path)


def test_values_that_half_precision_cannot_hold_are_refused(tmp_path):
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1e6)
    with pytest.raises(ValueError, match="weight does not fit into fp16"):
        weights.save(model, "m", {}, tmp_path)
    assert not list(tmp_path.glob("m.*"))


def test_a_missing_library_names_the_extra(monkeypatch):
    def missing():
        raise ImportError("no timm", name="timm")

    monkeypatch.setattr(digits, "build", missing)
    with pytest.raises(ImportError, match=r"timm: pip install 'tokenreduce\[bench\]'"):
        tr.zoo.load("digits-vit")
