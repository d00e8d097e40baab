"""Ctrl-C and SIGTERM ask a training run to save and stop; they do not tear it down."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """A run that a signal has stopped, its state saved."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}, state saved")
        self.exit_status = 128 + number


class StopRequest:
    """Whether a signal has asked to stop."""

    def __init__(self) -> None:
        self.number: int | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        # Ctrl-C twice: at once. A launcher and a scheduler may each send SIGTERM.
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM are noted. Data workers started inside inherit that, so that a
    signal before they have left the process group does not take the data away first."""
    request = StopRequest()
    before = {n: signal.signal(n, request.note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
