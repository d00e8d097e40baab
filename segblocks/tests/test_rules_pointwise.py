"""Functions of each pixel alone equal the definition: activations, arithmetic, dropout."""

import pytest
import torch
from agreement import assert_rule, make_grid, make_image
from torch import nn

from segblocks import to_blocks

ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.LeakyReLU(0.2),
    nn.PReLU(),
    nn.PReLU(4),
    nn.ELU(0.7),
    nn.SELU(),
    nn.CELU(0.8),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    nn.Mish(),
    nn.Hardtanh(-0.5, 0.7),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Softplus(),
    nn.Softsign(),
    nn.LogSigmoid(),
    nn.Threshold(0.1, -1),
    nn.Hardshrink(),
    nn.Softshrink(),
    nn.Tanhshrink(),
    nn.RReLU().eval(),
    nn.Identity(),
]


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
def test_activation(layer):
    assert_rule(layer.double())


IN_PLACE = [
    nn.ReLU(True),
    nn.ReLU6(True),
    nn.LeakyReLU(0.2, True),
    nn.ELU(inplace=True),
    nn.SELU(True),
    nn.CELU(inplace=True),
    nn.SiLU(True),
    nn.Mish(True),
    nn.Hardtanh(inplace=True),
    nn.Hardswish(True),
    nn.Hardsigmoid(True),
    nn.Threshold(0.1, -1, True),
]


@pytest.mark.parametrize("layer", IN_PLACE, ids=str)
def test_activation_in_place(layer):
    def twice(x):
        y = x * 1.0
        out = layer(y)
        return out, y  # y was written to, as with a dense tensor

    assert_rule(twice)


GATES = {
    "channel": torch.linspace(-1, 1, 4, dtype=torch.float64).view(1, 4, 1, 1),
    "channel without batch": torch.linspace(-1, 1, 4, dtype=torch.float64).view(4, 1, 1),
    "image": torch.tensor([0.5, 2.0], dtype=torch.float64).view(2, 1, 1, 1),
    "image and channel": torch.arange(8, dtype=torch.float64).view(2, 4, 1, 1) - 3.5,
    "one number": torch.tensor(1.7, dtype=torch.float64),
    "one element": torch.tensor([1.7], dtype=torch.float64),
}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_arithmetic_with_dense_values_constant_over_space(gate):
    assert_rule(lambda x: x + gate)
    assert_rule(lambda x: gate * x)
    assert_rule(lambda x: gate - x)
    assert_rule(lambda x: x / (gate + 10))
    assert_rule(lambda x: torch.where(x > 0, x, gate))


ARITHMETIC = {
    "scalar": lambda x: 2 - (3 + x * 2 - 1) / 4,
    "reciprocal": lambda x: 1 / (x * x + 1),
    "power": lambda x: x**2 + 2**x + abs(x).pow(0.5),
    "negative": lambda x: -x,
    "methods": lambda x: x.mul(2).add(1).sub(0.5).div(3).clamp(min=-0.2, max=0.4),
    "functions": lambda x: torch.exp(torch.sigmoid(x)) + torch.sqrt(x.abs()) - torch.log(x**2 + 1),
    "clamp": lambda x: torch.clamp(x, 0, 1),
    "compare": lambda x: (x > 0, x <= 0.5, ~(x < 0), (x > 0) & (x < 1)),
    "equal": lambda x: ((x > 0) == (x > 1), x != 0),
    "same dtype": lambda x: (x.double(), x.to(x.dtype), x.type(x.dtype), x.to(x), x.type_as(x)),
    "like": lambda x: (torch.zeros_like(x), torch.ones_like(x), x.clone(), x.detach()),
    "contiguous": lambda x: x.contiguous(memory_format=torch.channels_last),
}  # fmt: skip


@pytest.mark.parametrize("function", ARITHMETIC.values(), ids=ARITHMETIC)
def test_arithmetic(function):
    assert_rule(function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_change_of_dtype(dtype):
    assert_rule(lambda x: x.to(dtype), tolerance=0.1)
    assert_rule(lambda x: x.to(dtype).double(), tolerance=0.1)
    grid = make_grid("mixed")
    assert to_blocks(make_image(grid), grid).to(dtype).combine().dtype == dtype


ARITHMETIC_OF_TWO = {
    "operators": lambda x, y: x + y * x - y / (x * x + 1),
    "functions": lambda x, y: torch.add(x, y, alpha=2) + torch.sub(x, y) * torch.mul(x, y),
    "maximum": lambda x, y: (torch.maximum(x, y), torch.minimum(x, y), torch.max(x, y)),
    "where": lambda x, y: torch.where(x > y, x, y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3) + torch.addcmul(x, x, y),
}


@pytest.mark.parametrize("function", ARITHMETIC_OF_TWO.values(), ids=ARITHMETIC_OF_TWO)
def test_arithmetic_of_two_block_tensors(function):
    assert_rule(function, inputs=2)


def test_in_place_arithmetic_changes_the_left_operand_only():
    def run(x, y):
        z = x * 1.0
        z += y
        z *= 2
        z -= 1
        z /= 3
        z.add_(y)
        z.relu_()
        return z

    assert_rule(run, inputs=2)


def test_in_place_arithmetic_keeps_the_object():
    grid = make_grid("mixed")
    x = to_blocks(make_image(grid), grid)
    y = x * 1.0
    z = y
    z += x
    assert torch.equal(y.pixels, 2 * x.pixels)


@pytest.mark.parametrize("layer", [nn.Dropout(0.3), nn.AlphaDropout(0.3)], ids=str)
def test_dropout_is_the_identity_in_evaluation(layer):
    assert_rule(layer.eval())


@pytest.mark.parametrize("layer", [nn.Dropout2d(0.3)], ids=str)
def test_dropout_of_channels_is_the_identity_in_evaluation(layer):
    assert_rule(layer.eval())


def test_dropout_of_channels_drops_them_whole():
    grid = make_grid("mixed")
    x = to_blocks(torch.ones(2, 200, 16, 24, dtype=torch.float64), grid)
    y = nn.Dropout2d(0.25)(x).combine()
    assert set(y.unique().tolist()) <= {0.0, 1 / 0.75}
    assert torch.equal(y.amax((2, 3)), y.amin((2, 3)))
    assert not torch.equal(y[0], y[1])
    assert (y[:, :, 0, 0] == 0).double().mean() == pytest.approx(0.25, abs=0.1)


def test_dropout_draws_for_every_stored_pixel():
    grid = make_grid("mixed")
    x = to_blocks(torch.ones(2, 50, 16, 24, dtype=torch.float64), grid)
    y = nn.Dropout(0.3)(x).pixels
    assert set(y.unique().tolist()) == {0.0, 1 / 0.7}
    assert (y == 0).double().mean() == pytest.approx(0.3, abs=0.02)
    again = nn.Dropout(0.3)(x).pixels
    assert not torch.equal(y, again)


def raised(x):
    y = x * 1
    z = y
    z **= 2
    return y


def marked(x):
    y = x > 0
    z = y
    z &= x < 1
    z |= x < -2
    return y


@pytest.mark.parametrize("function", [raised, marked])
def test_operators_in_place_change_what_others_hold(function):
    image = torch.randn(1, 2, 8, 8)
    blocks = to_blocks(image, torch.ones(1, 1, 1, dtype=torch.bool))
    assert torch.equal(function(blocks).combine(), function(image))
