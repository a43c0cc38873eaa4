"""Operators of a narrow model, read at the true widths, against FLOPs counted on the true model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tokenreduce as tr
from tokenreduce.core.flops import count_flops
from tokenreduce.estimation.ops import DECODE, PREFILL, PROJECTOR, TOWER
from tokenreduce.estimation.record import recorded
from tokenreduce.estimation.recorder import Recorder, Sites
from tokenreduce.estimation.scale import Heads, Scale
from tokenreduce.estimation.subject import Ask
from tokenreduce.estimation.subjects import subject_of

pytest.importorskip("timm")
pytest.importorskip("transformers")
from vlms import VLMS

TINY = "timm:vit_tiny_patch16_224?img_size=64&depth=3&patch_size=8"


def flops(made, *parts: str, own: bool = True) -> float:
    return sum(op.flops for op in made.ops if op.part in parts and (own or not op.own))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    VLMS["llava"].model.config.save_pretrained(folder)
    return subject_of(str(folder), Ask(prompt=8))


@pytest.mark.parametrize("spec", ["", "tome:r=6", "evit:base_keep_rate=0.6"])
def test_flops_of_an_encoder_are_those_of_the_true_model(spec):
    subject = subject_of(TINY, Ask())
    true = subject.build()
    if spec:
        tr.patch(true, spec)
    want = count_flops(subject.forward, true, subject.inputs)
    made = recorded(subject, tr.parse(spec) if spec else ())
    assert flops(made, TOWER) == pytest.approx(want, rel=0.02 if spec else 1e-9)
    assert sum(p.numel() for p in true.parameters()) == subject.parameters
    assert not tr.describe(subject.narrow).active


@pytest.mark.parametrize("spec", ["", "divprune:keep=5", "fastv:layer=2,keep=0.25"])
def test_flops_of_a_prefill_are_those_of_the_true_model(llava, spec):
    true = llava.build()
    if spec:
        tr.patch(true, spec)
    want = count_flops(llava.forward, true, llava.inputs)
    made = recorded(llava, tr.parse(spec) if spec else ())
    assert flops(made, TOWER, PROJECTOR, PREFILL) == pytest.approx(want, rel=0.03 if spec else 1e-9)


def test_tokens_and_cache_are_those_of_the_budget(llava):
    assert (llava.visual, llava.text) == (16, 8)
    made = recorded(llava, tr.parse("divprune:keep=5+fastv:layer=2,keep=2"))
    assert made.cached == (13.0, 13.0, 10.0, 10.0)
    assert made.rows(PREFILL) == {0: 13.0, 1: 13.0, 2: 10.0, 3: 10.0}
    assert made.tokens(PREFILL) == 11.5
    assert {op.inner for op in made.of(DECODE) if op.kind == "attention"} == {14.0, 11.0}
    assert {op.rows for op in made.of(DECODE) if op.weights} == {1.0}
    assert not any(op.own for op in recorded(llava).ops)
    assert {op.part for op in made.ops if op.own} == {PROJECTOR, PREFILL}


def test_fused_attention_is_noted_and_left_out():
    recorder = Recorder(Scale({}, {}, {TOWER: (Heads(2, 1, 4), Heads(8, 2, 64))}))
    q, k = torch.randn(3, 2, 5, 4), torch.randn(3, 1, 7, 4)
    with recorder.running(Sites((), ())):
        out = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    assert out.shape == q.shape
    assert torch.equal(out[0, 1, 3], k[0, 0].mean(0))
    (op,) = recorder.ops
    assert (op.kind, op.rows, op.inner, op.outer) == ("attention", 5.0, 7.0, 64.0)
    assert op.flops == 3 * 8 * 5 * 7 * 4 * 64


def test_products_with_weights_count_the_true_ones():
    narrow, true = torch.nn.Linear(6, 10), torch.nn.Linear(600, 1000)
    recorder = Recorder(Scale.between(narrow, true, {}), batch=2)
    with torch.no_grad(), recorder.running(Sites((), ())):
        narrow(torch.randn(2, 7, 6))
    (op,) = [op for op in recorder.ops if op.kind == "matmul"]
    assert (op.rows, op.inner, op.outer, op.weights) == (7.0, 600.0, 1000.0, 600_000.0)
    assert op.flops == 2 * 7 * 600_000


def test_views_are_free_and_errors_leave_no_hook():
    recorder = Recorder(Scale({}, {}))
    layer = torch.nn.Linear(4, 4)
    x = torch.zeros(2, 3, 4)
    with recorder.running(Sites((), [layer])):
        x.transpose(1, 2)[:, 1:].unsqueeze(0).expand(4, 2, 3, 3)
    assert recorder.ops == []
    with pytest.raises(RuntimeError), recorder.running(Sites((), [layer])):
        layer(torch.zeros(3))
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_other_parameters_are_refused():
    with pytest.raises(ValueError, match="other parameters than the true one: bias"):
        Scale.between(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False), {})
