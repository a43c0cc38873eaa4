"""Reducers: methods with their settings. A method is a frozen dataclass with one pure function, ``plan``."""

from __future__ import annotations

import difflib
import functools
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from tokenreduce.core.evidence import Look
from tokenreduce.core.plan import Plan
from tokenreduce.core.settings import check
from tokenreduce.core.specs import format_spec

__all__ = [
    "METHODS", "STAGES", "Reducer", "check_size_bias", "register", "size_power",
]  # fmt: skip

STAGES = ("encoder", "projector", "language", "cache", "diffusion")
#: Where in an encoder block a plan is applied: on the image before the first block, on the block's input, between
#: attention and MLP, or on the block's output.
POSITIONS = ("input", "before", "middle", "after")
#: What an adapter can gather. ``attention`` stands for queries and keys; ``before`` is the sub-layer's input, inside a
#: language model that of the layer before. There, ``ahead`` makes keys, queries, values and attention those of the
#: layer that the method acts before instead of the one before it, and ``plain`` then those before their rotation where
#: positions have several axes (M-RoPE), while ``unrotated`` then has queries and keys before their rotation in every
#: model, with those behind it beside them (``attention.used``); ``middle`` lets it act between attention and MLP of the
#: layer before; ``prompt`` are the features at the model's entry, ``norm`` its final norm, ``frames`` says which frames
#: of a video the tokens come from, ``places`` where in an image they are, ``history`` how many visual tokens there
#: were.
#: At an encoder's input, ``pixels`` are those of every patch, in 8-bit levels, in the place of features.
#: Between vision encoder and language model, ``tower`` are queries and keys of blocks of the vision tower, ``cls`` its
#: class token, ``head`` its pooling head, ``pixels`` what it was given, ``text`` the question in the language model's
#: space, ``clip`` patches and question in a CLIP model's, ``through`` what enters the projector for every token, and
#: the projector as a function.
#: At the cache stage, ``rotary`` are the tables that turned the keys.
#: A method inside a language model that needs ``tower`` gets its scores, see :meth:`Reducer.tower_scores`.
EVIDENCE = (
    "keys", "queries", "values", "attention", "before", "text", "times", "ahead", "plain", "middle", "prompt", "norm",
    "tower", "cls", "clip", "crops", "frames", "history", "head", "pixels",
    "places", "unrotated", "through", "rotary",
)  # fmt: skip


#: Names of powers of a size by which attention counts the key of a merged token: as if all were still there, damped,
#: once.
SIZE_BIAS = {"log": 1.0, "sqrt": 0.5, "none": 0.0}


def size_power(value: str | float) -> float:
    """The power that ``size_bias=value`` stands for. Raises ``ValueError`` for one that is neither a name nor in
    [0, 1]."""
    if isinstance(value, str) and value in SIZE_BIAS:
        return SIZE_BIAS[value]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"size_bias is one of {tuple(SIZE_BIAS)} or a power in [0, 1], not {value!r}")
    return float(value)


def check_size_bias(value: str | float | None) -> None:
    """Raise ``ValueError`` unless ``value`` is None or one that :func:`size_power` knows."""
    if value is not None:
        size_power(value)


#: What methods answered to before, and do for one release.
RENAMED = {
    "acts": "acts_at", "gathers": "required", "wishes": "optional", "looks": "tower_blocks", "site": "acting_position",
    "later": "decode_mode", "mark": "tower_scores",
}  # fmt: skip


#: Words of :data:`EVIDENCE` that were others before.
RENAMED_NEEDS = {"films": "frames"}


def _words(method: str, needs: tuple[str, ...]) -> tuple[str, ...]:
    """What a ``method`` needs, in today's words."""
    for old in RENAMED_NEEDS.keys() & {*needs}:
        warnings.warn(f"{method} needs {RENAMED_NEEDS[old]!r} now, not {old!r}", DeprecationWarning, stacklevel=4)
    return tuple(RENAMED_NEEDS.get(need, need) for need in needs)


def _in_todays_words(required: Callable[[Any], tuple[str, ...]]) -> Any:
    @functools.wraps(required)
    def ask(self: Any) -> tuple[str, ...]:
        return _words(type(self).__name__, required(self))

    return ask


#: Every method by its name; class statements write here.
METHODS: dict[str, type[Reducer]] = {}


def _known(name: str) -> type[Reducer]:
    return METHODS[name]


#: How a class is found by its name: the registry, which knows where to look for files, puts its own way here.
FIND: list[Callable[[str], type[Reducer]]] = [_known]


def register(kind: type[Reducer]) -> None:
    """Add a method class; called by its class statement. Raises ``ValueError`` if another class has its name."""
    known = METHODS.get(kind.name)
    if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"two methods are called {kind.name!r}: {known.__module__} and {kind.__module__}")
    METHODS[kind.name] = kind


@dataclass(frozen=True)
class Reducer:
    """Base of all methods.

    A subclass names itself in its class statement and is then known to the registry::

        @dataclass(frozen=True)
        class Mine(Reducer, name="mine", stage="encoder", needs=("keys",), paper="2210.09461"):
            keep: int | float = 1.0
            def plan(self, evidence): ...

    ``needs`` lists the evidence an adapter must gather, ``position`` where in an encoder block the plan acts. What its
    fields are annotated with is what settings take: values of another kind are a ``ValueError`` before its own
    ``__post_init__`` runs, see :func:`tokenreduce.core.settings.check`.
    Encoder methods have a field ``keep`` (the share or number of patch tokens left after the last layer), which is
    what benchmarks sweep.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[str] = "encoder"
    paper: ClassVar[str] = ""
    title: ClassVar[str] = ""
    position: ClassVar[str] = "middle"
    needs: ClassVar[tuple[str, ...]] = ()
    #: Whether samples of a batch may keep different numbers of tokens (plans with ``valid``).
    ragged: ClassVar[bool] = False
    #: Whether an encoder method lays tokens out on the grid of the image.
    gridded: ClassVar[bool] = False
    #: Whether an encoder method only sets tokens aside, which are rebuilt behind the last block: its plan is a
    #: :class:`~tokenreduce.core.plan.Rebuild` in front of one block (position "before"), attention of the first
    #: ``as_layer`` blocks from there on is over all tokens, and ``per`` says whether "image" or "all" is a row.
    rebuilds: ClassVar[bool] = False
    #: Whether an encoder method merges whole frames of a video behind a block (position "after"), in towers that see
    #: the frames of a video as a batch: it is shown a :class:`~tokenreduce.core.evidence.FrameEvidence`.
    merges_frames: ClassVar[bool] = False
    #: The first block of a tower that any settings of an encoder method can name; it needs that one.
    first_block: ClassVar[int] = 0
    #: Whether a method of the language or cache stage needs layers without sliding windows up to the last, the last two
    #: at least, whatever its settings are.
    unwindowed: ClassVar[bool] = False
    #: The settings, on reducers that are in a model; see :mod:`tokenreduce.core.compiled`.
    _fixed: ClassVar[tuple[tuple[str, str, Any], ...]] = ()

    def __init_subclass__(
        cls,
        *,
        name: str = "",
        stage: str | None = None,
        needs: tuple[str, ...] | None = None,
        paper: str | None = None,
        position: str | None = None,
        title: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in RENAMED.items():
            if callable(vars(cls).get(old)):
                warnings.warn(f"{cls.__name__}.{old} is {new} now", DeprecationWarning, stacklevel=2)
                setattr(cls, new, vars(cls)[old])
        cls.name = name
        if stage is not None:
            cls.stage = stage
        if cls.stage in ("language", "cache") and "required" in vars(cls):
            cls.required = _in_todays_words(cls.required)  # type: ignore[method-assign]
        if needs is not None:
            cls.needs = _words(cls.__name__, needs)
        if position is not None:
            cls.position = position
        if paper is not None:
            cls.paper = paper
        cls.title = title or cls.__name__
        unknown = [n for n in cls.needs if n not in EVIDENCE]
        if cls.stage not in STAGES or cls.position not in POSITIONS or unknown:
            raise TypeError(
                f"{cls.__name__}: stage is one of {STAGES}, position one of {POSITIONS}, needs among {EVIDENCE}"
            )
        if "__post_init__" in vars(cls):
            cls.__post_init__ = _checked_first(cls.__post_init__)  # type: ignore[method-assign]
        if name:
            register(cls)

    def __post_init__(self) -> None:
        if type(self).__post_init__ is Reducer.__post_init__:
            check(self)

    # -- what a method says ----------------------------------------------------------------------------------------
    def plan(self, evidence: Any) -> Plan:
        """Which of the N tokens become which of K; a pure function of the evidence."""
        raise NotImplementedError("abstract")

    def fixed_count(self, present: int, frames: int = 1) -> int | None:
        """How many of the ``present`` tokens of an image, or of a video of so many ``frames``, stay where size and
        settings alone say it; None where it depends on what is seen, or the method does not say. Engines that make a
        prompt before its images are encoded need it."""
        return None

    def acts_at(self, layer: int, depth: int) -> bool:
        """Whether the method does something in 0-based ``layer`` of ``depth``. Raises ``ValueError`` if it cannot."""
        return True

    def parts(self) -> tuple[Reducer, ...]:
        """What acts where this method is put: itself, and behind it others at later stages where its settings say so.
        They are no methods that a user names; their :meth:`spec` is this one's."""
        return (self,)

    def frame_segments(self, evidence: Any) -> Tensor | None:
        """(B,T) 0-based segment of every frame, for methods with :attr:`merges_frames`: asked of what the last of their
        merges left (a :class:`~tokenreduce.core.evidence.FrameEvidence`), for the evidence of a method before the
        language model. None where nobody wants to know."""
        return None

    def required(self) -> tuple[str, ...]:
        """The evidence that these settings need; :attr:`needs` unless a method overrides it."""
        return self.needs

    def optional(self) -> tuple[str, ...]:
        """Evidence that these settings use where a model has it, and do without elsewhere."""
        return ()

    def acting_position(self) -> str:
        """Where in the block these settings act; :attr:`position` unless a method overrides it."""
        return self.position

    @property
    def drops_at_input(self) -> bool:
        """Whether an encoder method drops patches by their pixels before the first block; others at the input resize
        the image."""
        return self.acting_position() == "input" and "pixels" in self.required()

    def tower_blocks(self) -> tuple[Look, ...]:
        """Blocks of a vision tower in front of a language model whose queries and keys the method reads."""
        return ()

    def decode_mode(self) -> str:
        """Whether the method chooses again in every decode step: "" (no), "hide" (among the tokens whose keys are
        cached), or "revive" (among all; one that it let go before comes back). ``plan`` is then asked with the tokens
        that the new one attended to in the layer before, itself last: ``attention`` is its row, ``x`` has no channels,
        and ``earlier`` is the step before."""
        return ""

    def tower_scores(self, evidence: Any) -> Tensor:
        """(B,N) numbers for the visual tokens of one view of an image, from what the vision tower saw of them: a pure
        function of ``evidence`` (a :class:`~tokenreduce.core.evidence.ImageEvidence`). For language-stage methods that
        need ``tower``: it is asked once, at the entry of the language model, and ``evidence.scores`` has the
        answer."""
        raise NotImplementedError("abstract")

    @property
    def proportional(self) -> bool:
        """Whether later attention gets log size as key bias (the ``prop_attn`` field where a method has one)."""
        return bool(getattr(self, "prop_attn", False))

    @property
    def size_power(self) -> float:
        """Power of a merged token's size by which later attention counts its key: by the ``size_bias`` field where a
        method has one, else 1 or 0, see :attr:`proportional`."""
        value = getattr(self, "size_bias", None)
        return float(self.proportional) if value is None else size_power(value)

    # -- text and JSON -----------------------------------------------------------------------------------------------
    def spec(self) -> str:
        """Short text such as ``tome:r=13`` that :func:`tokenreduce.get_method` reads back."""
        return format_spec(self.name, self._changed())

    def _changed(self) -> dict[str, Any]:
        out = {}
        for f in fields(self):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if (value := getattr(self, f.name)) != default:
                out[f.name] = value
        return out

    def to_json(self) -> str:
        """All settings as JSON; read back by :meth:`from_json`."""
        return json.dumps({"method": self.name, **{f.name: getattr(self, f.name) for f in fields(self)}})

    @staticmethod
    def from_json(text: str | Mapping[str, Any]) -> Reducer:
        """A reducer from :meth:`to_json`'s text or an equal mapping. Raises ``ValueError`` for unknown names."""
        given = json.loads(text) if isinstance(text, str) else text
        if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
            raise ValueError("a reducer's JSON is an object with a key 'method', the method's name, and its settings")
        settings = dict(given)
        return build(FIND[0](settings.pop("method")), settings)

    def __str__(self) -> str:
        return self.spec()


def _under_its_old_name(old: str, new: str) -> Any:
    def ask(self: Reducer, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(f"{type(self).__name__}.{old} is {new} now", DeprecationWarning, stacklevel=2)
        return getattr(self, new)(*args, **kwargs)

    ask.__name__, ask.__doc__ = old, f"The old name of :meth:`{new}`."
    return ask


for _old, _new in RENAMED.items():
    setattr(Reducer, _old, _under_its_old_name(_old, _new))


def _checked_first(own: Callable[..., None]) -> Callable[..., None]:
    """``own``, a class's ``__post_init__``, behind the check of what kinds its settings are."""

    @functools.wraps(own)
    def checked(self: Reducer, *args: Any) -> None:
        if type(self).__post_init__ is checked:  # else a subclass calls it, and has checked
            try:
                check(self)
            except ValueError as error:
                raise ValueError(f"{error}{_more(str(error), own, self, *args)}") from None
        own(self, *args)

    return checked


def _more(error: str, own: Callable[..., None], *args: Any) -> str:
    """What the method itself says about settings of a wrong kind: it knows the values that it takes, too."""
    try:
        own(*args)
    except ValueError as other:
        return f" ({str(other).removesuffix(', not ' + error.rpartition(', not ')[2].partition(';')[0])})"
    except Exception:  # it was not made for such values
        return ""
    return ""


def build(kind: type[Reducer], settings: Mapping[str, Any]) -> Reducer:
    """``kind(**settings)`` with an error that lists the valid names. Lists become tuples, so reducers hash."""
    known = [f.name for f in fields(kind)]
    for key in settings:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ValueError(f"{kind.name} has no setting {key!r}{hint} It takes: {', '.join(known) or 'none'}.")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
