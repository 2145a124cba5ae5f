"""Fuzz BetonReader and verify: whatever the bytes, a BetonError that names file and field, or right data.

    python tests/fuzz_beton.py --cases 20000 --seed 0 [--workers 2]
    python tests/fuzz_beton.py --seed 0 --case 1234     # that case again, in this process, with its traceback

A case is a small valid file and a list of operations on it, drawn from (seed, case number) alone. Some files are
*sealed* again after
the damage, as one would who makes it on purpose: right CRC-32s, so that the checks behind the CRCs are reached. A case
fails when

- anything but a BetonError comes out, or one whose message does not begin with the file and a field;
- a file that was not sealed is called sound by `verify`, or a sample of it by `check`, though its content differs from
the original's;
- a sealed file that is accepted contradicts itself (samples outside the file or over each other, classes >= C, scores
not finite);
- reading takes more memory than the file has bytes (tracemalloc on every eighth case; an address-space limit on all),
hangs, or crashes.

Batches run in processes of their own, which say after each case how it went, so a crash or a hang names its case.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import io
import json
import lzma
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from tl_fast.beton.layout import (
    ALLOCATION,
    CUSTOM,
    FIELD,
    HEADER,
    IMAGE,
    INDEX,
    INT,
    LABEL_MAP,
    SPEC_ARGUMENTS,
    STOCK_TYPES,
    BetonError,
    metadata_dtype,
)
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.verify import verify
from tl_fast.convert.encode import Sample
from tl_fast.convert.write import write_beton
from tl_fast.labelmaps.format import MapSpec, pack
from tl_fast.masks.format import MaskSpec

BATCH, SECONDS, ADDRESS_SPACE = (
    2000,
    5,
    256 << 20,
)  # cases a process, time limit a case, bytes above what the process holds before
SLACK = 1 << 20  # bytes a reader may take beside the file's size
TIGHT = 8  # every such case runs under tracemalloc
MAX_U64 = (1 << 64) - 1
MESSAGE = re.compile(r"(?P<field>[a-z_]+|field .{1,16}?|allocation table|num_samples): ")

Operation = list  # a name, then integers and strings: JSON, so that cases can be kept


class Violation(AssertionError):
    """The reader broke the one rule."""


# ---------------------------------------------------------------- the valid files


def picture(height: int, width: int, rng: np.random.Generator, **options) -> bytes:
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", **{"quality": 60, **options})
    return buffer.getvalue()


def make_bases(folder: Path) -> None:
    """Write every file that cases start from as FOLDER/NAME.beton."""
    rng = np.random.default_rng(0)

    def write(
        name: str,
        images: list[bytes],
        spec: MapSpec | None = None,
        classes: int = 300,
        page_size: int = 1 << 21,
        masks: MaskSpec | None = None,
        planes: bool = False,
    ) -> None:
        samples = []
        for i, image in enumerate(images):
            label_map = None
            if spec is not None:
                listed = (
                    spec.num_classes if i % 2 else min(spec.num_classes, 2 * spec.k)
                )  # many classes in one map, or few
                cells = spec.height * spec.width
                chosen = np.stack([rng.permutation(listed)[: spec.k] for _ in range(cells)], axis=1).reshape(spec.shape)
                record = pack(chosen, rng.normal(3, 4, spec.shape), spec)
                label_map = lambda record=record: record  # noqa: E731
            sample = Sample(f"n{i % 3:02d}/é {i}.jpg", i % classes, lambda image=image: image, label_map)
            if planes:
                sample = dataclasses.replace(sample, as_planes=i != 3)
            if masks is not None:
                mask = rng.integers(0, masks.num_classes, (8 + i, 16), np.uint8)
                mask[2:, :5], mask[: 2 + i, 4:] = 255, 1
                sample = dataclasses.replace(sample, mask=lambda mask=mask: mask)
            samples.append(sample)
        annotator = {"model": "none", "nested": {"value": [1, 2.5, None]}} if spec else None
        names = [f"class {i}" for i in range(classes)]
        write_beton(
            folder / f"{name}.beton",
            samples,
            class_names=names,
            spec=spec,
            masks=masks,
            annotator=annotator,
            page_size=page_size,
            workers=1,
        )

    tiny = [picture(8 + i, 16, rng) for i in range(6)]
    write("one", tiny[:1], classes=1)
    write("plain", tiny, classes=7)
    write("maps", tiny, MapSpec(3, 5, 7, 300))
    write("masks", tiny, classes=7, masks=MaskSpec(3, 255, ("a", "b", "c"), ((1, 2, 3), (4, 5, 6), (7, 8, 9))))
    write("both", tiny, MapSpec(2, 2, 3, 9), classes=9, masks=MaskSpec(2))
    write("planes", tiny, classes=7, planes=True)
    write("all", tiny, MapSpec(2, 2, 3, 9), classes=9, masks=MaskSpec(2), planes=True)
    write("square", tiny[:2], MapSpec(1, 1, 1, 1000, "center_square"), classes=1000)
    write("many", [picture(4, 4 + i % 5, rng) for i in range(120)], MapSpec(2, 2, 3, 20), classes=20)
    write(
        "pages", [picture(640, 640, rng, quality=98, subsampling=0) for _ in range(4)], MapSpec(2, 2, 2, 9), classes=9
    )
    stock = (
        Path(__file__).parent / "stock_ffcv.beton.xz"
    )  # by ffcv 1.0.2's DatasetWriter: 6 images, labels 0 to 2, page_size 2 MiB
    (folder / "stock.beton").write_bytes(lzma.decompress(stock.read_bytes()))


@dataclasses.dataclass(frozen=True)
class Content:
    """All that a file says: what must not change unnoticed. maps: (classes, scores) bytes a sample, if any."""

    spec: MapSpec | None
    masks: MaskSpec | None
    class_names: list
    annotator: dict | None
    samples: list[tuple]  # id, label, height, width, whether planes, image, map, mask


def content_of(reader: BetonReader) -> Content:
    samples = [sample_of(reader, i) for i in range(len(reader))]
    return Content(reader.spec, reader.mask_spec, reader.class_names, reader.annotator, samples)


def sample_of(reader: BetonReader, i: int) -> tuple:
    maps = None if reader.spec is None else tuple(part.tobytes() for part in reader.label_maps(np.array([i])))
    return (
        reader.source_ids[i],
        int(reader.labels[i]),
        int(reader.heights[i]),
        int(reader.widths[i]),
        bool(reader.stored_as_planes[i]),
        bytes(reader.image(i)),
        maps,
        None if reader.mask_spec is None else reader.mask(i).tobytes(),
    )


class Base:
    """A valid file with the places in it: `spots` (numbers: offset, bytes) and `regions` (offset, bytes), by name."""

    def __init__(self, path: Path) -> None:
        self.name, self.data = path.stem, path.read_bytes()
        with BetonReader(path) as reader:
            self.content = content_of(reader)
        self.spots, self.regions = places(self.data)
        self.rows = [name for name in self.spots if name.startswith(("row", "alloc"))]
        self.tables = [name for name in self.spots if name not in self.rows]


def places(data: bytes | bytearray) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    """Spots and regions of a file whose tables are as they should be."""
    spots: dict[str, tuple[int, int]] = {}

    def add(prefix: str, dtype: np.dtype, start: int) -> None:
        for name, (kind, offset, *_) in dtype.fields.items():
            if kind.fields:
                add(f"{prefix}.{name}", kind, start + offset)
            else:
                spots[f"{prefix}.{name}"] = start + offset, kind.itemsize

    add("header", HEADER, 0)
    header = np.frombuffer(data[: HEADER.itemsize], HEADER)[0]
    count, samples, table = int(header["num_fields"]), int(header["num_samples"]), int(header["alloc_table_ptr"])
    fields = np.frombuffer(data, FIELD, count, HEADER.itemsize)
    regions = {"header": (0, HEADER.itemsize), "fields": (HEADER.itemsize, fields.nbytes)}
    for i, field in enumerate(fields):
        start = HEADER.itemsize + i * FIELD.itemsize
        spots[f"field{i}.type"], spots[f"field{i}.name"] = (start, 1), (start + 1, 16)
        spots[f"field{i}.arguments"] = (start + 17, 8)
        if field["type_id"] == CUSTOM and bytes(field["name"]) == b"label_map":
            add("spec", SPEC_ARGUMENTS, start + 17)
        elif field["type_id"] == CUSTOM:
            spots["image.magic"] = start + 17, 8
        elif field["arguments"].any():
            add("index", INDEX, start + 17)
            index = np.frombuffer(data, INDEX, 1, start + 17)[0]
            regions |= {name: (int(index[f"{name}_ptr"]), int(index[f"{name}_size"])) for name in ("info", "ids")}
    row = row_type(fields)
    start = HEADER.itemsize + fields.nbytes
    regions |= {"metadata": (start, samples * row.itemsize), "alloc": (table, len(data) - table)}
    allocations = np.frombuffer(data, ALLOCATION, offset=table)
    data_start = int(allocations["ptr"].min())
    regions["data"] = data_start, int((allocations["ptr"] + allocations["size"]).max()) - data_start
    for i in range(min(samples, 8)):
        add(f"row{i}", row, start + i * row.itemsize)
    for i in range(min(len(allocations), 16)):
        add(f"alloc{i}", ALLOCATION, table + i * ALLOCATION.itemsize)
    return spots, regions


def row_type(fields: np.ndarray) -> np.dtype:
    def kind_of(field: np.void) -> np.dtype:
        if field["type_id"] == CUSTOM:
            return IMAGE if bytes(field["name"]) == b"image" else LABEL_MAP
        return STOCK_TYPES.get(int(field["type_id"]), np.dtype("u1"))

    return metadata_dtype([kind_of(field) for field in fields])


# ---------------------------------------------------------------- operations


def apply(base: Base, operations: list[Operation]) -> bytes:
    data = bytearray(base.data)
    spots, regions = base.spots, base.regions
    for name, *values in operations:
        size = max(len(data), 1)
        if name == "flip" and data:
            data[values[0] % size] ^= 1 << values[1]
        elif name == "set":
            data[values[0] % size : values[0] % size + len(values[1]) // 2] = bytes.fromhex(values[1])
        elif name == "cut":
            del data[values[0] % size :]
        elif name == "grow":
            data += bytes.fromhex(values[0]) * values[1]
        elif name == "zero":
            start = values[0] % size
            data[start : start + values[1]] = bytes(len(data[start : start + values[1]]))
        elif name == "copy":  # overwrites: the length stays
            part = data[values[0] % size : values[0] % size + values[2]]
            data[values[1] % size : values[1] % size + len(part)] = part[: size - values[1] % size]
        elif name == "drop":
            del data[values[0] % size : values[0] % size + values[1]]
        elif name == "swap":
            first, second, length = values[0] % size, values[1] % size, values[2]
            length = min(length, abs(first - second), size - max(first, second))
            data[first : first + length], data[second : second + length] = (
                data[second : second + length],
                data[first : first + length],
            )
        elif name == "put" and values[0] in spots:
            at, width = spots[values[0]]
            data[at : at + width] = (values[1] % (1 << 8 * width)).to_bytes(width, "little")
        elif name == "take" and values[0] in spots and values[1] in spots:
            (at, width), (source, length) = spots[values[0]], spots[values[1]]
            data[at : at + width] = bytes(data[source : source + length])[:width].ljust(width, b"\0")
        elif name == "move" and f"alloc{values[0]}.ptr" in spots:  # a sample's data, in both places that name it
            at = spots[f"alloc{values[0]}.ptr"][0]
            old, new = bytes(data[at : at + 8]), (values[1] & MAX_U64).to_bytes(8, "little")
            start, length = regions["metadata"]
            for place in (at, data.find(old, start, start + length)):
                if place >= 0:
                    data[place : place + 8] = new
        elif name == "json" and values[0] in regions:
            prefix, unit, times, suffix = (
                value if isinstance(value, int) else value.encode("latin-1") for value in values[1:]
            )
            data = with_json(data, regions, spots, values[0], prefix + unit * times + suffix)
            spots, regions = places(data)
        elif name == "entries":
            at = regions["alloc"][0] + ALLOCATION.itemsize * values[0]
            data += bytes(data[at : at + ALLOCATION.itemsize]) * values[1]
        elif name == "seal":
            seal(data, values[0] == "samples")
    return bytes(data)


def with_json(data: bytearray, regions: dict, spots: dict, name: str, text: bytes) -> bytearray:
    """The file with another info or ids, everything behind the data laid out anew."""
    texts = {
        part: text if part == name else bytes(data[regions[part][0] : sum(regions[part])]) for part in ("info", "ids")
    }
    table = bytes(data[regions["alloc"][0] :])
    out = data[: regions["info"][0]]
    for part, content in texts.items():
        out += bytes(-len(out) % 8)
        for key, value in (("ptr", len(out)), ("size", len(content))):
            at = spots[f"index.{part}_{key}"][0]
            out[at : at + 8] = value.to_bytes(8, "little")
        out += content
    out += bytes(-len(out) % 8)
    out[16:24] = len(out).to_bytes(8, "little")
    return out + table


def seal(data: bytearray, samples: bool) -> None:
    """Put right CRCs into a damaged file, of its samples too if asked for; leaves it alone where there is no telling
    how."""
    if len(data) < HEADER.itemsize:
        return
    header = np.frombuffer(bytes(data[: HEADER.itemsize]), HEADER)[0]
    count = min(int(header["num_fields"]), (len(data) - HEADER.itemsize) // FIELD.itemsize)
    fields = np.frombuffer(bytes(data[HEADER.itemsize : HEADER.itemsize + count * FIELD.itemsize]), FIELD)
    column = next(
        (i for i, field in enumerate(fields) if bytes(field["name"]) == b"crc" and field["type_id"] == INT), None
    )
    if column is None:
        return
    head_size, row = HEADER.itemsize + fields.nbytes, row_type(fields)
    rows = min(int(header["num_samples"]), max(0, len(data) - head_size) // row.itemsize)
    table = int(header["alloc_table_ptr"])
    place = HEADER.itemsize + column * FIELD.itemsize + 17
    index = np.frombuffer(bytes(data[place : place + INDEX.itemsize]), INDEX).copy()
    if samples:
        metadata = np.frombuffer(bytes(data[head_size : head_size + rows * row.itemsize]), row).copy()
        entries = np.frombuffer(
            bytes(data[table:]), ALLOCATION, (len(data) - min(table, len(data))) // ALLOCATION.itemsize
        )
        sizes = dict(zip(entries["ptr"].tolist(), entries["size"].tolist(), strict=True))
        pointers = [column for column, kind in enumerate(row.fields.values()) if kind[0].fields]
        for i in range(min(rows, 500)):  # a count of samples may be damaged too
            crc = 0
            for pointer in pointers:  # image, label map, mask
                start = int(metadata[i][f"f{pointer}"]["ptr" if "ptr" in row[pointer].names else "data_ptr"])
                crc = zlib.crc32(data[start : start + sizes.get(start, 0)], crc)
            metadata[f"f{column}"][i] = crc
        data[head_size : head_size + metadata.nbytes] = metadata.tobytes()
    parts = {"metadata_crc": data[head_size : head_size + rows * row.itemsize], "alloc_crc": data[table:]}
    for name in ("info", "ids"):
        start = int(index[f"{name}_ptr"][0])
        parts[f"{name}_crc"] = data[start : start + int(index[f"{name}_size"][0])]
    for name, part in parts.items():
        index[name] = zlib.crc32(part)
    index["head_crc"] = 0
    data[place : place + INDEX.itemsize] = index.tobytes()
    index["head_crc"] = zlib.crc32(data[:head_size])
    data[place : place + INDEX.itemsize] = index.tobytes()


# ---------------------------------------------------------------- drawing cases

WEIGHTS = {
    "one": 3,
    "plain": 4,
    "maps": 6,
    "masks": 3,
    "both": 2,
    "planes": 3,
    "all": 2,
    "square": 1,
    "many": 2,
    "pages": 0.4,
    "stock": 0.8,
}
INFO = [
    ["", "null", 1, ""],
    ["", "[]", 1, ""],
    ["", "", 0, ""],
    ["", "7", 1, ""],
    ["{", "", 0, "}"],
    ['{"class_names": ', "null", 1, ', "annotator": null}'],
    ['{"class_names": [', '"a",', 7, '1], "annotator": null}'],
    ['{"class_names": {"a": 1}, "annotator": null, "tl_fast": "0"', "", 0, "}"],
    ['{"class_names": ["a", "b", "c", "d", "e", "f", "g"], "annotator": [', "1,", 5, "1]}"],
    ['{"class_names": ["a", "b", "c", "d", "e", "f", "g"], "annotator": {"x": ', "[", 30, "]" * 30 + "}}"],
    ['{"class_names": ["a", "b", "c", "d", "e", "f", "g"], "annotator": {"x": ', "[", 900, "]" * 900 + "}}"],
    ['{"class_names": ["a", "b", "c", "d", "e", "f", "g"], "annotator": {"x": ', "9", 6000, "}}"],
    ['{"class_names": ["a", "b", "c", "d", "e", "f", "g"], "annotator": {"x": ', "9", 400, "e999}}"],
    ['{"class_names": ["a", "b", "c", "d", "e", "f", "g"], "annotator": {"x": NaN}', "", 0, ', "tl_fast": 7}'],
    ['{"class_names": ["a"], "class_names": ["a"', ',"b"', 6, '], "annotator": {}, "annotator": null, "tl_fast": "0"}'],
    [
        '{"class_names": ["a", "b", "c", "d", "e", "f", "\\ud800"',
        "",
        0,
        '], "annotator": {"x": "\\udfff"}, "tl_fast": "0"}',
    ],
    ['{"class_names": ["a"', ', "\xff"', 6, "]}"],
    ["\xef\xbb\xbf{", '"class_names": []', 1, "}"],
    ["\xff\xfe", "{\0}\0", 1, ""],
    ["", "[", 100_000, ""],
    ["", '{"a":', 50_000, ""],
    ["[", "[],", 60_000, "[]]"],
    ["[", "{},", 60_000, "{}]"],
    ['{"class_names": [', '"",', 60_000, '""]}'],
    ['"', "\xf0\x9f\x98\x80", 30_000, '"'],
    ['"a', "x", 150_000, '\xf0\x9f\x98\x80"'],
    ['{"class_names": ["a", "b", "c", "d", "e", "f", "g"], "annotator": null, "masks": {"num_classes": ', "3", 1, "}}"],
    [
        '{"class_names": ["a", "b", "c", "d", "e", "f", "g"], "annotator": null, "masks": {"num_classes": ',
        "9",
        90,
        "}}",
    ],
    ['{"class_names": ["a", "b", "c", "d", "e", "f", "g"], "annotator": null, "masks": ', "{", 9, "}" * 9 + "}"],
    ['{"class_names": ["a", "b", "c", "d", "e", "f", "g"], "annotator": null, "masks": {"\\u0000": ', "1", 1, "}}"],
    ['{"class_names": [], "annotator": {', '"\\u0000": 1,', 9_000, '"b": 2}, "tl_fast": null}'],
]
IDS = [
    ["", "null", 1, ""],
    ["", "", 0, ""],
    ["{", '"a": 1', 1, "}"],
    ['"', "a", 6, '"'],
    ["[", "1,", 5, "1]"],
    ["[", '"a",', 5, '"a"]'],
    ["[", '"a",', 0, '"a"]'],
    ["[", '"a",', 119, '"a"]'],
    ["[", '"a",', 5, "null]"],
    ["[", '"a",', 5, '["a"]]'],
    ["[", '"a",', 5, '"b",]'],
    ["[", '"\\ud800",', 5, '"a"]'],
    ["[", '"\\ud83d\\ude00",', 5, '"a"]'],
    ["[", '"\xff",', 5, '"a"]'],
    ["[", '"a\n",', 5, '"a"]'],
    ["[", '"a\\"b\\\\",', 5, '"c"]'],
    ["[", '"', 11, "]"],
    ["[", '"\\', 11, "]"],
    ["[", '"a"', 6, "]"],
    ["\xef\xbb\xbf[", '"a",', 5, '"b"]'],
    ["[\0", '"\0a\0"\0,\0', 5, '"\0b\0"\0]\0'],
    ["", "[", 100_000, ""],
    ["[", "[],", 60_000, "[]]"],
    ["[", '"",', 60_000, '""]'],
    ["[", '"ab",', 40_000, '"c"]'],
    ["[", '"a",', 4, '"' + "b" * 150_000 + '\xf0\x9f\x98\x80","c"]'],
    [" [ ", '"a" , ', 5, '"b" ] '],
]


def draw(seed: int, case: int, bases: dict[str, Base]) -> tuple[Base, list[Operation]]:
    """The case's file and operations. The last operation says whether it is sealed."""
    rng = np.random.default_rng([seed, case])
    names = [name for name in WEIGHTS if name in bases]
    weights = np.array([WEIGHTS[name] for name in names])
    base = bases[names[rng.choice(len(names), p=weights / weights.sum())]]
    operations: list[Operation] = []
    for _ in range(1 + int(rng.integers(0, 2) * rng.integers(0, 4))):
        operations += [raw, number, row_number, table, text][rng.choice(5, p=[0.3, 0.2, 0.2, 0.18, 0.12])](rng, base)
    operations.sort(
        key=lambda operation: operation[0] != "json"
    )  # these lay the file out anew, and need its tables for that
    if sealed := int(rng.choice(3, p=[0.4, 0.35, 0.25])):
        operations.append(["seal", ["tables", "samples"][sealed - 1]])
    return base, operations


def place(rng: np.random.Generator, base: Base) -> int:
    """An offset: every part of the file is as likely as the next, however large."""
    start, size = (
        base.regions["data"] if rng.integers(5) == 0 else list(base.regions.values())[rng.integers(len(base.regions))]
    )
    return start + int(rng.integers(max(size, 1)))


def raw(rng: np.random.Generator, base: Base) -> list[Operation]:
    at, length = place(rng, base), int(2 ** rng.uniform(0, 9))
    kind = rng.integers(12)
    if kind < 4:
        return [["flip", at, int(rng.integers(8))]]
    if kind == 4:
        return [["set", at, rng.bytes(1).hex()]]
    if kind == 5:
        return [["set", at, hostile(rng, base).to_bytes(8, "little").hex()]]
    if kind == 6:
        return [["cut", at if rng.integers(2) else len(base.data) - length]]
    if kind == 7:
        return [["grow", rng.bytes(int(rng.choice([1, 7, 24]))).hex() if rng.integers(2) else "00", length]]
    if kind == 8:
        return [["zero", at, length]]
    if kind == 9:
        return [["drop", at, length]]
    return [["copy" if kind == 10 else "swap", at, place(rng, base), length]]


def hostile(rng: np.random.Generator, base: Base) -> int:
    """A number that a check may have forgotten, 0 to 2^64 - 1."""
    header = np.frombuffer(base.data[: HEADER.itemsize], HEADER)[0]
    data, metadata = base.regions["data"], base.regions["metadata"]
    marks = [
        0,
        1 << 7,
        1 << 8,
        1 << 15,
        1 << 16,
        1 << 31,
        1 << 32,
        1 << 63,
        1 << 64,
        len(base.data),
        int(header["page_size"]),
        65_500,
    ]
    marks += [
        int(header["num_samples"]),
        int(header["alloc_table_ptr"]),
        data[0],
        sum(data),
        metadata[0],
        sum(metadata),
        (1 << 64) // 24,
    ]
    marks += [(1 << 64) // 48, (1 << 63) // 48, (1 << 32) // 1041, 0x7F800000, 0xFFC00000, 0x7F7FFFFF, 0xBF800000]
    if rng.integers(8) == 0:
        bits = int(rng.integers(1, 65))
        return int(rng.integers(0, 1 << bits, dtype=np.uint64)) if rng.integers(2) else int(rng.integers(300))
    return (marks[rng.integers(len(marks))] + int(rng.integers(-2, 3))) % (1 << 64)


def number(rng: np.random.Generator, base: Base) -> list[Operation]:
    return change(rng, base, base.tables)


def row_number(rng: np.random.Generator, base: Base) -> list[Operation]:
    return change(rng, base, base.rows)


def change(rng: np.random.Generator, base: Base, names: list[str]) -> list[Operation]:
    """One of the numbers set to a hostile value, to another number's value, or moved a little."""
    name = names[rng.integers(len(names))]
    kind = rng.integers(6)
    if kind == 0:
        return [["take", name, names[rng.integers(len(names))]]]
    at, width = base.spots[name]
    value = int.from_bytes(base.data[at : at + width], "little")
    if kind == 1:
        value += int(rng.choice([-8, -2, -1, 1, 2, 8]))
    elif kind == 2:
        value ^= 1 << int(rng.integers(8 * width))
    else:
        value = hostile(rng, base)
    return [["put", name, value % (1 << 8 * width)]]


def table(rng: np.random.Generator, base: Base) -> list[Operation]:
    """Allocations that move, overlap, are swapped, repeated, or lose their sample."""
    count = base.regions["alloc"][1] // ALLOCATION.itemsize
    first, second = (int(rng.integers(min(count, 16))) for _ in range(2))
    kind = rng.integers(7)
    at = int.from_bytes(base.data[base.spots[f"alloc{second}.ptr"][0] :][:8], "little")
    if kind == 0:
        return [["move", first, hostile(rng, base)]]
    if kind == 1:
        return [["move", first, (at + int(rng.integers(-40, 40))) % (1 << 64)]]
    if kind == 2:
        return [["move", first, at], ["take", f"alloc{first}.size", f"alloc{second}.size"]]
    if kind == 3:
        start = base.regions["alloc"][0]
        return [["swap", start + 24 * first, start + 24 * second, 24]]
    if kind == 4:
        return [["entries", first, int(2 ** rng.uniform(0, 10))]]
    if kind == 5:
        return [["entries", first, 1], ["set", len(base.data) + 8, hostile(rng, base).to_bytes(8, "little").hex()]]
    row = int(rng.integers(min(8, len(base.content.samples))))
    return [
        ["take", name.replace("row0", f"row{row}"), name]
        for name in base.spots
        if name.startswith("row0") and "ptr" in name
    ]


def text(rng: np.random.Generator, base: Base) -> list[Operation]:
    """Info or ids: others from the lists above, or damaged at one place."""
    if "info" not in base.regions:
        return raw(rng, base)
    name, choices = [("info", INFO), ("ids", IDS)][rng.integers(2)]
    if rng.integers(3):
        return [["json", name, *choices[rng.integers(len(choices))]]]
    start, size = base.regions[name]
    piece = ['"', "[", "]", "{", "\\", "\\u", ",", ":", "\0", "\x80", "\xed\xa0\x80", "1e999", "null", "//"][
        rng.integers(14)
    ]
    return [["set", start + int(rng.integers(max(1, size))), piece.encode("latin-1").hex()]]


# ---------------------------------------------------------------- judging


def run_case(base: Base, operations: list[Operation], path: Path, tight: bool = False) -> tuple[str, str]:
    """Writes the case to `path` and reads it. Returns how it ended, and the field that the first BetonError named.

    open: refused when opened; read: by ids, label maps or a sample's check; verify: by verify only; harmless: sound,
    nothing changed;
    accepted: sealed, and free of contradictions. Raises whatever comes out that should not, Violation among it.
    """
    data = apply(base, operations)
    path.write_bytes(data)
    sealed = (
        any(operation[0] == "seal" for operation in operations) or base.name == "stock"
    )  # a stock file has no CRCs: nothing to hold
    if tight:
        tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0] if tight else 0
        outcome, field, reader = read(path)
        if tight and (used := tracemalloc.get_traced_memory()[1] - before) > len(data) + slack_of(operations):
            raise Violation(f"reading {len(data)} bytes took {used} bytes of memory")
    finally:
        tracemalloc.stop()
    if reader is None:
        return outcome, field
    if not sealed:
        compare(reader, base.content, outcome)
    if outcome == "sound":
        if sealed:
            contradictions(reader, len(data))
        outcome = "accepted" if sealed else "harmless"
    return outcome, field


def slack_of(operations: list[Operation]) -> int:
    """Bytes that reading may take beside the file's size: what Python makes of JSON is larger than its text."""
    lengths = {"info": 0, "ids": 0}
    for name, *values in operations:
        if name == "json":
            lengths[values[0]] += len(values[1]) + len(values[2]) * values[3] + len(values[4])
    return SLACK + 32 * lengths["info"] + 8 * lengths["ids"]


def named(error: BetonError | str, path: Path) -> str:
    """The field that a message names after the file. Raises Violation where it does not."""
    message = str(error)
    found = MESSAGE.match(message, len(str(path)) + 2)
    if not message.startswith(f"{path}: ") or found is None:
        raise Violation(f"the message does not begin with file and field: {message!r}")
    if len(message) > 2000 or not message.isprintable():
        raise Violation(f"the message is long or not printable: {message[:3000]!r}")
    return re.sub(r"^field .*", "field", found["field"])


def read(path: Path) -> tuple[str, str, BetonReader | None]:
    """Everything that can be read. Lets through what is no BetonError."""
    try:
        reader = BetonReader(path)
    except BetonError as error:
        return "open", named(error, path), None
    first = ""
    steps = [lambda: reader.source_ids, lambda: [reader.image(i) for i in range(len(reader))]]
    steps += [lambda i=i: reader.planes(i) for i in np.flatnonzero(reader.stored_as_planes)]
    if reader.spec is not None:
        batches = [np.arange(start, min(start + 8, len(reader))) for start in range(0, len(reader), 8)]
        steps += [lambda batch=batch: reader.label_maps(batch) for batch in batches]
    if reader.mask_spec is not None:
        steps += [lambda i=i: reader.mask(i) for i in range(len(reader))]
    if reader.has_crc:
        steps += [lambda i=i: (reader.crc(i), reader.check(i)) for i in range(len(reader))]
    for step in steps:
        try:
            step()
        except BetonError as error:
            first = first or named(error, path)
    decode = int(reader.heights.max()) < 640
    try:
        problems = verify(path, decode=decode)
    except BetonError as error:
        return "read" if first else "verify", first or named(error, path), reader
    for problem in problems:
        first_of_verify = named(problem, path)
    if first and not problems:
        raise Violation(f"verify calls a file sound that cannot be read: {first}")
    return (
        ("read" if first else "verify" if problems else "sound"),
        first or (first_of_verify if problems else ""),
        reader,
    )


def compare(reader: BetonReader, right: Content, outcome: str) -> None:
    """A file that was not sealed says what it said before, sample by sample, or a check finds the sample."""
    head = reader.spec, reader.mask_spec, reader.class_names, reader.annotator, len(reader)
    if head != (right.spec, right.masks, right.class_names, right.annotator, len(right.samples)):
        raise Violation(f"read wrong: {head}")
    for i, sample in enumerate(right.samples):
        try:
            reader.check(i)
            found = sample_of(reader, i)
        except BetonError as error:
            if outcome == "sound":
                raise Violation(f"verify calls a file sound of which a check says: {error}") from error
            continue
        if found != sample:
            raise Violation(f"sample {i} is read wrong, and its check finds nothing")


def contradictions(reader: BetonReader, size: int) -> None:
    """What no accepted file may contain, whoever sealed it."""
    if not (
        reader.heights.min() > 0 < reader.widths.min() and len(reader.source_ids) == len(reader) == len(reader.labels)
    ):
        raise Violation("empty images, or tables of different lengths")
    for name in [*reader.source_ids, *reader.class_names, json.dumps(reader.annotator, ensure_ascii=False)]:
        name.encode("utf-8")
    if reader.class_names and not 0 <= reader.labels.min() <= reader.labels.max() < len(reader.class_names):
        raise Violation("labels outside of the classes")
    if reader.has_crc and len(set(reader.source_ids)) < len(reader):
        raise Violation("two samples with one id")
    views = [reader.image(i) for i in range(len(reader))]
    starts = np.array([view.ctypes.data for view in views]) - reader._bytes.ctypes.data
    order = np.argsort(starts)
    ends = starts + [len(view) for view in views]
    if (
        starts.min() < 0
        or ends.max() > size
        or (ends[order][:-1] > starts[order][1:]).any()
        or min(map(len, views)) == 0
    ):
        raise Violation("images that are empty, outside of the file, or overlap")
    for i in np.flatnonzero(reader.stored_as_planes):
        (height, width), sizes = (reader.heights[i], reader.widths[i]), [plane.shape for plane in reader.planes(i)]
        half = -(-height // 2), -(-width // 2)
        if sizes != [(height, width), half, half] or sum(map(np.prod, sizes)) != len(views[i]):
            raise Violation("planes of another size than the image")
    if reader.spec is not None:
        classes, scores = reader.label_maps(np.arange(len(reader)))
        if classes.max() >= reader.spec.num_classes or not np.isfinite(scores).all() or classes.shape != scores.shape:
            raise Violation("label maps with classes >= C or scores that are not finite")
        if reader.labels.min() < 0 or reader.labels.max() >= reader.spec.num_classes:
            raise Violation("labels outside of the label maps' classes")
    if reader.mask_spec is not None:
        for i in range(len(reader)):
            mask = reader.mask(i)
            if mask.shape != (reader.heights[i], reader.widths[i]) or not reader.mask_spec.allowed[mask].all():
                raise Violation("masks of another size than their image, or with other values")


# ---------------------------------------------------------------- processes


@dataclasses.dataclass
class Report:
    outcomes: Counter = dataclasses.field(default_factory=Counter)
    fields: Counter = dataclasses.field(default_factory=Counter)
    failures: dict[int, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


def worker(folder: Path, seed: int, first: int, last: int, scratch: Path) -> None:
    """Runs cases first to last - 1; one JSON line to stdout each, at once, so that a crash loses none."""
    warnings.simplefilter("error")  # numpy's overflows
    faulthandler.enable()
    bases = {path.stem: Base(path) for path in sorted(folder.glob("*.beton"))}
    for base in bases.values():
        run_case(base, [], scratch)  # loads what is loaded once
        run_case(base, [], scratch, tight=True)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESS_SPACE, resource.RLIM_INFINITY))
    os.write(1, b"ready\n")
    for case in range(first, last):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            line = [case, *run_case(*draw(seed, case, bases), scratch, tight=case % TIGHT == 0)]
        except Exception:
            line = [case, "failed", traceback.format_exc(limit=-6)]
        faulthandler.cancel_dump_traceback_later()
        os.write(1, json.dumps(line).encode() + b"\n")


def run(seed: int, cases: range, workers: int, prelude: str = "", failures: int = 20) -> Report:
    """prelude: Python code to run in the workers before the cases. Stops early after so many failures."""
    report, started = Report(), time.monotonic()

    def batch(bounds: range, folder: Path) -> None:
        first = bounds.start
        scratch = folder / f"case{first}.tmp"
        while first < bounds.stop and len(report.failures) < failures:
            code = f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            code += f"import fuzz_beton\n{prelude}\n"
            code += f"fuzz_beton.worker(Path({str(folder)!r}), {seed}, {first}, {bounds.stop}, Path({str(scratch)!r}))"
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
            ready, *lines = process.stdout.splitlines() or [""]
            if ready != "ready":
                raise RuntimeError(f"the undamaged files could not be read:\n{process.stderr}")
            for case, outcome, field in map(json.loads, lines):
                report.outcomes[outcome] += 1
                if outcome == "failed":
                    report.failures[case] = field
                else:
                    report.fields[field] += 1
            first += len(lines)
            if first < bounds.stop:
                report.failures[first] = f"the process ended with code {process.returncode}:\n{process.stderr[-2000:]}"
                report.outcomes["failed"] += 1
                first += 1
        scratch.unlink(missing_ok=True)

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        make_bases(Path(folder))
        with ThreadPoolExecutor(workers) as pool:
            starts = range(cases.start, cases.stop, BATCH)
            list(pool.map(lambda start: batch(range(start, min(start + BATCH, cases.stop)), Path(folder)), starts))
    report.seconds = time.monotonic() - started
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--case", type=int, metavar="N", help="run this one only, in this process")
    arguments = parser.parse_args()
    if arguments.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            make_bases(Path(folder))
            bases = {path.stem: Base(path) for path in sorted(Path(folder).glob("*.beton"))}
            base, operations = draw(arguments.seed, arguments.case, bases)
            print(f"{base.name}: {json.dumps(operations)}")
            print(*run_case(base, operations, Path(folder) / "case.tmp", tight=True))
        return 0
    report = run(arguments.seed, range(arguments.cases), arguments.workers)
    for case, failure in sorted(report.failures.items()):
        print(f"--seed {arguments.seed} --case {case}: {failure}")
    print(f"{sum(report.outcomes.values()):,} cases in {report.seconds:.0f} s: {dict(report.outcomes.most_common())}")
    print(f"fields named: {dict(report.fields.most_common())}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
