"""A question about an image as a request, and what becomes of the answer."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenreduce.bench.questions import Item

__all__ = ["Form", "image_url", "keep_text"]

#: EXIF tag of how a picture is to be turned.
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Form:
    """How questions are put to a served model.

    Args:
        model: its name on the server.
        prompt: the text of a question, with ``{question}`` in it.
        max_new_tokens: longest answer.

    Raises ``ValueError`` for a ``prompt`` without ``{question}``.
    """

    model: str
    prompt: str = "{question}"
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt:
            raise ValueError(f"--prompt has {{question}} where the question goes, not {self.prompt!r}")

    def body(self, item: Item, keep: int | float | None) -> dict[str, Any]:
        """A greedy chat completion of one image and one text; ``keep`` visual tokens of a server of ours.

        Raises ``OSError`` or ``ValueError`` where the image is missing or broken.
        """
        content = [
            {"type": "image_url", "image_url": {"url": image_url(item)}},
            {"type": "text", "text": self.prompt.replace("{question}", item.text)},
        ]
        made: dict[str, Any] = {
            "model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0,
            "max_tokens": self.max_new_tokens,
        }  # fmt: skip
        if keep is not None:
            made["mm_processor_kwargs"] = {"tokenreduce_keep": keep}
        return made


def image_url(item: Item) -> str:
    """The image of ``item`` as a data URL: the file itself where a decoder gets the same pixels of it, else PNG."""
    picture = item.open()
    if isinstance(item.image, Path):
        from PIL import Image

        with Image.open(item.image) as stored:
            kind = stored.format
            plain = stored.mode == "RGB" and stored.getexif().get(ORIENTATION, 1) == 1
        if plain and kind in ("JPEG", "PNG"):
            return _url(item.image.read_bytes(), kind)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return _url(file.getvalue(), "PNG")


def _url(data: bytes, kind: str) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode('ascii')}"


def keep_text(keep: int | float | None) -> str:
    """
    >>> keep_text(64), keep_text(0.25), keep_text(1.0)
    ('keep=64', 'keep=0.25', 'keep=1.0')
    """
    return "as served" if keep is None else f"keep={keep}"
