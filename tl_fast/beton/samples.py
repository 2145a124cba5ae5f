"""Reads one or several betons as one data set."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tl_fast.beton.layout import BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.system.mistakes import InputError


class Samples:
    """Several betons as one data set: sample i of the concatenation, in the order the files are given."""

    def __init__(self, paths: str | Path | Sequence[str | Path]):
        self.paths = expand(paths)
        self.readers = [BetonReader(path) for path in self.paths]
        first = self.readers[0]
        for reader in self.readers[1:]:
            if reader.spec != first.spec:
                raise InputError(
                    f"{reader.path}: label maps are {reader.spec}, but {first.path} has {first.spec}; "
                    "convert both alike"
                )
            if reader.mask_spec != first.mask_spec:
                raise InputError(
                    f"{reader.path}: masks are {_in_words(reader)}, but {first.path} has {_in_words(first)}; convert"
                    " both with the same --mask-classes"
                )
            if reader.class_names != first.class_names:
                raise InputError(
                    f"{reader.path}: class names differ from those of {first.path}; convert both from the same classes"
                )
        self.spec = first.spec
        self.mask_spec = first.mask_spec
        self.class_names = first.class_names
        self.heights = np.concatenate([reader.heights for reader in self.readers]).astype(np.int64)
        self.widths = np.concatenate([reader.widths for reader in self.readers]).astype(np.int64)
        self.labels = np.concatenate([reader.labels for reader in self.readers]).astype(np.int64)
        self.stored_as_planes = np.concatenate([reader.stored_as_planes for reader in self.readers])
        self._starts = np.cumsum([0] + [len(reader) for reader in self.readers])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def num_classes(self) -> int:
        """Classes of the label maps, or of the labels where there are no maps."""
        if self.spec is not None:
            return self.spec.num_classes
        return len(self.class_names) or (int(self.labels.max()) + 1 if len(self) else 0)

    def locate(self, sample_id: int) -> tuple[BetonReader, int]:
        """The reader that holds the sample and its index there; IndexError names an id outside the data set."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} is not in 0..{len(self) - 1} ({', '.join(map(str, self.paths))})")
        file = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return self.readers[file], int(sample_id - self._starts[file])

    def image(self, sample_id: int) -> np.ndarray:
        """The sample's image as it is stored, a JPEG or planes: a uint8 view of the file."""
        reader, index = self.locate(sample_id)
        return reader.image(index)

    def image_file(self, sample_id: int) -> bytes:
        """The sample's image as a file that can be opened (`BetonReader.image_file`)."""
        reader, index = self.locate(sample_id)
        return reader.image_file(index)

    def image_addresses(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in memory the samples' images begin, and their sizes in bytes, int64 [B] both. Valid while the files
        are open."""
        return self._addresses(sample_ids, BetonReader.image_addresses)

    def planes(self, sample_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Y, Cb and Cr of a sample whose image is planes (`BetonReader.planes`)."""
        reader, index = self.locate(sample_id)
        return reader.planes(index)

    def check(self, sample_id: int) -> None:
        """Raise BetonError when the sample's bytes do not have the CRC-32 they were written with."""
        reader, index = self.locate(sample_id)
        reader.check(index)

    def name(self, sample_id: int) -> str:
        """How messages call a sample: its number, its source id and the file."""
        reader, index = self.locate(sample_id)
        return f"sample {sample_id} ({reader.source_ids[index]}) of {reader.path}"

    def label_maps(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Classes uint16 and scores float32, both [B, k, H, W]."""
        if len(self.readers) == 1:
            return self.readers[0].label_maps(sample_ids)
        shape = (len(sample_ids), self.spec.k, self.spec.height, self.spec.width)
        classes, scores = np.empty(shape, np.uint16), np.empty(shape, np.float32)
        for reader, chosen, indices in self._by_file(sample_ids):
            classes[chosen], scores[chosen] = reader.label_maps(indices)
        return classes, scores

    def raw_label_maps(self, sample_ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """The maps as they lie in the files, uint8 each, and float32 [B, 2] = (score_min, score_step)."""
        if len(self.readers) == 1:
            return self.readers[0].raw_label_maps(sample_ids)
        maps, ranges = [np.empty(0, np.uint8)] * len(sample_ids), np.empty((len(sample_ids), 2), np.float32)
        for reader, chosen, indices in self._by_file(sample_ids):
            file_maps, ranges[chosen] = reader.raw_label_maps(indices)
            for b, label_map in zip(chosen, file_maps, strict=True):
                maps[b] = label_map
        return maps, ranges

    def label_map_addresses(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in memory the samples' label maps begin, and their sizes in bytes, int64 [B] both. Valid while the
        files are open."""
        return self._addresses(sample_ids, BetonReader.label_map_addresses)

    def label_map_ranges(self, sample_ids: np.ndarray) -> np.ndarray:
        """(score_min, score_step) of the samples' label maps, float32 [B, 2]."""
        ranges = np.empty((len(sample_ids), 2), np.float32)
        for reader, chosen, indices in self._by_file(sample_ids):
            ranges[chosen] = reader.label_map_ranges(indices)
        return ranges

    def mask_addresses(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in memory the samples' masks begin, and their sizes in bytes, int64 [B] both. Valid while the files are
        open."""
        return self._addresses(sample_ids, BetonReader.mask_addresses)

    def mask(self, sample_id: int) -> np.ndarray:
        """The sample's mask, uint8 [H, W] (`BetonReader.mask`)."""
        reader, index = self.locate(sample_id)
        return reader.mask(index)

    def _addresses(
        self, sample_ids: np.ndarray, of_file: Callable[[BetonReader, np.ndarray], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        addresses, sizes = np.empty(len(sample_ids), np.int64), np.empty(len(sample_ids), np.int64)
        for reader, chosen, indices in self._by_file(sample_ids):
            addresses[chosen], sizes[chosen] = of_file(reader, indices)
        return addresses, sizes

    def _by_file(self, sample_ids: np.ndarray) -> Iterator[tuple[BetonReader, np.ndarray, np.ndarray]]:
        """The reader of each file that holds some of the samples, where these stand among them, and their indices in
        the file."""
        files = np.searchsorted(self._starts, sample_ids, side="right") - 1
        for file in np.unique(files):
            chosen = np.flatnonzero(files == file)
            yield self.readers[file], chosen, sample_ids[chosen] - self._starts[file]

    def map_error(self, sample_id: int, wrong: int) -> BetonError:
        """The error for a sample's damaged label map (`BetonReader.map_error`)."""
        reader, index = self.locate(sample_id)
        return reader.map_error(index, wrong)

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


def _in_words(reader: BetonReader) -> str:
    return "none" if reader.mask_spec is None else f"of {reader.mask_spec}, {reader.mask_spec.class_names!s:.60}"


def expand(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that a path, a glob pattern or a list of either names, each glob's sorted.

    Raises FileNotFoundError naming what matches nothing.
    """
    files: list[Path] = []
    for pattern in [paths] if isinstance(paths, (str, Path)) else paths:
        matches = [str(pattern)] if os.path.exists(pattern) else sorted(glob.glob(str(pattern)))
        if not matches:
            raise FileNotFoundError(f"no beton at {pattern}; make one with converters/to_beton.py")
        files += map(Path, matches)
    if not files:
        raise FileNotFoundError("no beton given")
    return files
