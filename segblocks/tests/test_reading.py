"""A number is read while the device goes on."""

import pytest
import torch
from fast_models import DEVICES

from segblocks.reading import Reading


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_read(device):
    mask = torch.arange(100, device=device) % 3 == 0
    count = Reading(mask.sum())
    mask.zero_()
    assert count.wait() == 34


@pytest.mark.gpu
def test_what_comes_after_is_not_waited_for():
    mask = torch.ones(5, dtype=torch.bool, device="cuda")
    count = Reading(mask.sum())
    torch.cuda._sleep(2_000_000_000)  # a second
    done = torch.cuda.Event()
    done.record()
    assert count.wait() == 5
    assert not done.query()
