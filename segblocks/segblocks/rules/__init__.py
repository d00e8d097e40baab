"""How torch functions act on a `DualResTensor`; importing this package fills the table of rules.

An operation on blocks is the dense operation on the full-resolution picture read at the high
blocks, and on the half-resolution picture read at the low blocks. What has no rule raises.
"""

from . import channels, convolution, normalise, pointwise, pool, resize, shape  # noqa: F401
