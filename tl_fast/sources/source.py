"""Defines `Source`, a listed data set of images, and what all kinds share: classes, ids, files that must not change."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from tl_fast.system.mistakes import InputError

# Label maps hold classes as uint16, and 65,535 stands for no class, so labels are below this number. A larger label is
# damage; without a limit the names made up for its classes would fill the memory.
MAX_CLASSES = 65_535


class SourceError(InputError):
    """A data set that is not as its kind should be; the message names the file (and member or row) and the remedy."""


class SourceChanged(SourceError):
    """A file of many samples is gone or has changed since it was listed. No sample is to blame: a conversion ends."""


class Source(Protocol):
    """A listed data set of n images. Kinds subclass this; any class of the same shape serves as well.

    kind: 'image folder', 'ImageNet tar', 'WebDataset', 'parquet' or 'beton'. root: what was opened, for messages.
    ids: n different strings, stable between runs.
    labels: int64 [n], indices into `class_names`; -1 where a sample has none (`read` of a parquet row then raises).
    sizes: int64 [n], bytes of each image (parquet: mean of its row group).
    stamps: int64 [n, m]; a row changes when its image's file does.
    ignored: how many other files or archive members were seen.
    exif: what was done about EXIF orientations when the images were converted ('ignore' or 'apply'); None: nothing yet.
    decodes_groups: reading one image decodes its neighbours too and keeps them for the next reads (parquet). One
    process should then do all reading, with threads, because each process decodes for itself.
    """

    kind: str
    root: str
    ids: list[str]
    labels: np.ndarray
    class_names: list[str]
    sizes: np.ndarray
    ignored: int
    exif: str | None = None
    decodes_groups: bool = False

    @property
    def stamps(self) -> np.ndarray: ...

    def read(self, i: int) -> bytes:
        """Bytes of image i's file. Thread-safe.

        Raises SourceError or OSError naming the file, also when it has changed since it was listed.
        """
        ...

    def origin(self, i: int) -> str:
        """How messages call sample i: its path, or archive and member, or file and row."""
        ...

    def order(self, seed: int | None) -> np.ndarray:
        """Order of reading, int64 [n]: as listed for None, else a permutation of that seed (numpy's PCG64)."""
        if seed is None:
            return np.arange(len(self.ids))
        return np.random.Generator(np.random.PCG64(seed)).permutation(len(self.ids))

    def release(self, but_for: int | None = None) -> None:
        """Drop what is kept for the next reads, except what sample `but_for` needs. Later reads make it again."""

    def close(self) -> None:
        """Close files and free memory."""

    def __len__(self) -> int:
        return len(self.ids)

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_listed(path: str, size: int) -> bytes:
    """The bytes of a file that had `size` of them when it was listed.

    Raises SourceError when it has more or fewer now, or is no file; OSError.
    """
    # O_NONBLOCK: without it, opening a pipe that nobody writes to would wait for ever.
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if size == 0 and not stat.S_ISREG(os.fstat(file).st_mode):
            raise SourceError(f"{path}: named like a file of the data set, but no file; remove it")
        data = os.read(file, size + 1)  # one system call; Path.read_bytes makes ten
        while len(data) < size and (more := os.read(file, size + 1 - len(data))):  # network mounts answer in pieces
            data += more
    finally:
        os.close(file)
    if len(data) != size:
        now = f"more than {size}" if len(data) > size else len(data)
        raise SourceError(
            f"{path}: has {now} bytes, it had {size} when it was listed; run again once nobody changes it"
        )
    return data


def read_class_names(path: Path | str) -> list[str]:
    """Class names from a file: a JSON list, or one name per line.

    Of ImageNet's lines 'n01440764 tench, ...' the name is the WordNet id. Raises SourceError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        names = json.loads(text) if text.lstrip().startswith("[") else text.strip().splitlines()
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise SourceError(
            f"{path}: cannot be read as class names ({error}); give one name per line, or a JSON list"
        ) from error
    if not all(isinstance(name, str) and name.strip() for name in names) or not names:
        raise SourceError(f"{path}: must be a list of class names, none of them empty")
    names = [name.strip() for name in names]
    wordnet = [re.match(r"(n\d{8})\s", name) for name in names]
    if all(wordnet):
        names = [match.group(1) for match in wordnet]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SourceError(f"{path}: the class name {twice!r} is there twice")
    return names


def names_beside(file: str) -> list[str] | None:
    """Class names from `class_names.txt` or `.json` beside a shard that holds none; None where there is no such file.

    Raises SourceError.
    """
    beside = (Path(file).parent / f"class_names.{suffix}" for suffix in ("txt", "json"))
    return next((read_class_names(path) for path in beside if path.is_file()), None)


def reorder_classes(
    labels: np.ndarray, listed: list[str], wanted: list[str] | None, root: str
) -> tuple[np.ndarray, list[str]]:
    """Labels that are indices into `listed`, the classes of the data, as indices into `wanted`; and the names.

    wanted None: nothing changes. Raises SourceError naming a listed class that is not wanted.
    """
    if wanted is None:
        return labels, listed
    label_of = {name: label for label, name in enumerate(wanted)}
    if unknown := [name for name in listed if name not in label_of]:
        raise SourceError(
            f"{root}: class {unknown[0]!r} is not among the {len(wanted)} of --class-names ({len(unknown)} such)"
        )
    return np.array([label_of[name] for name in listed], np.int64)[labels], wanted


def label_classes(
    texts: Sequence[str], class_names: list[str] | None, origin: Callable[[int], str]
) -> tuple[np.ndarray, list[str]]:
    """Labels int64 [n] and class names from each sample's class as text.

    Where all texts are among `class_names`, they are names of classes. Where all are whole numbers, they are indices
    into `class_names`; without class names the classes are called '0', '1', ... up to the highest number. Otherwise,
    where `class_names` is None, the classes are the sorted different texts.
    Raises SourceError naming the first sample that fits none of these.
    """
    different = set(texts)
    label_of = None if class_names is None else {name: label for label, name in enumerate(class_names)}
    by_name = label_of is not None and different <= label_of.keys()
    if not by_name and all(text.isascii() and text.isdigit() for text in different):
        limit = MAX_CLASSES if class_names is None else len(class_names)
        # int() refuses a text of more than 4,300 digits, with an error that names no sample.
        numbers = {text: int(text) if len(text) <= 18 else limit for text in different}
        for i, text in enumerate(texts if max(numbers.values(), default=0) >= limit else ()):
            if numbers[text] >= limit:
                raise SourceError(f"{origin(i)}: class {text:.20} is not below {limit}, the number of classes")
        label_of = numbers
        class_names = class_names or [str(number) for number in range(max(numbers.values(), default=-1) + 1)]
    elif label_of is None:
        if any(re.fullmatch(r"[+-]?\d+", text) for text in different):
            i, text = next((i, text) for i, text in enumerate(texts) if not (text.isascii() and text.isdigit()))
            raise SourceError(f"{origin(i)}: class {text[:40]!r} is no whole number from 0 up, as others are")
        if len(different) > MAX_CLASSES:
            raise SourceError(
                f"{origin(0)}: {len(different):,} different classes, at most {MAX_CLASSES:,} are possible"
            )
        class_names = sorted(different)
        label_of = {name: label for label, name in enumerate(class_names)}
    elif not by_name:
        i, text = next((i, text) for i, text in enumerate(texts) if text not in label_of)
        raise SourceError(
            f"{origin(i)}: class {text[:40]!r} is not among the {len(class_names)} class names ({class_names[0]!r}"
            " first)"
        )
    return np.fromiter((label_of[text] for text in texts), np.int64, len(texts)), class_names


def check_ids(ids: Sequence[str], origin: Callable[[int], str]) -> None:
    """Raise SourceError naming two samples with one id, or one whose id is no valid Unicode, so that JSON cannot hold
    it.
    """
    if len(set(ids)) != len(ids):
        first: dict[str, int] = {}
        for i, name in enumerate(ids):
            if (other := first.setdefault(name, i)) != i:
                raise SourceError(
                    f"{origin(other)} and {origin(i)}: two samples with the id {name!r}; rename or remove one"
                )
    for i, name in enumerate(ids):
        if not name.isascii():
            try:
                name.encode("utf-8")
            except UnicodeEncodeError:
                raise SourceError(
                    f"{origin(i)!a}: its name is not UTF-8; rename it (convmv does that for many)"
                ) from None
