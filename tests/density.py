"""Density peaks clustering and videos for tests: plain loops on one sample, in float64."""

from __future__ import annotations

import math

import torch

import tokenreduce as tr


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def film(t: int, n: int, channels: int = 8, *, batch: int = 1, seed: int = 0, still: float = 0.6, shots: int = 2):
    """(B,t*n,C): ``shots`` scenes, each with some tokens that hardly change and others that are new in every frame."""
    out = []
    for b in range(batch):
        g = torch.Generator().manual_seed(1000 * seed + b)
        scenes = torch.randn(shots, n, channels, generator=g)
        resting = torch.rand(shots, n, 1, generator=g) < still
        frames = []
        for f in range(t):
            scene = f * shots // t
            fresh = torch.randn(n, channels, generator=g)
            small = 0.05 + 0.5 * torch.rand(n, 1, generator=g)
            frames.append(torch.where(resting[scene], scenes[scene] + small * fresh, fresh))
        out.append(torch.cat(frames))
    return torch.stack(out)


def rows(x, seed: int = 0):
    """(B,1,1,N) attention that no two tokens share."""
    return torch.rand(len(x), 1, 1, x.shape[1], generator=torch.Generator().manual_seed(seed + 99))


def video(x, t: int, attention=None, **more) -> tr.Evidence:
    n = (x.shape[1] - more.get("protected", 0)) // t
    return tr.Evidence(x, grid=(t, 1, n), attention=rows(x) if attention is None else attention, **more)


def cosine(a, b) -> float:
    a, b = a.double(), b.double()
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else 0.0


def shared_out(total: int, sizes: list[int]) -> list[int]:
    """Largest remainders, ties to the first."""
    if not sum(sizes):
        return [0] * len(sizes)
    exact = [total * s / sum(sizes) for s in sizes]
    out = [math.floor(e + 1e-9) for e in exact]
    while sum(out) < total:
        i = max(range(len(sizes)), key=lambda j: (round(exact[j] - out[j], 9), -j))
        out[i] += 1
    return out


def peaks_of(points: list, count: int, k: int) -> list[int]:
    """Index of the centre that every point joins; -1 for all where there is none."""
    m = len(points)
    if not count:
        return [-1] * m
    if count >= m:
        return list(range(m))
    root = math.sqrt(len(points[0]))
    d = [[float((a.double() - b.double()).norm()) / root for b in points] for a in points]
    density = [math.exp(-sum(v * v for v in sorted(row)[:k]) / min(k, m)) for row in d]
    score = []
    for i in range(m):
        denser = [j for j in range(m) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        score.append(density[i] * (min(d[i][j] for j in denser) if denser else math.inf))
    centres = sorted(sorted(range(m), key=lambda i: -score[i])[:count])
    return [i if i in centres else min(centres, key=lambda c: (d[i][c], c)) for i in range(m)]


def check(plan: tr.Plan, x, want: list[list[tuple[int, dict[int, float]]]]) -> None:
    """``want``: for every sample its outputs in order, each as the token whose place it takes and weights of tokens."""
    valid = plan.validity()
    out = plan.reduce(x)
    for b, outputs in enumerate(want):
        there = slice(None) if valid is None else valid[b]
        assert plan.representatives()[b][there].tolist() == [head for head, _ in outputs]
        expected = torch.stack([sum(w * x[b, i].double() for i, w in mix.items()) for _, mix in outputs])
        torch.testing.assert_close(out[b][there].double(), expected, rtol=1e-4, atol=1e-5)
        source = {i: place for place, (_, mix) in enumerate(outputs) for i, w in mix.items() if w}
        k = plan.representatives().shape[1]
        assert plan.sources()[b].tolist() == [
            source[i] + k - len(outputs) if i in source else -1 for i in range(x.shape[1])
        ]
        same = torch.tensor([mix == {head: 1.0} for head, mix in outputs])
        assert torch.equal(plan.untouched()[b][there], same)
