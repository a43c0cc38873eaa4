from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_vit

import tokenreduce as tr
from tokenreduce.core.plan import Identity, Merge, Pool, Prune
from tokenreduce.measure.picture import MARGIN, _regions, draw, show, view

RED, GREEN, BLUE, GREY = (200, 0, 0), (0, 200, 0), (0, 0, 200), (120, 120, 120)


def tiles(colours: list[list[tuple[int, int, int]]], cell: int = 40) -> Image.Image:
    """An image with one flat colour per patch."""
    return Image.fromarray(np.kron(np.array(colours, dtype=np.uint8), np.ones((cell, cell, 1), dtype=np.uint8)))


def right(picture: Image.Image, rows: int, cols: int, cell: int) -> np.ndarray:
    """The right half as (rows, cols, cell, cell, 3)."""
    pixels = np.asarray(picture)
    h, w = rows * cell, cols * cell
    assert picture.width == 2 * w + 3 * MARGIN
    half = pixels[-MARGIN - h : -MARGIN, -MARGIN - w : -MARGIN]
    return half.reshape(rows, cell, cols, cell, 3).transpose(0, 2, 1, 3, 4)


def middle(patch: np.ndarray) -> tuple[int, ...]:
    inner = patch[10:-10, 10:-10].reshape(-1, 3)
    assert (inner == inner[0]).all()
    return tuple(int(v) for v in inner[0])


IMAGE = tiles([[RED, GREEN, BLUE], [GREY, RED, GREEN]])


def test_merged_patches_share_a_mean_and_a_line() -> None:
    # prefix 1; patches 0 and 1 merge (red and green), 2 and 4 merge (blue and red), 3 and 5 stay
    plan = Merge.from_assignment(torch.tensor([[0, 1, 1, 2, 3, 2, 4]]), 5)
    got = right(draw(IMAGE, plan, (2, 3), 1, side=80), 2, 3, 40)
    assert middle(got[0, 0]) == middle(got[0, 1]) == (100, 100, 0)
    assert middle(got[0, 2]) == middle(got[1, 1]) == (100, 0, 100)
    assert middle(got[1, 0]) == GREY
    assert middle(got[1, 2]) == GREEN
    # one region has one colour of line; the border between its own patches has none
    first, second = got[0, 0][0, 5], got[0, 2][0, 5]
    assert (first == got[0, 1][0, 30]).all()
    assert (second == got[1, 1][0, 5]).all()
    assert not (first == second).all()
    assert tuple(got[0, 0][20, 39]) == (100, 100, 0)


def test_dropped_patches_are_dark_and_hatched() -> None:
    plan = Prune(7, torch.tensor([[0, 1, 6]]))
    got = right(draw(IMAGE, plan, (2, 3), 1, side=80), 2, 3, 40)
    assert middle(got[0, 0]) == RED
    assert middle(got[1, 2]) == GREEN
    for place, colour in (((0, 1), GREEN), ((0, 2), BLUE), ((1, 0), GREY), ((1, 1), RED)):
        patch = got[place].reshape(-1, 3)
        assert set(map(tuple, patch.tolist())) == {(84, 84, 84), tuple(round(0.25 * c + 0.75 * 34) for c in colour)}


def test_what_went_into_the_prefix_counts_as_gone() -> None:
    plan = Merge.from_assignment(torch.tensor([[0, 0, 1, 2, 3, 4, 5]]), 6)
    assert _regions(plan, (2, 3), 1, 0).tolist() == [[-1, 1, 2], [3, 4, 5]]


def test_only_the_sample_asked_for() -> None:
    plan = Prune(7, torch.tensor([[0, 1, 2], [0, 5, 6]]))
    assert _regions(plan, (2, 3), 1, 1).tolist() == [[-1, -1, -1], [-1, 1, 2]]


@pytest.mark.parametrize("plan", [None, Identity(6)])
def test_nothing_happened(plan: Identity | None) -> None:
    got = right(draw(IMAGE, plan, (2, 3), side=80), 2, 3, 40)
    assert middle(got[1, 0]) == GREY
    assert middle(got[0, 2]) == BLUE


def test_the_left_half_is_the_image() -> None:
    picture = draw(IMAGE, Prune(6, torch.tensor([[0]])), (2, 3), side=80)
    left = np.asarray(picture)[-MARGIN - 80 : -MARGIN, MARGIN : MARGIN + 120]
    assert (left == np.asarray(IMAGE)).all()


def test_pools_and_chains_and_sizes_that_the_grid_does_not_divide() -> None:
    weights = torch.zeros(1, 2, 6)
    weights[0, 0, :3], weights[0, 1, 3:] = 1, 1
    plan = Pool(6, weights).then(Prune(2, torch.tensor([[1]])))
    picture = draw(Image.new("RGB", (101, 67), "white"), plan, (2, 3), side=60)
    got = np.asarray(picture)[-MARGIN - 67 : -MARGIN, -MARGIN - 101 : -MARGIN]
    assert got[:33].max() < 100  # dropped
    assert got[40:60, 40:60].min() == 255


def test_small_images_are_enlarged() -> None:
    picture = draw(Image.new("L", (28, 28)), None, (7, 7), side=448)
    assert picture.width == 2 * 448 + 3 * MARGIN


def test_the_title_is_drawn() -> None:
    with_title = np.asarray(draw(IMAGE, None, (2, 3), side=200, title="tome:r=3"))
    without = np.asarray(draw(IMAGE, None, (2, 3), side=200))
    top = 2 * MARGIN + 21
    assert (with_title[:top] != without[:top]).any()
    assert (with_title[top:] == without[top:]).all()


def test_a_wrong_grid_is_an_error() -> None:
    with pytest.raises(ValueError, match="prefix 1 and grid 2x2 make 5"):
        draw(IMAGE, Prune(7, torch.tensor([[0]])), (2, 2), 1)


# -- view --------------------------------------------------------------------------------------------------------------
def test_view_undoes_any_normalisation() -> None:
    from torchvision import transforms as T

    transform = T.Compose(
        [T.Resize(64), T.CenterCrop(48), T.ToTensor(), T.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))]
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    wanted = T.CenterCrop(48)(T.Resize(64)(image))
    got = np.asarray(view(transform, image)).astype(int)
    assert np.abs(got - np.asarray(wanted)).max() <= 1


def test_view_of_a_transform_that_looks_at_the_content() -> None:
    got = np.asarray(
        view(lambda image: torch.tensor([[[-3.0, 1.0]]]) * (image.getpixel((0, 0)) > 9), Image.new("L", (2, 2), 50))
    )
    assert got.tolist() == [[0, 255]]


# -- show --------------------------------------------------------------------------------------------------------------
def loaded(**changes) -> SimpleNamespace:
    def transform(image: Image.Image) -> torch.Tensor:
        pixels = np.asarray(image.convert("RGB").resize((24, 24)), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1

    return SimpleNamespace(model=tiny_vit(**changes), transform=transform, forward=torch.nn.Module.__call__)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    data = pytest.importorskip("skimage.data")
    return Image.fromarray(data.astronaut())


def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    calls: list[tuple] = []
    original = draw

    def spy(image, plan, grid, prefix=0, **rest):
        calls.append((image, plan, grid, prefix, rest["title"]))
        return original(image, plan, grid, prefix, **rest)

    monkeypatch.setattr("tokenreduce.measure.picture.draw", spy)
    return calls


def test_show_draws_what_the_model_did(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captured(monkeypatch)
    case = loaded()
    picture = show(case, photo, "tome:r=4", side=400)
    ((_, plan, grid, prefix, title),) = calls
    with torch.no_grad(), tr.patched(case.model, "tome:r=4"), tr.record(case.model) as trace:
        case.model(case.transform(photo)[None])
    assert plan == trace.plan
    assert (plan.n, plan.k, grid, prefix, title) == (37, 13, (6, 6), 1, "tome:r=4")
    assert picture.size == (2 * 408 + 3 * MARGIN, 408 + 3 * MARGIN + 21)  # 17 times 24 pixels
    with pytest.raises(ValueError, match="not patched"):
        tr.unpatch(case.model)


def test_show_after_a_layer(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captured(monkeypatch)
    case = loaded()
    for layer in (0, 2, 5):
        show(case, photo, tr.ToMe(r=4), layer=layer)
    assert [c[1].k for c in calls] == [33, 25, 13]
    assert calls[1][4] == "tome:r=4, after layer 2"
    for layer in (-1, 6):
        with pytest.raises(ValueError, match="layer is 0 to 5"):
            show(case, photo, "tome:r=4", layer=layer)


def test_show_of_a_resized_input(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captured(monkeypatch)
    show(loaded(dynamic_img_size=True), photo, "resize:keep=0.25")
    ((image, plan, grid, _, title),) = calls
    assert (image.size, plan, grid) == ((12, 12), None, (3, 3))
    assert "24x24 resized to 12x12" in title


def test_show_of_several_methods_and_a_pruner(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captured(monkeypatch)
    show(loaded(), photo, ["tome:r=[4,4]", "random:r=[0,0,0,5]"])
    assert calls[0][1].k == 37 - 13
    assert calls[0][4] == "tome:r=[4,4]+random:r=[0,0,0,5]"


def test_show_of_every_encoder_method(photo: Image.Image) -> None:
    """Whatever kind of plan a method makes, it can be drawn."""
    case = loaded(dynamic_img_size=True)
    for name in tr.describe(case.model).methods("encoder"):
        assert show(case, photo, f"{name}:keep=0.4", side=60).width > 120, name


@dataclass(frozen=True)
class Half(tr.Reducer, stage="encoder"):
    """Not registered: it has no name."""

    keep: float = 0.5

    def plan(self, evidence: tr.Evidence) -> tr.Plan:
        keep = torch.arange(0, evidence.n, 2).expand(evidence.batch, -1)
        return tr.Prune(evidence.n, keep)


def test_show_takes_instances(photo: Image.Image) -> None:
    assert show(loaded(), photo, Half(), layer=0, side=60).height > 60
