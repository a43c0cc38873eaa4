"""Names of models: options behind a question mark."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["options_of"]


def options_of(name: str, text: str) -> dict[str, Any]:
    """``img_size=64&pretrained=false`` to values; numbers, true, false and none are read as such.

    ``name`` is the whole, for messages. Raises ``ValueError`` for an option without a value.
    """
    out: dict[str, Any] = {}
    words = {"true": True, "false": False, "none": None}
    for item in filter(None, text.split("&")):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"cannot read the option {item!r} in {name!r}; write ?option=value&option=value")
        try:
            out[key] = words[value.lower()] if value.lower() in words else json.loads(value)
        except ValueError:
            out[key] = value
    return out
