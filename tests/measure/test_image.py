from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from support import images, tiny_vit

import tokenreduce as tr
from tokenreduce.core.flops import count_flops, flops_by_layer
from tokenreduce.core.undo import reducers_of
from tokenreduce.measure.image import clock_image, compare_image
from tokenreduce.patching import twin


@pytest.fixture
def loaded() -> Any:
    model = tiny_vit()
    x = images(1)[0]
    return SimpleNamespace(
        model=model, name="tiny", kind="classifier", classifier=None, transform=lambda _: x.clone(),
        forward=lambda m, x: m(x), predict=lambda x, m=model: m(x), labels=None,
    )  # fmt: skip


PICTURE = Image.new("RGB", (24, 24))


def test_both_sides_are_what_the_model_gives(loaded) -> None:
    x = loaded.transform(PICTURE)[None]
    made = compare_image(loaded, PICTURE, "tome:r=4")
    with torch.no_grad():
        assert torch.equal(made.stock.outputs, loaded.model(x)[0])
        with tr.patched(loaded.model, "tome:r=4"), tr.record(loaded.model) as trace:
            assert torch.equal(made.reduced.outputs, loaded.model(x)[0])
    assert made.reduced.tokens == tuple(trace.tokens) == (33, 29, 25, 21, 17, 13)
    assert made.stock.tokens == (37,) * 6
    assert made.reduced.flops == trace.flops
    assert made.stock.flops == count_flops(loaded.model, x)
    assert made.similarity < 1
    assert reducers_of(loaded.model) == ()


def test_flops_of_layers_are_those_of_the_blocks(loaded) -> None:
    made = compare_image(loaded, PICTURE, "tome:r=4")
    assert len(set(made.stock.layer_flops)) == 1
    assert list(made.reduced.layer_flops) == sorted(made.reduced.layer_flops, reverse=True)
    block, around = loaded.model.blocks[0], made.stock.flops - sum(made.stock.layer_flops)
    assert made.stock.layer_flops[0] == count_flops(block, torch.randn(1, 37, 32))
    assert around == made.reduced.flops - sum(made.reduced.layer_flops) > 0


def test_hooks_are_gone_behind_the_block(loaded) -> None:
    with flops_by_layer(loaded.model.blocks, lambda: 0):
        assert all(len(b._forward_hooks) == 1 for b in loaded.model.blocks)
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in loaded.model.blocks)


def test_no_method_is_the_model_itself(loaded) -> None:
    made = compare_image(loaded, PICTURE, ())
    assert made.stock is made.reduced
    assert made.look.plan() is None


def test_pictures_follow_the_layers(loaded) -> None:
    look = compare_image(loaded, PICTURE, "evit:keep=0.3").look
    left = [look.plan(i).k if look.plan(i) else 37 for i in range(6)]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 37
    assert "dropped" in look.caption()
    assert f"{left[0]} tokens" in look.caption(0)
    size = look.overlay().size
    assert look.draw(2).width > 2 * size[0]
    with pytest.raises(ValueError, match="layer is 0 to 5"):
        look.caption(6)


def test_the_clock_has_a_time_for_every_round(loaded) -> None:
    stock, reduced = clock_image(loaded, PICTURE, "tome:r=4", batch=2, rounds=3)
    assert len(stock.times) == len(reduced.times) == 3
    assert reducers_of(loaded.model) == ()
    with pytest.raises(ValueError, match="batch is an int >= 1"):
        clock_image(loaded, PICTURE, "tome:r=4", batch=0)
    with pytest.raises(ValueError, match="unknown method"):
        clock_image(loaded, PICTURE, "nonsense")


def test_a_twin_shares_weights_and_nothing_else() -> None:
    model = tiny_vit()
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    tr.patch(other, "tome:r=4")
    assert reducers_of(model) == ()
    x = images(1)
    with torch.no_grad():
        assert not torch.equal(model(x), other(x))
