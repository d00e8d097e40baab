"""What cannot be right on blocks raises, names the operation and says what to do about it."""

import operator

import pytest
import torch
import torch.nn.functional as F
from agreement import make_grid, make_image
from torch import nn
from torch.autograd import forward_ad

from segblocks import BlockGrid, execute_with_grid, to_blocks


@pytest.fixture
def blocks():
    grid = make_grid("mixed")
    return to_blocks(make_image(grid, 4), grid)


W = torch.ones(4, 4, 3, 3, dtype=torch.float64)

UNSUPPORTED = {
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d(1),
    "adaptive_max_pool2d": nn.AdaptiveMaxPool2d(2),
    "max_pool2d_with_indices": nn.MaxPool2d(2, return_indices=True),
    "lp_pool2d": nn.LPPool2d(2, 2),
    "group_norm": nn.GroupNorm(2, 4).double(),
    "instance_norm": nn.InstanceNorm2d(4),
    "local_response_norm": nn.LocalResponseNorm(2),
    "layer_norm": nn.LayerNorm([4, 16, 24]).double(),
    "flatten": nn.Flatten(),
    "unflatten": nn.Unflatten(1, (2, 2)),
    "reshape": lambda x: x.reshape(2, -1),
    "view": lambda x: x.view(2, 4, -1),
    "squeeze": lambda x: x.squeeze(),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "transpose": lambda x: x.transpose(2, 3),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "matmul": lambda x: torch.matmul(x, torch.ones(24, 5, dtype=torch.float64)),
    "__matmul__": lambda x: x @ x,
    "einsum": lambda x: torch.einsum("nchw,ndhw->ncd", x, x),
    "bmm": lambda x: torch.bmm(x, x),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "linear": lambda x: F.linear(x, torch.ones(5, 24, dtype=torch.float64)),
    "mean": lambda x: x.mean(),
    "mean space": lambda x: x.mean((2, 3)),
    "mean width": lambda x: torch.mean(x, dim=-1),
    "sum": lambda x: torch.sum(x),
    "sum batch": lambda x: x.sum(0),
    "amax": lambda x: x.amax(),
    "max": lambda x: x.max(),
    "argmax": lambda x: x.argmax(),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "cumsum": lambda x: x.cumsum(1),
    "topk": lambda x: x.topk(2, dim=1),
    "cat": lambda x: torch.cat((x, x), dim=2),
    "cat default": lambda x: torch.cat((x, x)),
    "stack": lambda x: torch.stack((x, x)),
    "chunk": lambda x: x.chunk(2, dim=3),
    "flip": lambda x: x.flip(3),
    "roll": lambda x: torch.roll(x, 1, 2),
    "unfold": nn.Unfold(3),
    "grid_sample": lambda x: F.grid_sample(x, torch.zeros(2, 3, 3, 2, dtype=torch.float64)),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "interpolate area": lambda x: F.interpolate(x, scale_factor=0.5, mode="area"),
    "interpolate align": lambda x: F.interpolate(
        x, scale_factor=2, mode="bilinear", align_corners=True
    ),
    "interpolate antialias": lambda x: F.interpolate(
        x, scale_factor=0.5, mode="bilinear", antialias=True
    ),
    "interpolate stretched": lambda x: F.interpolate(x, scale_factor=(2, 1)),
    "interpolate size": lambda x: F.interpolate(x, size=(17, 25), mode="bilinear"),
    "interpolate to odd blocks": lambda x: F.interpolate(x, scale_factor=0.125),
    "conv2d": lambda x: F.conv2d(x, W),
    "conv2d too much padding": lambda x: F.conv2d(x, W, padding=2),
    "conv2d stride 2 valid": lambda x: F.conv2d(x, W, stride=2),
    "conv2d of two strides": lambda x: F.conv2d(x, W, stride=(1, 2), padding=1),
    "F.pad twice": lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 5, 1, 1),
    "F.pad crop": lambda x: F.conv2d(F.pad(x, (-1, -1, -1, -1)), W, padding=2),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "F.pad then max_pool2d": lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 5, 1, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, W, stride=2),
    "F.pad then conv_transpose2d": lambda x: F.conv_transpose2d(F.pad(x, (1, 1, 1, 1)), W),
    "conv3d": lambda x: F.conv3d(x, W),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pad circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular").double(),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "pad not taken up": lambda x: F.relu(F.pad(x, (1, 1, 1, 1))),
    "pad at the end": lambda x: F.pad(x, (1, 1, 1, 1)).combine(),
    "__bool__": bool,
    "indexing": lambda x: x[0],
    "indexing space": lambda x: x[:, :, ::2],
    "indexing ellipsis": lambda x: x[..., 0],
    "indexing iteration": list,
    "__setitem__": lambda x: operator.setitem(x, 0, 1.0),
    "numpy": lambda x: x.numpy(),
    "item": lambda x: x.item(),
    "cuda": lambda x: x.cuda(),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_operations_raise(name, blocks):
    """The message names the operation and the way out, `no_blocks`."""
    with pytest.raises(NotImplementedError, match="no_blocks") as error:
        UNSUPPORTED[name](blocks)
    assert name.split()[0].lower() in str(error.value).lower()
    assert "\n" not in str(error.value)


def test_multihead_attention_raises(blocks):
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double()
    with pytest.raises((NotImplementedError, AttributeError), match="no_blocks"):
        layer(blocks, blocks, blocks)


@pytest.mark.parametrize("net", [nn.Conv2d(3, 4, 3), nn.Flatten(), nn.AdaptiveAvgPool2d(1)])
def test_a_network_that_cannot_run_on_blocks_says_so(net):
    grid = make_grid("mixed")
    with pytest.raises(NotImplementedError, match="no_blocks"):
        execute_with_grid(net.double(), make_image(grid), grid)


def test_strides_that_do_not_divide_the_block_name_the_block_size(blocks):
    deep = nn.Sequential(*(nn.Conv2d(4, 4, 3, 2, 1) for _ in range(3))).double()
    with pytest.raises(ValueError, match="block_size"):
        deep(blocks)
    with pytest.raises(ValueError, match="block_size"):
        F.max_pool2d(blocks, 8)
    with pytest.raises(ValueError, match="block_size"):
        F.pixel_unshuffle(blocks, 8)


def test_padding_same_with_stride(blocks):
    with pytest.raises(ValueError, match="stride 1"):
        F.conv2d(blocks, W, stride=2, padding="same")


def test_attributes_that_blocks_lack_are_attribute_errors(blocks):
    for name in ("T", "data", "is_sparse", "grad", "no_such_thing", "__array__"):
        assert not hasattr(blocks, name)


# -- operands ------------------------------------------------------------------------------------

PAIRS = {
    "add": operator.add,
    "mul": operator.mul,
    "cat": lambda a, b: torch.cat((a, b), 1),
    "maximum": torch.maximum,
    "in place": operator.iadd,
}


@pytest.mark.parametrize("function", PAIRS.values(), ids=PAIRS)
def test_blocks_of_different_grids_are_refused(function, blocks):
    """Even equal masks: one bookkeeping object is shared by identity."""
    other = to_blocks(make_image(blocks.grid.mask, 4), blocks.grid.mask)
    with pytest.raises(ValueError, match=r"to_blocks\(x, blocks\.grid\)"):
        function(blocks, other)


@pytest.mark.parametrize("function", PAIRS.values(), ids=PAIRS)
def test_blocks_of_different_size_are_refused(function, blocks):
    with pytest.raises(ValueError, match="resize"):
        function(blocks, F.avg_pool2d(blocks, 2))


@pytest.mark.parametrize("function", PAIRS.values(), ids=PAIRS)
def test_a_dense_picture_is_refused(function, blocks):
    with pytest.raises(ValueError, match=r"to_blocks\(x, blocks\.grid\)"):
        function(blocks, make_image(blocks.grid.mask, 4))


@pytest.mark.parametrize(
    "shape", [(24,), (16, 24), (4,), (4, 1), (3, 1, 1, 1), (1, 4, 16, 1), (1, 1, 4, 1, 1)]
)
def test_dense_operands_that_vary_over_space_are_refused(shape, blocks):
    with pytest.raises(ValueError, match=r"per-channel|to_blocks"):
        blocks + torch.ones(shape, dtype=torch.float64)


def test_channel_counts_that_differ_are_an_error(blocks):
    other = to_blocks(make_image(blocks.grid.mask, 3), blocks.grid)
    with pytest.raises(RuntimeError):
        blocks + other
    with pytest.raises(RuntimeError):
        blocks + torch.ones(1, 3, 1, 1, dtype=torch.float64)


def test_weights_of_another_dtype_are_an_error(blocks):
    with pytest.raises(RuntimeError):
        F.conv2d(blocks, W.float(), padding=1)


# -- images and grids ----------------------------------------------------------------------------

IMAGE = torch.zeros(2, 3, 16, 24)
GRID = make_grid("mixed")


@pytest.mark.parametrize(
    ("image", "grid", "error", "message"),
    [
        (IMAGE, GRID.int(), TypeError, "bool tensor"),
        (IMAGE, GRID[0], TypeError, r"\(N, Gh, Gw\)"),
        (IMAGE, [[True]], TypeError, "list"),
        (IMAGE, None, TypeError, "NoneType"),
        (IMAGE, GRID[:, :0], ValueError, "no blocks"),
        (IMAGE, GRID[:1], ValueError, "batch"),
        (IMAGE[..., :23], GRID, ValueError, "pad the image"),
        (torch.zeros(2, 3, 18, 27), GRID, ValueError, "even block size"),
        (IMAGE[..., :2, :3], GRID, ValueError, "even block size"),
        (IMAGE[..., :0, :0], GRID, ValueError, "even block size"),
        (IMAGE[..., :12], GRID, ValueError, "even block size"),
        (IMAGE[0], GRID, TypeError, r"\(N, C, H, W\)"),
        (IMAGE.byte(), GRID, TypeError, "uint8"),
        (IMAGE.to(torch.complex64), GRID, TypeError, "complex64"),
        (IMAGE.numpy(), GRID, TypeError, "ndarray"),
        (IMAGE.to("meta"), GRID, ValueError, r"grid\.to\(image\.device\)"),
    ],
)
def test_images_and_grids_that_do_not_fit(image, grid, error, message):
    with pytest.raises(error, match=message) as caught:
        to_blocks(image, grid)
    assert "\n" not in str(caught.value)


def test_splitting_blocks_again_is_refused(blocks):
    with pytest.raises(TypeError, match="DualResTensor"):
        to_blocks(blocks, blocks.grid)


def test_bookkeeping_is_shared_by_identity(blocks):
    other = to_blocks(make_image(blocks.grid.mask, 4), blocks.grid)
    assert other.grid is blocks.grid
    assert isinstance(blocks.grid, BlockGrid)
    assert torch.equal((blocks + other).pixels, blocks.pixels + other.pixels)


def test_forward_mode_says_that_there_is_none():
    """It would go on with zeros."""
    net = nn.Conv2d(3, 2, 3, padding=1)
    grid = BlockGrid.from_mask(torch.ones(1, 2, 2, dtype=torch.bool))
    x = torch.randn(1, 3, 16, 16)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda image: execute_with_grid(net, image, grid), (x,), (x,))
    with forward_ad.dual_level():
        execute_with_grid(net, x, grid)  # of no tangent nothing is lost


def test_resizing_of_a_grid_that_exists_is_the_grids_own():
    mask, x = torch.tensor([[[True, False]]]), torch.randn(1, 3, 8, 16)
    with pytest.raises(ValueError, match="BlockGrid that was made without"):
        execute_with_grid(nn.Identity(), x, BlockGrid.from_mask(mask), legacy_upsample=True)


def test_dimensions_and_places_that_are_not_there():
    blocks = to_blocks(torch.randn(1, 4, 8, 8), torch.ones(1, 1, 1, dtype=torch.bool))
    for call in (lambda: blocks.sum(5), lambda: torch.cat([blocks, blocks], -6)):
        with pytest.raises(IndexError, match="along dimension"):
            call()
    with pytest.raises(NotImplementedError, match=r"'where'.*no_blocks"):
        torch.where(blocks > 0)
