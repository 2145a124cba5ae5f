"""Betons as a data set to read from: to annotate what is packed already, or to pack it anew with other label maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_fast.beton import BetonReader
from tl_fast.sources import Source, SourceError, check_ids, expand_paths, open_source, read_class_names


class BetonSource(Source):
    """One beton, or the shards of one data set in the order given; samples in the order of the files.

    Ids, labels and class names are those that were packed. class_names: other names for the same labels. Each image's
    CRC-32 is checked when it is read. Raises SourceError for shards with other classes, or a sample that two of them
    hold.
    """

    kind = "beton"

    def __init__(self, files: Sequence[str], class_names: list[str] | None = None) -> None:
        self.root = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        self.ignored = 0
        self.readers = [BetonReader(path) for path in files]
        first = self.readers[0]
        for reader in self.readers[1:]:
            for what, ours, theirs in (
                ("class names", reader.class_names, first.class_names),
                ("--exif", _exif(reader), _exif(first)),
            ):
                if ours != theirs:
                    raise SourceError(
                        f"{first.path} and {reader.path}: have different {what}; give the shards of one data set"
                    )
        self.exif = _exif(first)
        self._starts = np.cumsum([0, *map(len, self.readers)])
        self.ids = [sample_id for reader in self.readers for sample_id in reader.source_ids]
        self.labels = np.concatenate([reader.labels for reader in self.readers]).astype(np.int64)
        highest = int(self.labels.max())
        names = class_names or first.class_names or [str(label) for label in range(highest + 1)]
        if highest >= len(names) or first.class_names and len(names) != len(first.class_names):
            raise SourceError(
                f"{self.root}: has {len(first.class_names) or highest + 1} classes, --class-names {len(names)}; "
                "name as many"
            )
        self.class_names = list(names)
        self.sizes = np.concatenate([reader.jpeg_sizes for reader in self.readers]).astype(np.int64)
        check_ids(self.ids, self.origin)

    def _locate(self, i: int) -> tuple[BetonReader, int]:
        file = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self.readers[file], i - int(self._starts[file])

    def origin(self, i: int) -> str:
        reader, index = self._locate(i)
        return f"{reader.path}: sample {index} ({reader.source_ids[index]})"

    @property
    def stamps(self) -> np.ndarray:
        """Size and modification time (ns) of the sample's file, its place in it."""
        status = [os.stat(reader.path) for reader in self.readers]
        counts = [len(reader) for reader in self.readers]
        files = np.repeat(np.array([(file.st_size, file.st_mtime_ns) for file in status], np.int64), counts, 0)
        return np.column_stack((files, np.concatenate([np.arange(count) for count in counts])))

    def read(self, i: int) -> bytes:
        reader, index = self._locate(i)
        if reader.has_crc:
            reader.check(index)
        return reader.jpeg(index).tobytes()

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


def _exif(reader: BetonReader) -> str:
    """What was done about EXIF orientations; betons of before the option ignored them."""
    return (reader.conversion or {}).get("exif", "ignore")


def open_images(paths: Sequence[Path | str] | Path | str, *, class_names: Path | None = None, **options: Any) -> Source:
    """Like `sources.open_source`, with the same options, but betons are a kind of data set, too. Raises SourceError,
    BetonError.
    """
    files = expand_paths([paths] if isinstance(paths, (str, Path)) else paths)
    betons = [path for path in files if path.lower().endswith(".beton") and os.path.isfile(path)]
    if not betons:
        return open_source(paths, class_names=class_names, **options)
    if len(betons) < len(files):
        other = next(path for path in files if path not in betons)
        raise SourceError(f"{betons[0]} and {other} are of different kinds; give files of one kind")
    for name in ("labels", "image_column", "label_column"):
        if options.get(name) is not None:
            raise SourceError(
                f"{files[0]}: --{name.replace('_', '-')} {options[name]} is for other files, a beton has its labels "
                "inside"
            )
    return BetonSource(files, None if class_names is None else read_class_names(class_names))


def settled_exif(source: Source, wanted: str | None) -> str:
    """'ignore' or 'apply': what is done about EXIF orientations of `source`. wanted: what the user asked for, None
    being 'ignore'.

    A beton's images were converted one way, and are what they are. Raises SourceError where the user asks for the other
    way.
    """
    if source.exif is None:
        return wanted or "ignore"
    if wanted not in (None, source.exif):
        raise SourceError(
            f"{source.root}: was converted with --exif {source.exif}, so --exif {wanted} cannot be had from it; "
            "leave it out, or start from the original files"
        )
    return source.exif
