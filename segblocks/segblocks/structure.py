"""Nested tuples, lists and dicts, as networks take and return them."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any


def map_structure(value: Any, kind: type, function: Callable) -> Any:
    """Replace every `kind` in nested tuples, lists and dicts."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        mapped = ((k, map_structure(v, kind, function)) for k, v in value.items())
        if type(value) in (dict, OrderedDict):
            return type(value)(mapped)
        other = copy.copy(value)  # whose constructor may take something else, as a defaultdict's
        other.update(mapped)
        return other
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_structure(v, kind, function) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_structure(v, kind, function) for v in value)
    return value


def find(value: Any, kind: type) -> list:
    """Every `kind` in nested tuples, lists and dicts, in order."""
    found: list = []
    map_structure(value, kind, found.append)
    return found


def leaves(value: Any) -> list:
    """Whatever nested tuples, lists and dicts hold, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        return [value]
    return [leaf for item in value for leaf in leaves(item)]
