"""--ema: an exponential moving average of the weights, validated and saved beside them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average of a model's parameters over its optimiser steps.

    After step t a parameter's average moves towards it by 1 - min(decay, (1 + t) / (10 + t)), so
    that early averages do not hang on to the initial weights. Running statistics are averages
    already and are taken as they are.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = list(model.parameters())
        self.names = [name for name, _ in model.named_parameters()]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """After optimiser step number `steps`, counted from 1; two launches or so."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averages))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Names and shapes are those of the model, which has been checked before."""
        for name, average in self.state_dict().items():
            average.copy_(state[name])

    @torch.no_grad()
    def restart(self) -> None:
        """Average from the present weights on."""
        torch._foreach_copy_(self.averages, self.parameters)

    def weights_of(self, model: nn.Module) -> dict[str, Tensor]:
        """A state dict of `model` with averaged parameters."""
        return {**model.state_dict(), **self.state_dict()}
