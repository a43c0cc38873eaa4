"""What the tabs share."""

from __future__ import annotations

import pytest

pytest.importorskip("gradio")

from tokenreduce.demo.common import Slider, keep_slider


@pytest.mark.parametrize(("typed", "taken"), [(1, 5), (15, 15), (1000, 100), (None, 5), (-3, 5), (17.5, 17.5)])
def test_what_one_types_on_the_way_to_a_value_is_taken(typed, taken) -> None:
    assert keep_slider("Left, %", 35, "keep").preprocess(typed) == taken


def test_the_browser_draws_it_as_a_slider() -> None:
    assert Slider(0, 1).get_block_name() == "slider"
