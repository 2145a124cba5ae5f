"""Reads and checks the tables of a beton when it is opened: header, fields, index, metadata, allocations, info, ids.

Whatever the bytes are, the outcome is a BetonError that names file and field, or tables that agree with each other and
with the file's size (tests/beton/test_fuzz.py). Counts and offsets are Python integers until they are known to lie
inside the file, because numpy's integers wrap around.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np

from tl_fast.beton.layout import (
    ALLOCATION,
    BYTES,
    CUSTOM,
    FIELD,
    HEADER,
    IMAGE,
    INDEX,
    INDEX_MAGIC,
    INT,
    JPEG,
    LABEL_MAP,
    MAX_INFO,
    MAX_PAGE_SIZE,
    MIN_PAGE_SIZE,
    PLANES,
    STOCK_TYPES,
    VERSION,
    WITH_ARGUMENTS,
    BetonError,
    image_arguments,
    metadata_dtype,
    planes_size,
    spec_from_arguments,
)
from tl_fast.labelmaps.format import LEVELS, LabelMapError, encoded_sizes
from tl_fast.masks.format import MaskError, MaskSpec
from tl_fast.system.crc import crc32

DAMAGED = "the file is damaged: convert again or copy it anew"
# Reading must not take more memory than the file has bytes. Python objects take up to 30 times the size of the JSON
# that they are made from. So info is limited to MAX_INFO and a 32nd of the file, and ids are parsed only when they
# match STRING_LIST.
MAX_GAP = 1 << 20  # bytes looked at between tables and data where no CRC covers the tables
STRING_LIST = re.compile(rb'\s*\[\s*(?:"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"\s*(?:,\s*(?!\])|(?=\])))*+\]\s*')


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class BetonTables:
    """A mapped file and the content of its tables; `tl_fast.beton.BetonReader` has the public names."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not stat.S_ISREG(os.stat(self.path).st_mode):  # before opening: a pipe would wait for its writer
            raise self._error("header", "not a regular file but a folder, pipe or device; give the name of a beton")
        with open(self.path, "rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            if self._size < HEADER.itemsize:
                raise self._error(
                    "header", f"the file has {self._size} bytes, a beton at least {HEADER.itemsize}; {DAMAGED}"
                )
            self._bytes = np.frombuffer(mmap.mmap(file.fileno(), self._size, access=mmap.ACCESS_READ), np.uint8)
        self._read_header()
        self._read_index()
        self._read_samples(self._read_allocations())

    def _error(self, field: str, problem: str) -> BetonError:
        return BetonError(f"{self.path}: {field}: {problem}")

    def _region(self, start: int, size: int, field: str) -> np.ndarray:
        """Bytes of the file, uint8 `[size]`. Raises BetonError naming `field` when they lie outside."""
        if start < 0 or size < 0 or start + size > self._size:
            raise self._error(
                field,
                f"bytes {start} to {start + size} are outside the file of {self._size} bytes; it is cut off or damaged:"
                " copy it anew",
            )
        return self._bytes[start : start + size]

    def _read_header(self) -> None:
        header = self._bytes[: HEADER.itemsize].view(HEADER)[0]
        if header["version"] != VERSION:
            raise self._error(
                "version",
                f"{header['version']}, this code reads {VERSION}; not a beton, or one whose writing was interrupted",
            )
        self.page_size, self.num_samples = int(header["page_size"]), int(header["num_samples"])
        if not MIN_PAGE_SIZE <= self.page_size <= MAX_PAGE_SIZE or self.page_size & (self.page_size - 1):
            raise self._error(
                "page_size",
                f"{self.page_size} is not a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}; {DAMAGED}",
            )
        if self.num_samples == 0:
            raise self._error("num_samples", "0: there is nothing in the file; convert again")
        self._alloc_ptr = int(header["alloc_table_ptr"])
        self._head_size = HEADER.itemsize + int(header["num_fields"]) * FIELD.itemsize
        fields = self._region(HEADER.itemsize, self._head_size - HEADER.itemsize, "num_fields").view(FIELD)
        row = metadata_dtype(self._read_fields(fields))
        self._data_start = self._head_size + self.num_samples * row.itemsize
        self._metadata = self._region(self._head_size, self.num_samples * row.itemsize, "num_samples").view(row)
        size = self._size - self._alloc_ptr
        if self._alloc_ptr < self._data_start or size <= 0 or size % ALLOCATION.itemsize:
            raise self._error(
                "alloc_table_ptr",
                f"no table of {ALLOCATION.itemsize}-byte entries lies between {self._alloc_ptr} and the end of the file"
                f" at {self._size}, behind the tables that end at {self._data_start}; the file is cut off or damaged:"
                " copy it anew",
            )

    def _read_fields(self, fields: np.ndarray) -> list[np.dtype]:
        """Check the field descriptors `[n]` of FIELD; returns the type of each column of the metadata table."""
        self._fields: dict[str, int] = {}  # name → column
        types, self.spec, self._index, self._may_hold_planes = [], None, None, False
        for column, field in enumerate(fields):
            name = bytes(field["name"]).split(b"\0")[0].decode("ascii", "replace")
            if not name or not name.isascii() or not name.isprintable():
                raise self._error(
                    f"field {column}", f"its name {bytes(field['name'])!r} is not printable ASCII; {DAMAGED}"
                )
            kind = int(field["type_id"])
            if name in self._fields:
                raise self._error(f"field {name}", f"appears twice; {DAMAGED}")
            if kind == CUSTOM and name == "image":
                if (field["arguments"] != image_arguments()).any():
                    raise self._error(f"field {name}", f"its arguments are not tl_fast's; {DAMAGED}")
                self._may_hold_planes = True
            elif kind == CUSTOM:
                try:
                    self.spec = spec_from_arguments(field["arguments"])
                except LabelMapError as error:
                    raise self._error(f"field {name}", f"{error}; this reader knows no other custom field") from error
                if name != "label_map":
                    raise self._error(f"field {name}", "a label map must be called label_map")
            elif kind not in STOCK_TYPES:
                raise self._error(
                    f"field {name}", f"type {kind} is unknown; known are {sorted([*STOCK_TYPES, CUSTOM])}"
                )
            elif name == "crc" or (field["arguments"].any() and kind not in WITH_ARGUMENTS):
                index = field["arguments"][: INDEX.itemsize].view(INDEX)[0]
                # Without this check the file would be taken for one of the stock writer, and read without CRCs.
                if name != "crc" or kind != INT or index["magic"] != INDEX_MAGIC:
                    expected = f"a crc field of type {INT} with {INDEX_MAGIC!r} was expected; {DAMAGED}"
                    raise self._error(f"field {name}", f"type {kind} with {bytes(index['magic'])!r}; {expected}")
                self._index = index
            self._fields[name] = column
            custom = IMAGE if name == "image" else LABEL_MAP
            types.append(custom if kind == CUSTOM else STOCK_TYPES[kind])
        for name, kind in (("image", IMAGE), ("label", STOCK_TYPES[INT])):
            if name not in self._fields or types[self._fields[name]] != kind:
                raise self._error("fields", f"no field {name!r} of the right type; the file has {list(self._fields)}")
        return types

    def _read_index(self) -> None:
        """Read what the index points to, and check the CRCs of all tables but ids: from here on they are as written."""
        self.class_names: list[str] = []
        self.annotator: dict[str, Any] | None = None
        self.conversion: dict[str, Any] | None = None
        self.tl_fast_version: str | None = None
        self.mask_spec: MaskSpec | None = None
        if self._index is None:
            return
        head = self._bytes[: self._head_size].copy()
        start = (
            HEADER.itemsize
            + self._fields["crc"] * FIELD.itemsize
            + FIELD.fields["arguments"][1]
            + INDEX.fields["head_crc"][1]
        )
        head[start : start + 4] = 0
        for name, data in (
            ("head", head),
            ("metadata", self._metadata.view(np.uint8)),
            ("alloc", self._bytes[self._alloc_ptr :]),
        ):
            self._check_crc(name, data)
        for name in ("info", "ids"):
            start, size = self._bounds(name)
            self._region(start, size, f"{name}_ptr")
            if start < self._data_start or start + size > self._alloc_ptr:
                raise self._error(
                    f"{name}_ptr",
                    f"bytes {start} to {start + size} are not between the tables, {self._data_start} to"
                    f" {self._alloc_ptr}; {DAMAGED}",
                )
        info = self._info()
        if (
            not isinstance(info, dict)
            or not _is_strings(info.get("class_names"))
            or not isinstance(info.get("annotator"), dict | None)
        ):
            raise self._error(
                "info",
                f"not an object with class_names, a list of strings, and annotator, an object or null; {DAMAGED}",
            )
        self.class_names, self.annotator = info["class_names"], info.get("annotator")
        self.conversion, self.tl_fast_version = info.get("conversion"), info.get("tl_fast")
        if not isinstance(self.tl_fast_version, str | None) or not isinstance(self.conversion, dict | None):
            raise self._error("info", f"tl_fast is not a string, or conversion not an object; {DAMAGED}")
        self._read_mask_spec(info.get("masks"))

    def _read_mask_spec(self, values: Any) -> None:
        """Check the description of the masks, and that there is a field of them if there is a description."""
        column = self._fields.get("mask")
        if (column is None) != (values is None) or column is not None and self._metadata.dtype[column] != BYTES:
            raise self._error("info", f"masks do not fit the fields {list(self._fields)}; {DAMAGED}")
        if values is not None:
            try:
                self.mask_spec = MaskSpec.from_dict(values)
            except MaskError as error:
                raise self._error("info", f"{ascii(str(error))[1:-1]}; {DAMAGED}") from error

    def _check_crc(self, name: str, data: np.ndarray) -> None:
        computed, stored = crc32(data), int(self._index[f"{name}_crc"])
        if computed != stored:
            raise self._error(f"{name}_crc", f"CRC-32 is {computed:08x}, the file says {stored:08x}; {DAMAGED}")

    def _bounds(self, name: str) -> tuple[int, int]:
        """Where a table of ours, info or ids, begins in the file, and its size in bytes."""
        return int(self._index[f"{name}_ptr"]), int(self._index[f"{name}_size"])

    def _info(self) -> Any:
        data = self._region(*self._bounds("info"), "info_ptr")
        if len(data) > (limit := MAX_INFO + self._size // 32):
            raise self._error(
                "info_size", f"{len(data)} bytes, at most {limit} are read from a file of {self._size}; {DAMAGED}"
            )
        self._check_crc("info", data)
        try:
            text = str(data.data, "utf-8")
            info = json.loads(text)
            if "\\u" in text:
                json.dumps(info, ensure_ascii=False).encode()  # refuses half a surrogate pair, which cannot be printed
        except (ValueError, RecursionError) as error:
            raise self._error("info", f"not readable as JSON ({error}); {DAMAGED}") from error
        return info

    def _read_allocations(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ptr, size, sample_id) int64, sorted by ptr.

        Entries lie in the data region, belong to samples that exist, and do not overlap.
        """
        table = np.frombuffer(self._bytes[self._alloc_ptr :], ALLOCATION)

        def refuse(bad: np.ndarray, problem: str) -> None:
            if len(bad):
                i = bad[0]
                entry = f"entry {i} ({table['size'][i]} bytes at {table['ptr'][i]} for sample {table['sample_id'][i]})"
                raise self._error("allocation table", f"{entry} {problem}; {DAMAGED}")

        outside = (table["ptr"] < self._data_start) | (table["ptr"] > self._alloc_ptr)
        outside |= table["size"] > self._alloc_ptr - np.minimum(table["ptr"], self._alloc_ptr)
        outside &= table["size"] > 0
        refuse(np.flatnonzero(outside), f"is outside the data, bytes {self._data_start} to {self._alloc_ptr}")
        refuse(
            np.flatnonzero(table["sample_id"] >= self.num_samples), f"is for a sample outside 0..{self.num_samples - 1}"
        )
        order = np.flatnonzero(table["size"] > 0)
        order = order[np.argsort(table["ptr"][order], kind="stable")]
        ptr, size = table["ptr"][order].astype(np.int64), table["size"][order].astype(np.int64)
        refuse(order[1:][ptr[1:] < ptr[:-1] + size[:-1]], "begins within the one before it")
        gap = self._bytes[self._data_start : ptr[0] if len(ptr) else None][:MAX_GAP]
        if self._index is None and gap.any():
            raise self._error(
                "fields",
                f"there are {np.count_nonzero(gap)} bytes other than 0 between the tables that end at"
                f" {self._data_start} and the data: num_fields, num_samples or a field's type is wrong; {DAMAGED}",
            )
        for name in ("info", "ids") if self._index is not None else ():
            start, length = self._bounds(name)
            refuse(
                order[(ptr < start + length) & (ptr + size > start)],
                f"overlaps {name}, bytes {start} to {start + length}",
            )
        self._allocations = len(ptr)
        return ptr, size, table["sample_id"][order].astype(np.int64)

    def _allocated_sizes(
        self, allocations: tuple[np.ndarray, np.ndarray, np.ndarray], pointers: np.ndarray, field: str
    ) -> np.ndarray:
        """Bytes that the allocation table gives each sample where its `field` points to, int64 `[n]`."""
        ptr, size, sample_id = allocations
        row = np.searchsorted(ptr, pointers)
        wrong = row == len(ptr)
        if not wrong.all():
            row[wrong] = 0
            wrong |= (ptr[row] != pointers) | (sample_id[row] != np.arange(self.num_samples))
        if len(bad := np.flatnonzero(wrong)):
            raise self._error(
                field,
                f"sample {bad[0]} points to {pointers[bad[0]]}, where the allocation table gives it nothing; {DAMAGED}",
            )
        return size[row]

    def _read_samples(self, allocations: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Check every sample's image, label, label map and mask as the metadata table describes them."""
        image = self._column("image")
        self._check_modes(image["mode"])
        self.heights, self.widths = image["height"].astype(np.int32), image["width"].astype(np.int32)
        if len(flat := np.flatnonzero((self.heights == 0) | (self.widths == 0))):
            raise self._error(
                "image", f"sample {flat[0]} is {self.widths[flat[0]]}×{self.heights[flat[0]]} pixels; {DAMAGED}"
            )
        self._image_ptr = image["data_ptr"].astype(np.int64)
        self._image_size = self._allocated_sizes(allocations, self._image_ptr, "image")
        wrong = self.stored_as_planes & (self._image_size != planes_size(self.heights, self.widths))
        if len(bad := np.flatnonzero(wrong)):
            height, width = int(self.heights[bad[0]]), int(self.widths[bad[0]])
            raise self._error(
                "image",
                f"sample {bad[0]} has {self._image_size[bad[0]]} bytes; planes of {width}×{height} pixels have"
                f" {planes_size(height, width)}; {DAMAGED}",
            )
        self.labels = self._column("label").astype(np.int64)
        classes = len(self.class_names) if self.spec is None else self.spec.num_classes
        if self.spec is not None and self.class_names and len(self.class_names) != classes:
            raise self._error(
                "info", f"{len(self.class_names)} class names, but label maps of {classes} classes; {DAMAGED}"
            )
        if classes and len(bad := np.flatnonzero((self.labels < 0) | (self.labels >= classes))):
            raise self._error(
                "label", f"sample {bad[0]} has label {self.labels[bad[0]]}, outside 0..{classes - 1}; {DAMAGED}"
            )
        if self.spec is not None:
            self._read_map_entries(allocations)
        if self.mask_spec is not None:
            self._read_mask_entries(allocations)

    def _check_modes(self, modes: np.ndarray) -> None:
        """Check how the images are stored, uint8 [n]."""
        self.stored_as_planes = modes == PLANES
        known = (modes == JPEG) | self.stored_as_planes if self._may_hold_planes else modes == JPEG
        if len(bad := np.flatnonzero(~known)):
            if (mode := int(modes[bad[0]])) == 1:
                problem = (
                    f"sample {bad[0]} and {len(bad) - 1} others are stored as raw pixels; write JPEGs or planes, with"
                    " converters/to_beton.py, or JPEGs with ffcv's RGBImageField(write_mode='jpg')"
                )
            else:
                holds = "a file of JPEGs and planes" if self._may_hold_planes else "a file of JPEGs"
                problem = f"sample {bad[0]} has mode {mode}, unknown in {holds}; {DAMAGED}"
            raise self._error("image", problem)

    def _read_map_entries(self, allocations: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Check every sample's label map as the metadata table describes it."""
        maps = self._column("label_map")
        self._map_ptr = maps["ptr"].astype(np.int64)
        self._map_size = self._allocated_sizes(allocations, self._map_ptr, "label_map")
        possible = [size for size in encoded_sizes(self.spec) if size <= self._size]
        if len(bad := np.flatnonzero(~np.isin(self._map_size, possible))):
            raise self._error(
                "label_map",
                f"sample {bad[0]} has {self._map_size[bad[0]]} bytes; a map of {self.spec} has"
                f" {encoded_sizes(self.spec)}",
            )
        if len(bad := np.flatnonzero(self._map_ptr == self._image_ptr)):
            raise self._error("label_map", f"sample {bad[0]} has its label map where its image is; {DAMAGED}")
        low, step = maps["score_min"], maps["score_step"]
        with np.errstate(all="ignore"):
            good = np.isfinite(low) & (step >= 0) & np.isfinite(low + step * LEVELS[-1])
        if len(bad := np.flatnonzero(~good)):
            raise self._error(
                "label_map",
                f"sample {bad[0]} has score_min {low[bad[0]]:g} and score_step {step[bad[0]]:g}, and so scores that"
                f" float32 does not hold, or falling ones; {DAMAGED}",
            )

    def _read_mask_entries(self, allocations: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Check every sample's mask as the metadata table describes it."""
        masks = self._column("mask")
        self._mask_ptr = masks["ptr"].astype(np.int64)
        self._mask_size = self._allocated_sizes(allocations, self._mask_ptr, "mask")
        if len(bad := np.flatnonzero(self._mask_size != masks["size"])):
            raise self._error(
                "mask",
                f"sample {bad[0]} has {masks['size'][bad[0]]} bytes, {self._mask_size[bad[0]]} by the allocation table;"
                f" {DAMAGED}",
            )
        shared = self._mask_ptr == self._image_ptr
        if self.spec is not None:
            shared |= self._mask_ptr == self._map_ptr
        if len(bad := np.flatnonzero(shared)):
            raise self._error("mask", f"sample {bad[0]} has its mask where its image or label map is; {DAMAGED}")

    def _column(self, name: str) -> np.ndarray:
        return self._metadata[f"f{self._fields[name]}"]

    def _pointers(self) -> np.ndarray:
        """All numbers in the metadata that may point to data, those of stock fields that we do not read included."""
        pointers = []
        for name in self._metadata.dtype.names:
            column = self._metadata[name]
            parts = [part for part in ("ptr", "data_ptr") if part in (column.dtype.names or ())]
            pointers += [column[part] for part in parts] or ([column] if column.dtype == np.uint64 else [])
        return np.concatenate(pointers)

    @functools.cached_property
    def source_ids(self) -> list[str]:
        """What the samples were called at the source; "0", "1", ... in files of the stock writer. Read on first use."""
        if self._index is None:
            return [str(i) for i in range(self.num_samples)]
        data = self._region(*self._bounds("ids"), "ids_ptr")
        self._check_crc("ids", data)
        raw = data.tobytes()
        if STRING_LIST.fullmatch(raw) is None:  # other JSON is not parsed: it may take far more memory than its text
            raise self._error("ids", f"not a JSON list of strings; {DAMAGED}")
        count = (raw.count(b'"') - raw.replace(b"\\\\", b"").count(b'\\"')) // 2
        if count != self.num_samples:
            raise self._error("ids", f"{count} ids for {self.num_samples} samples; {DAMAGED}")
        try:
            text = raw.decode()
            del raw
            ids = json.loads(text)
            for name in ids if "\\u" in text else ():
                name.encode()  # refuses half a surrogate pair, which cannot be printed
        except ValueError as error:
            raise self._error("ids", f"not readable as UTF-8 text ({error}); {DAMAGED}") from error
        return ids

    def _name(self, i: int) -> str:
        name = self.source_ids[i]
        return f"sample {i} ({name if len(name) <= 300 and name.isprintable() else ascii(name[:300])})"
