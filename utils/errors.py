"""Mistakes of users end as one line; mistakes of ours keep their traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What validation raises while data, network and checkpoint are set up. OSError covers missing,
# unreadable and unwritable files and a full disk.
VALIDATION_ERRORS = (ValueError, TypeError, NotImplementedError, OSError)


class UserError(Exception):
    """Something its reader can put right. train.py prints it as one line and exits with 1."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Inside, what validation raises becomes a UserError, with the original as its cause."""
    try:
        yield
    except VALIDATION_ERRORS as error:
        raise UserError(one_line(error)) from error
    except torch.OutOfMemoryError as error:
        raise UserError(OUT_OF_MEMORY) from error


OUT_OF_MEMORY = (
    "out of GPU memory: lower --batch-size (and raise --accumulate to keep the size of a step) or "
    "--crop-res, use --amp bf16, or --cuda-graphs no, which takes up to a fifth less"
)


def one_line(error: BaseException) -> str:
    """The message of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__
