"""The training loop: task loss plus policy loss, cosine schedule, validation, checkpoints."""

import time
from argparse import Namespace
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from utils.checkpoint import load_weights, save_checkpoint
from utils.errors import UserError
from utils.evaluate import Evaluation, evaluate, forward_options
from utils.logger import Means, RunLog, progress
from utils.losses import task_loss
from utils.optim import build_optimizer, build_scheduler
from utils.profiler import profiler
from utils.published import is_published, settle_upsampling
from utils.resume import Progress, changed_flags
from utils.seeding import rng_state, set_rng_state
from utils.signals import Stopped, stop_requests

MAC_IMAGES = 10  # of each validation in training; --mode val counts on all
AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FiniteGuard:
    """Notices a loss that is not finite, without waiting for the device at every step."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self._losses: deque[tuple[torch.Tensor, torch.Tensor, int]] = deque()

    def add(self, loss: torch.Tensor, index: torch.Tensor, step: int) -> None:
        self._losses.append((loss, index, step))

    def check(self) -> None:
        """Raise UserError naming the first bad step since the last check and its images."""
        if self._losses:
            finite = torch.stack([loss for loss, _, _ in self._losses]).isfinite().tolist()
            for good, (loss, index, step) in zip(finite, self._losses):
                if not good:
                    names = ", ".join(self.dataset.name_of(int(i)) for i in index)
                    raise UserError(
                        f"the loss is {float(loss)} at step {step + 1} (images: {names}); the last "
                        "checkpoint is from before it: lower --lr, set --grad-clip, or use "
                        "--amp bf16 or off"
                    )
        self._losses.clear()


class Trainer:
    """Trains a SegBlocksModel.

    A checkpoint is taken between two optimiser steps and holds everything the next one depends
    on, so a run that stops and goes on ends with the weights of one that did not.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: DataLoader,
        val_loader: DataLoader,
        args: Namespace,
        device: torch.device,
    ):
        self.model, self.args, self.device = model, args, device
        self.train_loader, self.val_loader = train_loader, val_loader
        self.dataset = train_loader.dataset.dataset
        self.criterion = task_loss(args, self.dataset.info).to(device)
        self.optimizer = build_optimizer(model, args)
        self.scheduler = build_scheduler(self.optimizer, args)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.progress = Progress()
        self.steps_per_epoch = len(self.dataset) // args.batch_size // args.accumulate
        self._saved_at = time.monotonic()

    # ---- stop and go ----

    def state(self) -> dict[str, Any]:
        return {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": self.progress.to_dict(),
            "rng": rng_state(self.device),
            "args": vars(self.args),
        }

    def load(self, path: Path | str) -> list[str]:
        """Continue from a checkpoint of a training run, or begin with published weights.

        Returns what to tell its user: where it goes on, and flags that have changed since. Raises
        ValueError if the file holds no training state or that of another architecture.
        """
        state = load_weights(self.model, path)
        told = settle_upsampling(self.model, self.args, state)
        if is_published(state):
            return [f"published weights {path}: optimiser and schedule start afresh", *told]
        missing = sorted(self.state().keys() - state.keys())
        if missing:
            raise ValueError(
                f"{path} cannot be trained further: it lacks {', '.join(missing)}; resume from a "
                "checkpoint that this program's training wrote, or start afresh with --resume none"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        set_rng_state(state["rng"], self.device)
        at = self.progress
        told += [f"resumed {path}: epoch {at.epoch + 1}, step {at.step} of {self.steps_per_epoch}"]
        return told + [f"changed since: {text}" for text in changed_flags(state["args"], self.args)]

    def save(self, log: RunLog, name: str = "checkpoint.pth") -> None:
        save_checkpoint(log.folder / name, self.state())
        self._saved_at = time.monotonic()

    # ---- training ----

    def fit(self, log: RunLog) -> Evaluation | None:
        """Train to --epochs or --max-steps; -> the last evaluation, None if all was done before."""
        with profiler(self.args, log) as self._profile, stop_requests() as self._stop:
            return self._fit(log)

    def _fit(self, log: RunLog) -> Evaluation | None:
        at, evaluation = self.progress, None
        while at.epoch < self.args.epochs and not self._out_of_steps():
            self._train_epoch(log)
            ended = at.step == self.steps_per_epoch
            last = self._out_of_steps() or (ended and at.epoch + 1 == self.args.epochs)
            if last or (self.args.val_every and (at.epoch + 1) % self.args.val_every == 0):
                evaluation = self._validate(log)
                best = evaluation.miou > at.score_best
                if best:
                    at.score_best, at.score_best_epoch = evaluation.miou, at.epoch
            else:
                best = False
            if ended:
                self.scheduler.step()
                at.epoch, at.step = at.epoch + 1, 0
            self.save(log)
            if best:
                self.save(log, "checkpoint_best.pth")
        return evaluation

    def _train_epoch(self, log: RunLog) -> None:
        at, args = self.progress, self.args
        self.model.train()
        batch_of_step = args.accumulate * args.batch_size
        self.train_loader.sampler.set_epoch(at.epoch, at.step * batch_of_step)
        batches = iter(self.train_loader)
        means, finite = Means(), FiniteGuard(self.dataset)
        started, images = time.monotonic(), 0
        title = f"epoch {at.epoch + 1}/{args.epochs}"
        steps = range(at.step, self.steps_per_epoch)
        for _ in progress(steps, title, "img", unit_scale=batch_of_step):
            self._step(batches, means, finite)
            self._profile.step()
            at.step, at.total_steps = at.step + 1, at.total_steps + 1
            images += batch_of_step
            log_now = at.total_steps % args.log_every == 0 or at.step == self.steps_per_epoch
            if log_now or self._out_of_steps():
                finite.check()
                self._log_step(log, means, images / (time.monotonic() - started))
                started, images = time.monotonic(), 0
            if self._out_of_steps():
                return
            stop = self._stop.number
            if stop or (self._save_is_due() and at.step < self.steps_per_epoch):
                finite.check()
                self.save(log)
            if stop:
                raise Stopped(stop)

    def _step(self, batches: Any, means: Means, finite: FiniteGuard) -> None:
        """One optimiser step, on --accumulate batches."""
        args = self.args
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(args.accumulate):
            image, label, index = next(batches)
            image = image.to(self.device, non_blocking=True)  # N,3,H,W
            if args.channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            label = label.to(self.device, non_blocking=True)  # N,H,W
            loss, stats = self._loss(image, label)
            self.scaler.scale(loss / args.accumulate).backward()
            means.add(stats)
            finite.add(loss.detach(), index, self.progress.total_steps)
        if args.grad_clip:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), args.grad_clip)
            means.add({"gradient_norm": norm})
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _loss(
        self, image: torch.Tensor, label: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Task loss plus policy loss, and what to log: all 0-d tensors on the device."""
        amp = self.args.amp
        with torch.autocast(self.device.type, AMP_DTYPES[amp], enabled=amp != "off"):
            result = self.model(image, **forward_options(self.args, self.criterion, label))
        task, loss_map = self.criterion(result.logits.float(), label)
        valid = label != self.dataset.info.ignore_index
        policy, stats = self.model.policy.loss(result, loss_map.detach(), valid)
        total = task + policy
        return total, {"loss_task": task, "loss_policy": policy, "loss_total": total, **stats}

    def _validate(self, log: RunLog) -> Evaluation:
        at = self.progress
        started = time.monotonic()
        evaluation = evaluate(
            self.model, self.val_loader, self.args, self.device, log, at.total_steps, MAC_IMAGES
        )
        seconds = time.monotonic() - started
        log.info(f"validation after epoch {at.epoch + 1}, step {at.step} ({seconds:.0f} s)")
        for line in evaluation.lines():
            log.info(f"  {line}")
        log.scalars(at.total_steps, evaluation.scalars())
        return evaluation

    def _log_step(self, log: RunLog, means: Means, rate: float) -> None:
        at, values = self.progress, means.pop()
        rates = {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        log.scalars(
            at.total_steps,
            {f"train/{name}": value for name, value in values.items()}
            | rates
            | {"train/images_per_second": rate},
        )
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info(
            f"epoch {at.epoch + 1}/{self.args.epochs}, step {at.step}/{self.steps_per_epoch}: "
            f"{text}; {rate:.1f} img/s"
        )

    def _out_of_steps(self) -> bool:
        return 0 < self.args.max_steps <= self.progress.total_steps

    def _save_is_due(self) -> bool:
        minutes = self.args.save_minutes
        return minutes > 0 and time.monotonic() - self._saved_at > 60 * minutes
