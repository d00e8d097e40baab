import torch
from experiments import SCRIPTS
from needs_gpu import pytest_runtest_setup  # noqa: F401
from published import easydict  # noqa: F401
from web import server  # noqa: F401

# Runs here are compared, bit for bit, with runs in processes of one thread each.
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"experiment scripts found under configs/: {len(SCRIPTS)}")
