"""run.log, TensorBoard and progress bars of one experiment."""

import io
import json
import logging
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from segblocks.reading import Reading
from utils.errors import one_line, user_errors

JPEG_QUALITY = 90  # of 100, in TensorBoard; files under viz/ are PNG


class RunLog:
    """Where an experiment writes: console and run.log, TensorBoard, JSON files.

    Opening it creates the folder, so open it once everything that can be wrong has been checked.
    Of several ranks one writes; the log of a `quiet` one says nothing.
    """

    def __init__(self, folder: str | Path, tensorboard: bool = False, quiet: bool = False):
        self.folder = Path(folder)
        self.tensorboard = tensorboard
        self._logger = logging.Logger("run", logging.INFO)
        self._writer = None
        self._one_at_a_time = threading.Lock()
        self._encoder = ThreadPoolExecutor(1, "pictures")  # its thread begins with the first one
        self._encoded: list[Future] = []
        if quiet:
            self._logger.addHandler(logging.NullHandler())
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        console = _TqdmHandler()
        console.setFormatter(logging.Formatter("%(message)s"))
        file = logging.FileHandler(self.folder / "run.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._logger.addHandler(console)
        self._logger.addHandler(file)
        if tensorboard:
            self._writer = SummaryWriter(str(self.folder))

    def info(self, message: str) -> None:
        self._logger.info(message)

    def warning(self, message: str) -> None:
        self._logger.warning(message)

    def command(self) -> None:
        """Record the command that runs."""
        self.info(f"command: {command_line()}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values by tag ("loss/task"); what is not a number is left out."""

        def write(writer: SummaryWriter) -> None:
            for tag, value in values.items():
                if value == value:
                    writer.add_scalar(tag, value, step)

        self._to_tensorboard(write)

    def picture(self, step: int, tag: str, picture: torch.Tensor) -> None:
        """`picture` uint8 (3,H,W), which is encoded and written while training goes on."""

        def write() -> None:
            summary = _as_summary(tag, picture)
            self._to_tensorboard(lambda writer: writer.file_writer.add_summary(summary, step))

        if self._writer is not None:
            self._encoded = [x for x in self._encoded if not x.done() or x.exception()]
            self._encoded.append(self._encoder.submit(write))

    def _to_tensorboard(self, write: Callable[[SummaryWriter], None]) -> None:
        """Without room for its files training goes on without them."""
        with self._one_at_a_time:
            if self._writer is None:
                return
            try:
                write(self._writer)
            except OSError as error:
                self._writer, writer = None, self._writer
                with suppress(OSError):
                    writer.close()
                self.warning(f"warning: TensorBoard files end here: {one_line(error)}")

    def json(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write `values` to the experiment's folder, whole or not at all; NaN becomes null. Raises
        UserError where that is impossible."""
        path = self.folder / name
        temporary = path.with_name(path.name + ".tmp")
        text = json.dumps(_no_nan(values), indent=2, allow_nan=False) + "\n"
        with user_errors():
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        return path

    def close(self) -> None:
        self._encoder.shutdown()  # when all are written
        failures = [error for error in (x.exception() for x in self._encoded) if error]
        if failures:
            self.warning(f"warning: {len(failures)} pictures were not written: {failures[0]}")
        self._encoded = []
        self._to_tensorboard(SummaryWriter.close)
        for handler in list(self._logger.handlers):
            handler.close()
            self._logger.removeHandler(handler)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._file_only(f"stopped: {kind.__name__}: {error}")
        self.close()

    def _file_only(self, message: str) -> None:
        # The console hears about an error from train.py.
        for handler in self._logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.emit(logging.makeLogRecord({"msg": message, "levelname": "ERROR"}))


class Means:
    """Running means of named numbers, kept on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, names: tuple[str, ...], values: torch.Tensor) -> None:
        """`values` (len(names),) float, without gradient."""
        self._sums[names] = self._sums[names] + values if names in self._sums else values
        self._counts[names] = self._counts.get(names, 0) + 1

    def add_all(self, several: Iterable[tuple[tuple[str, ...], torch.Tensor]]) -> None:
        """The same for some groups of names."""
        for names, values in several:
            self.add(names, values)

    def ask(
        self, total: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    ) -> Callable[[], dict[str, float]]:
        """What gives the means since the last time, and waits for no more than the device has been
        told by now. `total` adds the values of one call up over the ranks."""
        readings = {
            names: Reading(total(sums) / self._counts[names]) for names, sums in self._sums.items()
        }
        self._sums, self._counts = {}, {}

        def means() -> dict[str, float]:
            values: dict[str, float] = {}
            for names, reading in readings.items():
                values.update(zip(names, reading.wait().tolist()))
            return values

        return means


def progress(
    items: Iterable,
    title: str,
    unit: str,
    unit_scale: int = 1,
    quiet: bool = False,
    total: int | None = None,
) -> tqdm:
    """A bar with rates on a terminal, nothing elsewhere. One item counts `unit_scale` units;
    `total` is for items without a length."""
    return tqdm(
        items,
        total=total,
        desc=title,
        unit=unit,
        unit_scale=unit_scale,
        disable=True if quiet else None,
        leave=False,
        dynamic_ncols=True,
    )


def command_line() -> str:
    """The command that started this process, as one would type it."""
    return shlex.join([Path(sys.executable).name, *sys.argv])


def _as_summary(tag: str, picture: torch.Tensor) -> Summary:
    """What `SummaryWriter.add_image` makes, as a JPEG. TensorBoard goes through each byte of it in
    Python, for a checksum, and nothing else in the process gets far meanwhile: five pictures as
    PNG held up training for longer than validating a hundred small images took."""
    packed = io.BytesIO()
    image = to_pil_image(picture)
    image.save(packed, "JPEG", quality=JPEG_QUALITY)
    size = {"height": image.height, "width": image.width, "colorspace": 3}
    image = Summary.Image(**size, encoded_image_string=packed.getvalue())
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _no_nan(value: Any) -> Any:
    """JSON knows no NaN: null instead."""
    if isinstance(value, Mapping):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


class _TqdmHandler(logging.Handler):
    """Lines on standard output that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()
