"""What a training step minimises: the task loss, a teacher's part in it, and the policy's loss."""

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

from segblocks import SegBlocksModel, SegBlocksOutput
from segblocks.borders import pad_to_blocks
from utils.oracle import forward_options
from utils.training.state import TrainingState
from utils.training.teacher import Teacher, distillation_loss

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Losses = dict[str, tuple[float, Tensor]]
Minimised = tuple[Tensor, tuple[str, ...], Tensor]  # a loss, 0-d; names and values of what to log


class Objective:
    """The loss of a batch, and what to log of it; of several ranks, each one's part of what all of
    them add up to.

    Args:
        run: holds the model, and says how far training is.
        network: what to call in place of the model, which it wraps where ranks share a batch.
        criterion: (logits, label) → task loss, 0-d, and that of each pixel.
        reward: (loss of each pixel, label) → what each pixel earns the policy.
        ignore_index: label of pixels that do not count.
        ranks: how many share a batch.
        teacher: whose predictions are part of the task loss; None: labels alone.
    """

    def __init__(
        self,
        run: TrainingState,
        network: Callable[..., Minimised],
        criterion: nn.Module,
        reward: nn.Module,
        ignore_index: int,
        ranks: int,
        teacher: Teacher | None = None,
    ):
        self.run, self.network = run, network
        self.criterion, self.reward = criterion, reward
        self.ignore_index, self.ranks, self.teacher = ignore_index, ranks, teacher

    @property
    def args(self) -> Namespace:
        return self.run.args

    @property
    def model(self) -> SegBlocksModel:
        return self.run.model

    @property
    def refines(self) -> bool:
        """Whether the policy learns from what is measured, as in the last epochs it may."""
        return self.run.progress.epoch >= self.run.schedule.refine_from

    def __call__(self, image: Tensor, label: Tensor, budget: int | None = None) -> Minimised:
        """Of images (N,3,H,W), normalised, and label (N,H,W) int64. `budget` is what --budget does
        not say: how many blocks of each image are high."""
        amp = self.args.amp
        options = forward_options(self.args, self.criterion, label)
        if options["budget"] is None:
            options["budget"] = budget
        taught = () if self.teacher is None else (self.teacher(image),)
        options |= {"objective": self._judge, "targets": (label, *taught)}
        with torch.autocast(image.device.type, AMP_DTYPES[amp], enabled=amp != "off"):
            if self.refines:
                known = (label, self._gain(image, label), self._before(image))
                options |= {"objective": self._judge_refining, "targets": (*known, *taught)}
            return self.network(image, **options)

    def _gain(self, image: Tensor, label: Tensor) -> Tensor:
        """(N,Gh,Gw): how much of what the policy is rewarded for full resolution saves each block,
        by two passes of the network as it is."""
        weights = self.reward(torch.ones_like(label, dtype=torch.float32), label)
        return self.model.block_gain(image, lambda x: self.criterion(x, label)[1] * weights)

    @torch.no_grad()
    def _before(self, image: Tensor) -> Tensor:
        """(N,Gh,Gw): what the policy said of each block before it began to refine itself."""
        return self.run.policy_before()(pad_to_blocks(image, self.model.policy.block_size))

    # Captured with the network, so nothing here may read the device.

    def _judge(self, result: SegBlocksOutput, label: Tensor, *taught: Tensor) -> Minimised:
        losses, loss_map = self._task(result.logits, label, *taught)
        valid = label != self.ignore_index
        reward = self.reward(loss_map.detach(), label)
        return self._together(losses, *self.model.policy.loss(result, reward, valid))

    def _judge_refining(
        self, result: SegBlocksOutput, label: Tensor, gain: Tensor, before: Tensor, *taught: Tensor
    ) -> Minimised:
        """The same where it was measured what full resolution saves each block."""
        losses, _ = self._task(result.logits, label, *taught)
        return self._together(losses, *self.model.policy.refining_loss(result, gain, before))

    def _task(self, logits: Tensor, label: Tensor, *taught: Tensor) -> tuple[Losses, Tensor]:
        """What the network learns from, by name, each with its weight; loss of each pixel by its
        label. `taught`: the teacher's logits, if there is one."""
        task, loss_map = self.criterion(logits, label)
        if not taught:
            return {"loss_task": (1.0, task)}, loss_map
        weight = self.args.teacher_weight
        valid = label != self.ignore_index
        distilled = distillation_loss(logits, *taught, valid, self.criterion.total)
        losses = {"loss_task": (1 - weight, task), "loss_teacher": (weight, distilled)}
        return losses, loss_map

    def _together(self, losses: Losses, policy: Tensor, stats: dict[str, Tensor]) -> Minimised:
        total = sum(weight * loss for weight, loss in losses.values()) + policy
        stats = {name: value / self.ranks for name, value in stats.items()}
        losses = {name: loss for name, (_, loss) in losses.items()}
        stats = {**losses, "loss_policy": policy, "loss_total": total, **stats}
        values = torch.stack([value.detach().float() for value in stats.values()])
        return total, tuple(stats), values
