"""Runs of a study side by side, each resumable where it stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from utils.study.plan import MODEL, TAUGHT, Experiment, Setup
from utils.training.resume import LATEST

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 120  # for a run that was asked to save and stop


@dataclass(frozen=True)
class Options:
    """What all runs of a study share."""

    dataset: str
    setup: Setup
    epochs: int
    folder: Path
    workers: int
    flags: tuple[str, ...] = ()  # for training and validation alike, after all others
    train_flags: tuple[str, ...] = ()  # for training alone


@dataclass(frozen=True)
class Step:
    """One call of train.py, and the file that says it is done."""

    title: str
    command: tuple[str, ...]
    folder: Path
    after: "Step | None" = None  # what has to be done before; None: those before it in its chain

    @property
    def marker(self) -> Path:
        return self.folder / "done.json"

    @property
    def begun(self) -> Path:
        return self.folder / "begun.json"

    def is_done(self) -> bool:
        """Raises ValueError if it was done, or begun, with another command: its figures are not
        these."""
        done = self.marker.exists()
        gone_on_with = (self.folder / LATEST).exists() and self.begun.exists()
        if not done and not gone_on_with:
            return False
        found = self.marker if done else self.begun
        before = json.loads(found.read_text(encoding="utf-8"))["command"]
        now, before = _what_counts(self.command), _what_counts(before)
        if before != now:
            changed = [word for word in (*now, *before) if word not in before] or [
                word for word in before if word not in now
            ]
            raise ValueError(
                f"{self.folder} was made with other flags ({' '.join(changed) or 'another order'}):"
                " give another --out, or remove the folder"
            )
        return done

    def begin(self) -> None:
        """Note the command, before anything is made with it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.begun, {"command": list(self.command)})


def _what_counts(command: Sequence[str]) -> list[str]:
    """A command without what does not change its result: the same data may lie elsewhere."""
    flags = [i for i, word in enumerate(command) if _is_free(word)]
    left_out = {i for at in flags for i in (at, at + 1)}
    return [word for i, word in enumerate(command) if i not in left_out]


def _is_free(word: str) -> bool:
    return word == "--num-workers" or (word.startswith("--") and word.endswith("-data-dir"))


def write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def steps(experiment: Experiment, seed: int, options: Options) -> list[Step]:
    """Training and validations of one experiment with one seed; the latter side by side."""
    name = f"{experiment.name}/seed{seed}"
    train, teacher = experiment.train, None
    if experiment.teacher:
        teacher = Step(of := f"{experiment.teacher}/seed{seed}", (), options.folder / of)
        train = train.replace(TAUGHT, f"--teacher {teacher.folder / LATEST}")
    scripts = ROOT / "configs" / options.dataset / MODEL
    common = [*options.setup.data_flags.split(), "--exp-dir", str(options.folder)]
    common += ["--num-workers", str(options.workers), "--num-viz-images", "0"]
    training = (
        str(scripts / "baseline_train.sh"),
        *options.setup.train_flags.split(),
        *train.split(),
        *("--seed", str(seed), "--name", name),
        # Validated once, at the end: nothing is selected on the way.
        *("--epochs", str(options.epochs), "--val-every", "0", "--save-minutes", "2"),
        *common,
        *options.train_flags,
        *options.flags,
    )
    folder = options.folder / name
    result = [Step(name, training, folder, teacher)]
    for validation, flags in experiment.validations.items():
        command = (
            str(scripts / "baseline_val.sh"),
            *_policy_of(experiment.train),
            *flags.split(),
            *("--policy-metrics", "yes", "--name", f"{name}/{validation}"),
            *("--resume-best", "no", "--resume", str(folder / "checkpoint.pth")),
            *common,
            *options.flags,
        )
        result.append(Step(f"{name}/{validation}", command, folder / validation, result[0]))
    return result


def _policy_of(train_flags: str) -> list[str]:
    """What of the flags of training says which network and policy are validated."""
    words, kept = train_flags.split(), []
    for flag in ("policy", "percent-target", "block-size"):
        if f"--segblocks-{flag}" in words:
            at = words.index(f"--segblocks-{flag}")
            kept += words[at : at + 2]
    return kept


class Runner:
    """Runs steps, `parallel` at a time, until all are done or time is up.

    Steps of a chain come one after the other, but those that say what they come after wait for that
    alone. Each sees one of `devices`, CUDA devices by number or identifier, which are dealt out in
    turn; without any it sees what this process does.
    """

    def __init__(
        self,
        parallel: int,
        threads: int,
        tell: Callable[[str], None] = print,
        devices: Sequence[str] = (),
    ):
        self.parallel, self.threads, self.tell = parallel, threads, tell
        # One for each step that runs.
        self._devices = [devices[i % len(devices)] for i in range(parallel if devices else 0)]
        self.failed: list[str] = []
        self._processes: set[subprocess.Popen] = set()
        self._stopping = threading.Event()
        self._lock = threading.Lock()

    def run(self, chains: Sequence[Sequence[Step]], minutes: float = 0) -> bool:
        """-> whether everything is done. After `minutes` (0: never), and when interrupted, runs
        are asked to save and stop. Raises ValueError, before any run, where `Step.is_done` does."""
        left = [
            (step, step.after or before)
            for chain in chains
            for step, before in zip(chain, [None, *chain])
            if not step.is_done()
        ]
        before = signal.signal(signal.SIGTERM, lambda number, frame: self.stop())
        pool = ThreadPoolExecutor(self.parallel)
        running: dict[Future, str | None] = {}  # with their devices
        deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        try:
            while True:
                for future in [future for future in running if future.done()]:
                    future.result()  # what is our own mistake is not hidden
                    self._devices.append(running.pop(future))
                while len(running) < self.parallel and not self._stopping.is_set():
                    ready = next((x for x in left if x[1] is None or x[1].marker.exists()), None)
                    if ready is None:
                        break
                    left.remove(ready)
                    device = self._devices.pop(0) if self._devices else None
                    running[pool.submit(self._one, ready[0], device)] = device
                if not running:
                    return not left and not self.failed and not self._stopping.is_set()
                if time.monotonic() > deadline and not self._stopping.is_set():
                    self.tell(f"{minutes:g} minutes are over: saving")
                    self.stop()
                time.sleep(0.1)
        except KeyboardInterrupt:
            self.stop()
            return False
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            signal.signal(signal.SIGTERM, before)

    def stop(self) -> None:
        """Ask every run to save and stop, and start no more."""
        self._stopping.set()
        with self._lock:
            for process in self._processes:
                process.terminate()

    def _one(self, step: Step, device: str | None) -> bool:
        """Whether the step is done now."""
        step.begin()
        environment = os.environ | {
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": str(self.threads),
        }
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        started = time.monotonic()
        self.tell(f"start  {step.title}")
        with open(step.folder / "study.log", "a", encoding="utf-8") as log:
            with self._lock:
                if self._stopping.is_set():
                    return False
                # A session of its own: Ctrl-C reaches the study alone, which asks each run once.
                process = subprocess.Popen(
                    step.command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
                self._processes.add(process)
            status = self._wait(process)
        seconds = time.monotonic() - started
        if status == 0:
            done = {"command": list(step.command), "seconds": round(seconds, 1)}
            write(step.marker, done)
            self.tell(f"done   {step.title} ({seconds:.0f} s)")
        elif self._stopping.is_set():
            self.tell(f"saved  {step.title}")
        else:
            self.failed.append(step.title)
            self.tell(f"FAILED {step.title}: {_last_line(step.folder / 'study.log')}")
        return status == 0

    def _wait(self, process: subprocess.Popen) -> int:
        while True:
            try:
                return process.wait(STOP_SECONDS if self._stopping.is_set() else 1)
            except subprocess.TimeoutExpired:
                if self._stopping.is_set():
                    process.kill()
            finally:
                if process.returncode is not None:
                    with self._lock:
                        self._processes.discard(process)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'no output'} ({path})"
