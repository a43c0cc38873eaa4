"""What a packed tower hands out: all units, where a method left fewer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenreduce.adapters.encoders.packed import Packed
from tokenreduce.adapters.encoders.state import lost, set_state, state_of

__all__ = ["expand_states", "expand_tokens", "give_rebuilt"]


def expand_tokens(merger: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Forward hook on a merger: every unit gets its token. Raises ``RuntimeError`` for patches that lost which units
    they are of."""
    packed: Any = state_of(args[0])
    if not isinstance(packed, Packed):
        raise lost(type(merger).__name__)
    return packed.expand(output, 1)


def give_rebuilt(merger: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook on a merger: its units are made of all patches, also of those that a method set aside."""
    packed: Any = state_of(args[0])
    if not isinstance(packed, Packed) or packed.lasting is packed:
        return None
    x, whole = packed.complete(args[0])
    return (set_state(x, whole), *args[1:]), kwargs  # type: ignore[arg-type]


def expand_states(tower: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook on a tower: every hidden state gets its patches back. Raises ``RuntimeError`` where one has lost
    which they are."""
    patches = len(args[0])

    def whole(x: Any) -> Any:
        packed: Any = state_of(x)
        if not isinstance(packed, Packed) and len(x) != patches:
            raise lost("the output")
        return packed.expand(x, packed.layout.unit) if isinstance(packed, Packed) else x

    if getattr(output, "last_hidden_state", None) is not None:
        output.last_hidden_state = whole(output.last_hidden_state)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(whole(x) for x in output.hidden_states)
    return output
