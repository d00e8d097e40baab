"""The table of rules and the way from a torch function to its rule."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

_modes = torch._C._len_torch_dispatch_stack
_compiling = torch.compiler.is_dynamo_compiling

RULES: dict[str, Callable] = {}

# Short ways of functions that inference repeats: (args, kwargs) -> result, or None where the rule
# has to decide. Filled once there are blocks on CUDA.
DIRECT: dict[Callable, Callable] = {}

# Where `segblocks.fast.trace` notes what a network does while it runs once.
RECORDER: ContextVar = ContextVar("segblocks_recorder", default=None)


def current_recorder():
    """Whoever records, or None. Dynamo cannot trace a ContextVar, and nobody records under it."""
    return None if torch.compiler.is_compiling() else RECORDER.get()


def apply(func: Callable, args: tuple, kwargs: dict[str, Any], name: str | None = None) -> Any:
    """Apply a torch function to block tensors, the short way if there is one."""
    if not _compiling():
        direct = DIRECT.get(func)
        # Recorders and dispatch modes, such as those of an export, want to see every operation.
        if direct is not None and RECORDER.get() is None and not _modes():
            result = direct(args, kwargs)
            if result is not None:
                return result
    return apply_rule(func, args, kwargs, name)


def rule(*names: str) -> Callable[[Callable], Callable]:
    """Register `rule(func, args, kwargs)` for torch functions of these names.

    `__name__` is the same for the function, the method and, without underscores, the operator.
    """

    def register(function: Callable) -> Callable:
        for name in names:
            RULES[name] = function
        return function

    return register


def apply_rule(func: Callable, args: tuple, kwargs: dict[str, Any], name: str | None = None) -> Any:
    """Apply the rule of `func`; NotImplementedError names the operation when there is none."""
    name = name or func.__name__
    found = RULES.get(name)
    if found is None:
        raise NotImplementedError(
            f"'{name}' has no meaning on blocks of two resolutions (it needs the whole picture or "
            "another shape); wrap the module or function that calls it in segblocks.no_blocks"
        )
    result = found(func, args, kwargs)
    recorder = current_recorder()
    if recorder is not None:
        recorder.record(name, func, args, kwargs, result)
    return result
