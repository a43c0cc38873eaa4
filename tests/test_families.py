"""Every encoder family under every method: keep-all, unpatch, batch, FLOPs, on small models of the real classes."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, OTHERS, first_tensor
from support import ENCODER_METHODS, with_keep

import tokenreduce as tr


@pytest.fixture(scope="module", params=[*FAMILIES, *OTHERS])
def family(request):
    torch.manual_seed(0)
    model, inputs = (FAMILIES | OTHERS)[request.param]()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3.0)  # wide activations: small mistakes must show
    return request.param, model.eval(), inputs


def serves(model, name: str) -> bool:
    return name in tr.describe(model).methods()


@pytest.mark.parametrize("name", ENCODER_METHODS)
@torch.no_grad()
def test_family(family, name):
    called, model, inputs = family
    if not serves(model, name):
        with pytest.raises(ValueError, match=r"cannot|needs"):
            tr.patch(model, with_keep(name, 0.5))
        return
    want, keys = first_tensor(model(**inputs)), list(model.state_dict())
    with tr.patched(model, with_keep(name, 1.0)):
        assert torch.equal(first_tensor(model(**inputs)), want), "keep-all is bit-identical"
    if "siglip2, padded" in called and with_keep(name, 0.4).gridded:  # 6x6 and 4x6 patches have no grid in common
        with tr.patched(model, with_keep(name, 0.4)), pytest.raises(ValueError, match="images of one shape per batch"):
            model(**inputs)
        inputs = {k: v[1:] for k, v in inputs.items()}
        want = first_tensor(model(**inputs))
    with tr.patched(model, with_keep(name, 0.4)):
        with tr.record(model) as trace:
            got = first_tensor(model(**inputs))
        alone = first_tensor(model(**{k: v[-1:] for k, v in inputs.items()}))
    assert not torch.equal(got[:, :1], want[:, :1])
    assert torch.isfinite(got).all()
    scale = float(want.abs().max())
    torch.testing.assert_close(got[-1:, :1], alone[:, :1], rtol=1e-4, atol=1e-4 * scale)
    with tr.record(model) as stock:
        assert torch.equal(first_tensor(model(**inputs)), want), "unpatch is bit-identical"
    if name != "ficoco-v":  # whose own products cost more than so few tokens save
        assert trace.flops < stock.flops
    assert list(model.state_dict()) == keys


@torch.no_grad()
def test_two_copies_share_nothing(family):
    """Patching one of two models that share a configuration object leaves the other alone."""
    import copy

    _, model, inputs = family
    other = copy.deepcopy(model)
    if hasattr(model, "config"):
        other.config = model.config
    want = first_tensor(other(**inputs))
    with tr.patched(model, with_keep("tome", 0.5)):
        model(**inputs)
        assert torch.equal(first_tensor(other(**inputs)), want)
