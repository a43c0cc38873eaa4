"""The search: optuna proposes, few samples throw bad settings out, every trial is written down when it is there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenreduce.common.files import append_line, write_text
from tokenreduce.core.labels import label_of
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import parse
from tokenreduce.tuning.scored import Score, Scored
from tokenreduce.tuning.space import SPLIT, combinations, drafts_of, fitted, suggested

__all__ = ["TOLERANCE", "Tried", "best_of", "pareto", "search"]

#: Every so many trials go to a cheaper and to a dearer budget in turn, for the Pareto set.
ASIDE = 4
AROUND = (0.7, 1.4)
#: A setting is thrown out when it is so many standard errors behind the best on few samples.
BEHIND = 2.0
#: A trial may miss the target by this share of what the unreduced model spends.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Tried:
    """One trial: what was proposed (``params``), the methods as text, their ``share`` of the cost, and the score with
    its standard error on ``n`` samples; ``thrown`` out on the first samples (before them where n is 0: it cannot be as
    cheap as the budget), or failed with an ``error``."""

    params: dict[str, Any]
    reduce: str = ""
    share: float = 1.0
    score: float = 0.0
    stderr: float = 0.0
    n: int = 0
    thrown: bool = False
    error: str = ""

    @property
    def counts(self) -> bool:
        """Whether it was scored on all samples that settings are chosen on."""
        return not self.thrown and not self.error


def search(
    scored: Scored,
    cost: Callable[[tuple[Reducer, ...]], float],
    share: float,
    trials: int,
    seed: int,
    log: Path,
    settings: dict[str, Any],
    done: Callable[[Tried, int, Tried | None], None] = lambda tried, number, best: None,
) -> list[Tried]:
    """``trials`` settings with at most about ``share`` of the cost of the unreduced model.

    ``log`` is a file of one JSON object per trial, behind a line with ``settings``, whose trials count as made;
    ``done`` hears of each new one with its number and the best so far. Raises ``ImportError`` that names the extra
    where optuna is missing, ``ValueError`` for a log of another search.
    """
    optuna = _optuna()
    names = scored.names()
    made = read(log, {**settings, "names": names, "share": share, "seed": seed})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental features of optuna
        sampler = optuna.samplers.TPESampler(seed=seed + len(made), n_startup_trials=10, multivariate=True, group=True)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        starts = drafts_of(names, scored.known)
        for params in starts[len(made) :]:
            study.enqueue_trial(params)
        seen = list(made)
        for old in made:
            study.add_trial(_told(optuna, old, names))
        for number in range(len(made), trials):
            trial = study.ask()
            draft = suggested(trial, names)
            aside = AROUND[number // ASIDE % 2] if number >= len(starts) and number % ASIDE == ASIDE - 1 else 1.0
            tried = _tried(scored, cost, min(share * aside, 0.98), draft, dict(trial.params), seen)
            seen.append(tried)
            append_line(log, json.dumps(asdict(tried)), "choose another place with --out")
            study.tell(trial, **_outcome(optuna, tried))
            done(tried, number + 1, best_of(seen, share))
    return seen


def _outcome(optuna: ModuleType, tried: Tried) -> dict[str, Any]:
    if tried.error:
        return {"state": optuna.trial.TrialState.FAIL}
    return {"values": [tried.score, tried.share]}


def _told(optuna: ModuleType, tried: Tried, names: dict[str, list[str]]) -> Any:
    """A trial of an earlier run, as optuna knows it."""
    known: dict[str, Any] = {"stages": optuna.distributions.CategoricalDistribution(combinations(list(names)))}
    for stage, of in names.items():
        known[f"method_{stage}"] = optuna.distributions.CategoricalDistribution(of)
        known[f"split_{stage}"] = optuna.distributions.FloatDistribution(*SPLIT)
    return optuna.trial.create_trial(
        params=tried.params, distributions={k: known[k] for k in tried.params}, **_outcome(optuna, tried)
    )


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("optuna is not installed: pip install 'tokenreduce[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    module: ModuleType = optuna
    return module


def _tried(
    scored: Scored,
    cost: Callable[[tuple[Reducer, ...]], float],
    share: float,
    draft: Any,
    params: dict[str, Any],
    seen: Sequence[Tried],
) -> Tried:
    try:
        whole = cost(())
        reducers = fitted(draft, cost, share * whole)
        text, got = "+".join(_named(r) for r in reducers), cost(reducers) / whole
        if got > share + TOLERANCE:  # as little as it can, and not little enough
            return Tried(params, text, got, thrown=True)
        first = scored.score(reducers, "first")
        if _behind(first, got, scored, seen):
            return Tried(params, text, got, *first, thrown=True)
        return Tried(params, text, got, *scored.score(reducers, "chosen"))
    except (ValueError, TypeError, RuntimeError, IndexError) as error:  # methods that do not go together, above all
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Tried(params, error=said)


def _named(reducer: Reducer) -> str:
    """The text of a method, with its stage, which several methods of one name need."""
    name = reducer.name if "@" in reducer.name else f"{reducer.name}@{reducer.stage}"
    return label_of(reducer, [name])


def _behind(first: Score, share: float, scored: Scored, seen: Sequence[Tried]) -> bool:
    """Whether a setting that costs no less was clearly better on the same few samples."""
    rivals = [t for t in seen if t.counts and t.share <= share * 1.02]
    if not rivals:
        return False
    best = max(rivals, key=lambda t: t.score)
    other = scored.score(parse(best.reduce), "first")
    spread = (other.stderr**2 + first.stderr**2 + 1 / (4 * first.n**2)) ** 0.5
    return first.value < other.value - BEHIND * spread


def read(log: Path, settings: dict[str, Any]) -> list[Tried]:
    """The trials in ``log``, which is begun where it is not there. A last line that was cut off does not count."""
    head = json.dumps(settings, sort_keys=True)
    if not log.is_file():
        write_text(log, head + "\n", "choose another place with --out")
        return []
    lines = log.read_text(encoding="utf-8").splitlines()
    if not lines or lines[0] != head:
        raise ValueError(
            f"{log} is of another search (model, data, methods, target or seed differ); write to another folder with "
            "--out, or start anew with --fresh"
        )
    out: list[Tried] = []
    for line in lines[1:]:
        try:
            out.append(Tried(**json.loads(line)))
        except (ValueError, TypeError):
            break
    if len(out) < len(lines) - 1:
        write_text(log, "\n".join([head, *lines[1 : 1 + len(out)]]) + "\n", "choose another place with --out")
    return out


def best_of(seen: Sequence[Tried], share: float) -> Tried | None:
    """The best score at no more than ``share``; of equal ones the cheaper. None where no setting is that cheap."""
    there = [t for t in seen if t.counts and t.share <= share + TOLERANCE]
    return max(there, key=lambda t: (t.score, -t.share), default=None)


def pareto(seen: Sequence[Tried]) -> list[Tried]:
    """Settings that none beats at no higher cost, from cheap to dear."""
    out: list[Tried] = []
    for tried in sorted((t for t in seen if t.counts), key=lambda t: (t.share, -t.score)):
        if not out or tried.score > out[-1].score:
            out.append(tried)
    return out
