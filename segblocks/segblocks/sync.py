"""Batch norm over several processes: one mean and variance of all pixels, of both resolutions."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _joint_on_cuda
from torch.nn.modules.batchnorm import _BatchNorm

from .peers import peers_on
from .rules.arguments import require_image
from .rules.normalise import as_image, as_pixels
from .rules.normalised import joint_batch_norm, put_off, takes_kernels
from .tensor import DualResTensor


class SyncBatchNorm(_BatchNorm):
    """What `torch.nn.SyncBatchNorm` computes, for blocks too, and on the CPU.

    In training with several processes, statistics are those of all stored pixels of all processes,
    however many each of them holds, but at least one. In all other cases it is plain batch norm.

    Processes on GPUs exchange them over NCCL, or quicker (`peers.py`). Which, they settle in their
    first pass, which all make together; in a CUDA graph it would be NCCL. Passes are on one stream.
    Where a process is lost or has no pixels, the others wait until NCCL gives up on an exchange
    that they have launched already, or until whoever started them ends them.
    """

    def forward(self, x: Tensor | DualResTensor) -> Tensor | DualResTensor:
        """(N, C, ...) or blocks; the same shape."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        if not isinstance(x, DualResTensor):
            return self._joint(x, self._share_of_batch())
        x.refuse_padding()
        require_image(x, "batch_norm")
        share, running = self._share_of_batch(), (self.running_mean, self.running_var)
        later = put_off(x, *running, self.weight, self.bias, share, self.eps, joint=True)
        if later is not None:
            return later
        return x.like(as_pixels(self._joint(as_image(x.stored), share)))

    def _check_input_dim(self, x: Tensor | DualResTensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"batch norm needs channels in dimension 1, got {x.dim()} dimensions")

    def _share_of_batch(self) -> float:
        """Of this batch in the running statistics, where it now counts."""
        if not self.track_running_stats:
            return 0.0
        self.num_batches_tracked.add_(1)
        return 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _joint(self, x: Tensor, share: float) -> Tensor:
        if not x.is_cuda:
            return self._in_steps(x, share)
        if takes_kernels(x) and peers_on(x.get_device()) is not None:
            # Whatever the layout: of small maps processes might not agree about it.
            rows = x.movedim(1, -1).reshape(-1, x.shape[1]).contiguous()
            given = (self.running_mean, self.running_var, self.weight, self.bias, share, self.eps)
            found = joint_batch_norm(rows, *given)
            if found is not None:
                image = _AsImage.apply(found, x.shape)
                return image.contiguous() if x.is_contiguous() else image
        return _joint_on_cuda.apply(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            share,
            dist.group.WORLD,
            dist.get_world_size(),
        )

    def _in_steps(self, x: Tensor, share: float) -> Tensor:
        """PyTorch has it for CUDA alone. The variance takes a second pass, for its precision."""
        dtype, x = x.dtype, x if x.dtype == torch.float64 else x.float()
        count = torch.tensor(x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
        dist.all_reduce(count)
        rest = [i for i in range(x.dim()) if i != 1]
        shape = [-1 if i == 1 else 1 for i in range(x.dim())]
        mean = _Total.apply(x.sum(rest, dtype=torch.float64)) / count  # C
        centred = x - mean.to(x.dtype).view(shape)
        variance = _Total.apply(centred.square().sum(rest, dtype=torch.float64)) / count  # C
        if self.track_running_stats:
            unbiased = variance.detach() * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), share)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        out = centred * (variance + self.eps).rsqrt().to(x.dtype).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(dtype)


class _WithWhatFollows(SyncBatchNorm):
    """Of a batch norm that holds modules which its output goes through, in their order, as timm's
    BatchNormAct2d does."""

    def forward(self, x: Tensor | DualResTensor) -> Tensor | DualResTensor:
        x = super().forward(x)
        for child in self.children():
            x = child(x)
        return x


class _AsImage(torch.autograd.Function):
    """Rows (P, C), which nobody else reads, as a tensor (N, C, ...) of the same memory; no view of
    it for autograd, which would have to copy the gradient where an activation works in place."""

    @staticmethod
    def forward(ctx, rows: Tensor, shape: torch.Size) -> Tensor:
        image = rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return rows.new_empty(0).set_(
            rows.untyped_storage(), rows.storage_offset(), image.shape, image.stride()
        )

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.movedim(1, -1).reshape(-1, grad.shape[1]), None


class _Total(torch.autograd.Function):
    """The sum over all processes. All their losses depend on it, so gradients are summed too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Total.forward(ctx, grad.contiguous())


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Replace each batch norm inside `model`, in place, by a SyncBatchNorm of the same parameters,
    statistics and names; -> the model.

    One that holds modules (timm's with an activation) applies them to its output afterwards.

    Raises:
        NotImplementedError: a batch norm that computes something else.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
                setattr(parent, name, _converted(child))
    return model


def _converted(norm: _BatchNorm) -> SyncBatchNorm:
    plain = type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if not plain and not norm._modules:
        raise NotImplementedError(
            f"{type(norm).__name__} has a forward pass of its own, which several processes cannot "
            "share; make it a plain BatchNorm2d, or train in one process"
        )
    kind = SyncBatchNorm if plain else _WithWhatFollows
    sync = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    sync._modules.update(norm._modules)
    sync._parameters.update(norm._parameters)
    sync._buffers.update(norm._buffers)
    return sync.train(norm.training)
