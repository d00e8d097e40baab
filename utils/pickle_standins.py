"""Harmless stand-ins for the few classes that published checkpoints name in their pickles.

torch's restricted unpickler calls these instead of the originals, so that neither easydict nor
NumPy is imported on behalf of a file.
"""

import struct
from collections import OrderedDict
from typing import Any

# NumPy's type codes and the struct format of one little-endian value.
SCALAR_FORMATS = {
    "b1": "?",
    "i1": "b",
    "u1": "B",
    "i2": "<h",
    "u2": "<H",
    "i4": "<i",
    "u4": "<I",
    "i8": "<q",
    "u8": "<Q",
    "f2": "<e",
    "f4": "<f",
    "f8": "<d",
}


class EasyDict:
    """Stands for `easydict.EasyDict`: its pickle fills an ordered dict.

    An `OrderedDict` because the unpickler sets items and attributes on no other mapping; an
    EasyDict pickles each entry as both.
    """

    def __new__(cls, *items: Any) -> OrderedDict:
        return OrderedDict()


class NumpyDtype:
    """Stands for `numpy.dtype`; remembers the type code, such as "f8"."""

    def __init__(self, code: str, *flags: Any):
        self.code = code
        self.big_endian = False

    def __setstate__(self, state: tuple) -> None:
        self.big_endian = state[1] == ">"


def numpy_scalar(dtype: NumpyDtype, raw: bytes) -> bool | int | float:
    """Stands for `numpy.core.multiarray.scalar`; raises ValueError for all but plain numbers."""
    if not isinstance(dtype, NumpyDtype) or dtype.big_endian or dtype.code not in SCALAR_FORMATS:
        raise ValueError("a NumPy scalar that is not a plain little-endian number")
    return struct.unpack(SCALAR_FORMATS[dtype.code], raw)[0]


# For torch.serialization.safe_globals: (what to call, the name in the pickle).
STAND_INS = [
    (EasyDict, "easydict.EasyDict"),
    (NumpyDtype, "numpy.dtype"),
    (numpy_scalar, "numpy.core.multiarray.scalar"),  # NumPy 1
    (numpy_scalar, "numpy._core.multiarray.scalar"),  # NumPy 2
]
