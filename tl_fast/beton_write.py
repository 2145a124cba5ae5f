"""Writing a .beton: in one pass, on threads, to a temporary file that takes the final name only when it is whole.

ffcv's writer loop is not used: it hangs when a worker dies, leaves torn files that look whole, and its output depends on the workers'
timing. Here worker threads read and encode, and one thread lays out and writes in the samples' order, so the bytes are the same for any
number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

import tl_fast
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
    RGB_IMAGE,
    STOCK_TYPES,
    VERSION,
    BetonError,
    metadata_dtype,
    spec_to_arguments,
)
from tl_fast.labelmap import MapSpec

PAGE_SIZE = 8 << 20  # ffcv's default, bytes


@dataclasses.dataclass(frozen=True)
class Sample:
    """One input of `write_beton`. `image()` returns the image file's bytes, `label_map()` its packed record; worker threads call both.

    source_id: unique in the data set, kept in the file. origin: what error messages call it (a path, an archive member), by default the id.
    """

    source_id: str
    label: int
    image: Callable[[], bytes]
    label_map: Callable[[], np.void] | None = None
    origin: str = ""


class SampleSource(Protocol):
    """What `write_beton` reads from: a list of Samples, or anything with a length that is iterated once."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sample]: ...


@dataclasses.dataclass(frozen=True)
class WriteSummary:
    """What `write_beton` did: images `copied` untouched, `reencoded`, `resized` (and encoded); sizes in bytes, wall time in seconds."""

    samples: int
    copied: int
    reencoded: int
    resized: int
    image_bytes: int
    label_map_bytes: int
    file_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A sample as it goes into the file; `crc` covers `jpeg` followed by `label_map`."""

    jpeg: bytes
    height: int
    width: int
    action: str
    label_map: bytes
    score_min: float
    score_step: float
    crc: int


def ordered_map(workers: int, function: Callable, items: Iterable, ahead: int = 4) -> Iterator:
    """`map(function, items)` on threads, in order, with at most `ahead * workers` items begun and not yet consumed.

    Threads suffice: file reads, libjpeg, Pillow and zlib all release the GIL. The first exception, in the order of the items, is raised
    and the rest cancelled.
    """
    pool = ThreadPoolExecutor(workers)
    pending: deque = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path`, complete and on disk, when the block ends, or not at all.

    It is written as `.NAME.partial` in the same folder, locked against a second writer; the next run overwrites what a killed one left.
    """
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):  # some network file systems have no locks
                raise BetonError(f"{path}: another process is writing it (it holds {partial}); wait for it or stop it") from error
        if not partial.exists() or os.fstat(handle).st_ino != partial.stat().st_ino:  # the other writer ended between our open and our lock
            raise BetonError(f"{path}: another process has just written it; run again with --overwrite to replace it")
        try:
            os.ftruncate(handle, 0)
            with os.fdopen(handle, "wb", buffering=1 << 20, closefd=False) as file:
                yield file
            os.fsync(handle)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    finally:
        os.close(handle)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself survive a power cut
    finally:
        os.close(folder)


def encode(sample: Sample, spec: MapSpec | None, max_resolution: int | None, quality: int) -> Encoded:
    """Read, check and encode one sample. Raises BetonError naming it."""
    from tl_fast.jpeg import prepare  # here, since reading a beton needs no image library

    try:
        image = prepare(sample.image(), max_resolution, quality)
        crc, data, score_min, score_step = zlib.crc32(image.data), b"", 0.0, 0.0
        if spec is not None:
            record = sample.label_map()
            if record.dtype != spec.dtype:
                raise ValueError(f"its label map has dtype {record.dtype}; {spec} has {spec.dtype}")
            if record["classes"].max() >= spec.num_classes:
                raise ValueError(f"its label map lists class {record['classes'].max()} of {spec.num_classes}")
            score_min, score_step = float(record["score_min"]), float(record["score_step"])
            if not (np.isfinite(score_min) and np.isfinite(score_step) and score_step >= 0):
                raise ValueError(
                    f"its label map has score_min {score_min} and score_step {score_step}; both must be finite, the step not negative"
                )
            data = record["classes"].tobytes() + record["scores"].tobytes()
            crc = zlib.crc32(data, crc)
    except Exception as error:  # whatever it is, the run ends with the sample's name
        what = error if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        raise BetonError(f"{sample.origin or sample.source_id}: {what}") from error
    return Encoded(image.data, image.height, image.width, image.action, data, score_min, score_step, crc)


class Layout:
    """Where everything goes: appends samples to `file`, then closes it with tables and header. reserved: samples to come."""

    def __init__(self, file: BinaryIO, reserved: int, page_size: int, spec: MapSpec | None) -> None:
        self.file, self.page_size, self.spec = file, page_size, spec
        kinds = [("image", RGB_IMAGE, IMAGE), ("label", INT, STOCK_TYPES[INT])]
        kinds += [("label_map", CUSTOM, LABEL_MAP)] if spec is not None else []
        kinds += [("crc", INT, STOCK_TYPES[INT])]
        self.fields = np.zeros(len(kinds), FIELD)
        self.fields["name"], self.fields["type_id"] = [name for name, _, _ in kinds], [kind for _, kind, _ in kinds]
        self.columns = {name: f"f{i}" for i, (name, _, _) in enumerate(kinds)}
        if spec is not None:
            self.fields["arguments"][2] = spec_to_arguments(spec)
        self.metadata = np.zeros(reserved, metadata_dtype([dtype for _, _, dtype in kinds]))
        self.allocations = np.zeros(reserved * (1 if spec is None else 2), ALLOCATION)
        self.offset, self.samples, self.allocated = HEADER.itemsize + self.fields.nbytes + self.metadata.nbytes, 0, 0
        file.seek(self.offset)

    def _append(self, data: bytes, align: int = 1) -> int:
        """Write at the next multiple of `align`; returns where."""
        gap = -self.offset % align
        self.file.write(bytes(gap) + data)
        start = self.offset + gap
        self.offset = start + len(data)
        return start

    def _allocate(self, data: bytes) -> int:
        start = self._append(data, align=2)  # label maps begin with uint16
        self.allocations[self.allocated] = (self.samples, start, len(data))
        self.allocated += 1
        return start

    def add(self, sample: Encoded, label: int) -> None:
        """Append one sample, all of it in one page: ffcv's process cache maps whole pages and nothing across them."""
        size = len(sample.jpeg) + (-len(sample.jpeg) % 2) + len(sample.label_map)
        if size > self.page_size:
            raise ValueError(
                f"its {size} bytes do not fit in a page of {self.page_size}; set --page-size {1 << (size - 1).bit_length()} "
                "or limit --max-resolution"
            )
        if self.page_size - (self.offset + self.offset % 2) % self.page_size < size:
            self._append(b"", align=self.page_size)
        row = self.metadata[self.samples]
        row[self.columns["image"]] = (0, sample.width, sample.height, self._allocate(sample.jpeg))
        row[self.columns["label"]], row[self.columns["crc"]] = label, sample.crc
        if self.spec is not None:
            row[self.columns["label_map"]] = (self._allocate(sample.label_map), sample.score_min, sample.score_step)
        self.samples += 1

    def close(self, info: dict[str, Any], ids: list[str]) -> None:
        """Write what follows the data, then what precedes it; until the header is there nothing takes the file for a beton."""
        texts = [json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8") for value in (info, ids)]
        starts = [self._append(text, align=8) for text in texts]
        allocations = self.allocations[: self.allocated].tobytes()
        table = self._append(allocations, align=8)  # ffcv reads it to the end of the file, so it must be last
        metadata = self.metadata[: self.samples].tobytes()
        crcs = [zlib.crc32(part) for part in (*texts, metadata, allocations)]
        header = np.array([(VERSION, len(self.fields), self.page_size, self.samples, table)], HEADER).tobytes()

        def head(head_crc: int) -> bytes:
            index = np.array([(INDEX_MAGIC, starts[0], len(texts[0]), starts[1], len(texts[1]), *crcs, head_crc)], INDEX)
            self.fields["arguments"][-1, : INDEX.itemsize] = index.view(np.uint8)
            return header + self.fields.tobytes()

        self.file.seek(0)
        self.file.write(head(zlib.crc32(head(0))))  # taken with its own place at zero
        self.file.write(metadata)


def write_beton(
    path: Path | str,
    samples: SampleSource,
    *,
    class_names: Sequence[str],
    spec: MapSpec | None = None,
    annotator: dict[str, Any] | None = None,
    workers: int | None = None,
    max_resolution: int | None = None,
    quality: int = 90,
    page_size: int = PAGE_SIZE,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> WriteSummary:
    """Write `samples` (with a `len()`; iterated once, in order) to `path`.

    class_names: name of every label; with `spec` as many as the label maps' classes, for token targets and labels are of one kind.
    annotator: JSON-able record of how the label maps were made. workers: threads, by default one per CPU core this process may use.
    max_resolution, quality: see `tl_fast.jpeg.prepare`. page_size: bytes, a power of two; no sample may be larger. progress: called with
    samples and bytes written.
    Raises BetonError that names the sample (the first bad one in the samples' order); nothing is left behind then.
    """
    path, started = Path(path), time.perf_counter()
    if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise BetonError(f"page_size {page_size}: must be a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}")
    if not 1 <= quality <= 100:
        raise BetonError(f"quality {quality}: must be 1 to 100")
    if max_resolution is not None and max_resolution < 1:
        raise BetonError(f"max_resolution {max_resolution}: must be at least 1 pixel")
    workers = workers if workers is not None else len(os.sched_getaffinity(0))
    if workers < 1:
        raise BetonError(f"workers {workers}: must be at least 1")
    if len(samples) == 0:
        raise BetonError(f"{path}: there are no samples to write")
    if spec is not None and len(class_names) != spec.num_classes:
        raise BetonError(
            f"{path}: the label maps know {spec.num_classes} classes, the labels {len(class_names)}; token targets and labels must be of "
            "the same classes: annotate with --classes (keep the data set's classes) or --fit-head (a head for them)"
        )
    if path.exists() and not overwrite:
        raise BetonError(f"{path} exists; choose another name or give --overwrite")

    ids: dict[str, None] = {}  # ordered, and finds duplicates
    actions: Counter[str] = Counter()
    image_bytes = map_bytes = 0

    def checked(source: Iterable[Sample]) -> Iterator[Sample]:
        for sample in source:
            where = sample.origin or sample.source_id
            if sample.source_id in ids:
                raise BetonError(f"{where}: a second sample with the id {sample.source_id!r}")
            if not 0 <= sample.label < len(class_names):
                raise BetonError(f"{where}: label {sample.label} is not in 0..{len(class_names) - 1}")
            if spec is not None and sample.label_map is None:
                raise BetonError(f"{where}: has no label map")
            ids[sample.source_id] = None
            yield sample

    try:
        with atomic_file(path) as file:
            layout = Layout(file, len(samples), page_size, spec)
            results = ordered_map(workers, lambda sample: (sample, encode(sample, spec, max_resolution, quality)), checked(samples))
            with contextlib.closing(results):
                for sample, encoded in results:
                    if layout.samples == len(layout.metadata):
                        raise BetonError(
                            f"{path}: more samples than the {len(layout.metadata)} announced; the source has changed, run again"
                        )
                    try:
                        layout.add(encoded, sample.label)
                    except ValueError as error:
                        raise BetonError(f"{sample.origin or sample.source_id}: {error}") from error
                    actions[encoded.action] += 1
                    image_bytes += len(encoded.jpeg)
                    map_bytes += len(encoded.label_map)
                    if progress is not None:
                        progress(layout.samples, layout.offset)
            if layout.samples != len(layout.metadata):
                raise BetonError(
                    f"{path}: {len(layout.metadata)} samples were announced, {layout.samples} came; the source has changed, run again"
                )
            layout.close({"annotator": annotator, "class_names": list(class_names), "tl_fast": tl_fast.__version__}, list(ids))
    except OSError as error:
        raise BetonError(f"{path}: cannot be written ({error}); free some space or choose another folder") from error
    return WriteSummary(
        layout.samples,
        actions["copied"],
        actions["re-encoded"],
        actions["resized"],
        image_bytes,
        map_bytes,
        path.stat().st_size,
        time.perf_counter() - started,
    )
