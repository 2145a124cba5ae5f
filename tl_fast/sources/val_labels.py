"""Reads the classes of ImageNet's validation images, which their tar lacks, from the development kit or a list."""

from __future__ import annotations

import csv
import io
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from tl_fast.sources.source import SourceError

_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_KAGGLE = ["ImageId", "PredictionString"]  # the header of Kaggle's list
_MAX_BYTES = 256 << 20  # of a list of labels or a part of the devkit; the real ones have 0.2 to 3 MB


def read_val_labels(path: Path | str, images: Sequence[str], root: str) -> tuple[list[str], list[str] | None]:
    """Class of every image as text, and the names of all classes: the devkit's sorted WordNet ids, None from a list.

    images: file names in sorted order. root: where they are, for messages. path: one of

    - the devkit, `ILSVRC2012_devkit_t12.tar.gz` or its folder: its n-th line is the class of the n-th image;
    - a text file of lines 'NAME CLASS' or 'NAME,CLASS'; a first line with an unknown NAME is a header;
    - Kaggle's LOC_val_solution.csv;
    - a text file of one CLASS per line, in the order of the sorted names.

    CLASS is a name or a whole number.
    Raises SourceError naming the line or image at fault.
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(
            f"{path}: no such file; give the devkit (ILSVRC2012_devkit_t12.tar.gz), its folder, or a list of labels"
        )
    if path.is_dir() or re.search(r"\.(tar|tar\.gz|tgz)$", path.name.lower()):
        return _devkit(path, images, root)
    if path.name == _TRUTH:  # the devkit numbers its classes in an order of its own, which meta.mat holds
        if not (path.parent / _META).is_file():
            raise SourceError(f"{path}: its numbers mean nothing without {_META} beside it; give the whole devkit")
        return _devkit(path.parent, images, root)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SourceError(f"{path}: too large for a list of labels")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read as a list of labels ({error})") from error
    return _listed(path, text, images, root), None


def _rows(path: Path, text: str) -> list[list[str]]:
    """The lines of a list: each an image and its class, or a class alone."""
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if "," not in (lines[0] if lines else ""):
        return [line.split(maxsplit=1) for line in lines]
    try:
        rows = [[cell.strip() for cell in row[:2]] for row in csv.reader(lines)]
    except csv.Error as error:
        raise SourceError(f"{path}: cannot be read as CSV ({error})") from error
    if rows[0] != _KAGGLE:
        return rows
    for number, row in enumerate(rows[1:], 2):
        classes = row[-1].split()[::5]  # of 'n01978287 85 1 499 272 n01978287 ...', a class and the box of each object
        if len(row) != 2 or len(set(classes)) != 1:
            raise SourceError(
                f"{path} line {number}: {', '.join(row)[:60]!r} should be an image and boxes of one class"
            )
        row[1] = classes[0]
    return rows[1:]


def _listed(path: Path, text: str, images: Sequence[str], root: str) -> list[str]:
    """The class of every image from the text of a list."""
    rows = _rows(path, text)
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(images):
            raise SourceError(
                f"{path}: has {len(rows)} labels, {root} {len(images)} images; one label per image, in order of their"
                " names"
            )
        return [row[0] for row in rows]
    by_name = {Path(name).stem: name for name in images} | {name: name for name in images}
    classes: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or not all(row):
            raise SourceError(f"{path} line {number}: {' '.join(row)[:60]!r} should be an image's name and its class")
        name = by_name.get(row[0].rsplit("/", 1)[-1])
        if name is None and number == 1:
            continue  # a header; if it was not, the image without a class is reported below
        if name is None:
            raise SourceError(
                f"{path} line {number}: {row[0][:60]!r} is no image of {root}; images are missing, or the list is"
                " another's"
            )
        if classes.setdefault(name, row[1]) != row[1]:
            raise SourceError(f"{path} line {number}: {name} has class {row[1]!r} here and {classes[name]!r} above")
    if without := [name for name in images if name not in classes]:
        raise SourceError(f"{path}: no class for {without[0]} ({len(without)} such images of {len(images)})")
    return [classes[name] for name in images]


def _devkit_files(path: Path) -> tuple[bytes, bytes]:
    """Ground truth and meta.mat of the devkit, from its folder or archive."""
    contents = {_TRUTH: b"", _META: b""}
    try:
        if path.is_dir():
            for name in contents:
                paths = [*path.glob(name), *path.glob(f"data/{name}"), *path.glob(f"*/data/{name}")]
                contents[name] = paths[0].read_bytes() if paths else b""
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    name = member.name.rsplit("/", 1)[-1]
                    if name in contents and member.isfile() and member.size <= _MAX_BYTES:
                        contents[name] = archive.extractfile(member).read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise SourceError(f"{path}: cannot be read as ImageNet's devkit ({error}); download it again") from error
    if missing := [name for name, data in contents.items() if not data]:
        raise SourceError(f"{path}: is not ImageNet's devkit (ILSVRC2012_devkit_t12): it has no data/{missing[0]}")
    return contents[_TRUTH], contents[_META]


def _devkit(path: Path, images: Sequence[str], root: str) -> tuple[list[str], list[str]]:
    """The class of every image, and the sorted classes, from the devkit."""
    try:
        from scipy.io import loadmat  # in the `convert` extra; only the devkit needs it
        from scipy.io.matlab import MatReadError
    except ModuleNotFoundError as error:
        raise SourceError(
            f"{path}: reading the devkit's {_META} needs scipy; pip install scipy, or give a list of labels"
        ) from error
    truth, meta = _devkit_files(path)
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]  # the others are groups of classes
        classes = dict(zip((int(number) for number in leaves["ILSVRC2012_ID"]), map(str, leaves["WNID"]), strict=True))
        numbers = [int(line) for line in truth.split()]
    except (
        MatReadError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        OSError,
        NotImplementedError,
        zlib.error,
    ) as error:
        raise SourceError(
            f"{path}: its data/{_META} or ground truth cannot be read ({error}); download the devkit again"
        ) from error
    if len(numbers) != len(images):
        raise SourceError(
            f"{path}: knows {len(numbers)} validation images, {root} has {len(images)}; a part is missing or they are"
            " others"
        )
    if wrong := [number for number in numbers if number not in classes]:
        raise SourceError(f"{path}: class {wrong[0]} of its ground truth is not in its {_META}")
    for count, name in enumerate(images, 1):  # the n-th line belongs to the image numbered n
        if (number := re.search(r"_val_(\d{8})\.", name)) and int(number.group(1)) != count:
            raise SourceError(
                f"{root}: {name} is image {count} in order of their names; the devkit's are numbered from 1 without"
                " gaps"
            )
    return [classes[number] for number in numbers], sorted(classes.values())
