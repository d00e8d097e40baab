"""Types of flags: what a word on the command line may be."""

import argparse
import math
from contextlib import suppress
from fractions import Fraction

_YES = ("yes", "true", "t", "y", "1")
_NO = ("no", "false", "f", "n", "0")


def boolean(text: str) -> bool:
    """Read yes/true/t/y/1 or no/false/f/n/0, in any case."""
    word = text.lower()
    if word in _YES:
        return True
    if word in _NO:
        return False
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither yes ({'/'.join(_YES)}) nor no ({'/'.join(_NO)})"
    )


def budget(text: str) -> float | int:
    """Read a share of blocks (0.4, 40%) as float or a number of blocks (51) as int."""
    try:
        if text.endswith("%"):
            value: float | int = float(text[:-1]) / 100
        elif "." in text or "e" in text.lower():
            value = float(text)
        else:
            value = int(text)
    except ValueError:
        value = -1
    if value < 0 or (isinstance(value, float) and not value <= 1):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a share of blocks (0.4 or 40%, from 0 to 1) "
            "nor a number of blocks (51)"
        )
    return value


def number(
    kind: type,
    low: float,
    high: float = math.inf,
    above: bool = False,
    below: float = math.inf,
):
    """An argparse type: a number from `low` (or above it) to `high` (or below `below`); floats may
    be fractions."""

    def read(text: str):
        try:
            value = float(Fraction(text)) if kind is float and "/" in text else kind(text)
        except (ValueError, ZeroDivisionError):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number ({kind.__name__})"
            ) from None
        if not (low < value if above else low <= value) or not (value <= high and value < below):
            bound = f"above {low:g}" if above else f"at least {low:g}"
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: accepted are values {bound}"
                + (f" and at most {high:g}" if high < math.inf else "")
                + (f" and below {below:g}" if below < math.inf else "")
            )
        return value

    return read


COUNT = number(int, 1)
WHOLE = number(int, 0)
POSITIVE = number(float, 0, above=True)
NOT_NEGATIVE = number(float, 0)
SHARE = number(float, 0, 1)


def epochs_or_share(text: str) -> int | Fraction:
    """A whole number of epochs, or a share of --epochs, below 1; exact, as it is rounded down."""
    with suppress(argparse.ArgumentTypeError):
        return WHOLE(text)
    with suppress(ValueError, ZeroDivisionError):
        if 0 <= (share := Fraction(text)) < 1:
            return share
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither a whole number of epochs nor a share of them below 1 (1/7)"
    )
