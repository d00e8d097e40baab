"""The fast inference path: `segblocks.compile`."""

from .compile import FastModel, compile

__all__ = ["FastModel", "compile"]
