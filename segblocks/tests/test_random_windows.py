"""Windows of random kernel, stride, dilation and padding equal the definition wherever they fit."""

import random

import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, distance, make_grid, make_image
from definition import slow_blocks

from segblocks import to_blocks

BLOCK = 8
CHANNELS = 2


def draw(seed: int):
    """A random operation, and whether its output lines up with the grid."""
    rng = random.Random(seed)
    kind = rng.choice(["conv", "conv", "max", "avg", "transpose"])
    stride = rng.choice([1, 1, 2, 2, 4])
    dilation = rng.choice([1, 1, 2, 3]) if kind in ("conv", "transpose") else 1
    kernel = (rng.randint(1, 7), rng.randint(1, 7))
    reach = [dilation * (k - 1) for k in kernel]
    weight = torch.randn(CHANNELS, CHANNELS, *kernel, dtype=torch.float64)
    if kind == "transpose":
        padding, extra = draw_transposed(rng, reach, stride, dilation)
        settings = {"stride": stride, "padding": padding, "output_padding": extra}
        return (
            lambda x: F.conv_transpose2d(x, weight, dilation=dilation, **settings),
            f"transposed {kernel} {settings} dilation {dilation}",
        )
    own = [rng.randint(0, r // 2) if rng.random() < 0.6 else 0 for r in reach]
    if kind != "conv":
        own = [min(p, k // 2) for p, k in zip(own, kernel)]
    # Draw the rest of the padding for F.pad so that the output usually lines up.
    missing = [r - 2 * p - rng.randint(0, stride - 1) for r, p in zip(reach, own)]
    before = [rng.randint(min(0, m), max(0, m)) for m in missing]
    sides = (before[1], missing[1] - before[1], before[0], missing[0] - before[0])
    ceil, include = rng.random() < 0.4, rng.random() < 0.5
    fill = -torch.inf if kind == "max" else 0.0

    def run(x):
        if any(sides):
            x = F.pad(x, sides, value=fill)
        if kind == "conv":
            return F.conv2d(x, weight, None, stride, tuple(own), dilation)
        if kind == "max":
            return F.max_pool2d(x, kernel, stride, tuple(own), ceil_mode=ceil)
        return F.avg_pool2d(x, kernel, stride, tuple(own), ceil, include)

    return (
        run,
        f"{kind} {kernel} stride {stride} dilation {dilation} pad {own} F.pad {sides} {ceil}",
    )


def draw_transposed(rng, reach, stride, dilation):
    """Padding with which the output is `stride` times the input, where there is one."""
    padding, extra = [], []
    for r in reach:
        surplus = r + 1 - stride
        more = surplus % 2 if surplus >= 0 else -surplus
        extra.append(min(more, max(stride, dilation) - 1))
        padding.append(max(0, (surplus + more) // 2))
    return tuple(padding), tuple(extra)


@pytest.mark.parametrize("chunk", range(8))
def test_random_windows(chunk):
    ran = 0
    for seed in range(chunk * 25, chunk * 25 + 25):
        torch.manual_seed(seed)
        function, text = draw(seed)
        grid = make_grid(["mixed", "one", "mixed", "none", "all"][seed % 5], (1, 2, 3), seed)
        image = make_image(grid, CHANNELS, BLOCK, seed)
        slow_leaf, leaf = (image.clone().requires_grad_() for _ in range(2))
        slow = function(slow_blocks(slow_leaf, grid))
        try:
            mine = function(to_blocks(leaf, grid))
        except NotImplementedError as error:
            if slow.whole and "F.pad (crop)" not in str(error):
                pytest.fail(f"refused although it fits: {text}: {error}")
            continue
        ran += 1
        assert slow.whole, text
        theirs = slow.combine()
        assert distance(mine.combine(), theirs) < TOLERANCE, text
        weight = torch.randn_like(theirs)
        finite = theirs.detach().isfinite()
        grads = [
            torch.autograd.grad((x.combine() * weight)[finite].sum(), y)[0]
            for x, y in ((mine, leaf), (slow, slow_leaf))
        ]
        assert distance(*grads) < TOLERANCE, text
    assert ran > 10
