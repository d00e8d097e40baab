"""The training loop: optimiser steps, cosine schedule, validation, checkpoints."""

import copy
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from dataloaders import start_workers, stop_workers
from segblocks import TrainingGraphs
from utils.checkpoint import previous
from utils.errors import UserError
from utils.logger import Means, RunLog, progress
from utils.losses import task_loss
from utils.profiler import profiler
from utils.ranks import ALONE, Agreement, Ranks
from utils.training.distributed import share_batch
from utils.training.graph_set import GraphSet
from utils.training.guard import FiniteGuard
from utils.training.objective import Objective
from utils.training.resume import BEST, LATEST, Progress, Told
from utils.training.reward import build_reward
from utils.training.signals import Stopped, stop_requests
from utils.training.state import TrainingState, images_per_step
from utils.training.step import OptimiserStep
from utils.training.step_lines import StepLines
from utils.training.teacher import load_teacher
from utils.training.uploads import Uploads
from utils.training.validations import Validations
from utils.training.writer import Saver
from utils.validation.evaluate import Evaluation

UNSAVED_SECONDS = 60  # of training that validation does not begin on
SAVE = 1  # what ranks agree on beside signals to stop, whose numbers are larger


class Trainer:
    """Trains a SegBlocksModel, on one device or on several ranks that share each batch.

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
        ranks: Ranks = ALONE,
    ):
        self.model, self.args, self.device, self.ranks = model, args, device, ranks
        self.train_loader, self.val_loader = train_loader, val_loader
        self.dataset = train_loader.dataset.dataset
        from_graphs = device.type == "cuda" and args.cuda_graphs
        self._graphs = GraphSet()
        graphs = TrainingGraphs(failed=self._graphs.release) if from_graphs else None
        if graphs is not None:
            self._graphs.add(graphs)
        model.train_from_graphs(graphs)
        self.shared = share_batch(model, args, device, ranks, from_graphs)
        info, total = self.dataset.info, ranks.replicas.total
        criterion = task_loss(args, info, total).to(device)
        reward = build_reward(args, info, total).to(device)
        self.run = TrainingState(model, args, device, reward)
        teacher = load_teacher(args, info, device)
        if teacher is not None:
            teacher.train_from_graphs(graphs)
        learnt = (self.shared.network, criterion, reward, info.ignore_index, ranks.count, teacher)
        self.objective = Objective(self.run, *learnt)
        self.validations = Validations(val_loader, args, device, ranks, self._graphs.release)
        self._graphs.add(self.validations.kept.copy)
        self.finite = FiniteGuard(self.dataset, ranks)
        how = (self.shared, self.finite, ranks, from_graphs, self._graphs.release)
        self._take_step = OptimiserStep(self.run, self.objective, *how)
        self._graphs.add(self._take_step)
        self.images_per_step = images_per_step(vars(args))
        self.steps_per_epoch = len(self.dataset) // self.images_per_step
        self.saver = Saver(ranks)
        self._saved_at = time.monotonic()
        self._keep_previous = True
        self._put_off: Callable[[], None] | None = None

    @property
    def progress(self) -> Progress:
        return self.run.progress

    # ---- stop and go ----

    def load(self, path: Path | str) -> Told:
        """Continue from a checkpoint of a training run, or begin with published weights; see
        TrainingState."""
        told = self.run.load(path)
        self.progress.step = min(self.progress.step, self.steps_per_epoch)
        told.lines[0] += f" of {self.steps_per_epoch}"
        if self.progress.epoch >= self.args.epochs:
            told.lines[0] = f"found {path}, of a run that has had its {self.args.epochs} epochs"
        # A checkpoint.pth that could not be used must not push out the good one before it.
        self._keep_previous = Path(path).name != previous(Path(LATEST)).name
        return told

    def save(self, log: RunLog) -> None:
        """Begin to write the checkpoint; `saver.wait` waits for it. Raises UserError where weights
        are not finite, and what `Saver.save` raises."""
        self._snapshot(log)()

    def _snapshot(
        self, log: RunLog, is_best: bool = False, tell: Callable[[], None] | None = None
    ) -> Callable[[], None]:
        """The same in two parts: the state is taken now; what is returned, which waits for the
        device, writes it if it is fit to be kept, also as the best one if it `is_best`. `tell` is
        called before that."""
        state, check = self.saver.take(self.run.to_dict()), self.finite.ask(self.model)
        also = log.folder / BEST if is_best else None

        def write() -> None:
            if tell is not None:
                tell()
            check()
            self.saver.save(log.folder / LATEST, state, log, self._keep_previous, also)
            self._saved_at = time.monotonic()
            self._keep_previous = True

        return write

    def _catch_up(self) -> None:
        """Do what was put off until the device has something to do."""
        put_off, self._put_off = self._put_off, None
        if put_off is not None:
            put_off()

    # ---- training ----

    def fit(self, log: RunLog) -> Evaluation | None:
        """Train to --epochs or --max-steps; -> the last evaluation, None if all was done before."""
        with profiler(self.args, log) as self._profile, stop_requests() as self._stop:
            self._agreed = Agreement(self.ranks)
            try:
                evaluation = self._fit(log)
                self.saver.wait()
                return evaluation
            except Stopped:
                self.saver.wait()
                raise
            except Exception as error:  # not KeyboardInterrupt, which is not to wait
                try:
                    self._catch_up()
                except UserError as earlier:
                    raise earlier from error
                finally:
                    self.saver.settle(log)
                raise
            finally:
                self.close()

    def close(self) -> None:
        """After the last step, before ranks part."""
        self._graphs.close()
        for loader in (self.train_loader, self.val_loader):
            stop_workers(loader)

    def _fit(self, log: RunLog) -> Evaluation | None:
        at, evaluation, args = self.progress, None, self.args
        if at.epoch < args.epochs and not self._out_of_steps():
            start = at.step * self.images_per_step
            self.train_loader.sampler.set_epoch(at.epoch, start, args.epochs - at.epoch)
            self._batches = Uploads(self.train_loader, self.device)
            # Later they would keep a checkpoint open that is being written, and steps waiting.
            start_workers(self.val_loader)
        while at.epoch < args.epochs and not self._out_of_steps():
            best_before = at.score_best
            tell = self._train_epoch(log)
            ended = at.step == self.steps_per_epoch
            last = self._out_of_steps() or (ended and at.epoch + 1 == args.epochs)
            validates = last or (args.val_every and (at.epoch + 1) % args.val_every == 0)
            if validates:
                tell()
                if ended and not self._out_of_steps() and self._much_is_unsaved():
                    self.save(log)  # validation may fail, or be killed as it takes long
                    self.saver.wait()
                evaluation = self._validate(log)
            if ended:
                self.run.schedule.step()
                at.epoch, at.step = at.epoch + 1, 0
            is_best = at.score_best > best_before
            self._put_off = self._snapshot(log, is_best, None if validates else tell)
            # A GPU is still busy with the last steps, and will have the next one before the host
            # has waited for it. Not of several ranks: where one fails, the others would wait.
            if last or self.device.type != "cuda" or self.ranks.count > 1:
                self._catch_up()
            if not last:
                self._stop_if_asked()
        return evaluation

    def train_on(self, batch: Sequence[torch.Tensor], steps: int) -> None:
        """So many optimiser steps on one batch of the training loader, which are neither counted
        nor logged; what is to be timed."""
        self.model.train()
        self._batches, means = Uploads(repeat(batch), self.device), Means()
        for _ in range(steps):
            self._step(means)

    def _train_epoch(self, log: RunLog) -> Callable[[], None]:
        """To the end of the epoch or of --max-steps. What is returned logs the last steps, for
        which it waits."""
        at, args = self.progress, self.args
        self.model.train()
        of = (args.epochs, self.steps_per_epoch)
        lines = StepLines(log, self.finite, self.ranks, at, self.run.schedule.now, of)
        title = f"epoch {at.epoch + 1}/{args.epochs}"
        steps = range(at.step, self.steps_per_epoch)
        for _ in progress(steps, title, "img", self.images_per_step, quiet=not self.ranks.main):
            self._step(lines.means)
            self._profile.step()
            at.step, at.total_steps = at.step + 1, at.total_steps + 1
            lines.add(self.images_per_step)
            ends = at.step == self.steps_per_epoch
            if self._out_of_steps():
                break
            if at.total_steps % args.log_every == 0 and not ends:
                lines.ask()()
            asked = self._agreed(self._stop.number or SAVE * self._save_is_due())
            if asked > SAVE and ends:
                lines.ask()()
            if asked > SAVE or (asked == SAVE and not ends):
                self.save(log)
                self._agreed.forget()
            if asked > SAVE:
                raise Stopped(asked)
        return lines.ask()

    def _step(self, means: Means) -> None:
        self.model.policy.exploration = self._exploration()
        self._take_step(self._batches, means)
        self._catch_up()
        self._batches.ahead()
        if self.run.average:
            self.run.average.update(self.progress.total_steps + 1)

    def _validate(self, log: RunLog) -> Evaluation:
        """Validate the weights and, with --ema, their average; keep whichever is best so far."""
        at = self.progress
        log.info(f"validation after epoch {at.epoch + 1}, step {at.step}")
        evaluation = self.validations(self.model, log, at.total_steps)
        if self.run.average:
            averaged = copy.deepcopy(self.model)
            averaged.load_state_dict(self.run.average.weights_of(self.model))
            score = self.validations(averaged, log, at.total_steps, averaged=True).miou
            if score > at.ema_score_best:
                at.ema_score_best, at.ema_score_best_epoch = score, at.epoch
                state = {"state_dict": averaged.state_dict(), "args": vars(self.args)}
                best = log.folder / "checkpoint_ema_best.pth"
                self.saver.save(best, self.saver.take(state), log)
        if evaluation.miou > at.score_best:
            at.score_best, at.score_best_epoch = evaluation.miou, at.epoch
        return evaluation

    def _exploration(self) -> float:
        """1 at the start of training, 0 once --segblocks-warmup-epochs are over."""
        warmup, at = self.args.segblocks_warmup_epochs, self.progress
        if not warmup:
            return 0.0
        return max(0.0, 1 - (at.epoch + at.step / self.steps_per_epoch) / warmup)

    def _out_of_steps(self) -> bool:
        return 0 < self.args.max_steps <= self.progress.total_steps

    def _much_is_unsaved(self) -> bool:
        """Whether any rank thinks so."""
        seconds = time.monotonic() - self._saved_at
        return any(self.ranks.everyones(seconds > UNSAVED_SECONDS))

    def _save_is_due(self) -> bool:
        """Asked of the main rank's clock alone."""
        minutes = self.args.save_minutes
        late = 0 < 60 * minutes < time.monotonic() - self._saved_at
        return self.ranks.main and (late or self.saver.writer.has_failed)

    def _stop_if_asked(self) -> None:
        """Between epochs, with the state just taken."""
        asked = max(number or 0 for number in self.ranks.everyones(self._stop.number))
        if asked:
            self._catch_up()
            raise Stopped(asked)
