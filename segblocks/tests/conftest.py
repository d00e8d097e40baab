import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    config.addinivalue_line("markers", "slow: takes more than ten seconds on two CPU cores")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
