"""What the mark `gpu` does, for conftest.py to import."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    # Not earlier: asking CUDA is in the way of processes that are forked from this one.
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
