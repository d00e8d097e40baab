"""What a run says of its steps: lines of the log, numbers for TensorBoard."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from utils.logger import Means, RunLog
from utils.ranks import Ranks
from utils.training.guard import FiniteGuard
from utils.training.resume import Progress


class StepLines:
    """Of the steps of one epoch: means of what they return, and images per second.

    Args:
        finite: says whether their losses were.
        at, rates: of the run, as they change: where it is, learning rates by name.
        of: epochs, and steps of each.

    Attributes:
        means: is given what each step returns.
    """

    def __init__(
        self,
        log: RunLog,
        finite: FiniteGuard,
        ranks: Ranks,
        at: Progress,
        rates: Mapping[str, float],
        of: tuple[int, int],
    ):
        self.log, self.finite, self.total = log, finite, ranks.replicas.total
        self.at, self.rates, self.of = at, rates, of
        self.means = Means()
        self._since, self._images = time.monotonic(), 0

    def add(self, images: int) -> None:
        """A step more, of so many images."""
        self._images += images

    def ask(self) -> Callable[[], None]:
        """What writes a line about the steps since the last one, for which it waits. It raises
        UserError, on all ranks, where a loss was not finite."""
        if not self._images:  # a run that goes on from the end of an epoch
            return lambda: None
        at, rates, now = replace(self.at), dict(self.rates), time.monotonic()
        check, means = self.finite.ask(), self.means.ask(self.total)
        images_per_second = self._images / (now - self._since)
        self._since, self._images = now, 0

        def tell() -> None:
            check()
            values = means()
            self.log.scalars(
                at.total_steps,
                {f"train/{name}": value for name, value in values.items()}
                | {f"lr/{name}": rate for name, rate in rates.items()}
                | {"train/images_per_second": images_per_second},
            )
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            epochs, steps = self.of
            self.log.info(
                f"epoch {at.epoch + 1}/{epochs}, step {at.step}/{steps}: "
                f"{text}; {images_per_second:.1f} img/s"
            )

        return tell
