import pytest
import torch
from needs_gpu import pytest_runtest_setup  # noqa: F401

from segblocks.fast import buffers


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    config.addinivalue_line("markers", "slow: takes more than ten seconds on two CPU cores")


def pytest_addoption(parser):
    parser.addoption(
        "--sample",
        type=int,
        default=0,
        metavar="N",
        help="at most N parametrisations of each test, evenly spread, and no memory made NaN: for "
        "compute-sanitizer, under which a test takes a second (default: 0, all)",
    )


@pytest.hookimpl(trylast=True)  # of those that -m and -k have left
def pytest_collection_modifyitems(config, items):
    most = config.getoption("--sample")
    if not most:
        return
    of_test = {}
    for item in items:
        of_test.setdefault((item.path, item.originalname), []).append(item)
    kept = {i for same in of_test.values() for i in same[:: max(1, -(-len(same) // most))]}
    config.hook.pytest_deselected(items=[i for i in items if i not in kept])
    items[:] = [i for i in items if i in kept]


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch, request):
    """New tensors start as NaN, so that an element read before it is written shows."""
    if request.config.getoption("--sample"):  # initcheck looks for that itself
        yield
        return
    monkeypatch.setattr(buffers, "_empty_strided", None)  # which fills nothing
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
