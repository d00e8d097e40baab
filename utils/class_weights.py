"""Weights of the classes in the loss: given one by one, or from the labels of a data set."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ENTRY = "class_weights"  # in the report of dataloaders.check


def class_weights(given: Sequence[str], classes: Sequence[str]) -> Tensor:
    """What --class-weights was given, as float32 (classes,).

    One word that is no number names a JSON file: a list of numbers, a mapping from class names to
    numbers, or a report of `dataloaders.check`, which holds such a mapping. Raises
    FileNotFoundError without the file, ValueError for anything but one weight a class, all finite
    and at least 0, one above 0.
    """
    if len(given) == 1 and not _is_number(given[0]):
        source, weights = given[0], _read(Path(given[0]), classes)
    else:
        source, weights = "--class-weights", list(given)
    if len(weights) != len(classes):
        raise ValueError(
            f"{source} gives {len(weights)} class weights for {len(classes)} classes "
            f"({', '.join(classes)}); give one a class, in this order"
        )
    for name, weight in zip(classes, weights):
        if isinstance(weight, bool) or not _is_number(weight) or not 0 <= float(weight) < math.inf:
            raise ValueError(f"{source}: weight {weight!r} of {name} is not a number of at least 0")
    values = torch.tensor([float(weight) for weight in weights])
    if not (values > 0).any():
        raise ValueError(f"{source}: all class weights are 0; nothing would be learned")
    return values


def median_frequency_weights(
    pixels: Mapping[str, int], pixels_of_images: Mapping[str, int]
) -> dict[str, float]:
    """Weight of each class: the median frequency over its own.

    The frequency of a class is its `pixels` over the labelled pixels of the images that show it,
    `pixels_of_images` (Eigen and Fergus, ICCV 2015, section 6.3.2). Classes that no image shows
    get 1, which no loss will ever use.
    """
    frequency = {name: pixels[name] / pixels_of_images[name] for name in pixels if pixels[name]}
    middle = median(frequency.values()) if frequency else 1.0
    return {name: middle / frequency[name] if name in frequency else 1.0 for name in pixels}


def _read(path: Path, classes: Sequence[str]) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"--class-weights {path} is neither a number nor a file; give one number a class, or "
            "the JSON file that python -m dataloaders.check --json writes"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # text that is not UTF-8 included
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict):
        content = content.get(ENTRY, content)
    if isinstance(content, dict):
        if content.keys() != set(classes):
            odd = sorted(content.keys() ^ set(classes))
            raise ValueError(
                f"{path} gives class weights for other classes than this data set's "
                f"({', '.join(odd[:5])}): was it made for another --dataset?"
            )
        return [content[name] for name in classes]
    if not isinstance(content, list):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a list or mapping")
    return content


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
