from __future__ import annotations

import pytest
import torch
from thinned import left_out


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_yours(tmp_path_factory):
    """Commands that tests start keep nothing in the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENREDUCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    fast = [item for item in items if hasattr(item, "callspec") and not item.get_closest_marker("slow")]
    cases = {(item.nodeid.partition("[")[0], tuple(item.callspec._idlist)): item for item in fast}
    for case in left_out(cases):
        cases[case].add_marker(pytest.mark.slow)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
