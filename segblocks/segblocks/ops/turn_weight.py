"""`turn_weight`: the weight of the convolution that is another one's gradient."""

from torch import Tensor

from .library import define


def _fake(weight):
    outputs, inputs, height, width = weight.shape
    return weight.new_empty((inputs, height, width, outputs)).permute(0, 3, 1, 2)


_turn_weight = define("turn_weight", "(Tensor weight) -> Tensor", _fake)


def turn_weight(weight: Tensor) -> Tensor:
    """(O, I, KH, KW) → (I, O, KH, KW) with its taps in reverse, channels_last; no autograd."""
    return _turn_weight(weight)
