import pytest
import torch
from experiments import SCRIPTS
from published import easydict  # noqa: F401
from web import server  # noqa: F401

# Runs here are compared, bit for bit, with runs in processes of one thread each.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    # Not earlier: asking CUDA is in the way of processes that are forked from this one.
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"experiment scripts found under configs/: {len(SCRIPTS)}")
