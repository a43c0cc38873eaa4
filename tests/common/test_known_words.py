"""Texts with a word that a vocabulary of whole words lacks are refused by name."""

from __future__ import annotations

import pytest

from tokenreduce.common.known_words import check_words

pytest.importorskip("transformers")

from tokenreduce.zoo import world2_texts, world2_words


def test_unknown_words_are_named_once_each() -> None:
    tokenizer = world2_words.clip_tokenizer(world2_texts.END)
    check_words(tokenizer, "What color is the STAR?", "it")
    with pytest.raises(ValueError, match=r"it does not know the words 'dog', 'cat' of 'a dog or a cat or a dog'; use"):
        check_words(tokenizer, "a dog or a cat or a dog", "it")
    with pytest.raises(ValueError, match=r"does not know the word 'photo' of 'a photo of a star'"):
        check_words(tokenizer, "a photo of a star", "it")


def test_tokenizers_that_spell_are_not_asked() -> None:
    class Spelling:
        unk_token_id = 3

        def __call__(self, *_: object, **__: object) -> None:
            raise AssertionError("not asked")

    check_words(Spelling(), "anything", "it")
