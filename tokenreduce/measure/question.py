"""One prompt with images as a model takes it: through the processor's chat template, or a plain form without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tokenreduce.common.images import as_rgb
from tokenreduce.common.words import counted

__all__ = ["Question", "ask", "prompt_text", "unknown_words"]

#: Processors of models that were trained on another form than images, line break, prompt.
FORMS = {
    **dict.fromkeys(
        ("LlavaProcessor", "LlavaNextProcessor", "LlavaNextVideoProcessor", "VideoLlavaProcessor"),
        "USER: {images}\n{prompt} ASSISTANT:",
    ),
    "PaliGemmaProcessor": "{images}{prompt}",
}


@dataclass(frozen=True)
class Question:
    """``text`` is what the tokenizer got, one placeholder per image; ``inputs`` are the model's, a batch of one.

    ``remake(model)`` makes inputs again that hold features of the vision tower, which must be those of the patched one.
    """

    prompt: str
    images: tuple[Image.Image, ...] = field(repr=False)
    text: str
    inputs: dict[str, Any] = field(repr=False)
    remake: Callable[[Any], dict[str, Any]] | None = field(default=None, repr=False)


def ask(processor: Any, images: Sequence[Image.Image], prompt: str) -> Question:
    """``images`` in front of ``prompt``, as one turn of a user that the model is to answer.

    The processor's chat template writes the text. A processor without one gets the form that its family was trained
    on: ``USER: <image>\\n... ASSISTANT:`` for LLaVA (Vicuna's form; one placeholder and line break per image), images
    and prompt for PaliGemma, and otherwise one placeholder per image, each on a line, above the prompt. A prompt that
    holds the processor's image token already is taken as it stands.

    Raises ``ValueError`` for an empty prompt, no image, another number of image tokens than images, and whatever the
    processor refuses.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; ask something about the image")
    if not images:
        raise ValueError("no image is given; give at least one")
    pictures = tuple(map(as_rgb, images))
    text = prompt_text(processor, len(pictures), prompt)
    settings: dict[str, Any] = {}
    bos = getattr(processor.tokenizer, "bos_token", None)
    if bos and text.startswith(bos):  # else it would be there twice
        settings["add_special_tokens"] = False
    try:
        made = dict(processor(images=list(pictures), text=[text], return_tensors="pt", **settings))
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{type(processor).__name__} cannot read the prompt with its images: {error}") from error
    made.pop("labels", None)  # PaliGemma's; a loss is not wanted
    return Question(prompt, pictures, text, made)


def prompt_text(processor: Any, count: int, prompt: str, kind: str = "image") -> str:
    """What the tokenizer gets for ``prompt`` with ``count`` images, or of another ``kind`` "video"; see :func:`ask`."""
    token = getattr(processor, f"{kind}_token", None)
    if token and token in prompt:
        if prompt.count(token) != count:
            raise ValueError(
                f"the prompt has {prompt.count(token)} {token} for {counted(count, kind)}; write one for each"
            )
        return prompt
    if getattr(processor, "chat_template", None) is not None:
        content = [{"type": kind}] * count + [{"type": "text", "text": prompt}]
        turn = [{"role": "user", "content": content}]
        text = str(processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        if token and token not in text:
            raise ValueError(f"the processor's chat template writes no {token} for the {kind}; correct or delete it")
        return text
    if not token:
        raise ValueError(
            f"{type(processor).__name__} has neither a chat template nor an {kind}_token; save one with a chat template"
        )
    form = FORMS.get(type(processor).__name__, "{images}\n{prompt}")
    between = "" if "\n" not in form else "\n"
    return form.format(images=between.join([token] * count), prompt=prompt)


def unknown_words(tokenizer: Any, question: Question) -> list[str]:
    """Words of a prompt that the tokenizer cannot tell from each other: what a model says to them is a guess.

    ``["some characters of the prompt"]`` where no single word is to blame, [] where all is known.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not bool((question.inputs["input_ids"] == unknown).any()):
        return []
    strange = [w for w in question.prompt.split() if unknown in tokenizer(w, add_special_tokens=False)["input_ids"]]
    return list(dict.fromkeys(strange)) or ["some characters of the prompt"]
