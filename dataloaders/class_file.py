"""classes.yaml: what the labels of a data set of your own mean.

    labels: ids                    # or colours; ids if left out
    ignore: 255                    # an id or a list of ids; 255 if left out
    classes:
      - {name: road, colour: [128, 64, 128]}
      - {name: pole, colour: [153, 153, 153], small: true}
      - {name: car, colour: [0, 0, 142], id: 13}

The order of `classes` is that of the network's outputs. `id` is the id in the label files, by
default the position in the list. `small: true` marks classes of small or thin things, which only
reports look at. With `labels: colours` label files are colour pictures in the colours of the
classes, ids do not occur, and `ignore` is a colour or a list of colours, by default none.
JSON is YAML, so the content may as well be JSON.
"""

from pathlib import Path
from typing import Any

import yaml

from dataloaders.decode import MAX_CLASSES, Colour, ColourLabels, IdLabels, LabelCode, label_table
from dataloaders.info import IGNORE_INDEX, DatasetInfo

_KEYS = {"labels", "ignore", "classes"}
_CLASS_KEYS = {"name", "colour", "id", "small"}
_FORM = "{name: road, colour: [128, 64, 128]}, with id and small if needed"


def read_class_file(path: Path, name: str) -> tuple[DatasetInfo, LabelCode]:
    """Classes of the data set `name`, and how its label files are read.

    Raises FileNotFoundError without the file, and ValueError, naming it, for anything in it that
    is not as above.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: write one that lists the classes, each as {_FORM}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return _read(content, name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(content: Any, name: str) -> tuple[DatasetInfo, LabelCode]:
    _check_keys(content, _KEYS, required={"classes"}, what="the file")
    classes = content["classes"]
    if not isinstance(classes, list) or not 1 <= len(classes) <= MAX_CLASSES:
        raise ValueError(f"classes must be a list of 1 to {MAX_CLASSES} entries, each {_FORM}")
    for number, entry in enumerate(classes, 1):
        _check_keys(entry, _CLASS_KEYS, required={"name", "colour"}, what=f"class {number}")
        if not isinstance(entry.get("small", False), bool):
            raise ValueError(f"class {number}: small is {entry['small']!r}; give true or false")
    names = _unique([str(entry["name"]) for entry in classes], "name")
    colours = _unique([_colour(entry["colour"]) for entry in classes], "colour")
    small = tuple(str(entry["name"]) for entry in classes if entry.get("small", False))
    info = DatasetInfo(name, tuple(names), tuple(colours), small)
    coding = content.get("labels", "ids")
    if coding == "ids":
        return info, _id_labels(classes, content.get("ignore", IGNORE_INDEX))
    if coding == "colours":
        return info, _colour_labels(classes, colours, content.get("ignore", []))
    raise ValueError(f"labels is {coding!r}; choose ids or colours")


def _id_labels(classes: list[dict], ignore: Any) -> IdLabels:
    ids = _unique([_id(entry.get("id", i)) for i, entry in enumerate(classes)], "id")
    ignored = [_id(value) for value in (ignore if isinstance(ignore, list) else [ignore])]
    if both := sorted(set(ids) & set(ignored)):
        raise ValueError(f"id {both[0]} is ignored and belongs to a class; choose one")
    table = {file_id: class_id for class_id, file_id in enumerate(ids)}
    expected = f"the ids of classes.yaml ({_ranges(ids)}) or its ignored ones ({_ranges(ignored)})"
    return IdLabels(label_table(table | dict.fromkeys(ignored, IGNORE_INDEX)), expected)


def _colour_labels(classes: list[dict], colours: list[Colour], ignore: Any) -> ColourLabels:
    if with_id := [entry["name"] for entry in classes if "id" in entry]:
        raise ValueError(f"class {with_id[0]!r} has an id, which labels: colours does not use")
    if not isinstance(ignore, list):
        raise ValueError(f"ignore is {ignore!r}; with labels: colours give a colour or a list")
    several = all(isinstance(value, list) for value in ignore)
    ignored = [_colour(value) for value in (ignore if several else [ignore])]
    if both := sorted(set(colours) & set(ignored)):
        raise ValueError(f"colour {list(both[0])} is ignored and belongs to a class; choose one")
    ids = {colour: class_id for class_id, colour in enumerate(colours)}
    expected = "the colours of the classes in classes.yaml or those that it ignores"
    return ColourLabels(ids | dict.fromkeys(ignored, IGNORE_INDEX), expected)


def _check_keys(value: Any, known: set[str], required: set[str], what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a mapping of {', '.join(sorted(known))}; got {value!r}")
    if unknown := sorted(map(str, set(value) - known)):
        raise ValueError(f"{what} has unknown {unknown[0]!r}; known are {', '.join(sorted(known))}")
    if missing := sorted(required - set(value)):
        raise ValueError(f"{what} lacks {missing[0]!r}")


def _id(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 255:
        raise ValueError(f"id {value!r} is not a whole number from 0 to 255")
    return value


def _colour(value: Any) -> Colour:
    parts = value if isinstance(value, list) else []
    if len(parts) != 3 or not all(type(part) is int and 0 <= part <= 255 for part in parts):
        raise ValueError(f"colour {value!r} is not [red, green, blue] of 0 to 255")
    return tuple(parts)


def _unique(values: list, what: str) -> list:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{what} {value!r} occurs twice; each class needs its own")
    return values


def _ranges(ids: list[int]) -> str:
    """0..3, 7, 9..11"""
    runs: list[list[int]] = []
    for value in sorted(ids):
        if runs and runs[-1][1] == value - 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
