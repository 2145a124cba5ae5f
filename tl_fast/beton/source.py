"""Betons as a `Source` of images: to annotate what is packed already, or to pack it anew with other label maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_fast.beton.reader import BetonReader
from tl_fast.beton.samples import Samples
from tl_fast.sources.open import expand_paths, open_source
from tl_fast.sources.source import Source, SourceError, check_ids, read_class_names


class BetonSource(Source):
    """One beton, or the shards of one data set in the order given; samples in the order of the files.

    Ids, labels and class names are those that were packed. class_names: other names for the same labels. Each image's
    CRC-32 is checked when it is read. Raises InputError for shards that do not belong together, SourceError for a
    sample that two of them hold.
    """

    kind = "beton"

    def __init__(self, files: Sequence[str], class_names: list[str] | None = None) -> None:
        self.root = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        self.ignored = 0
        self.samples = Samples(files)
        first, *others = self.samples.readers
        self.exif = _exif(first)
        for reader in others:
            if _exif(reader) != self.exif:
                raise SourceError(
                    f"{first.path} and {reader.path}: were converted with different --exif; convert both alike"
                )
        self.labels = self.samples.labels
        count, own = self.samples.num_classes, self.samples.class_names
        names = class_names or own or [str(label) for label in range(count)]
        if len(names) < count or own and len(names) != len(own):
            raise SourceError(f"{self.root}: has {count} classes, --class-names {len(names)}; name as many")
        self.class_names = list(names)
        self.ids = [sample_id for reader in self.samples.readers for sample_id in reader.source_ids]
        self.sizes = np.concatenate([reader.image_sizes for reader in self.samples.readers])
        check_ids(self.ids, self.origin)

    def origin(self, i: int) -> str:
        return self.samples.name(i)

    @property
    def stamps(self) -> np.ndarray:
        """Size and modification time (ns) of the sample's file; the sample's index in it."""
        rows = []
        for reader in self.samples.readers:
            status, count = os.stat(reader.path), len(reader)
            file = np.array([status.st_size, status.st_mtime_ns], np.int64)
            rows.append(np.column_stack((np.tile(file, (count, 1)), np.arange(count))))
        return np.concatenate(rows)

    def read(self, i: int) -> bytes:
        if self.samples.locate(i)[0].has_crc:
            self.samples.check(i)
        return self.samples.image_file(i)

    def close(self) -> None:
        self.samples.close()


def _exif(reader: BetonReader) -> str:
    """What was done about EXIF orientations. Betons made before the option existed ignored them."""
    return (reader.conversion or {}).get("exif", "ignore")


def open_images(paths: Sequence[Path | str] | Path | str, *, class_names: Path | None = None, **options: Any) -> Source:
    """`sources.open_source`, with the same options, for betons too. Raises SourceError, BetonError."""
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
                f"{files[0]}: --{name.replace('_', '-')} {options[name]} is for other files, a beton has its "
                "labels inside"
            )
    return BetonSource(files, None if class_names is None else read_class_names(class_names))


def settled_exif(source: Source, wanted: str | None) -> str:
    """What is done about EXIF orientations of `source`, 'ignore' or 'apply'.

    wanted: what the user asked for; None means 'ignore', or for a beton the way it was converted. A beton's images
    cannot be changed any more: raises SourceError where the user asks for the other way.
    """
    if source.exif is None:
        return wanted or "ignore"
    if wanted not in (None, source.exif):
        raise SourceError(
            f"{source.root}: was converted with --exif {source.exif}, so --exif {wanted} cannot be had from it; "
            "leave it out, or start from the original files"
        )
    return source.exif
