"""Puts a search together: model, data, target, and what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenreduce.bench.resolve import resolve
from tokenreduce.bench.vlms import EMBEDDED as LANGUAGE
from tokenreduce.bench.vlms import pick_device
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import parse
from tokenreduce.core.tuned import Tuned
from tokenreduce.estimation.limits import first_token, seconds_by
from tokenreduce.estimation.lookup import device_named
from tokenreduce.estimation.record import recorded
from tokenreduce.estimation.subject import Ask
from tokenreduce.estimation.subjects import subject_of
from tokenreduce.tuning.scored import ImageScored, QuestionScored, Score, Scored
from tokenreduce.tuning.search import TOLERANCE, Tried, best_of, pareto, search
from tokenreduce.tuning.target import Target, target_of

__all__ = ["Found", "tune"]


@dataclass(frozen=True)
class Found:
    """What :func:`tune` found. ``reduce`` is recommended; ``score`` and ``unreduced`` are of the held-out part, which
    nothing was chosen on; ``pareto`` and ``trials`` have the scores that settings were chosen by, which flatter.
    ``max_drop`` in points says whether ``kept`` holds."""

    model: str
    target: Target
    reduce: str
    share: float
    score: Score
    unreduced: Score
    pareto: tuple[Tried, ...]
    trials: tuple[Tried, ...]
    file: Path
    max_drop: float | None = None

    @property
    def drop(self) -> float:
        """Points lost on the held-out part."""
        return 100 * (self.unreduced.value - self.score.value)

    @property
    def kept(self) -> bool:
        """Whether no more than ``max_drop`` was lost."""
        return self.max_drop is None or self.drop <= self.max_drop

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        plain = {"target": str(self.target), "file": str(self.file), "drop": self.drop, "kept": self.kept}
        return {**asdict(self), **plain}

    def __str__(self) -> str:
        lines = [
            f"{self.model}, {self.target}: {self.reduce}",
            f"  {100 * self.share:.1f} % of the {self.target.label}",
            f"  held out ({self.score.n:,} samples): {_said(self.score)}, unreduced {_said(self.unreduced)}",
        ]
        if not self.kept:
            lines.append(f"  loses {self.drop:.1f} points, more than the {self.max_drop:g} that were allowed")
            least = self.unreduced.value - (self.max_drop or 0.0) / 100
            dearer = next((t for t in self.pareto if t.score >= least and t.share > self.share), None)
            if dearer is not None:
                lines.append(f"  {dearer.reduce} at {100 * dearer.share:.1f} % may lose less (not held out)")
        lines.append(f"  cheap to dear, by the samples that were chosen on ({len(self.trials)} trials):")
        lines += [f"    {100 * t.share:5.1f} %  {100 * t.score:5.1f} %  {t.reduce}" for t in self.pareto]
        return "\n".join([*lines, f'  tr.patch(model, "{self.file}") puts it in'])


def _said(score: Score) -> str:
    return f"{100 * score.value:.1f} ±{100 * score.stderr:.1f} %"


def tune(
    model: str,
    data: str | None = None,
    target: str = "flops=0.5",
    *,
    max_drop: float | None = None,
    stages: Sequence[str] | None = None,
    trials: int = 60,
    limit: int | None = 480,
    batch: int = 32,
    out: str | Path = "runs/tune",
    device: str = "cpu",
    on: str = "h100",
    seed: int = 0,
    fresh: bool = False,
    done: Callable[[Tried, int, Tried | None], None] = lambda tried, number, best: None,
) -> Found:
    """Methods, settings and a split of the budget over stages for a model and data.

    Half of the samples is chosen on (a quarter of these throws bad settings out first); the score that is reported is
    of the other half, measured once at the end. Trials are written to ``out`` one by one, and the same call goes on
    behind the last of them (the sampler then draws anew, so that other settings may follow).

    Args:
        model: as ``tokenreduce bench`` takes it: ``world-vit``, ``world-llava``, a timm name, a Hub id or a folder.
        data: as the benchmarks take it; ``world`` or ``digits`` for embedded models.
        target: ``flops=``, ``kv=`` or ``ttft=`` a share of the unreduced model; ``ttft`` is estimated ``on`` a device
            (:func:`tokenreduce.estimate`), in bf16 (fp32 on ``measured``).
        max_drop: points of the score; where more are lost, that is said, and what was tried that loses less.
        stages: of "projector", "language", "encoder"; all that the model has by default.
        trials, limit, batch, seed: settings tried, samples used, samples per forward, and what draws them.
        done: hears of every trial, its number and the best so far.

    Raises ``ValueError`` for bad settings, too few samples and a target that no setting reaches (with the nearest);
    ``ImportError`` that names the extra ``tune`` where optuna is missing; and what loading model and data raises.
    """
    wanted = target_of(target)
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ValueError(f"trials is an int >= 1, not {trials!r}")
    scored = _scored(model, data, limit, seed, str(pick_device(device)), batch, stages)
    if wanted.kind == "kv" and isinstance(scored, ImageScored):
        raise ValueError(f"{model} has no cache of keys and values; give flops= or ttft=")
    cost = partial(scored.cost, kind=wanted.kind) if wanted.kind != "ttft" else _timed(model, on)
    folder = Path(out)
    log = folder / "trials.jsonl"
    if fresh:
        log.unlink(missing_ok=True)
    settings = {"model": model, "data": data, "limit": limit, "on": on, "target": str(wanted)}
    seen = search(scored, cost, wanted.share, trials, seed, log, settings, done)
    best = best_of(seen, wanted.share)
    if best is None:
        raise ValueError(_unreached(wanted, seen))
    chosen = parse(best.reduce)
    found = Found(
        model, wanted, best.reduce, best.share, scored.score(chosen, "held"), scored.score((), "held"),
        tuple(pareto(seen)), tuple(seen), folder / "tuned.json", max_drop,
    )  # fmt: skip
    facts = {k: v for k, v in found.to_dict().items() if k not in ("model", "reduce", "trials", "file")}
    Tuned(model, scored.family, best.reduce, facts).save(found.file)
    return found


def _scored(
    model: str, data: str | None, limit: int | None, seed: int, device: str, batch: int, stages: Sequence[str] | None
) -> Scored:
    kind, name = resolve(model)
    if data is None:
        own = {
            "world-vit": "world", "world-vit-2": "world2", "digits-vit": "digits", "world-clip-2": "world2-one",
            **LANGUAGE,
        }  # fmt: skip
        if name not in own:
            raise ValueError(f"data is needed for {model}: what tokenreduce bench takes, images or questions")
        data = own[name]
    if kind == "image":
        if stages is not None and tuple(stages) != ("encoder",):
            raise ValueError(f"{model} has the stage encoder only, not {', '.join(stages)}")
        return ImageScored(name, data, limit, seed, device, batch)
    asked = tuple(stages) if stages is not None else ("projector", "language", "encoder")
    return QuestionScored(name, data, limit, seed, device, batch, asked)


def _timed(model: str, on: str) -> Callable[[tuple[Reducer, ...]], float]:
    """Estimated seconds to the first token on a device."""
    dtype = "fp32" if on == "measured" else "bf16"
    seconds = seconds_by(device_named(on, dtype), 1, dtype)
    subject = subject_of(model, Ask())
    known: dict[tuple[Reducer, ...], float] = {}

    def cost(reducers: tuple[Reducer, ...]) -> float:
        if reducers not in known:
            known[reducers] = first_token(recorded(subject, reducers), seconds)
        return known[reducers]

    return cost


def _unreached(wanted: Target, seen: Sequence[Tried]) -> str:
    there = [t for t in seen if t.reduce]
    if not there:
        errors = list(dict.fromkeys(t.error for t in seen if t.error))
        return f"no setting could be measured: {'; '.join(errors[:3]) or 'all were thrown out'}"
    near = min(there, key=lambda t: t.share)
    return (
        f"no setting reaches {wanted}; the nearest of {len(seen)} trials is {near.reduce} at {near.share:.3f}. What is "
        f"left is spent where these stages do not act (a tower in front of them, text, layers before the first that "
        f"acts); take more --stages, or a target of {near.share + TOLERANCE:.2f}"
    )
