from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tokenreduce.common.pinned import PINNED, faults, is_pinned, load_of_machine


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_a_process_starts_again_with_its_arguments_and_a_pinned_allocator():
    code = (
        "import os, sys; from tokenreduce.common.pinned import is_pinned, pin; before = is_pinned(); pin(); "
        "print(before, is_pinned(), sys.argv[1:])"
    )
    env = {k: v for k, v in os.environ.items() if k not in PINNED}
    out = subprocess.run(
        [sys.executable, "-c", code, "a b", "--c"], capture_output=True, text=True, env=env, check=True
    )
    assert out.stdout.split("\n")[0] == "True True ['a b', '--c']"  # the second time it is pinned already


def test_what_a_measurement_notes():
    assert faults() >= 0
    assert is_pinned() in (True, False)
    load = load_of_machine()
    assert load is None or load >= 0
