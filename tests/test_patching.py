from __future__ import annotations

import pytest
import torch
from support import images, tiny_vit
from torch import nn

import tokenreduce as tr


def logits(model):
    with torch.no_grad():
        return model(images())


def test_patch_returns_the_model_and_shows_in_print():
    model = tiny_vit()
    plain = repr(model)
    assert tr.patch(model, tr.ToMe(r=3)) is model
    assert "Block[tome:r=3]" in repr(model)
    tr.unpatch(model)
    assert repr(model) == plain


def test_text_and_reducers_are_the_same():
    a, b = tiny_vit(), tiny_vit()
    assert torch.equal(logits(tr.patch(a, "tome:r=3")), logits(tr.patch(b, tr.ToMe(r=3))))


def test_two_methods_in_different_layers_combine():
    model = tr.patch(tiny_vit(), "tome:r=[8,8]+tome_kth:layers=[4],k=2")
    with torch.no_grad(), tr.record(model) as trace:
        model(images())
    assert trace.tokens == [29, 21, 21, 21, 11, 11]
    composed = trace.plan
    assert (composed.n, composed.k) == (37, 11)


def test_two_methods_in_one_layer_are_refused():
    model = tiny_vit()
    with pytest.raises(ValueError, match="both act in layer 0"):
        tr.patch(model, "tome:r=3+tome_kth")
    assert "tokenreduce" not in repr(vars(model.blocks[0]))


def test_patching_twice_and_unpatching_nothing():
    model = tr.patch(tiny_vit(), tr.ToMe(r=1))
    with pytest.raises(ValueError, match="unpatch"):
        tr.patch(model, tr.ToMe(r=1))
    wrapped = nn.Sequential(model)
    with pytest.raises(ValueError, match="unpatch"):
        tr.patch(wrapped, tr.ToMe(r=1))
    with pytest.raises(ValueError, match="through its parent"):
        tr.unpatch(model.blocks)
    tr.unpatch(wrapped)
    with pytest.raises(ValueError, match="not patched"):
        tr.unpatch(model)


def test_a_wrapped_model_is_found():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_vit()

        def forward(self, x):
            return self.inner(x * 2)

    model = Normalised()
    want = logits(model)
    tr.patch(model, tr.ToMe(r=3))
    assert not torch.equal(logits(model), want)
    assert torch.equal(logits(tr.unpatch(model)), want)


@pytest.mark.parametrize("bad", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 3, 1))])
def test_models_without_adapter_list_the_supported_ones(bad):
    with pytest.raises(TypeError, match=rf"no adapter for {type(bad).__name__}.*VisionTransformer.*SigLIP2"):
        tr.patch(bad, tr.ToMe(r=1))
    with pytest.raises(TypeError, match="no adapter"):
        tr.describe(bad)


def test_other_bad_calls():
    with pytest.raises(ValueError, match="no method given"):
        tr.patch(tiny_vit())
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module"):
        tr.patch("vit", tr.ToMe(r=1))
    with pytest.raises(ValueError, match="lists 9 layers but the model has 6"):
        tr.patch(tiny_vit(), tr.ToMe(r=[1] * 9))


def test_a_failed_patch_leaves_the_model_as_it_was():
    model = tiny_vit()
    want, attributes = logits(model), set(vars(model))
    with pytest.raises(ValueError, match="lists 9"):
        tr.patch(model, tr.ToMe(r=[1] * 9))
    model.blocks[3].forward = model.blocks[3].forward
    with pytest.raises(ValueError, match="forward of its own"):
        tr.patch(model, tr.ToMe(r=1))
    del model.blocks[3].forward
    assert set(vars(model)) == attributes
    assert torch.equal(logits(model), want)
    assert {type(b).__name__ for b in model.blocks} == {"Block"}


def test_a_failing_forward_leaves_the_model_usable():
    model = tr.patch(tiny_vit(), tr.ToMe(r=3))
    want = logits(model)
    with pytest.raises(ValueError, match="NaN in the tokens"):
        model(torch.full((1, 3, 24, 24), float("nan")))
    with pytest.raises((RuntimeError, AssertionError)):
        model(torch.zeros(1, 3, 25, 25))
    assert torch.equal(logits(model), want)


def test_context_manager_and_decorator_undo_also_after_errors():
    model = tiny_vit()
    want = logits(model)
    with tr.patched(model, tr.ToMe(r=3)) as inside:
        assert inside is model
        assert not torch.equal(logits(model), want)
    assert torch.equal(logits(model), want)
    with pytest.raises(ZeroDivisionError), tr.patched(model, "tome:r=3"):
        1 / 0  # noqa: B018
    assert torch.equal(logits(model), want)

    @tr.patched(model, tr.ToMe(r=3))
    def reduced():
        return logits(model)

    assert not torch.equal(reduced(), want)
    assert not torch.equal(reduced(), want)
    assert torch.equal(logits(model), want)


def test_factories_and_classes_build_patched_models():
    @tr.reduce_tokens(tr.ToMe(r=3))
    def build():
        return tiny_vit()

    @tr.reduce_tokens("tome:r=3")
    def build_with_transform():
        return tiny_vit(), "transform"

    @tr.reduce_tokens(tr.ToMe(r=3))
    class Model(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.inner, self.scale = tiny_vit(), scale

        def forward(self, x):
            return self.inner(x) * self.scale

    class Child(Model):
        pass

    want = logits(build())
    assert torch.equal(logits(build_with_transform()[0]), want)
    assert torch.equal(logits(Model(1.0)), want)
    assert not torch.equal(logits(Child(1.0)), want), "a subclass is not patched before it is complete"
    assert not torch.equal(logits(tr.unpatch(build())), want)
    with pytest.raises(TypeError, match=r"holds no nn\.Module"):
        tr.reduce_tokens("tome:r=3")(lambda: 3)()


def test_traces_count_tokens_and_flops():
    model = tiny_vit()
    with torch.no_grad(), tr.record(model) as stock:
        model(images(1))
    assert stock.tokens == []
    assert stock.plan is None
    tr.patch(model, tr.ToMe(r=4))
    with torch.no_grad(), tr.record(model) as trace:
        model(images(1))
    assert trace.tokens == [33, 29, 25, 21, 17, 13]
    assert [p.k for p in trace.plans] == trace.tokens
    assert 0 < trace.flops < stock.flops
    with torch.no_grad(), tr.record(model, flops=False, timing=True) as timed:
        model(images(1))
    assert timed.flops == 0
    assert timed.seconds > 0


def test_flops_are_what_the_formula_says():
    """2 FLOPs per multiply-add: attention half on n tokens, MLP half on what is left."""
    model = tr.patch(tiny_vit(), tr.ToMe(r=4))
    with torch.no_grad(), tr.record(model) as trace:
        model(images(1))
    c, n, want = 32, 37, 0
    for left in trace.tokens:
        similarity = ((n - 1) // 2) * (n // 2) * 16  # even places behind the class token with odd ones
        want += 4 * n * c * c + 2 * n * n * c + similarity + left * 4 * c * c
        n = left
    want += 36 * (3 * 16) * c + c * 7
    assert trace.flops == 2 * want


def test_a_clamped_r_is_noted_in_the_trace():
    model = tr.patch(tiny_vit(), tr.ToMe(r=16))
    with torch.no_grad(), tr.record(model) as trace:
        model(images(1))
    assert trace.tokens == [21, 11, 6, 4, 3, 2]
    assert trace.notes[0] == "tome: r=16 clamped to 10 at layer 1 (21 tokens, 1 protected)"
    with pytest.warns(UserWarning, match="r=16 is more than some layers can remove"):
        model(images(1))


def test_describe_says_what_fits():
    model = tiny_vit()
    text = str(tr.describe(model))
    assert "6 layers, tokens 1 + 6x6 = 37" in text
    assert "active   none" in text
    assert "tome" in tr.describe(model).methods()
    tr.patch(model, tr.ToMe(r=2))
    assert "active   tome:r=2" in str(tr.describe(model))


def test_lost_state_is_an_error():
    model = tr.patch(tiny_vit(), tr.ToMe(r=2))
    with pytest.raises(RuntimeError, match="did not reach block 3"):
        model.blocks[3](torch.randn(1, 9, 32))
