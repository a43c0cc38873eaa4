"""Who acts where in an image/video language model, and whether that goes together."""

from __future__ import annotations

from dataclasses import dataclass

from tokenreduce.adapters.language.decode import check_decode
from tokenreduce.adapters.language.decoders import check_layers, window_of
from tokenreduce.adapters.language.evicting import check_evicting, evict_at
from tokenreduce.adapters.language.families import Language
from tokenreduce.adapters.language.packing import check_packing
from tokenreduce.adapters.language.projector.scores import needs_scores
from tokenreduce.adapters.language.steps.pack import Pack
from tokenreduce.adapters.language.towers import Everything
from tokenreduce.core.cache_codec import CacheCodec
from tokenreduce.core.cache_reducer import CacheReducer
from tokenreduce.core.reducer import Reducer

__all__ = ["Acting", "acting_in"]

#: Evidence of where a token comes from, which is noted at the entry of the language model.
WHENCE = ("frames", "places")


@dataclass(frozen=True)
class Acting:
    """Who acts where in a language model of as many layers as ``windows`` (the width of each one's, if it slides).

    ``tower`` are the methods inside the vision tower, ``entry`` the one before the language model, ``layers`` those
    before each layer, ``stepwise`` those that choose before it in every decode step, too, and ``evict`` those that take
    keys out of its cache.
    """

    tower: tuple[Reducer, ...]
    entry: Reducer | None
    layers: tuple[Reducer | None, ...]
    stepwise: tuple[Reducer | None, ...]
    windows: tuple[int | None, ...]
    #: The method that takes keys out of each layer's cache.
    evict: tuple[CacheReducer | None, ...]
    #: The step behind each layer that stores its cache together with another's.
    pack: tuple[Pack | None, ...]

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def first(self) -> int:
        """The first layer before which a method chooses, the depth where none does."""
        here = (i for i in range(self.depth) if self.layers[i] is not None or self.stepwise[i] is not None)
        return next(here, self.depth)

    @property
    def behind(self) -> int:
        """The first layer that may see fewer tokens."""
        return self.first if self.entry is None else 0

    @property
    def inside(self) -> tuple[Reducer, ...]:
        """The methods inside the language model in prefill."""
        return tuple(dict.fromkeys(r for r in self.layers if r is not None))

    @property
    def scoring(self) -> tuple[Reducer, ...]:
        """Those of them that score by what the vision tower saw."""
        return tuple(r for r in self.inside if needs_scores(r))

    @property
    def told(self) -> tuple[str, ...]:
        """What they ask of where tokens come from: "frames" (which frame), "places" (where in an image)."""
        asking = (*self.inside, *(r for r in self.evict if r is not None))
        return tuple(word for word in WHENCE if any(word in r.required() for r in asking))


def acting_in(found: Language, reducers: tuple[Reducer, ...]) -> Acting:
    """Raises ``ValueError`` for methods that act in one place, or that do not go together."""
    depth = len(found.layers)
    staged = {s: tuple(r for r in reducers if r.stage == s) for s in ("encoder", "projector", "language", "cache")}
    inside, cached = staged["language"], staged["cache"]
    layers = _acting_at_layers(inside, depth)
    choosing = [r for r in cached if not isinstance(r, CacheReducer | CacheCodec)]
    windows = tuple(window_of(found.text.config, i) for i in range(depth))  # type: ignore[arg-type]
    present = [[r for r in (layers[i], *choosing) if r is not None and r.acts_at(i, depth)] for i in range(depth)]
    stepwise = tuple(next((r for r in here if r.decode_mode()), None) for here in present)
    evict = evict_at(tuple(r for r in cached if isinstance(r, CacheReducer)), found)
    packing = [r for r in cached if isinstance(r, CacheCodec)]
    pack = check_packing(packing, found, layers, (evict, stepwise), windows)
    acting = Acting(staged["encoder"], _acting_before(staged), layers, stepwise, windows, evict, pack)
    check_evicting(evict, stepwise, found.layers)
    counting = " and ".join(r.spec() for r in inside if r.size_power)
    if any(stepwise) and counting:
        raise ValueError(
            f"{counting} counts merged tokens by their sizes, which methods that choose again in decode do not; set "
            f"size_bias='none', or leave one of them out"
        )
    if acting.behind < depth:
        check_layers(found.layers, acting.behind, layers, stepwise)
        check_decode(present, list(windows), found.layers)
    return acting


def _acting_before(staged: dict[str, tuple[Reducer, ...]]) -> Reducer | None:
    """The method before the language model; one that keeps everything where others have to know which token is of
    what, which shows where it enters."""
    before = staged["projector"]
    asking = [
        r for r in (*staged["language"], *staged["cache"])
        if not {*WHENCE}.isdisjoint(r.required()) or needs_scores(r)
    ]  # fmt: skip
    if len(before) > 1:
        raise ValueError(f"{' and '.join(r.spec() for r in before)} both act before the language model; choose one")
    return before[0] if before else Everything() if staged["encoder"] or asking else None


def _acting_at_layers(inside: tuple[Reducer, ...], depth: int) -> tuple[Reducer | None, ...]:
    """The method before each layer."""
    layers: list[Reducer | None] = []
    for i in range(depth):
        here = [r for r in inside if r.acts_at(i, depth)]
        if len(here) > 1:
            raise ValueError(f"{' and '.join(r.spec() for r in here)} both act before layer {i}; choose other layers")
        layers.append(here[0] if here else None)
    return tuple(layers)
