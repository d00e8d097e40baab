"""Checkpoints: written whole or not at all, read without running anything that is in them."""

import logging
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.download import fetch, is_url
from utils.pickle_standins import STAND_INS
from utils.published import without_classifier

log = logging.getLogger(__name__)

# How a file written by torch.save begins: as a zip archive, or with the pickled magic number of
# the format before PyTorch 1.6.
TORCH_FILE_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
# What PyTorch's zip reader and restricted unpickler were seen to raise on damaged files.
DAMAGE = (
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
PLAIN_TYPES = (bool, int, float, str, bytes, type(None), torch.Size, torch.dtype, torch.device)
WEIGHT_ENTRIES = ("model", "state_dict")
POLICY_PREFIX = "policy."
LOGITS_WEIGHT = "logits.conv.weight"
NAMES_SHOWN = 10


class DamagedCheckpoint(ValueError):
    """A checkpoint file that is truncated, changed, or none at all."""


def previous(path: Path) -> Path:
    """Where `save_checkpoint` keeps the checkpoint before that at `path`."""
    return path.with_name(f"{path.stem}_previous{path.suffix}")


def save_checkpoint(
    path: str | Path,
    state: dict[str, Any],
    keep_previous: bool = False,
    also: str | Path | None = None,
) -> None:
    """Write `state` to `path`, replacing what was there in one step.

    The file is complete on disk before it takes the name, so a run that is killed or a disk that
    fills up leaves the previous checkpoint as it was; `keep_previous` keeps it under the name that
    `previous` gives, too. `also` gets a copy of the new file first; where that is impossible, the
    rest is done all the same. Raises TypeError if `state` holds anything but tensors, plain values
    and plain containers, which `load_checkpoint` would refuse, and OSError if a file cannot be
    written.
    """
    path = Path(path)
    _check_plain(state, "state")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files can be read by their owner alone, and the mode survives the rename.
    # The name is always the same: what a killed process has left is written over by the next.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        failure = None if also is None else _copy(temporary, Path(also))
        if keep_previous and path.exists():
            _replace_by_link(path, previous(path))
        os.replace(temporary, path)
        if failure is not None:
            raise failure
    except RuntimeError as error:
        # torch.save turns a failed write into a RuntimeError about archive positions.
        if not isinstance(error.__context__, OSError):
            raise
        reason = error.__context__.strerror
        raise OSError(f"cannot write the checkpoint {path} ({reason}); make room") from error
    finally:
        temporary.unlink(missing_ok=True)


def _copy(path: Path, other: Path) -> OSError | None:
    """Put a copy of the file at `path` in place of what was at `other`; -> why that failed. No
    link: where one of the two is damaged, the other one is not."""
    temporary = other.with_name(f".{other.name}.tmp")
    try:
        with open(path, "rb") as source, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 24)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, other)
    except OSError as error:
        reason = f"cannot write the checkpoint {other} ({error.strerror}); make room"
        return OSError(reason).with_traceback(error.__traceback__)
    finally:
        temporary.unlink(missing_ok=True)
    return None


def _replace_by_link(path: Path, other: Path) -> None:
    """Make `other` a second name of the file at `path`; at no time is either name without a file,
    save on file systems without hard links, where `path` is for the moment between two renames."""
    second = other.with_name(f".{other.name}.tmp")
    try:
        second.unlink(missing_ok=True)
        os.link(path, second)
    except OSError:
        os.replace(path, other)
        return
    try:
        os.replace(second, other)
    finally:
        second.unlink(missing_ok=True)


def load_checkpoint(source: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this program or of the published release; tensors arrive on the CPU.

    `source` is a file, or an http(s) address that is downloaded once (see `utils.download.fetch`).
    Mappings arrive as plain dicts (the release's `easydict.EasyDict` included), NumPy scalars as
    Python numbers. Nothing in the file is run: raises ValueError for a file that asks for code, its
    subclass DamagedCheckpoint for one that is truncated, has changed or is no checkpoint,
    FileNotFoundError if there is none, and OSError for a download that stays incomplete.
    """
    if not is_url(source):
        return _read(Path(source))
    path = fetch(str(source))
    try:
        return _read(path)
    except ValueError as error:
        text = f"{error}; it came from {source}, delete it to download again"
        raise type(error)(text) from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train first, or correct the path")
    with open(path, "rb") as file:
        start = file.read(len(max(TORCH_FILE_STARTS, key=len)))
    if not start.startswith(TORCH_FILE_STARTS):
        raise DamagedCheckpoint(f"{path} is not a checkpoint: torch.save did not write it")
    _check_sums(path)
    try:
        with torch.serialization.safe_globals(STAND_INS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise DamagedCheckpoint(_damaged(path)) from error
        raise ValueError(
            f"{path} is refused: it asks to run code ({code[1]}), and only tensors and plain "
            "containers are loaded; save state dicts, not whole objects"
        ) from error
    except DAMAGE as error:
        raise DamagedCheckpoint(_damaged(path)) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(state).__name__}, no dict")
    return _to_plain(state)


def _damaged(path: Path) -> str:
    return f"{path} is not a checkpoint, or is truncated or damaged"


def _check_sums(path: Path) -> None:
    """Raise DamagedCheckpoint where the content of a zip archive does not fit its checksums, which
    PyTorch does not look at."""
    try:
        if not zipfile.is_zipfile(path):
            return  # of the older format, or truncated: reading it will tell
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:
                return
    except (zipfile.BadZipFile, *DAMAGE) as error:
        raise DamagedCheckpoint(_damaged(path)) from error
    raise DamagedCheckpoint(_damaged(path))


def load_weights(
    model: nn.Module, path: str | Path, checkpoint: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Load the weights at `path` into `model`, in place, and return the whole checkpoint.

    `path` is a file or an http(s) address, see `load_checkpoint`; `checkpoint` what that has
    returned already, None where the file is still to be read. It may hold the weights under
    "model" or "state_dict" (as published), or be a bare state dict. Every name and shape must
    agree, else ValueError is raised and the model is left as it was. Dropped are the unused
    ImageNet classifier of published EfficientNet-Lite checkpoints, and a policy network if the
    model's policy has no parameters. What published policies lack (a threshold) is 0.
    Published weights were trained with the `legacy_upsample` of SegBlocksModel, which is not set
    here.
    """
    if checkpoint is None:
        checkpoint = load_checkpoint(path)
    own = model.state_dict()
    weights = without_classifier(_find_weights(checkpoint, path), own)
    if _has_bare_policy(model) and any(name.startswith(POLICY_PREFIX) for name in weights):
        weights = _without(weights, POLICY_PREFIX)
        log.warning(
            "%s: its policy network is not used; this model's policy has no parameters", path
        )
    for name in getattr(getattr(model, "policy", None), "SINCE_PUBLISHED", ()):
        weights.setdefault(POLICY_PREFIX + name, torch.zeros_like(own[POLICY_PREFIX + name]))
    _check_fit(own, weights, path)
    model.load_state_dict(weights)
    return checkpoint


def _without(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith(prefix)}


def _has_bare_policy(model: nn.Module) -> bool:
    policy = getattr(model, "policy", None)
    return isinstance(policy, nn.Module) and not any(True for _ in policy.parameters())


def _find_weights(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    weights = next((checkpoint[name] for name in WEIGHT_ENTRIES if name in checkpoint), checkpoint)
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(value, Tensor) for value in weights.values())
    ):
        raise ValueError(
            f"{path} holds no weights: expected a state dict under "
            f"{' or '.join(map(repr, WEIGHT_ENTRIES))}, found {_some(map(repr, checkpoint))}"
        )
    return weights


def _check_fit(own: dict[str, Tensor], weights: dict[str, Tensor], path: str | Path) -> None:
    """Raise ValueError unless both have the same names with the same shapes."""
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    reshaped = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    if missing and not unexpected and all(name.startswith(POLICY_PREFIX) for name in missing):
        raise ValueError(
            f"{path} has no policy network, but this model has one; pass the --segblocks-policy "
            "that it was trained with (disabled, for a baseline)"
        )
    classes = next((n for n in reshaped if n.endswith(LOGITS_WEIGHT)), None)
    rest = [name for name in reshaped if ".logits.conv." not in f".{name}"]
    if classes and not (missing or unexpected or rest):
        there, here = weights[classes], own[classes]
        if there.shape[1:] == here.shape[1:]:
            raise ValueError(
                f"{path} was trained for {there.shape[0]} classes, this network has "
                f"{here.shape[0]}; check --dataset"
            )
    shapes = [f"{n} {tuple(weights[n].shape)} for {tuple(own[n].shape)}" for n in reshaped]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    wrong = [f"{len(names)} {kind} ({_some(names)})" for kind, names in found.items() if names]
    if wrong:
        raise ValueError(
            f"{path} does not fit this network: {'; '.join(wrong)}; check --backbone, "
            "--num-features, --segblocks-policy and --dataset"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _check_plain(value: Any, where: str) -> None:
    """Raise TypeError, naming the entry, for anything that `load_checkpoint` would refuse."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif type(value) not in (*PLAIN_TYPES, Tensor, nn.Parameter):
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds "
            "tensors, numbers, strings, lists, tuples and dicts only: convert it first"
        )


def _to_plain(value: Any) -> Any:
    """The same, with plain dicts for ordered ones."""
    if isinstance(value, dict):
        # Not value.items(): a pickle may have given an OrderedDict an attribute of that name.
        return {key: _to_plain(item) for key, item in dict.items(value)}
    if type(value) in (list, tuple):
        return type(value)(_to_plain(item) for item in value)
    return value
