"""The kernels for small dense maps on Hopper: convolutions, excursions, the policy."""

import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, make_grid, make_image
from fast_models import ON_HOPPER, build, picture
from neighbours import extended
from test_fast_dense import DENSE, Layers

from segblocks import BlockGrid, to_blocks
from segblocks.fast import stem
from segblocks.fast.compile import FastModel
from segblocks.fast.dense_fuse import CallStep
from segblocks.fast.dense_run import DenseFunction
from segblocks.fast.dense_trace import record_dense
from segblocks.fast.policy import PolicyKernels
from segblocks.fast.small_conv import SmallConv
from segblocks.fast.steps import Affine
from segblocks.fast.tables import Scale
from segblocks.ops import reference

pytestmark = [*ON_HOPPER, pytest.mark.usefixtures("poisoned_memory")]
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
BOUND = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def noise(*size, dtype=torch.float32):
    return torch.randn(*size, device="cuda").to(dtype)


def last(x):
    """(N, C, H, W) as a map of small_conv."""
    return x.permute(0, 2, 3, 1).contiguous()


def error(found, expected) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


@HALF
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rows", [3, 40, 130])  # each kind of tile
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_small_convolutions(size, stride, rows, relu, dtype):
    for cin, cout in ((64, 64), (24, 19), (128, 200)):
        weight, bias = noise(cout, cin, size, size) / 8, noise(cout)
        x = noise(2, cin, rows, 2 * rows + 1, dtype=dtype)
        packed = SmallConv.pack(weight, bias, dtype, stride=stride, padding=size // 2, relu=relu)
        found = packed(last(x))
        kernel = weight.to(dtype).double()
        expected = F.conv2d(x.double(), kernel, bias.double(), stride, size // 2)
        expected = expected.relu() if relu else expected
        assert found.shape[3] % 8 == 0
        assert not found[..., cout:].any(), "channels beyond the last are zero"
        assert error(found[..., :cout].permute(0, 3, 1, 2), expected) < BOUND[dtype]


@HALF
@pytest.mark.parametrize("rows", [4, 40, 130])
def test_small_convolutions_of_several_resized_maps(rows, dtype):
    parts, size = (64, 24, 8, 40), (rows, rows + 2)
    sizes = (size, (2, 5), (1, 1), (2 * rows, 3 * rows))
    maps = [noise(2, c, *s, dtype=dtype) for c, s in zip(parts, sizes)]
    pre = Affine(noise(sum(parts)), noise(sum(parts)))
    weight, bias = noise(50, sum(parts), 1, 1) / 8, noise(50)
    packed = SmallConv.pack(weight, bias, dtype, parts, pre=pre)
    found = packed(*(last(x) for x in maps), size=size)
    wide = [F.interpolate(x.double(), size, mode="bilinear") for x in maps]
    x = torch.cat(wide, 1) * pre.scale.view(-1, 1, 1) + pre.shift.view(-1, 1, 1)
    expected = F.conv2d(x.relu(), weight.to(dtype).double(), bias.double())
    assert error(found[..., :50].permute(0, 3, 1, 2), expected) < BOUND[dtype]


@HALF
@pytest.mark.parametrize("name", DENSE)
def test_dense_excursions(name, dtype):
    """Every pattern, on the kernels where they fit."""
    net = Layers().to("cuda", dtype)
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    x = noise(2, 16, 12, 20, dtype=dtype).contiguous(memory_format=torch.channels_last)
    program = record_dense(lambda x: DENSE[name][0](net, x), x, own)
    dense = DenseFunction(program, kernels=True)
    convolved = [step for step in dense.steps if not isinstance(step, CallStep)]
    assert len(dense.packed) == len(convolved)
    found, again = dense(x.clone()), dense(x.clone())
    assert torch.equal(found, again)
    expected = DENSE[name][0](net.double(), x.double())
    assert error(found, expected) < 5 * BOUND[dtype]


@HALF
@pytest.mark.parametrize("kind", GRIDS)
def test_splits_into_an_extended_buffer(kind, dtype):
    mask = make_grid(kind)
    for channels, block in ((24, 8), (128, 4), (8, 2)):
        image = make_image(mask, channels, block).to(dtype)
        image = image.contiguous(memory_format=torch.channels_last)
        grid = BlockGrid.from_mask(mask.cuda())
        scale = Scale.of(block, grid.n_high, mask.numel())
        for given in (image, F.pad(image, (0, 0, 0, 0, 0, 8))[:, :channels]):
            given = given.cuda()
            assert stem.has_adjacent_channels(given)
            found = stem.split_extended(given, grid.cells, tuple(mask.shape), scale)
            expected = extended(to_blocks(image, BlockGrid.from_mask(mask)))
            assert error(found.cpu(), expected.double()) < BOUND[dtype]


@HALF
@pytest.mark.parametrize(("block", "by_place"), [(32, False), (64, True), (128, True)])
def test_the_policy(block, by_place, dtype):
    model = build("cuda", policy="reinforce", block=block)
    if by_place:
        model.policy.place.uniform_(-3, 3)
    kernels = FastModel(model, torch.device("cuda", 0), torch.float32, dtype)._engine.policy_kernels
    for n, rows, columns in ((1, 3, 5), (2, 5, 7), (4, 1, 1)):
        image = picture("cuda", rows * block, columns * block, n, dtype=dtype)
        for given in (image, image.contiguous(memory_format=torch.channels_last)):
            scores = kernels.scores(given)
            expected = model.policy.double().scores(given.double(), None)
            assert error(scores, expected) < 5 * BOUND[dtype]
            for count in (0, 1, rows * columns):
                chosen = kernels.spend(given, count)
                grid = reference.select_budget(scores, count)
                made = (chosen.scores, chosen.grid, chosen.slot, chosen.cells)
                wanted = (scores, grid, *reference.build_slots(grid))
                assert all(torch.equal(a, b) for a, b in zip(made, wanted))


def test_only_the_policy_of_this_package_takes_the_kernels():
    model = build("cuda", policy="reinforce", block=48)  # no whole number of pixels a step
    assert PolicyKernels.of(model.policy, torch.float16) is None
    assert PolicyKernels.of(build("cuda", policy="heuristic").policy, torch.float16) is None
    assert PolicyKernels.of(build("cuda").policy, torch.float16) is None, "batch norm not folded"
