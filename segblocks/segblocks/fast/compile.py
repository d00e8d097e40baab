"""`segblocks.compile`: from policy to logits in CUDA graphs, on kernels that fuse whole layers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from ..model import SegBlocksModel, SegBlocksOutput
from ..ops.cuda.launch import can_overlap
from .generation import generation
from .plan import Engine, Plan
from .policy import PolicyKernels


def compile(model: SegBlocksModel, image: Tensor, dtype: torch.dtype | None = None) -> "FastModel":
    """Make a fast inference version of a model.

    Args:
        model: a SegBlocksModel in evaluation mode. Its parameters are copied, batch norm folded and
            converted to `dtype`; the model itself stays as it is. Compile again after training on.
        image: (N, 3, H, W) example on the device to run on; its values do not matter. Other shapes
            may be given later and are compiled once, on first use.
        dtype: float16 or bfloat16 on CUDA (default float16); float32 on CPU.

    Returns:
        `fast`: `fast(image, budget=None)` returns what `model(image, budget)` returns. On CUDA
        the returned tensors are static buffers that the next call overwrites. It works in memory
        that it keeps, so it takes one call at a time: compile once for each thread.

    Raises:
        ValueError: the model is in training mode, runs dense (`disabled`), or needs labels
            (`oracle`); or a dtype that the device cannot do.
    """
    fast = FastModel(model, image.device, image.dtype, dtype)
    fast.warm_up(image)
    return fast


class FastModel:
    """A compiled model; see `compile`.

    `fast(image, budget)` is `fast.load(image)`, which copies the image into a static input, and
    `fast.run(budget)`.
    """

    def __init__(
        self,
        model: SegBlocksModel,
        device: torch.device,
        image_dtype: torch.dtype,
        dtype: torch.dtype | None = None,
    ):
        if not isinstance(model, SegBlocksModel):
            raise TypeError(
                f"compile takes a SegBlocksModel, got {type(model).__name__}: put the network "
                "under a policy first, SegBlocksModel(network, build_policy(...))"
            )
        if model.training:
            raise ValueError("compile is for inference: call model.eval() first")
        if model.is_dense:
            raise ValueError(
                "the 'disabled' policy runs the dense network, which needs no blocks; use "
                "torch.compile(model.net), or build another policy"
            )
        if model.policy.needs_pixel_loss:
            raise ValueError("the 'oracle' policy needs labels and cannot be compiled; use another")
        self.device = device
        self.image_dtype = image_dtype
        self.dtype = _working_dtype(device, dtype)
        net = copy.deepcopy(model.net).to(device=device, dtype=self.dtype).requires_grad_(False)
        folded = _fold_batch_norm(copy.deepcopy(model.policy).to(device, torch.float32))
        folded = folded.requires_grad_(False)
        kernels = generation(device) > 0 and self.dtype.itemsize == 2
        self._engine = Engine(
            net=net.to(memory_format=torch.channels_last),
            policy=folded,
            scorer=copy.deepcopy(folded).to(self.dtype, memory_format=torch.channels_last),
            policy_kernels=PolicyKernels.of(folded, self.dtype) if kernels else None,
            device=device,
            dtype=self.dtype,
            legacy_upsample=model.legacy_upsample,
            overlap=kernels and can_overlap(device),
        )
        self._plans: dict[tuple, Plan] = {}
        self._loaded: Plan | None = None

    def warm_up(self, image: Tensor) -> None:
        """Compile for this image's shape."""
        self._plan(image)

    @property
    def how(self) -> str:
        """In a few words, how the shapes compiled so far are run."""
        ways = dict.fromkeys(plan.how for plan in self._plans.values())
        return "; ".join(ways)

    def __call__(self, image: Tensor, budget: float | int | None = None) -> SegBlocksOutput:
        """What the model returns for (N, 3, H, W) `image`; see `SegBlocksModel.forward`."""
        self.load(image)
        return self.run(budget)

    @torch.inference_mode()
    def load(self, image: Tensor) -> None:
        """Copy (N, 3, H, W) `image` into the static input of its shape, for `run`."""
        self._loaded = self._plan(image)
        self._loaded.load(image)

    @torch.inference_mode()
    def run(self, budget: float | int | None = None) -> SegBlocksOutput:
        """What the model returns for the image loaded last.

        Raises:
            RuntimeError: none was.
        """
        if self._loaded is None:
            raise RuntimeError("no image to run on: call load(image) first, or fast(image)")
        return self._loaded.decide_and_run(budget)

    @torch.inference_mode()
    def execute(self, image: Tensor, grid: Tensor, n_high: int | None = None) -> Any:
        """The network's output for a given grid (N, Gh, Gw) bool; see `execute_with_grid`."""
        plan = self._plan(image)
        plan.load(image)
        return plan.run_grid(grid, n_high)

    def _plan(self, image: Tensor) -> Plan:
        if image.dim() != 4 or not image.is_floating_point():
            raise TypeError(
                f"image must be floating point (N, C, H, W); got {image.dtype} {tuple(image.shape)}"
            )
        if image.device != self.device or image.dtype != self.image_dtype:
            raise ValueError(
                f"compiled for {self.image_dtype} images on {self.device}, got {image.dtype} on "
                f"{image.device}; convert the image, or compile for it"
            )
        shape = tuple(image.shape)
        if shape not in self._plans:
            with torch.inference_mode():
                self._plans[shape] = Plan(self._engine, image)
        return self._plans[shape]


def _working_dtype(device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    if device.type == "cuda":
        dtype = dtype or torch.float16
        accepted = (torch.float16, torch.bfloat16)
    else:
        dtype = dtype or torch.float32
        accepted = (torch.float32,)
    if dtype not in accepted:
        names = " or ".join(str(d) for d in accepted)
        raise ValueError(f"on {device.type} the working dtype is {names}; got {dtype}")
    return dtype


def _fold_batch_norm(module: nn.Module) -> nn.Module:
    """Fold batch norms into the convolutions before them, inside `nn.Sequential`s; in place."""
    for part in module.modules():
        if not isinstance(part, nn.Sequential):
            continue
        for i, (conv, norm) in enumerate(zip(part, list(part)[1:])):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                part[i], part[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return module
