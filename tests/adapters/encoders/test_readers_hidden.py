"""Code around a tower that comes at its blocks by a way that is not ``self.tower.blocks``; the oracle is that of
``equal_tokens``."""

from __future__ import annotations

import pytest
import torch
from equal_tokens import MERGE, check_equal_tokens, hf, pictures, timm_vit
from torch import Tensor, nn

import tokenreduce as tr

VIT = timm_vit()


def entered(vit, x):
    return vit._pos_embed(vit.patch_embed(x))


def first_blocks(vit, x, n=2):
    x = entered(vit, x)
    for i, block in enumerate(vit.blocks):
        if i == n:
            break
        x = block(x)
    return x


def through(vit, x):
    return first_blocks(vit, x)


def all_blocks(vit, x):
    x = entered(vit, x)
    for block in vit.blocks:
        x = block(x)
    return x


def run(blocks, x):
    for block in blocks:
        x = block(x)
    return x


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = timm_vit(global_pool="avg")

    @property
    def backbone(self) -> nn.Module:
        return self.vit

    def tower(self) -> nn.Module:
        return self.vit


class Function(Around):
    def forward(self, x):
        return first_blocks(self.vit, x)


class Keyword(Around):
    def forward(self, x):
        return through(x=x, vit=self.vit)


class Whole(Around):
    def forward(self, x):
        return reads_of(self, x)


def reads_of(model, x):
    return model.vit.blocks[0](entered(model.vit, x))


class Method(Around):
    def some(self, vit, x):
        return vit.blocks[0](entered(vit, x))

    def forward(self, x):
        return self.some(self.vit, x)


class Named(Around):
    def forward(self, x):
        vit = getattr(self, "vit")  # noqa: B009
        return vit.blocks[0](entered(vit, x))


class Pair(Around):
    def forward(self, x):
        vit, _ = self.vit, None
        return vit.blocks[0](entered(vit, x))


class Walrus(Around):
    def forward(self, x):
        return (vit := self.vit).blocks[0](entered(vit, x))


class Property(Around):
    def forward(self, x):
        return self.backbone.blocks[0](entered(self.vit, x))


class Getter(Around):
    def forward(self, x):
        return self.tower().blocks[0](entered(self.vit, x))


class Closure(Around):
    def __init__(self) -> None:
        super().__init__()
        vit = self.vit
        self.features = lambda x: vit.blocks[0](entered(vit, x))

    def forward(self, x):
        return self.features(x)


class Nested(Around):
    def forward(self, x):
        def some(y: Tensor) -> Tensor:
            return self.vit.blocks[0](y)

        return some(entered(self.vit, x))


class Global(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = VIT

    def forward(self, x):
        return VIT.blocks[0](entered(VIT, x))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList([timm_vit()])

    def forward(self, x):
        return torch.stack([vit.blocks[0](entered(vit, x)) for vit in self.towers])


class Numbered(Listed):
    def forward(self, x):
        return self.towers[0].blocks[0](entered(self.towers[0], x))


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"left": timm_vit(), "right": timm_vit()})

    def forward(self, x):
        return self.towers["left"].blocks[0](entered(self.towers["left"], x))


class Shorter(Around):
    def __init__(self) -> None:
        super().__init__()
        self.layers = self.vit.blocks

    def forward(self, x):
        x = entered(self.vit, x)
        for block in self.layers[:2]:
            x = block(x)
        return x


class Unseen(Around):
    def forward(self, x):
        return self.helper(self.vit, x)  # whatever was put there at run time


READ = [
    Function, Keyword, Whole, Method, Named, Pair, Walrus, Property, Getter, Closure, Nested, Global, Listed, Numbered,
    Keyed, Shorter, Unseen,
]  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_blocks_that_are_reached_another_way_are_refused(kind):
    model = kind()
    for call in (tr.describe, lambda m: tr.patch(m, "tome:r=2")):
        with pytest.raises(TypeError, match=f"{kind.__name__}.*between its blocks"):
            call(model)
    assert "tokenreduce" not in repr([vars(m) for m in model.modules()])


class Stages(Around):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(*self.vit.blocks[:2]), nn.Sequential(*self.vit.blocks[2:])])

    def forward(self, x):
        x, seen = entered(self.vit, x), []
        for stage in self.stages:
            x = stage(x)
            seen.append(x.mean(1))
        return torch.cat(seen, 1)


def test_blocks_that_stand_elsewhere_as_well_are_refused():
    with pytest.raises(TypeError, match=r"^stages\.\d\.\d is a block of timm VisionTransformer outside of it"):
        tr.patch(Stages(), "tome:r=2")


class PassFunction(Around):
    def forward(self, x):
        return all_blocks(self.vit, x)[:, 1:].mean(1)


class PassBlocks(Around):
    def forward(self, x):
        return run(self.vit.blocks, entered(self.vit, x))[:, 1:].mean(1)


class PassProperty(Around):
    def forward(self, x):
        return self.backbone.forward_features(x)[:, 1:].mean(1)


class PassLambda(Around):
    def __init__(self) -> None:
        super().__init__()
        vit = self.vit
        self.features = lambda x: vit.forward_features(x)[:, 1:].mean(1)

    def forward(self, x):
        return self.features(x)


class PassAlias(Around):
    def __init__(self) -> None:
        super().__init__()
        self.layers = self.vit.blocks

    def forward(self, x):
        x = entered(self.vit, x)
        for block in self.layers:
            x = block(x)
        return x[:, 1:].mean(1)


class PassItems(Keyed):
    def forward(self, x):
        return sum(vit.forward_features(x)[:, 1:].mean(1) for vit in self.towers.values())


class Managed(Around):
    """Looks at its tower in ways that read no tokens."""

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.vit, x, use_reentrant=False)

    def about(self):
        print(self.vit, isinstance(self.vit, nn.Module), getattr(self.vit, "num_prefix_tokens", 1))
        return len(self.vit.blocks), hasattr(self.vit.blocks[0], "attn"), self.vit.blocks[0].attn.num_heads

    def freeze(self):
        for block in self.vit.blocks[:2]:
            block.requires_grad_(False)
        nn.init.zeros_(self.vit.head.weight)


SERVED = [PassFunction, PassBlocks, PassProperty, PassLambda, PassAlias, PassItems, Managed]


@pytest.mark.parametrize("kind", SERVED)
def test_what_only_passes_tokens_on_is_served(kind):
    check_equal_tokens(kind(), lambda m: m(pictures()))


class Hooked(Around):
    """Features as a hook finds them, the way published dense heads on timm models take theirs."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}
        self.vit.get_submodule(where).register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.seen["x"] = output

    def forward(self, x):
        self.vit(x)
        return self.seen["x"][:, 1:].mean(1)


@pytest.mark.parametrize("where", ["blocks", "blocks.0", "blocks.2", "blocks.2.mlp", "blocks.1.attn", "norm"])
def test_hooks_inside_a_tower_that_other_code_reads(where):
    model = Hooked(where)
    with pytest.raises(ValueError, match=f"the hook Hooked.keep on {where} of timm VisionTransformer would see fewer"):
        tr.patch(model, "tome:r=2")
    assert len(list(model.vit.get_submodule(where)._forward_hooks)) == 1
    seen: list[int] = []
    with tr.patched(model.vit, MERGE), torch.no_grad():  # the tower itself: its caller asked for fewer tokens
        model.vit.norm.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
        model.vit(pictures())
    assert seen == [37 - 9]


def test_hooks_of_torch_and_hooks_on_pooled_features_are_no_readers():
    model = Around()
    wrapped = nn.Sequential(model.vit)
    model.vit.head.register_forward_hook(lambda module, args, out: out * 2)
    nn.utils.parametrizations.weight_norm(model.vit.blocks[0].mlp.fc1)
    check_equal_tokens(wrapped, lambda m: m(pictures()))


def test_hooks_inside_a_transformers_tower():
    class Mean(nn.Module):
        def __init__(self, tower: nn.Module) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, x):
            return self.tower(x).last_hidden_state[:, 1:].mean(1)

    model = Mean(hf("ViTModel", "ViTConfig"))
    with torch.no_grad():
        model.tower(pictures(), output_hidden_states=True)  # transformers leaves hooks of its own behind
    check_equal_tokens(model, lambda m: m(pictures()))
    model.tower.layernorm.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(ValueError, match=r"on layernorm of .* would see fewer tokens"):
        tr.patch(model, "tome:r=2")


def test_parts_of_a_language_model_that_cannot_generate_are_looked_at():
    from transformers import GitConfig, GitModel

    part = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = GitModel(GitConfig(vocab_size=60, vision_config=part | dict(image_size=24, patch_size=4), **part))
    for call in (tr.describe, lambda m: tr.patch(m, "tome:r=2")):
        with pytest.raises(TypeError, match=r"GitModel|no adapter"):
            call(model)


def test_a_tower_without_layers():
    for call in (tr.describe, lambda m: tr.patch(m, "tome:r=2")):
        with pytest.raises(TypeError, match="has no layers"):
            call(timm_vit(depth=0))


def test_the_loop_that_is_advised_is_one_over_the_blocks():
    from open_clip.transformer import VisionTransformer

    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = VisionTransformer(24, 4, 32, 3, 2, 2.0, output_dim=8)

        def forward(self, x):
            return self.visual.transformer.resblocks[0](self.visual._embeds(x))

    with pytest.raises(TypeError, match=r"for block in self.visual.transformer.resblocks: x"):
        tr.patch(Middle(), "tome:r=2")


@pytest.mark.parametrize("as_dict", [True, False])
def test_attention_maps_of_fewer_tokens_are_not_handed_to_other_code(as_dict):
    class Rollout(nn.Module):
        def __init__(self, tower: nn.Module) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, x):
            return self.tower(x, output_attentions=True, return_dict=as_dict)[-1][-1].mean((1, 2))

    model = Rollout(hf("ViTModel", "ViTConfig"))
    model.tower.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(pictures())
        with tr.patched(model, "tome:r=0"):
            assert torch.equal(model(pictures()), want)
        with tr.patched(model, MERGE), pytest.raises(ValueError, match=r"output_attentions=True .* fewer tokens"):
            model(pictures())
        with tr.patched(model.tower, MERGE):  # its caller asked for fewer tokens
            assert model(pictures()).shape[1] < want.shape[1]
