from __future__ import annotations

import pytest

from tokenreduce.core.tuned import Tuned, is_tuned, read_tuned


def test_a_file_goes_there_and_back(tmp_path):
    made = Tuned("world-vit", "timm", "tome:r=8", {"score": 0.5})
    path = made.save(tmp_path / "sub" / "tuned.json")
    assert read_tuned(path, "timm") == made


def test_files_of_other_kinds_are_refused(tmp_path):
    path = Tuned("world-vit", "timm", "tome:r=8").save(tmp_path / "tuned.json")
    with pytest.raises(ValueError, match=r"found for world-vit, a timm, and this model is a LlavaModel; .*tome:r=8"):
        read_tuned(path, "LlavaModel")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_tuned(tmp_path / "no.json", "timm")
    for text in ("{", "[]", "{}", '{"format": "other"}', '{"format": "tokenreduce-tuned-1", "model": "x"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="was not written by tokenreduce tune"):
            read_tuned(path, "timm")


def test_which_texts_are_files():
    assert is_tuned("runs/tune/tuned.json")
    assert not is_tuned("tome:r=8")
    assert not is_tuned("fastv:file=a.json")
    assert not is_tuned(None)
