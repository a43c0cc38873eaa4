"""Texts for models with a vocabulary of whole words: a word that is not in it must not pass as another."""

from __future__ import annotations

from typing import Any

__all__ = ["check_words"]


def check_words(tokenizer: Any, text: str, owner: str) -> None:
    """Raise ``ValueError`` that names the words of ``text`` which a transformers ``tokenizer`` of ``owner`` (for the
    message) does not know. Nothing is said of tokenizers that spell words, as those of the published CLIP models."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "model", None)).__name__ != "WordLevel":
        return
    unknown = tokenizer.unk_token_id

    def lacks(words: str) -> bool:
        return unknown in tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]

    if lacks(text):
        odd = [repr(word) for word in dict.fromkeys(text.split()) if lacks(word)]
        raise ValueError(
            f"{owner} does not know the word{'s' if len(odd) > 1 else ''} {', '.join(odd)} of {text!r}; use the words "
            f"of its tokenizer's vocabulary ({', '.join(sorted(w for w in tokenizer.get_vocab() if w.isalpha())[:5])}, "
            f"...)"
        )
