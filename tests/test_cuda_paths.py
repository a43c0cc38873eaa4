"""What a forward does on a CUDA device, as far as it shows without one: tensors without numbers that say that they are
on one. Who asks them for a number would make the host wait for the device; so does a copy between the two."""

from __future__ import annotations

import pytest
import torch
from support import ENCODER_METHODS, tiny_vit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vlms import VLMS, prompts

import tokenreduce as tr
from tokenreduce.adapters.encoders.sizes import sizes_as
from tokenreduce.adapters.language.generation import cache_as, cache_of

#: Beside other tests in one process fake devices were seen to fail; `make gpu` runs these by themselves.
pytestmark = pytest.mark.gpu

#: The number of tokens that it leaves follows from the images, and the host has to know it; and one that makes its
#: windows on the host, once in a forward.
ASKS = {"ats", "t2t-pool"}


class Between(TorchDispatchMode):
    """Notes operators that copy between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()}
        made = {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.dim()}
        if len(given | made) > 1:
            self.seen.append(str(func))
        return out


def on_device(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """``model`` with weights that are on a CUDA device and have no numbers."""

    def fake(t: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(fake(p), requires_grad=False)
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else fake(b)
    return model


@pytest.fixture(scope="module")
def device():
    mode = FakeTensorMode()
    model = on_device(tiny_vit(), mode)
    with mode:
        x = torch.empty(2, 3, 24, 24, device="cuda")
    return mode, model, x


@pytest.mark.parametrize(
    ("name", "form"), [(n, "mask") for n in ENCODER_METHODS if n not in ASKS] + [("tome", "key"), ("diffrate", "key")]
)
@torch.no_grad()
def test_the_device_is_neither_asked_nor_copied_from(name, form, device):
    mode, model, x = device
    with sizes_as(form), tr.patched(model, tr.get_method(f"{name}:keep=0.5")), mode, Between() as between:
        out = model(x)
    assert out.device.type == "cuda"
    assert not between.seen


class Asking(TorchDispatchMode):
    """Notes operators whose outcome the host has to wait for."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name.startswith(self.NAMES):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_a_decode_step_asks_for_no_more_numbers_than_the_stock_models(name):
    vlm = VLMS[name]
    given, token = prompts(vlm, ((9, "i"),)), torch.tensor([[7]])

    def asked(model) -> list[str]:
        cache = cache_of(model(**given, use_cache=True))
        model(input_ids=token, **cache_as(model, cache))
        with Asking() as asking:
            model(input_ids=token, **cache_as(model, cache))
        return asking.seen

    stock = asked(vlm.model)
    for spec in ("visionzip:keep=0.5", "divprune:keep=0.5", "fastv:keep=0.5", "snapkv:keep=0.5", "knorm:keep=0.5"):
        with tr.patched(vlm.model, spec):
            assert len(asked(vlm.model)) <= len(stock), spec
