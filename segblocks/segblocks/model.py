"""A network, a policy, and the forward pass that joins them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from .borders import crop_output, pad_to_blocks
from .dispatch import current_recorder
from .graphs import TrainingGraphs
from .grid import BlockGrid
from .policy import Decision, Policy
from .policy.base import block_mean
from .policy.rank import DisabledPolicy
from .reading import Reading
from .structure import map_structure
from .tensor import DualResTensor, cut_image, to_blocks

# Methods of a policy that settle the number of high blocks. Where a policy has its own, it is asked
# as everywhere; else the number is read when all that does not need it has been launched.
_DECIDING = ("forward", "settle")


def no_blocks(function: Callable) -> Callable:
    """Let `function` see dense tensors: combine its block arguments, call it, split its results.

    For what needs the whole picture (global pooling, attention). Called with dense tensors only,
    it is `function` itself, so a network wrapped this way still runs without blocks.
    """

    @wraps(function)
    def dense(*args, **kwargs):
        blocks = _find_blocks((*args, *kwargs.values()))
        if blocks is None:
            return function(*args, **kwargs)
        dense_args, dense_kwargs = combine_all(args), combine_all(kwargs)
        result = _split_all(function(*dense_args, **dense_kwargs), blocks.grid)
        recorder = current_recorder()
        if recorder is not None:
            recorder.record("no_blocks", dense, args, kwargs, result)
        return result

    return dense


def execute_with_grid(
    net: nn.Module,
    image: Tensor,
    grid: Tensor | BlockGrid,
    legacy_upsample: bool = False,
) -> Any:
    """Run an ordinary network on blocks of two resolutions.

    Args:
        net: any module of supported operations; unmodified, but for `no_blocks` round what needs
            the whole picture.
        image: (N, C, H, W) floating point.
        grid: (N, Gh, Gw) bool, True = full resolution, H/Gh = W/Gw even; or its bookkeeping.
        legacy_upsample: resize inside each block alone, as the published release did.

    Returns:
        What the network returns, block tensors combined to dense ones.
    """
    blocks = cut_image(image, grid, legacy_upsample, at_once=False)
    if not blocks.is_cuda or torch.compiler.is_compiling():
        return combine_all(net(blocks))
    with blocks.grid.later:
        return combine_all(net(blocks))


@dataclass(frozen=True)
class SegBlocksOutput(Decision):
    """What `SegBlocksModel` returns: the decision (see `Decision`) and the network's output.

    Attributes:
        logits: (N, classes, h, w) at the network's output stride, cropped to the image; whatever
            structure of tensors the network returns.
    """

    logits: Any = None

    @property
    def share(self) -> Tensor:
        """0-d float tensor on the device: realised share of high blocks."""
        return self.grid.float().mean()


class SegBlocksModel(nn.Module):
    """A network that spends full resolution where its policy says.

    Args:
        net: any module of supported operations, image (N, C, H, W) → tensor(s).
        policy: from `build_policy`.
        legacy_upsample: resize inside each block alone, as the published release did.

    """

    def __init__(self, net: nn.Module, policy: Policy, legacy_upsample: bool = False):
        super().__init__()
        self.net = net
        self.policy = policy
        self.legacy_upsample = legacy_upsample
        self.graphs: TrainingGraphs | None = None

    def train_from_graphs(self, graphs: TrainingGraphs | None) -> None:
        """Let network and policy run from CUDA graphs, in training and under `torch.no_grad`; None:
        as written in Python."""
        self.graphs = graphs
        self.policy.train_from_graphs(graphs)

    def forward(
        self,
        image: Tensor,
        budget: float | int | None = None,
        pixel_loss: Callable[[Tensor], Tensor] | None = None,
        block_gain: Tensor | None = None,
        objective: Callable[..., Any] | None = None,
        targets: tuple[Tensor, ...] = (),
        decision: Decision | None = None,
    ) -> Any:
        """Decide, split, run the network, combine.

        Args:
            image: (N, 3, H, W) floating point; any H and W, padded with zeros to whole blocks at
                the right and at the bottom, and cropped again.
            budget: share (float) or count (int) of blocks of each image that run high, overriding
                what the policy was trained for; nothing is read back to the host.
            pixel_loss: for the oracle: logits → loss of each pixel (N, H, W).
            block_gain: for the oracle, instead: what `block_gain` has found.
            objective: (SegBlocksOutput, *targets) → what to return in its place, tensors in
                tuples, lists and dicts: the losses of a training step. It runs without autocast,
                and from CUDA graphs if the network does; the same object each time, or all would
                be captured again.
            targets: (…) tensors, the labels for example.
            decision: what `decide` has returned for these images, in place of another one; then
                budget, pixel_loss and block_gain do not matter.

        Returns:
            SegBlocksOutput: logits, grid and the policy's record, under the names of `Decision`;
            or what `objective` returns.
        """
        _check_image(image)
        size = tuple(image.shape[2:])
        padded = pad_to_blocks(image, self.policy.block_size)
        if decision is None:
            if self.policy.needs_pixel_loss and pixel_loss is not None and block_gain is None:
                block_gain = self.block_gain(image, pixel_loss)
            decision = self._decide(padded, budget, block_gain)
        if objective is not None:
            return self._judge(padded, decision, size, objective, targets)
        if decision.n_high is None:
            decision = self.policy.settle(decision)
        logits = self._run(padded, decision.grid, decision.n_high)
        return _output(decision, crop_output(logits, tuple(padded.shape[2:]), size))

    def decide(
        self,
        image: Tensor,
        budget: float | int | None = None,
        block_gain: Tensor | None = None,
    ) -> Decision:
        """What the policy decides of images, for `forward` to act on; their number of high blocks
        is None where the host has not asked the device for it yet. Arguments and errors as for
        `forward`; the oracle needs `block_gain`."""
        _check_image(image)
        return self._decide(pad_to_blocks(image, self.policy.block_size), budget, block_gain)

    @property
    def is_dense(self) -> bool:
        """True for the `disabled` policy, which runs the network as it is."""
        return isinstance(self.policy, DisabledPolicy)

    def _run(self, padded: Tensor, mask: Tensor, n_high: int | None) -> Any:
        """The network on `padded`; from graphs where it can be."""
        inputs = (padded,) if self.is_dense else (padded, mask)
        function = partial(self._network, n_high)
        if self.graphs is None or n_high is None:
            return function(*inputs)
        return self.graphs(self.net, function, inputs, (n_high, self.legacy_upsample))

    def _network(self, n_high: int | None, padded: Tensor, mask: Tensor | None = None) -> Any:
        if self.is_dense:
            return self.net(padded)
        grid = BlockGrid.from_mask(mask, n_high, self.legacy_upsample)
        return execute_with_grid(self.net, padded, grid)

    def _decide(
        self, padded: Tensor, budget: float | int | None, block_gain: Tensor | None
    ) -> Decision:
        """The policy's decision, without the number of high blocks if that can be had later."""
        kind = type(self.policy)
        if all(getattr(kind, name) is getattr(Policy, name) for name in _DECIDING):
            return self.policy(padded, budget, block_gain, settled=False)
        decision = self.policy(padded, budget, block_gain)
        if decision.n_high is None:
            decision = replace(decision, n_high=int(decision.grid.sum()))
        return decision

    def _judge(
        self,
        padded: Tensor,
        decision: Decision,
        size: tuple[int, int],
        objective: Callable[..., Any],
        targets: tuple[Tensor, ...],
    ) -> Any:
        """`objective` of the network's output, the two together; from graphs where they can be.

        The device is idle from when it has counted the policy's choice until the host, which asks
        for the count, has launched the network. So all else is done before, and rounding up with
        the network.
        """
        told = {k: value for k, value in _record(decision).items() if isinstance(value, Tensor)}
        n_high, settled = decision.n_high, decision.n_high is not None
        if not settled:
            del told["grid"]
            count = Reading(decision.sampled.sum())
        names = tuple(told)

        def run(image: Tensor, *tensors: Tensor) -> Any:
            again = replace(decision, **dict(zip(names, tensors)))
            if not settled:
                again = self.policy.promote(again, n_high)
            logits = self._network(n_high, image, again.grid)
            output = _output(again, crop_output(logits, tuple(image.shape[2:]), size))
            with torch.autocast(image.device.type, enabled=False):
                return objective(output, *tensors[len(names) :])

        inputs = (padded, *told.values(), *targets)
        prepared = None if self.graphs is None else self.graphs.prepare(self.net, inputs)
        if not settled:
            n_high = self.policy.rounded_up(int(count.wait()), decision.sampled.numel())
        if prepared is None:
            return run(*inputs)
        setting = (n_high, self.legacy_upsample, objective, names, decision.stochastic, size)
        return self.graphs.run(prepared, run, setting)

    @torch.no_grad()
    def block_gain(self, image: Tensor, pixel_loss: Callable[[Tensor], Tensor]) -> Tensor:
        """What full resolution would save each block: what the oracle ranks by.

        Args:
            image: (N, 3, H, W) floating point, as for `forward`.
            pixel_loss: logits → loss of each pixel (N, H, W).

        Returns:
            (N, Gh, Gw) float: block mean of the loss with every block low, less the same with
            every block high. Takes two passes of the network.
        """
        size = tuple(image.shape[2:])
        padded = pad_to_blocks(image, self.policy.block_size)
        shape = self.policy.grid_shape(padded)
        losses = []
        with _evaluating(self.net):
            for value in (False, True):
                mask = torch.full(shape, value, device=padded.device)
                logits = self._run(padded, mask, mask.numel() * value)
                losses.append(pixel_loss(crop_output(logits, tuple(padded.shape[2:]), size)))
        return block_mean((losses[0] - losses[1]).float(), self.policy.block_size)[0]


def _check_image(image: Tensor) -> None:
    if image.dim() != 4 or not image.is_floating_point():
        raise TypeError(
            f"image must be floating point (N, C, H, W); got {image.dtype} {tuple(image.shape)}"
        )


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Each module in evaluation mode, so that looking ahead moves no running statistics."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def combine_all(value: Any) -> Any:
    """Combine every block tensor in a structure of tuples, lists and dicts."""
    return map_structure(value, DualResTensor, DualResTensor._combine)


def _split_all(value: Any, grid: BlockGrid) -> Any:
    n, gh, gw = grid.shape

    def split(x: Tensor) -> Any:
        # What is no picture any more (a pooled vector, say) stays dense.
        fits = x.dim() == 4 and x.shape[0] == n and x.shape[2] % gh == 0 and x.shape[3] % gw == 0
        block = x.shape[2] // gh if fits else 0
        if not fits or block % 2 or not block or x.shape[3] // gw != block:
            return x
        return to_blocks(x, grid)

    return map_structure(value, Tensor, split)


def _find_blocks(value: Any) -> DualResTensor | None:
    if isinstance(value, DualResTensor):
        return value
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return None
    for item in value:
        found = _find_blocks(item)
        if found is not None:
            return found
    return None


def _output(decision: Decision, logits: Any) -> SegBlocksOutput:
    return SegBlocksOutput(**_record(decision), logits=logits)


def _record(decision: Decision) -> dict[str, Any]:
    """Its attributes by name."""
    return {field.name: getattr(decision, field.name) for field in fields(decision)}
