"""ApET's choice against the steps of its card, in plain loops; `apet` and `apet-llm` share it."""

from __future__ import annotations

import pytest
import torch
from mixed import LAYOUTS, kept_of, mixed
from visual import ORIGINS, visual

import tokenreduce as tr


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(x, keep, basis_tokens, start, *, kept=False, by_place=True, ridge=1e-5):
    """{place: vector} of what is left of one image (N,C), by the card."""
    x, n = x.double(), len(x)
    size = basis_tokens if keep > basis_tokens else keep // 2
    basis = [start][:size]
    while len(basis) < size:
        rest = [i for i in range(n) if i not in basis]
        near = {i: min(float((x[i] - x[j]).norm()) for j in basis) for i in rest}
        basis.append(max(rest, key=lambda i: (near[i], -i)))
    error = [float(v.norm()) for v in x]
    if basis:
        rows = x[basis]
        inverse = torch.linalg.inv(rows @ rows.T + ridge * torch.eye(size, dtype=torch.double))
        error = [float((v - (v @ rows.T @ inverse) @ rows).norm()) for v in x]
    if kept:
        others = sorted((i for i in range(n) if i not in basis), key=lambda i: (-error[i], i))
        carriers, slots = others[: keep - size], basis
    else:
        order = sorted(range(n), key=lambda i: (-error[i], i))[:keep]
        carriers, slots = order[: keep - size], order[keep - size :]
        slots = sorted(slots) if by_place else slots
    out = {i: [x[i]] for i in carriers}
    for i in range(n):
        if i in carriers or i in slots:
            continue
        cosine = {c: float(x[i] @ x[c] / (x[i].norm() * x[c].norm())) for c in carriers}
        out[max(sorted(carriers), key=lambda c: (cosine[c], -c))].append(x[i])
    left = {i: torch.stack(rows).mean(0) for i, rows in out.items()}
    left.update({slot: x[slot if kept else basis[j]] for j, slot in enumerate(slots)})
    return left


@pytest.mark.parametrize("n", [5, 17, 40])
@pytest.mark.parametrize("keep", [1, 3, 4, 0.4, 15])
@pytest.mark.parametrize("basis", ["slots", "kept"])
def test_before_the_language_model(n, keep, basis):
    x = noise(2, n, 24, seed=n)
    method = tr.ApET(keep=keep, basis_token_num=4, basis=basis, start=2)
    plan, want = method.plan(tr.Evidence(x)), method.total(n)
    if want >= n:
        assert plan.is_identity
        return
    got = plan.reduce(x)
    if basis == "slots" and want > n - (4 if want > 4 else want // 2):  # which basis tokens stay hangs on rounding
        assert torch.isfinite(got).all()
        return
    for b in range(2):
        left = reference(x[b], want, 4, 2, kept=basis == "kept")
        assert plan.representatives()[b].tolist() == sorted(left)
        for slot, i in enumerate(sorted(left)):
            torch.testing.assert_close(got[b, slot], left[i].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("basis", ["slots", "kept"])
def test_inside_the_language_model(basis):
    evidence = mixed(LAYOUTS)
    plan = tr.ApETLLM(layer=2, keep=5, basis_token_num=2, basis=basis, start=1).plan(evidence)
    got = plan.reduce(evidence.x)
    for b, layout in enumerate(LAYOUTS):
        where = [i for i, c in enumerate(layout) if c == "v"]
        left = reference(evidence.x[b, where], 5, 2, 1, kept=basis == "kept", by_place=False)
        left = {where[i]: v for i, v in left.items()}
        kept = kept_of(plan, b)
        assert [i for i in kept if layout[i] == "v"] == sorted(left)
        for slot, i in enumerate(kept, plan.k - len(kept)):
            want = left[i].float() if i in left else evidence.x[b, i]
            torch.testing.assert_close(got[b, slot], want, rtol=1e-4, atol=1e-4)


def test_the_draw_is_of_the_image_and_the_seed():
    x = noise(3, 30, 8)
    plans = [tr.ApET(keep=9, basis_token_num=3, seed=s).plan(tr.Evidence(x)) for s in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    alone = tr.ApET(keep=9, basis_token_num=3).plan(tr.Evidence(x[1:2]))
    assert torch.equal(alone.reduce(x[1:2])[0], plans[0].reduce(x)[1])


def test_units_of_patches_keep_the_basis_in_its_place():
    e = visual(ORIGINS["units"])
    auto, kept = (tr.ApET(keep=6, basis_token_num=2, start=0, basis=b).plan(e) for b in (None, "kept"))
    assert auto == kept
    plain = visual(ORIGINS["square"])
    assert tr.ApET(keep=6, start=0).plan(plain) == tr.ApET(keep=6, start=0, basis="slots").plan(plain)


def test_equal_tokens():
    plan = tr.ApET(keep=4, basis_token_num=2, start=0).plan(tr.Evidence(torch.ones(1, 9, 5)))
    torch.testing.assert_close(plan.reduce(torch.ones(1, 9, 5)), torch.ones(1, 4, 5))


@pytest.mark.parametrize("bad", [{"basis": "own"}, {"ridge": 0.0}, {"basis_token_num": 0}, {"start": -1}, {"seed": -1}])
@pytest.mark.parametrize("method", ["apet", "apet-llm"])
def test_bad_settings(bad, method):
    kind = {"apet": tr.ApET, "apet-llm": tr.ApETLLM}[method]
    with pytest.raises(ValueError, match=next(iter(bad))):
        kind(**bad)


def test_where_the_step_inside_acts():
    assert [tr.ApETLLM().acts_at(i, 32) for i in (15, 16)] == [False, True]
    with pytest.raises(ValueError, match="layers 0 to 3"):
        tr.ApETLLM(layer=4).acts_at(0, 4)
