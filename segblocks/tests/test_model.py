"""SegBlocksModel and execute_with_grid: any size, any structure of outputs."""

import copy
import pickle
from collections import defaultdict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, distance, make_grid, make_image
from definition import slow_execute
from networks import image, net
from torch import nn

from segblocks import (
    SegBlocksModel,
    build_policy,
    execute_with_grid,
)
from segblocks.borders import crop_output
from segblocks.policy import Decision, Policy, ReinforcePolicy

BLOCK = 16
Pyramid = namedtuple("Pyramid", ["fine", "coarse"])


# -- any size ------------------------------------------------------------------------------------

SIZES = [(48, 64), (47, 64), (48, 63), (33, 17), (1, 1), (15, 50), (16, 16), (49, 65)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_any_size_is_padded_and_cropped(size, stride):
    """The result is that of the image padded with zeros, cut to the image at the output stride."""
    model = SegBlocksModel(net(stride), build_policy("random", BLOCK, 0.5))
    x = image(*size)
    torch.manual_seed(3)
    result = model(x)
    height, width = (-(-s // BLOCK) for s in size)
    assert result.grid.shape == (2, height, width)
    assert result.logits.shape == (2, 5, -(-size[0] // stride), -(-size[1] // stride))
    padded = torch.zeros(2, 3, height * BLOCK, width * BLOCK, dtype=x.dtype)
    padded[..., : size[0], : size[1]] = x
    expected = slow_execute(model.net, padded, result.grid)
    expected = expected[..., : result.logits.shape[2], : result.logits.shape[3]]
    assert distance(result.logits, expected) < TOLERANCE


@pytest.mark.parametrize("size", SIZES)
def test_all_high_is_dense_on_the_padded_image(size):
    model = SegBlocksModel(net(2), build_policy("random", BLOCK))
    x = image(*size)
    padded = F.pad(x, (0, -size[1] % BLOCK, 0, -size[0] % BLOCK))
    expected = model.net(padded)[..., : -(-size[0] // 2), : -(-size[1] // 2)]
    assert distance(model(x, budget=1.0).logits, expected) < TOLERANCE


def test_only_pictures_are_cropped():
    """Of 33×33 padded to 64×64: maps of any stride, channels last too; not tokens, not grids."""
    shapes = {
        (2, 5, 64, 64): (2, 5, 33, 33),
        (2, 5, 16, 16): (2, 5, 9, 9),
        (2, 5, 128, 128): (2, 5, 66, 66),
        (2, 5, 48, 48): (2, 5, 25, 25),
        (2, 5, 96, 96): (2, 5, 50, 50),
        (2, 64, 64, 5): (2, 33, 33, 5),
        (2, 64, 64): (2, 33, 33),
        (2, 8, 64): (2, 8, 64),
        (2, 5, 5, 5): (2, 5, 5, 5),
        (2, 7): (2, 7),
    }
    for shape, expected in shapes.items():
        cropped = crop_output({"x": torch.zeros(shape)}, (64, 64), (33, 33))["x"]
        assert cropped.shape == expected


def test_legacy_upsample_reaches_the_network():
    body = nn.Sequential(net(2), nn.Upsample(scale_factor=2, mode="bilinear"))
    results = []
    for legacy in (False, True):
        model = SegBlocksModel(body, build_policy("middle", BLOCK), legacy_upsample=legacy)
        result = model(image())
        expected = slow_execute(body, image(), result.grid, legacy)
        assert distance(result.logits, expected) < TOLERANCE
        results.append(result.logits)
    assert distance(*results) > 1e-2


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)]
)
def test_images_of_another_kind_are_refused(x):
    model = SegBlocksModel(net(), build_policy("random", BLOCK))
    with pytest.raises(TypeError, match="floating point"):
        model(x)


def test_blocks_too_small_for_the_network_name_the_block_size():
    model = SegBlocksModel(net(4), build_policy("random", 4))
    with pytest.raises(ValueError, match="block_size"):
        model(image(16, 16))


# -- what the network returns ----------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.fine, self.coarse, self.wrap = net(1), net(4), wrap

    def forward(self, x):
        return self.wrap(self.fine(x), self.coarse(x))


STRUCTURES = {
    "dict": lambda a, b: {"out": a, "aux": b, "name": "x"},
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, [b, None]],
    "named tuple": Pyramid,
    "nested": lambda a, b: {"a": (a, {"b": b}), "n": 3},
    "defaultdict": lambda a, b: defaultdict(list, {"out": a, "aux": b}),
}


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [x for item in value for x in tensors(item)]


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_of_outputs(name):
    heads = Heads(STRUCTURES[name])
    result = SegBlocksModel(heads, build_policy("middle", BLOCK))(image(47, 63))
    dense = heads(image(48, 64))
    assert type(result.logits) is type(dense)
    fine, coarse = tensors(result.logits)
    assert fine.shape == (2, 5, 47, 63)
    assert coarse.shape == (2, 5, 12, 16)
    x = F.pad(image(47, 63), (0, 1, 0, 1))
    assert distance(fine, slow_execute(heads.fine, x, result.grid)[..., :47, :63]) < TOLERANCE
    out = execute_with_grid(heads, image(48, 64), torch.ones(2, 3, 4, dtype=torch.bool))
    for mine, theirs in zip(tensors(out), tensors(dense), strict=True):
        assert distance(mine, theirs) < TOLERANCE


def test_label_maps_are_outputs_too():
    """Without channels, and repeated where blocks are low: nothing lies between two classes."""
    grid = make_grid("mixed")
    labels = execute_with_grid(lambda x: x.argmax(1), make_image(grid, 5), grid)
    assert labels.dtype == torch.int64
    assert labels.shape == (2, 16, 24)
    assert torch.equal(labels, slow_execute(lambda x: x.argmax(1), make_image(grid, 5), grid))


def test_the_result_is_a_record():
    result = SegBlocksModel(net(), build_policy("reinforce", BLOCK).double())(image())
    assert result.grid.dtype == result.sampled.dtype == torch.bool
    assert result.scores.shape == result.log_probs.shape == result.probs.shape == (2, 3, 4)
    assert result.share.dim() == 0
    assert float(result.share) == pytest.approx(float(result.grid.double().mean()))
    with pytest.raises(AttributeError):
        result.grid = None


def test_state_dict_has_net_and_policy():
    model = SegBlocksModel(net(), build_policy("reinforce", BLOCK))
    assert {name.split(".")[0] for name in model.state_dict()} == {"net", "policy"}
    other = SegBlocksModel(net(), build_policy("reinforce", BLOCK))
    other.load_state_dict(model.state_dict())


def test_models_can_be_copied_and_pickled():
    model = SegBlocksModel(net(), build_policy("random", BLOCK))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        runs = []
        for each in (model, other):
            torch.manual_seed(0)
            runs.append(each(image()).logits)
        assert torch.equal(*runs)


def test_gradients_reach_net_and_image():
    model = SegBlocksModel(net(), build_policy("random", BLOCK))
    x = image(47, 63).requires_grad_()
    model(x).logits.square().sum().backward()
    assert (x.grad.abs().sum((1, 2, 3)) > 0).all()
    assert all(p.grad.abs().sum() > 0 for p in model.net.parameters())


# -- policies of one's own -----------------------------------------------------------------------


class Upper(Policy):
    """The upper rows of blocks; says no more than where."""

    def forward(self, image, budget=None, block_gain=None):
        grid = torch.zeros(self.grid_shape(image), dtype=torch.bool)
        grid[:, :2] = True
        return Decision(grid, grid)


class Generous(ReinforcePolicy):
    """Rounds up to all blocks."""

    def settle(self, decision):
        return self.promote(decision, decision.grid.numel())


@pytest.mark.parametrize(("kind", "high"), [(Upper, 2 / 3), (Generous, 1)])
def test_policies_that_decide_in_their_own_way_do_so_with_an_objective(kind, high):
    torch.manual_seed(0)
    model = SegBlocksModel(net(2), kind(BLOCK)).float()
    x = image(48, 64).float()
    result = model(x)
    assert float(result.share) == pytest.approx(high)
    again = model(x, objective=lambda output: output)
    assert torch.equal(again.grid, result.grid)
    assert again.n_high == result.grid.sum()
