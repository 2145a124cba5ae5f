"""One data set in one FFCV .beton file: read it memory-mapped, verify it; `write_beton` writes it.

The bytes are laid out as ffcv 1.0 lays them out, so stock `ffcv.Loader` opens the file; docs/file_format.md has the tables. Beyond that it
holds label maps, a CRC-32 for every sample and every table, class names, source ids and the annotator's manifest.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

from tl_fast.beton_layout import (
    ALLOCATION,
    CUSTOM,
    FIELD,
    HEADER,
    IMAGE,
    INDEX,
    INDEX_MAGIC,
    INT,
    LABEL_MAP,
    MAX_PAGE_SIZE,
    MIN_PAGE_SIZE,
    STOCK_TYPES,
    VERSION,
    BetonError,
    metadata_dtype,
    spec_from_arguments,
)
from tl_fast.beton_write import Sample, WriteSummary, ordered_map, write_beton
from tl_fast.labelmap import LEVELS, LabelMapError, encoded_sizes

__all__ = ["BetonError", "BetonReader", "Sample", "WriteSummary", "verify", "write_beton"]


DAMAGED = "the file is damaged: convert again or copy it anew"
VERIFY_CHUNK = 64  # samples per task: a task costs some 20 µs of its own


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class BetonReader:
    """Read access to a beton, memory-mapped; needs numpy only. Files of the stock ffcv writer open too (without ids, class names, CRCs).

    `len()` or `num_samples`; `heights`, `widths` int32 `[n]` in pixels; `labels` int64 `[n]`; `spec` (None without label maps);
    `class_names`; `source_ids`; `annotator` (the label-map store's manifest, or None). Picklable: another process opens the file itself.
    Every table is checked when the file is opened; a sample's bytes by `check`. Raises BetonError that names file and field, OSError if
    there is no such file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            if self._size < HEADER.itemsize:
                raise self._error("header", f"the file has {self._size} bytes, a beton at least {HEADER.itemsize}")
            self._bytes = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        self._read_header()
        self._read_index()
        self._read_samples(self._read_allocations())

    def _error(self, field: str, problem: str) -> BetonError:
        return BetonError(f"{self.path}: {field}: {problem}")

    def _region(self, start: int, size: int, field: str) -> np.ndarray:
        if start < 0 or size < 0 or start + size > self._size:
            raise self._error(
                field, f"bytes {start} to {start + size} are outside the file of {self._size} bytes; it is truncated or damaged"
            )
        return self._bytes[start : start + size]

    def _read_header(self) -> None:
        header = self._bytes[: HEADER.itemsize].view(HEADER)[0]
        if header["version"] != VERSION:
            raise self._error(
                "version", f"{header['version']}, this code reads {VERSION}; not a beton, or one whose writing was interrupted"
            )
        self.page_size, self.num_samples, count = int(header["page_size"]), int(header["num_samples"]), int(header["num_fields"])
        if not MIN_PAGE_SIZE <= self.page_size <= MAX_PAGE_SIZE or self.page_size & (self.page_size - 1):
            raise self._error("page_size", f"{self.page_size} is not a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}")
        if self.num_samples == 0:
            raise self._error("num_samples", "0: the file is empty")
        self._alloc_ptr = int(header["alloc_table_ptr"])
        fields = self._region(HEADER.itemsize, count * FIELD.itemsize, "num_fields").view(FIELD)
        self._fields: dict[str, int] = {}  # name → column
        types, self.spec, self._index = [], None, None
        for column, field in enumerate(fields):
            try:
                name = bytes(field["name"]).split(b"\0")[0].decode("ascii")
            except UnicodeDecodeError:
                raise self._error(f"field {column}", f"name {bytes(field['name'])!r} is not ASCII") from None
            kind = int(field["type_id"])
            if name in self._fields:
                raise self._error(f"field {name}", "appears twice")
            if kind == CUSTOM:
                try:
                    self.spec = spec_from_arguments(field["arguments"])
                except LabelMapError as error:
                    raise self._error(f"field {name}", f"{error}; this reader knows no other custom field") from error
                if name != "label_map":
                    raise self._error(f"field {name}", "a label map must be called label_map")
            elif kind not in STOCK_TYPES:
                raise self._error(f"field {name}", f"type {kind} is unknown; known are {sorted([*STOCK_TYPES, CUSTOM])}")
            elif kind == INT and field["arguments"].any():
                self._index = field["arguments"][: INDEX.itemsize].view(INDEX)[0]
                if name != "crc" or self._index["magic"] != INDEX_MAGIC:
                    raise self._error(
                        f"field {name}",
                        f"magic {bytes(self._index['magic'])!r} in an integer field; a crc field with {INDEX_MAGIC!r} was expected",
                    )
            self._fields[name] = column
            types.append(LABEL_MAP if kind == CUSTOM else STOCK_TYPES[kind])
        for name, kind in (("image", IMAGE), ("label", STOCK_TYPES[INT])):
            if name not in self._fields or types[self._fields[name]] != kind:
                raise self._error("fields", f"no field {name!r} of the right type; the file has {list(self._fields)}")
        row = metadata_dtype(types)
        self._head_size = HEADER.itemsize + fields.nbytes
        self._data_start = self._head_size + self.num_samples * row.itemsize
        self._metadata = self._region(self._head_size, self.num_samples * row.itemsize, "num_samples").view(row)
        size = self._size - self._alloc_ptr
        if self._alloc_ptr < self._data_start or size <= 0 or size % ALLOCATION.itemsize:
            raise self._error(
                "alloc_table_ptr",
                f"no table of {ALLOCATION.itemsize}-byte entries lies between {self._alloc_ptr} and the end of the file at {self._size}, "
                f"behind the tables that end at {self._data_start}; the file is truncated or damaged",
            )

    def _read_index(self) -> None:
        """Checks the CRCs of all tables: beyond this point a file of ours is what was written."""
        self.class_names: list[str] = []
        self.annotator: dict[str, Any] | None = None
        self.tl_fast_version: str | None = None
        if self._index is None:
            return
        head = self._bytes[: self._head_size].copy()
        start = HEADER.itemsize + self._fields["crc"] * FIELD.itemsize + FIELD.fields["arguments"][1] + INDEX.fields["head_crc"][1]
        head[start : start + 4] = 0
        for name, data in (("head", head), ("metadata", self._metadata.view(np.uint8)), ("alloc", self._bytes[self._alloc_ptr :])):
            self._check_crc(name, data)
        info = self._json("info")
        if not isinstance(info, dict) or not _is_strings(info.get("class_names")) or not isinstance(info.get("annotator"), dict | None):
            raise self._error("info", "class_names is not a list of strings, or annotator not an object")
        self.class_names, self.annotator, self.tl_fast_version = info["class_names"], info["annotator"], info.get("tl_fast")

    def _check_crc(self, name: str, data: np.ndarray) -> None:
        if (found := zlib.crc32(data)) != self._index[f"{name}_crc"]:
            raise self._error(
                f"{name}_crc",
                f"CRC-32 is {found:08x}, the file says {int(self._index[f'{name}_crc']):08x}; {DAMAGED}",
            )

    def _json(self, name: str) -> Any:
        data = self._region(int(self._index[f"{name}_ptr"]), int(self._index[f"{name}_size"]), name)
        self._check_crc(name, data)
        try:
            return json.loads(data.tobytes())
        except (ValueError, RecursionError) as error:
            raise self._error(name, f"not readable as JSON ({error})") from error

    def _read_allocations(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ptr, size, sample_id) int64, sorted by ptr; inside the data region and not overlapping."""
        table = np.frombuffer(self._bytes[self._alloc_ptr :], ALLOCATION)
        table = table[table["size"] > 0]
        ptr, size = table["ptr"], table["size"]
        if len(
            bad := np.flatnonzero(
                (ptr < self._data_start) | (ptr > self._alloc_ptr) | (size > self._alloc_ptr - np.minimum(ptr, self._alloc_ptr))
            )
        ):
            raise self._error("allocation table", f"entry {bad[0]} ({ptr[bad[0]]}, {size[bad[0]]} bytes) is outside the data region")
        order = np.argsort(ptr, kind="stable")
        ptr, size = ptr[order].astype(np.int64), size[order].astype(np.int64)
        if len(bad := np.flatnonzero(ptr[1:] < ptr[:-1] + size[:-1])):
            raise self._error("allocation table", f"the regions at {ptr[bad[0]]} and {ptr[bad[0] + 1]} overlap")
        return ptr, size, table["sample_id"][order]

    def _read_samples(self, allocations: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        def sizes(pointers: np.ndarray, field: str) -> np.ndarray:
            ptr, size, sample_id = allocations
            row = np.searchsorted(ptr, pointers)
            known = row < len(ptr)
            row[~known] = 0
            if (
                len(ptr) == 0
                or not known.all()
                or (ptr[row] != pointers).any()
                or (sample_id[row] != np.arange(self.num_samples, dtype=np.uint64)).any()
            ):
                raise self._error(field, "a sample points to bytes that the allocation table does not give to it")
            return size[row]

        image = self._column("image")
        if len(raw := np.flatnonzero(image["mode"] != 0)):
            raise self._error(
                "image",
                f"sample {raw[0]} and {len(raw) - 1} others are stored as raw pixels; write JPEGs, with converters/to_beton.py or "
                "ffcv's RGBImageField(write_mode='jpg')",
            )
        self.heights, self.widths = image["height"].astype(np.int32), image["width"].astype(np.int32)
        if len(flat := np.flatnonzero((self.heights == 0) | (self.widths == 0))):
            raise self._error("image", f"sample {flat[0]} has size {self.widths[flat[0]]}×{self.heights[flat[0]]}")
        self._jpeg_ptr = image["data_ptr"].astype(np.int64)
        self._jpeg_size = sizes(self._jpeg_ptr, "image")
        self.labels = self._column("label").astype(np.int64)
        if self.class_names and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise self._error("label", f"{self.labels.min()}..{self.labels.max()} for {len(self.class_names)} classes")
        if self.spec is not None:
            maps = self._column("label_map")
            self._map_ptr = maps["ptr"].astype(np.int64)
            self._map_size = sizes(self._map_ptr, "label_map")
            possible = [size for size in encoded_sizes(self.spec) if size <= self._size]
            if len(bad := np.flatnonzero(~np.isin(self._map_size, possible))):
                raise self._error(
                    "label_map", f"sample {bad[0]} has {self._map_size[bad[0]]} bytes; a map of {self.spec} has {encoded_sizes(self.spec)}"
                )
            if not (np.isfinite(maps["score_min"]) & np.isfinite(maps["score_step"])).all():
                raise self._error("label_map", "non-finite score_min or score_step")

    def _column(self, name: str) -> np.ndarray:
        return self._metadata[f"f{self._fields[name]}"]

    def __len__(self) -> int:
        return self.num_samples

    @functools.cached_property
    def source_ids(self) -> list[str]:
        """What the samples were called at the source; "0", "1", ... in files of the stock writer. Read on first use."""
        if self._index is None:
            return [str(i) for i in range(self.num_samples)]
        ids = self._json("ids")
        if not _is_strings(ids) or len(ids) != self.num_samples:
            raise self._error("ids", f"not a list of {self.num_samples} strings")
        return ids

    @property
    def has_crc(self) -> bool:
        return self._index is not None

    def jpeg(self, i: int) -> np.ndarray:
        """The JPEG file of sample i: uint8 `[size]`, a read-only view of the mapped file."""
        start = int(self._jpeg_ptr[i])
        return self._bytes[start : start + int(self._jpeg_size[i])]

    def _map_bytes(self, i: int) -> np.ndarray:
        start = int(self._map_ptr[i])
        return self._bytes[start : start + int(self._map_size[i])]

    def label_maps(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """classes uint16 `[B, k, H, W]` and dequantised scores float32 `[B, k, H, W]` of the samples `indices` `[B]`.

        Raises BetonError when the file has no label maps, or one that lists what is no class or refers beyond its palette.
        """
        if self.spec is None:
            raise self._error("label_map", "the file has no label maps; convert with --label-maps")
        from tl_fast.kernels import maps  # here: opening a beton takes 0.2 s without numba

        indices = np.asarray(indices, np.int64)
        classes = np.empty((len(indices), *self.spec.shape), np.uint16)
        scores = np.empty(classes.shape, np.float32)
        metadata = self._column("label_map")[indices]
        row, wrong = maps.read_maps(
            self._bytes,
            self._map_ptr[indices],
            self._map_size[indices],
            metadata["score_min"],
            metadata["score_step"],
            LEVELS,
            self.spec.num_classes,
            encoded_sizes(self.spec),
            classes.reshape(len(indices), self.spec.cells),
            scores.reshape(len(indices), self.spec.cells),
        )
        if wrong:
            problem = {
                maps.BAD_CLASS: f"it lists a class outside 0..{self.spec.num_classes - 1}",
                maps.BAD_BITMAP: f"its palette has more than 512 classes, or one outside 0..{self.spec.num_classes - 1}",
                maps.BAD_INDEX: "it refers to a class beyond its palette",
                maps.BAD_SIZE: f"it has {self._map_size[indices[row]]} bytes",
            }[wrong]
            raise self._error("label_map", f"sample {indices[row]}: {problem}; {DAMAGED}")  # kernels index with the classes
        return classes, scores

    def crc(self, i: int) -> int:
        """The stored CRC-32 of sample i: JPEG bytes, then label-map bytes. Raises BetonError in files of the stock writer."""
        if self._index is None:
            raise self._error("crc", "the file has none (written by stock ffcv)")
        return int(self._column("crc")[i])

    def check(self, i: int) -> None:
        """Raises BetonError when sample i's bytes are not those that were written."""
        stored, found = self.crc(i), zlib.crc32(self.jpeg(i))
        if self.spec is not None:
            found = zlib.crc32(self._map_bytes(i), found)
        if found != stored:
            raise self._error(
                "crc",
                f"sample {i} ({self.source_ids[i]}): CRC-32 is {found:08x}, the file says {stored:08x}; {DAMAGED}",
            )

    def check_decode(self, i: int) -> None:
        """Raises BetonError when sample i's JPEG does not decode without a warning to the size the file says. Needs simplejpeg."""
        import simplejpeg

        try:
            height, width = simplejpeg.decode_jpeg(self.jpeg(i), fastdct=True, fastupsample=True).shape[:2]
        except ValueError as error:
            raise self._error("image", f"sample {i} ({self.source_ids[i]}) does not decode: {error}") from error
        if (height, width) != (self.heights[i], self.widths[i]):
            raise self._error(
                "image", f"sample {i} ({self.source_ids[i]}) is {width}×{height}, the file says {self.widths[i]}×{self.heights[i]}"
            )

    def close(self) -> None:
        """Let go of the file. Arrays that `jpeg` returned stay valid; the reader is of no more use."""
        self._bytes = self._metadata = self._index = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        return BetonReader, (self.path,)


def verify(path: Path | str, decode: bool = False, workers: int = 1, progress: Callable[[int], None] | None = None) -> list[str]:
    """Check a whole file: every table, every sample's CRC-32, with `decode` every JPEG and its size too. Returns the problems found.

    progress: called with the number of samples done. Raises BetonError where the tables are damaged: there are no samples to look at then.
    """

    def problems_of(first: int) -> list[str]:
        found = []
        for i in range(first, min(first + VERIFY_CHUNK, len(reader))):
            try:
                if reader.has_crc:
                    reader.check(i)
                if decode:
                    reader.check_decode(i)
            except BetonError as error:
                found.append(str(error))
        return found

    problems: list[str] = []
    with BetonReader(path) as reader:
        reader.source_ids  # noqa: B018  read, and so checked, on first use
        for chunk, found in enumerate(ordered_map(workers, problems_of, range(0, len(reader), VERIFY_CHUNK)), 1):
            problems += found
            if progress is not None:
                progress(min(chunk * VERIFY_CHUNK, len(reader)))
    return problems
