"""The classes of masks: which value of a mask file is which class, what the classes are called and coloured."""

from __future__ import annotations

import csv
import dataclasses
from importlib import resources
from pathlib import Path

import numpy as np

from tl_fast.masks.format import MaskError, MaskSpec

TABLES = ("ade20k", "cityscapes", "camvid")  # in tables/
IGNORED = 255  # the train_id in a table of values that are no class; an empty one and those below 0 mean the same
COLOURS = ("red", "green", "blue")


@dataclasses.dataclass(frozen=True)
class MaskClasses:
    """What the values of mask files mean.

    spec: of the masks that are made of them. values: int16 [256], the mask's value for each value in a file, -1 for
    values that no mask may have. source: where this was read, for messages.
    """

    spec: MaskSpec
    values: np.ndarray
    source: str

    def translate(self, indices: np.ndarray) -> np.ndarray:
        """The mask, uint8 [H, W], of a file's values, uint8 [H, W]. Raises MaskError naming a value that is unknown."""
        unknown = (np.bincount(indices.ravel(), minlength=256) > 0) & (self.values < 0)
        if unknown.any():
            value = int(np.flatnonzero(unknown)[0])
            row, column = np.argwhere(indices == value)[0]
            raise MaskError(
                f"has the value {value} (at row {row}, column {column}), which {self.source} does not know; list it"
                f" there, with train_id {IGNORED} to ignore it"
            )
        return self.values.astype(np.uint8)[indices]

    def with_palette(self, palette: np.ndarray) -> MaskClasses:
        """With the colours of a palette, uint8 [n, 3], that files have; unchanged where it lacks a class's."""
        first = [np.flatnonzero(self.values == label)[0] for label in range(self.spec.num_classes)]
        if max(first) >= len(palette):
            return self
        colours = tuple(tuple(map(int, palette[value])) for value in first)
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, colours=colours))


def read_classes(text: str, ignore_index: int = IGNORED) -> MaskClasses:
    """What `--mask-classes` says: a name of TABLES, a number of classes, or a CSV file.

    A number N: the values 0 to N - 1 are the classes. A file has a first line of column names: id (the value in the
    mask files), train_id (the class: each of 0 to C - 1; 255, nothing or a number below 0 for what is not labelled),
    name, and optionally red, green, blue. Of several ids with one train_id, the first names it. ignore_index: of
    unlabelled pixels in the masks; in mask files too, unless the table lists it. Raises MaskError naming the file and
    the line.
    """
    if text.isdecimal():
        count = int(text)
        spec = MaskSpec(count, ignore_index)
        rows = [(value, value, "", ()) for value in range(count)]
        names, colours = (), ()
    else:
        rows = _read_table(text)
        count = 1 + max((label for _, label, _, _ in rows), default=-1)
        first: dict[int, tuple[str, tuple]] = {}
        for _, label, name, colour in rows:
            if label >= 0:
                first.setdefault(label, (name, colour))
        if not first or len(first) < count:
            missing = next((label for label in range(count) if label not in first), 0)
            raise MaskError(f"{text}: no line has the train_id {missing}; they must be 0, 1, 2 ... without gaps")
        names = tuple(first[label][0] for label in range(count))
        colours = tuple(first[label][1] for label in range(count))
        colours = colours if all(colours) else ()
        spec = MaskSpec(count, ignore_index, names, colours)
    values = np.full(256, -1, np.int16)
    values[ignore_index] = ignore_index
    for value, label, _, _ in rows:
        values[value] = ignore_index if label < 0 else label
    return MaskClasses(spec, values, f"--mask-classes {text}")


def _read_table(text: str) -> list[tuple[int, int, str, tuple]]:
    """(id, train_id or -1, name, colour or ()) of every line."""
    try:
        if text in TABLES:
            content = resources.files("tl_fast.masks").joinpath("tables", f"{text}.csv").read_text("utf-8")
        else:
            content = Path(text).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise MaskError(
            f"--mask-classes {text}: cannot be read ({error}); give {', '.join(TABLES)}, a number of classes, or a CSV"
            " file"
        ) from error
    reader = csv.DictReader(content.splitlines(), skipinitialspace=True, strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        if not {"id", "train_id", "name"} <= set(columns) <= {"id", "train_id", "name", *COLOURS}:
            raise ValueError(f"its first line names {columns}")
        rows = [_read_row(row) for row in reader]
    except (ValueError, csv.Error) as error:
        raise MaskError(
            f"{text}: line {max(reader.line_num, 1)}: {error}; the columns are id (0 to 255), train_id (0 to 254, 255"
            " or nothing for what is not labelled), name and, if wanted, red, green, blue"
        ) from error
    if len({value for value, _, _, _ in rows}) < len(rows):
        twice = next(value for i, (value, *_) in enumerate(rows) if value in [row[0] for row in rows[:i]])
        raise MaskError(f"{text}: the id {twice} is there twice")
    return rows


def _read_row(row: dict[str, str]) -> tuple[int, int, str, tuple]:
    """One line of a table. Raises ValueError."""
    if None in row or None in (row["id"], row["train_id"], row["name"]):
        raise ValueError("has more or fewer values than the first line has columns")
    value, label = int(row["id"]), int(row["train_id"].strip() or -1)
    if not 0 <= value <= 255 or label > IGNORED:
        raise ValueError(f"id {value}, train_id {label} is out of range")
    levels = [(row.get(name) or "").strip() for name in COLOURS]
    colour = tuple(map(int, levels)) if all(levels) else ()
    return value, -1 if label == IGNORED or label < 0 else label, row["name"].strip(), colour
