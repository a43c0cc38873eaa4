"""How many visual tokens stay, said before an image is encoded; and what vLLM cannot serve, by name.

vLLM makes a prompt of placeholders, gives it room in its cache and shares it out among steps before any image goes
through the encoder. So a method must know from the size of an image alone how many of its tokens stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenreduce.algorithms.projector import Projector
from tokenreduce.core.budget import check_keep, count
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.registry import get_class, list_methods, parse
from tokenreduce.integrations.vllm.names import KEEP

__all__ = ["check_runs", "fitting", "kept", "method_of", "requested", "shortened"]

#: Why vLLM has no place for the methods of a stage.
_STAGES = {
    "encoder": "acts inside the vision tower, whose layers vLLM replaces by its own",
    "language": "acts inside the language model, and vLLM gives all layers of a sequence the same tokens in its cache",
    "cache": "takes keys out of the cache, whose pages all heads and layers of a sequence share in vLLM",
}
_QUESTION = ("text", "clip")


def method_of(spec: Any) -> Projector:
    """The method of ``spec`` that vLLM can serve.

    Raises ``ValueError`` for text that names none, for several, and for one that vLLM has no place for: the reason, and
    methods that fit.
    """
    if not isinstance(spec, str) or not spec.strip():
        raise ValueError(f"the method is text such as 'divprune:keep=64', not {spec!r}")
    reducers = parse(spec, stage="projector")
    if len(reducers) != 1:
        raise ValueError(f"{spec!r} names several methods, and vLLM takes one before the language model")
    (reducer,) = reducers
    if (why := _refusal(reducer)) is not None:
        raise ValueError(
            f"{reducer.spec()} cannot be served by vLLM: it {why}. Methods that fit: {', '.join(fitting())}"
        )
    assert isinstance(reducer, Projector)
    return reducer


def _refusal(reducer: Reducer) -> str | None:
    if not isinstance(reducer, Projector):
        return _STAGES.get(reducer.stage, "does not act before the language model")
    if not {*_QUESTION}.isdisjoint(reducer.required()):
        return "looks at the question, while vLLM keeps what it makes of an image for every question about it"
    if reducer.fixed_count(576, 8) is None:
        return "finds out how many tokens it leaves, and vLLM needs the number before it sees the image; give keep"
    return None


def fitting() -> list[str]:
    """Names of the methods that vLLM can serve, those with a number to be given among them."""
    names = list_methods(stage="projector")
    return [n for n in names if _refusal(get_class(n, "projector")(keep=64)) is None]  # type: ignore[call-arg]


def requested(kwargs: Mapping[str, Any]) -> int | float | None:
    """What a request asks to keep, of its ``mm_processor_kwargs``: a count, a ratio, or None.

    Raises ``ValueError`` for another value, and for another key that is meant for us.
    """
    for key in kwargs:
        if key.startswith("tokenreduce") and key != KEEP:
            raise ValueError(f"unknown key {key!r} in mm_processor_kwargs; a request may say {KEEP}")
    keep = kwargs.get(KEEP)
    check_keep(keep, KEEP)
    return keep


def kept(
    reducer: Projector,
    n: int,
    keep: int | float | None = None,
    *,
    modality: str = "image",
    frames: int = 1,
    tiles: int = 1,
    blank: int = 0,
) -> int:
    """How many of the ``n`` tokens of an image or a video stay.

    Args:
        reducer: the method of the server.
        keep: what the request asks for instead of the method's own ``keep``; a count above ``n`` keeps all.
        modality: "image" or "video". Methods that look across frames leave images as they are.
        frames: of the video, as the language model counts them.
        tiles: in how many parts the image comes, each of which is an image to the method.
        blank: how many of the ``n`` tokens stand for no patch, see :mod:`.blanks`. The method's ``newlines`` says
            whether they stay beside what is kept ("keep"), go ("drop"), or are tokens like others ("rank").
    """
    if reducer.temporal and modality != "video":
        return n
    ranked = reducer.newlines == "rank"
    seen = n if ranked else n - blank
    if seen % tiles:
        raise ValueError(f"an image of {seen} tokens does not come in {tiles} tiles of one size")
    each = seen // tiles
    asked = reducer if keep is None else reducer.at(count(keep, each))
    left = asked.fixed_count(each, frames)
    assert left is not None  # see method_of
    left = min(left, each) * tiles
    return left + blank if reducer.newlines == "keep" else left


def check_runs(ids: list[int], token: int, tiles: int = 1) -> None:
    """Raise ``ValueError`` unless the placeholders ``token`` among ``ids`` of an item stand side by side, or tile by
    tile: a patched model takes every run of them for an image."""
    runs = sum(one == token and (i == 0 or ids[i - 1] != token) for i, one in enumerate(ids))
    if runs not in (1, tiles):
        raise ValueError(
            f"this model writes other tokens between those of an image, which stand in {runs} runs; such models cannot "
            f"be served with fewer tokens; use tr.patch with transformers"
        )


def shortened(ids: list[int], token: int, keep: int, tiles: int = 1) -> list[int]:
    """The placeholders ``ids`` of an item with ``keep`` of its ``token``, as many in each of its ``tiles``: the others
    go from the end of a tile; what stands between them (row ends, marks of tiles) stays.

    >>> shortened([7, 1, 1, 1, 8], 1, 2), shortened([1, 1, 5, 1, 1], 1, 2, tiles=2)
    ([7, 1, 1, 8], [1, 5, 1])
    """
    whole = ids.count(token)
    of_tile, left = whole // max(tiles, 1), keep // max(tiles, 1)
    out, seen = [], 0
    for one in ids:
        if one != token:
            out.append(one)
            continue
        if seen % of_tile < left:
            out.append(one)
        seen += 1
    return out
