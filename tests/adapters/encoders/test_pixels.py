"""Methods on pixels in towers, against the stock tower on the patches that stay, at their own positions."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, OTHERS, first_tensor
from toys.checks import plain
from vlms import IMAGE, VLMS, encodes_before, prompts
from vlms_masked import close, generate, hidden, layers_of

import tokenreduce as tr
from tokenreduce.adapters.encoders.pixels import Pixels, deviations_of

#: name -> tokens in front of the patches; rotary families have tables that must follow.
TOWERS = {
    "timm vit": 1, "timm vit, registers": 5, "timm vit, average pool": 0, "timm siglip, attention pool": 0,
    "timm eva02": 1, "timm dinov3": 5, "open_clip vit": 1, "open_clip vit, average pool": 1, "transformers vit": 1,
    "transformers clip": 1, "transformers siglip": 0, "transformers dinov2": 1, "transformers dinov3": 3,
    "transformers internvl": 1, "transformers deit": 2, "transformers ijepa": 0,
}  # fmt: skip


def repeated(size=48, patch=8):
    """Two images of patches that repeat: in pairs of rows, and in a corner; different numbers of them."""
    g = torch.Generator().manual_seed(7)
    n = size // patch
    patches = torch.randint(0, 256, (2, n, n, 3, patch, patch), generator=g).float()
    patches[0, 1::2] = patches[0, ::2]
    patches[1, :3, :4] = patches[1, 0, 0]
    image = patches.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, size, size)
    return (image / 255 - 0.5) / 0.5


def kept(image, patch=8):
    """Numbers of the patches of ``image`` (3,H,W) that are not equal to what predicts them."""
    n = image.shape[1] // patch
    cut = [[image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] for c in range(n)] for r in range(n)]
    out = []
    for r in range(n):
        for c in range(n):
            if r and c:
                a, b, corner = cut[r][c - 1], cut[r - 1][c], cut[r - 1][c - 1]
                guess = b if torch.equal(corner, a) and not torch.equal(corner, b) else a
            else:
                guess = cut[r][c - 1] if c else cut[r - 1][c] if r else None
            if guess is None or not torch.equal(guess, cut[r][c]):
                out.append(r * n + c)
    return out


@contextmanager
def only(model, stay, prefix, patches=36):
    """The stock ``model`` on the patches ``stay``: what enters its blocks is gathered, rotary tables too."""
    (tower,) = tr.describe(model).towers
    tokens = torch.tensor([*range(prefix), *(prefix + s for s in stay)])

    def rows(t):
        if isinstance(t, tuple):
            return tuple(rows(one) for one in t)
        if not isinstance(t, torch.Tensor) or t.dim() < 2:
            return t
        if t.shape[-2] == patches:
            return t[..., torch.tensor(stay), :]
        return t[..., tokens, :] if t.shape[-2] == patches + prefix else t

    def gather(block, args, kwargs):
        return tuple(rows(a) for a in args), {k: rows(v) for k, v in kwargs.items()}

    hooks = [block.register_forward_pre_hook(gather, with_kwargs=True) for block in tower.blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_tower_is_the_stock_one_on_the_patches_that_stay(name):
    torch.manual_seed(0)
    model, inputs = (FAMILIES | OTHERS)[f"{name}"]()
    model = model.eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(3.0)
    (key,), prefix = inputs, TOWERS[name]
    image = repeated()
    with tr.patched(model, "pixelprune"), tr.record(model, flops=False) as trace:
        got = first_tensor(model(**{key: image}))
    stays = [kept(one) for one in image]
    assert len(stays[0]) != len(stays[1])
    assert trace.plan.places()[:, prefix:].sum(1).tolist() == [len(s) for s in stays]
    for i, stay in enumerate(stays):
        with only(model, stay, prefix):
            want = first_tensor(model(**{key: image[i : i + 1]}))
        mine = got[i : i + 1]
        if want.dim() == 3:  # tokens, where one sample has fewer in the batch
            valid = trace.plan.validity()[i]
            mine = (
                mine[:, valid]
                if mine.shape[1] == len(valid)
                else mine[:, [*range(prefix), *(prefix + s for s in stay)]]
            )
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@torch.no_grad()
def test_odd_sizes_are_cut_as_the_model_cuts_them():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=48, depth=2, num_heads=4,
                              dynamic_img_size=True, dynamic_img_pad=True).eval()  # fmt: skip
    image = torch.zeros(1, 3, 43, 30)
    with tr.patched(model, "pixelprune"), tr.record(model, flops=False) as trace:
        model(image)
    assert trace.steps[0].grid == (6, 4)
    assert trace.tokens[0] == 2  # padding is as black as the image
    flat = Pixels(torch.arange(2 * 3 * 5 * 7).view(2, 3, 5, 7).half(), (2, 3)).units((2, 2), (2.0,))
    assert flat.shape == (2, 4, 18)
    assert flat[1, 3].tolist() == [
        2.0 * (105 + 35 * c + 7 * r + x) for c in range(3) for r in (2, 3) for x in (3, 4, 5)
    ]


def test_levels_come_from_what_a_model_says(tmp_path):
    model, _ = FAMILIES["transformers clip"]()
    assert deviations_of(model, model) is None  # nobody loaded it with a processor
    model.config.name_or_path = "somebody/clip-of-no-cache"
    assert deviations_of(model, model) == (0.26862954, 0.26130258, 0.27577711)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_std": [0.5, 0.25, 0.2]}))
    model.config.name_or_path = str(tmp_path)
    assert deviations_of(model, model) == (0.5, 0.25, 0.2)
    unknown, inputs = FAMILIES["open_clip vit"]()
    with pytest.raises(ValueError, match="give std"):
        tr.patch(unknown, "pixelprune:tolerance=2")
    image = (torch.full((1, 3, 48, 48), 100.0) + torch.arange(48) // 8) / 255 / 0.3  # levels 100 to 105
    for tolerance, want in ((0, 6), (1, 3), (2, 2), (5, 1)):
        spec = f"pixelprune:tolerance={tolerance},std=0.3"
        with tr.patched(unknown, spec), torch.no_grad(), tr.record(unknown, flops=False) as trace:
            unknown(image)
        assert trace.tokens[0] == 1 + want
    with pytest.raises(ValueError, match="channels"), tr.patched(unknown, "pixelprune:std=[1,2]"):
        unknown(**inputs)


@pytest.mark.parametrize(
    ("name", "spec", "why"),
    [
        ("transformers siglip2, padded", "pixelprune", "pixelprune needs pixels, which transformers SigLIP2"),
        ("timm vit", "pixelprune+resize", "both act on the input"),
        ("timm vit", "pixelprune+pixel-diff", "both act on the input"),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, spec, why):
    with pytest.raises(ValueError, match=why):
        tr.patch(FAMILIES[name]()[0], spec)


def test_in_front_of_methods_inside():
    """What merges in the first block merges what is left."""
    model, _ = FAMILIES["timm vit"]()
    image = repeated()[:1]
    with tr.patched(model.eval(), "pixelprune+tome:r=2"), tr.record(model, flops=False) as trace, torch.no_grad():
        model(image)
    left = 1 + len(kept(image[0]))
    assert trace.tokens == [left, left - 2, left - 4, left - 6, left - 8]


# -- packed towers -----------------------------------------------------------------------------------------------------
GRIDS = torch.tensor([[1, 8, 8], [2, 4, 12], [1, 4, 8]])


def packed(grids=GRIDS):
    """Patches (P,96) of two images and a video of two temporal positions, where 2x2 units repeat."""
    g, rows = torch.Generator().manual_seed(3), []
    for t, h, w in grids.tolist():
        units = torch.randint(0, 256, (t, h // 2, w // 2, 4, 3, 2, 16), generator=g).float()
        if t == 1:
            units[..., 1, :] = units[..., 0, :]
        units[:, 1:, ::2] = units[:, :1, ::2]
        units[:, 0, 1:3] = units[:, 0, :1]
        if t > 1:
            units[1, :, 3:] = units[0, :, 3:]
        rows.append(units.reshape(-1, 96))
    return torch.cat(rows) / 127.5 - 1


def units_left(pixels, method, grids=GRIDS):
    """(N,) bool by hand, in the order of the images."""
    out, at = [], 0
    for t, h, w in grids.tolist():
        n = h // 2 * (w // 2)
        here = pixels[at : at + t * n * 4].view(t, h // 2, w // 2, -1)
        at += t * n * 4
        if method == "pixel-diff":
            stay = torch.ones(t, n, dtype=torch.bool)
            for f in range(1, t):
                gap = (here[f] - here[f - 1]).abs().amax(-1).flatten()
                stay[f] = gap > 0
                stay[f, gap.argmax()] = True
            out.append(stay.flatten())
            continue
        for frame in here:
            stay = torch.ones(h // 2, w // 2, dtype=torch.bool)
            for r in range(h // 2):
                for c in range(w // 2):
                    if not r and not c:
                        continue
                    guess = frame[r, c - 1] if c else frame[r - 1, c]
                    if r and c:
                        corner = frame[r - 1, c - 1]
                        if torch.equal(corner, frame[r, c - 1]) and not torch.equal(corner, frame[r - 1, c]):
                            guess = frame[r - 1, c]
                    stay[r, c] = not torch.equal(guess, frame[r, c])
            out.append(stay.flatten())
    return torch.cat(out)


#: Towers of no table, whose layers compute by what was read of their code.
FOUND = ("qwen3_5", "qwen3_5_moe", "glm4v", "qwen3_vl_moe", "exaone4_5")


def tower_named(name):
    if name in FOUND and not encodes_before():
        pytest.skip("earlier releases have no discovered families")
    return (plain(name)[0] if name in FOUND else VLMS[name].model).model.visual


@pytest.mark.parametrize("method", ["pixelprune", "pixel-diff"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", *FOUND])
@torch.no_grad()
def test_a_packed_tower_is_the_stock_one_on_the_units_that_stay(name, method):
    """Rows and rotary tables of the kept patches enter the stock blocks, and every block's boundaries are counted anew;
    mergers, DeepStack's too, make tokens of what is left."""
    grids = GRIDS[::2] if name == "glm4v" else GRIDS  # which is given the frames of a video one by one
    tower, pixels = tower_named(name), packed(grids)
    stay = units_left(pixels, method, grids)
    order = torch.arange(len(stay))
    if hasattr(tower, "fullatt_block_indexes"):
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

        order = get_vision_window_index(grids, 2, tower.window_size, tower.patch_size)[0]
    rows = stay[order].repeat_interleave(4)
    before = torch.cat([torch.zeros(1, dtype=torch.long), rows.long().cumsum(0)])

    def gather(block, args, kwargs):
        x, kwargs = args[0], dict(kwargs)
        kwargs["cu_seqlens"] = before[kwargs["cu_seqlens"].long()].unique().to(torch.int32)
        kwargs["position_embeddings"] = tuple(t[rows] for t in kwargs["position_embeddings"])
        if "max_seqlen" in kwargs:
            kwargs["max_seqlen"] = int(kwargs["cu_seqlens"].diff().max())
        return (x[rows] if len(x) == len(rows) else x, *args[1:]), kwargs

    def scatter(merger, args, output):
        full = output.new_zeros(len(stay), output.shape[1])
        full[stay[order]] = output
        return full

    mergers = (tower.merger, *getattr(tower, "deepstack_merger_list", ()))
    hooks = [b.register_forward_pre_hook(gather, with_kwargs=True) for b in tower.blocks]
    hooks += [m.register_forward_hook(scatter) for m in mergers]
    try:
        want = tower(pixels, grid_thw=grids)
    finally:
        for hook in hooks:
            hook.remove()
    with tr.patched(tower, method), tr.record(tower, flops=False) as trace:
        got = tower(pixels, grid_thw=grids)
    assert 0.2 < float(stay.float().mean()) < 0.9 or (name, method) == ("glm4v", "pixel-diff")
    assert sum(s.patches for s in trace.steps if s.layer == 0) == 4 * int(stay.sum())
    pairs = [(got.pooler_output, want.pooler_output)]
    deep = [getattr(out, "deepstack_features", None) or () for out in (got, want)]
    pairs += list(zip(*deep, strict=True))
    assert len(pairs) == 1 + len(getattr(tower, "deepstack_merger_list", ()))
    for mine, right in pairs:
        torch.testing.assert_close(mine[stay], right[stay], rtol=1e-4, atol=1e-4 * float(right.abs().max()))


@pytest.mark.parametrize(("name", "cell"), [("internvl", 2), ("idefics3", 2), ("gemma3", 2)])
@torch.no_grad()
def test_patches_of_one_visual_token_go_together(name, cell):
    vlm = VLMS[name]
    inputs = prompts(vlm, ((6, "i"), (5, "ii")))
    with tr.patched(vlm.model, "pixelprune:keep=6"), tr.record(vlm.model, flops=False) as trace:
        vlm.model(**inputs)
    first, entry = trace.steps[0], next(s for s in trace.steps if s.stage == "projector")
    prefix = int(name == "internvl")
    stay = first.plan.places()[:, prefix:].view(3, 8 // cell, cell, 8 // cell, cell)
    assert torch.equal(stay.any(2).any(-1), stay.all(2).all(-1))
    assert (stay.any(2).any(-1).flatten(1).sum(1) == 6).all()
    assert int((entry.plan.sources() < 0).sum()) == 3 * (16 - 6)


@pytest.mark.parametrize("spec", ["pixelprune:keep=0.4", "pixelprune:keep=0.4+fastv:layer=2,keep=0.5"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_language_models_get_the_units_that_are_left(name, spec):
    """The stock language model with the columns of dropped units hidden: positions and DeepStack rows are theirs."""
    vlm, (first, *more) = VLMS[name], spec.split("+")
    inputs = prompts(vlm, ((6, "i"), (5, "ii")))
    tower = vlm.model.model.visual
    with tr.patched(tower, first):
        with tr.record(tower, flops=False) as trace, torch.no_grad():
            tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        gone = inputs["input_ids"] == IMAGE
        gone[gone.clone()] = ~trace.steps[0].plan.places().flatten()
        with hidden(layers_of(name, vlm.model), gone, 0):
            want, logits, _ = generate(vlm.model, inputs)
    with tr.patched(vlm.model, spec):
        got, mine, trace = generate(vlm.model, inputs)
    assert torch.equal(next(s for s in trace.steps if s.stage == "projector").plan.sources() < 0, gone)
    if not more:
        assert torch.equal(got, want)
        close(mine, logits)


@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video", "qwen3_vl"])
@torch.no_grad()
def test_frames_of_a_video_are_compared_with_those_before(name):
    """A still video: the first frame, and one unit of every later one."""
    vlm = VLMS[name]
    inputs = prompts(vlm, ((6, "v"),))
    pixels = inputs["pixel_values_videos"]
    if pixels.dim() == 5:
        inputs["pixel_values_videos"] = pixels[:, :1].expand_as(pixels).contiguous()
    else:  # two temporal positions
        inputs["pixel_values_videos"] = torch.cat([pixels[:32], pixels[:32]])
    with tr.patched(vlm.model, "pixel-diff"), tr.record(vlm.model, flops=False) as trace:
        vlm.model(**inputs)
    step = trace.steps[0]
    views = [int(v) for v in (step.plan.places().sum(1) - int("next" in name))]
    assert views == ([8, 1] if name == "qwen3_vl" else [4] + [1] * 7)
