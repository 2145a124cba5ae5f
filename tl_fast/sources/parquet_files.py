"""Reads parquet shards as Hugging Face's `datasets` writes them: a column of images and a column of labels.

An image is bytes, or a struct of bytes and path. This is the only module that needs pyarrow.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tl_fast.sources.source import (
    MAX_CLASSES,
    Source,
    SourceChanged,
    SourceError,
    check_ids,
    label_classes,
    names_beside,
)

CACHE_BYTES = 512 << 20  # of decoded row groups that are kept; two are kept in any case
_IMAGE_NAMES = ("image", "img", "images", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target")
# n01440764_10026_n01440764.JPEG, ILSVRC2012_val_00000293_n02110341.JPEG
_HUB_IMAGENET = re.compile(r"(?:.*/)?([^/]+)_(n\d{8})(\.\w+)")
# What pyarrow raises for damage. ArrowInvalid is a ValueError; a damaged page is an OSError without errno. An OSError
# with errno comes from the machine.
_DAMAGE = (pa.ArrowException, OSError, ValueError)


@dataclasses.dataclass(frozen=True)
class _File:
    path: str
    size: int
    mtime: int  # ns
    metadata: pq.FileMetaData
    leaf: str  # the column that holds the bytes: 'image.bytes', or 'image' itself
    class_names: list[str] | None


@dataclasses.dataclass(frozen=True)
class _RowGroup:
    file: int  # index in the source's list of files
    number: int  # in its file, counted from 0
    start: int  # its first sample
    first_row: int  # its first row, in its file
    rows: int
    bytes: int  # uncompressed, as the file's footer states


@dataclasses.dataclass(frozen=True)
class _Images:
    """Decoded images of a row group: image r is data[offsets[r]:offsets[r + 1]].

    valid: False for rows without bytes. unread: rows not read so far.
    """

    data: memoryview
    offsets: list[int]
    valid: list[bool]
    unread: set[int]


def _column(
    names: Sequence[str], features: dict, kind: str, usual: Sequence[str], chosen: str | None, option: str, path: str
) -> str:
    """The chosen column; else the only one of that kind in the features; else the first with one of the usual names."""
    if chosen is not None:
        if chosen not in names:
            raise SourceError(f"{path}: no column {chosen!r}; it has {', '.join(names)}")
        return chosen
    typed = [name for name in names if isinstance(features.get(name), dict) and features[name].get("_type") == kind]
    candidates = typed if len(typed) == 1 else [name for name in usual if name in (typed or names)]
    if not candidates:
        raise SourceError(
            f"{path}: which column holds the {option}s? Choose with --{option}-column among {', '.join(names)}"
        )
    return candidates[0]


class ParquetSource(Source):
    """Rows of the files in the order given.

    Ids: `image.path`. ImageNet's paths on the Hub ('n01440764_10026_n01440764.JPEG') become
    those of the usual folders ('n01440764/n01440764_10026.JPEG'), so that label maps made from folders fit. A row
    without a path, or with one that another row has too, is '<file's stem>/<row>', and its path behind that.
    Labels: whole numbers, with the names that `datasets` left in the file, or texts.

    Images are decoded a row group at a time, and a row group is kept until all its rows have been read. So threads that
    read in the order of `order` decode each row group once; threads that read in listed order keep only the row groups
    that are being read. At most `cache_bytes` are kept, and at least two row groups. Beyond that the row group unused
    for longest is dropped, and decoded again when its other rows are read. This happens only where the row groups that
    are being read at the same time fill more than half of `cache_bytes`. Each process decodes for itself, so one
    process should read, with threads (`decodes_groups`).
    """

    kind = "parquet"
    decodes_groups = True

    def __init__(
        self,
        files: Sequence[str],
        image_column: str | None = None,
        label_column: str | None = None,
        class_names: list[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.root = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        self.ignored, self.cache_bytes = 0, cache_bytes
        self._files: list[_File] = []
        self._groups: list[_RowGroup] = []
        self._cache: OrderedDict[int, Future[_Images]] = OrderedDict()
        self._damaged: dict[int, str] = {}  # what is wrong with a row group, by its index in `_groups`
        self._lock = threading.Lock()
        self._starts: list[int] = []
        columns, paths, texts = [], [], []
        for path in files:
            labels, file_paths = self._list_file(path, image_column, label_column)
            (texts if isinstance(labels, list) else columns).append(labels)
            paths.append(file_paths)
        if texts and columns:
            raise SourceError(f"{self.root}: labels are whole numbers in one file and texts in another")
        if not sum(map(len, paths)):
            raise SourceError(f"{self.root}: no rows in it")
        self._starts = [group.start for group in self._groups]
        self._sizes = [group.bytes for group in self._groups]  # bytes that each takes in the cache
        names = self._class_names(class_names)
        if texts:
            self.labels, self.class_names = self._text_labels([text for part in texts for text in part], names)
        else:
            self.labels, self.class_names = self._number_labels(np.concatenate(columns), names)
        self.ids = self._name(paths)
        check_ids(self.ids, self.origin)
        means = [group.bytes // max(group.rows, 1) for group in self._groups]
        self.sizes = np.repeat(np.array(means, np.int64), [group.rows for group in self._groups])

    def _list_file(
        self, path: str, image_column: str | None, label_column: str | None
    ) -> tuple[np.ndarray | list, list[str | None]]:
        """Add one file to `_files` and `_groups`; returns its labels and image paths, and reads no other column."""
        try:
            status = os.stat(path)
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                schema, metadata = file.schema_arrow, file.metadata
                info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
                features = info.get("info", {}).get("features", {})
                image = _column(schema.names, features, "Image", _IMAGE_NAMES, image_column, "image", path)
                label = _column(schema.names, features, "ClassLabel", _LABEL_NAMES, label_column, "label", path)
                leaf, path_leaf = self._leaves(schema.field(image), path)
                table = file.read(columns=[label] + ([path_leaf] if path_leaf else []))
            names = features[label].get("names") if isinstance(features.get(label), dict) else None
            if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise SourceError(f"{path}: the class names of column {label!r} are no list of texts")
            leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
            if leaf not in leaves:
                raise SourceError(f"{path}: no column {leaf}; it has {', '.join(leaves)}")
            labels = self._labels(table.column(label), path)
            paths = [None] * len(table)
            if path_leaf:
                paths = [
                    text for chunk in table.column(image).chunks for text in pc.struct_field(chunk, "path").to_pylist()
                ]
            rows = self._list_groups(path, metadata)
            if not rows == metadata.num_rows == len(paths) == len(labels):
                raise SourceError(
                    f"{path}: {metadata.num_rows} rows announced, {len(paths)} there; it is damaged, fetch it again"
                )
        except (SourceError, MemoryError):
            raise
        except (*_DAMAGE, AttributeError, RecursionError) as error:
            # AttributeError: the features are no dict. RecursionError: they are nested too deep.
            if isinstance(error, OSError) and error.errno is not None:
                raise SourceError(f"{path}: cannot be read ({error})") from error
            raise SourceError(
                f"{path}: cannot be read as parquet, it is cut off or damaged ({error}); fetch it again"
            ) from error
        self._files.append(_File(path, status.st_size, status.st_mtime_ns, metadata, leaf, names))
        return labels, paths

    def _list_groups(self, path: str, metadata: pq.FileMetaData) -> int:
        """Add the row groups of the next file to `_groups`; returns how many rows they have."""
        rows, start = 0, sum(file.metadata.num_rows for file in self._files)
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            # The size of the row group, not that of its image column: where a column's statistics are damaged, asking
            # pyarrow for the column ends the whole process.
            size = max(group.total_byte_size, 0)
            self._groups.append(_RowGroup(len(self._files), number, start + rows, rows, group.num_rows, size))
            if group.num_rows < 0:
                raise SourceError(
                    f"{path}: row group {number} announces {group.num_rows} rows; it is damaged, fetch it again"
                )
            rows += group.num_rows
        return rows

    @staticmethod
    def _leaves(field: pa.Field, path: str) -> tuple[str, str | None]:
        """Leaf columns of the image's bytes and of its path; None without a path."""

        def binary(kind: pa.DataType) -> bool:
            return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)

        if binary(field.type):
            return field.name, None
        if pa.types.is_struct(field.type):
            parts = {part.name: part.type for part in field.type}
            if binary(parts.get("bytes", pa.null())):
                kind = parts.get("path", pa.null())
                has_path = pa.types.is_string(kind) or pa.types.is_large_string(kind)
                return f"{field.name}.bytes", f"{field.name}.path" if has_path else None
        raise SourceError(
            f"{path}: column {field.name!r} is {field.type}, not bytes or a struct with bytes; choose with"
            " --image-column"
        )

    @staticmethod
    def _labels(column: pa.ChunkedArray, path: str) -> np.ndarray | list[str | None]:
        """A label column as int64 [n] with -1 for null, or as texts."""
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if pa.types.is_integer(kind):
            labels = column.cast(pa.int64())
            if labels.null_count < len(labels) and pc.min(labels).as_py() < 0:
                row = int(np.argmax(labels.fill_null(0).to_numpy() < 0))
                raise SourceError(
                    f"{path} row {row}: label {labels[row].as_py()} is below 0 (a test set has none); name files with"
                    " labels"
                )
            return labels.fill_null(-1).to_numpy()
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return column.to_pylist()
        raise SourceError(
            f"{path}: the label column is {column.type}, neither whole numbers nor texts; choose with --label-column"
        )

    def _class_names(self, wanted: list[str] | None) -> list[str] | None:
        """The class names, the same in all files, or `wanted` in their place; None where there are none."""
        first = self._files[0]
        for file in self._files:
            if file.class_names != first.class_names:
                raise SourceError(
                    f"{first.path} and {file.path}: have different class names; convert them apart, or make them agree"
                )
        if wanted is not None and first.class_names is not None and len(wanted) != len(first.class_names):
            raise SourceError(
                f"{first.path}: has {len(first.class_names)} classes, --class-names {len(wanted)}; name as many"
            )
        return wanted or first.class_names or names_beside(first.path)

    def _number_labels(self, labels: np.ndarray, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
        """Labels and class names from whole numbers."""
        limit = MAX_CLASSES if names is None else len(names)
        if labels.max(initial=-1) >= limit:
            i = int(np.argmax(labels >= limit))
            raise SourceError(f"{self.origin(i)}: label {labels[i]} is not below {limit}, the number of classes")
        return labels, [str(label) for label in range(labels.max(initial=-1) + 1)] if names is None else names

    def _text_labels(self, texts: list[str | None], names: list[str] | None) -> tuple[np.ndarray, list[str]]:
        """Labels, -1 for null, and class names from texts."""
        given = [i for i, text in enumerate(texts) if text is not None]
        labels = np.full(len(texts), -1, np.int64)
        labels[given], names = label_classes([texts[i] for i in given], names, lambda i: self.origin(given[i]))
        return labels, names

    def _name(self, paths: list[list[str | None]]) -> list[str]:
        """The ids that the class describes, from the image paths of every file."""
        present = [path for part in paths for path in part if path]
        matches = [_HUB_IMAGENET.fullmatch(path) for path in present]
        if present and all(matches):
            shorter = iter([f"{match.group(2)}/{match.group(1)}{match.group(3)}" for match in matches])
            paths = [[next(shorter) if path else None for path in part] for part in paths]
        counts = Counter(path for part in paths for path in part)
        ids = []
        for file, part in zip(self._files, paths, strict=True):
            stem = Path(file.path).stem
            for row, path in enumerate(part):
                ids.append(f"{stem}/{row}" if not path else path if counts[path] == 1 else f"{stem}/{row}/{path}")
        return ids

    def _group_of(self, i: int) -> int:
        """Index in `_groups` of the row group that holds sample i."""
        if not 0 <= i < len(self.labels):
            raise IndexError(f"sample {i}: there are {len(self.labels)}")
        return bisect.bisect_right(self._starts, i) - 1

    def origin(self, i: int) -> str:
        group = self._groups[bisect.bisect_right(self._starts, i) - 1]
        return f"{self._files[group.file].path} row {i - group.start + group.first_row}"

    @property
    def stamps(self) -> np.ndarray:
        """Size and modification time (ns) of the sample's file; the sample's row in it."""
        counts = [file.metadata.num_rows for file in self._files]
        files = np.repeat([(file.size, file.mtime) for file in self._files], counts, axis=0)
        return np.column_stack((files, np.concatenate([np.arange(count) for count in counts])))

    def order(self, seed: int | None) -> np.ndarray:
        """As listed for None. With a seed: row groups in random order, rows shuffled within windows of row groups.

        A window has as many row groups as fill half of `cache_bytes` (256 MB: some 2,000 ImageNet photos), so that each
        row group is decoded only once. Where files are sorted by class, this mixes less than a full permutation does.
        """
        if seed is None:
            return np.arange(len(self.ids))
        random = np.random.Generator(np.random.PCG64(seed))
        bounds = [*self._starts, len(self.ids)]
        order: list[np.ndarray] = []
        window: list[np.ndarray] = []
        size = 0

        def flush() -> None:
            if window:
                order.append(random.permutation(np.concatenate(window)))
                window.clear()

        for g in random.permutation(len(self._groups)).tolist():
            if size + self._groups[g].bytes > self.cache_bytes // 2:
                flush()
                size = 0
            window.append(np.arange(bounds[g], bounds[g + 1]))
            size += self._groups[g].bytes
        flush()
        return np.concatenate(order)

    def read(self, i: int) -> bytes:
        """Bytes of image i. Thread-safe.

        Raises SourceChanged when the file has changed or is gone, SourceError when the row group is damaged or the row
        has no label or no bytes, OSError when reading failed; a later read tries again.
        """
        g = self._group_of(i)
        row = i - self._groups[g].start
        images = self._decoded(g, row)
        if self.labels[i] < 0:
            raise SourceError(f"{self.origin(i)}: has no label (null)")
        if not images.valid[row]:
            raise SourceError(
                f"{self.origin(i)}: has no image bytes (null); embed the images when writing the parquet files"
            )
        return bytes(images.data[images.offsets[row] : images.offsets[row + 1]])

    def _decoded(self, g: int, row: int) -> _Images:
        """Row group g, to read this row of it. One thread decodes it; others that want it meanwhile wait."""
        while True:
            with self._lock:
                future = self._cache.get(g)
                mine = future is None
                if mine:
                    future = self._cache[g] = Future()
                    self._evict()
                else:
                    self._cache.move_to_end(g)
            if mine:
                images = self._fill(g, future)
            else:
                try:
                    images = future.result()
                except Exception:  # another thread's attempt failed; this thread's may succeed
                    continue
            with self._lock:
                images.unread.discard(row)
                if not images.unread and self._cache.get(g) is future:
                    del self._cache[g]
            return images

    def _fill(self, g: int, future: Future[_Images]) -> _Images:
        """Decode row group g for all threads that wait for `future`. A failed attempt does not stay in the cache."""
        try:
            images = self._decode_again(g)
        except BaseException as error:
            with self._lock:
                if self._cache.get(g) is future:
                    del self._cache[g]
            future.set_exception(error)
            raise
        with self._lock:
            # The footer may state fewer bytes than the row group holds.
            self._sizes[g] = max(self._sizes[g], len(images.data))
            self._evict()
        future.set_result(images)
        return images

    def _decode_again(self, g: int) -> _Images:
        """`_decode`, and a second time where it fails: a passing error, as on network mounts, must cost no sample.

        Damage that both attempts meet is remembered as text. Otherwise each of some 1,000 rows would decode the row
        group again.
        """
        if g in self._damaged:
            raise SourceError(self._damaged[g])
        try:
            return self._decode(self._groups[g])
        except SourceChanged:
            raise
        except (SourceError, OSError):
            pass
        try:
            return self._decode(self._groups[g])
        except SourceChanged:
            raise
        except SourceError as error:
            self._damaged[g] = str(error)
            raise

    def _evict(self) -> None:
        """Drop the row groups unused for longest until the rest fits `cache_bytes`, but keep two. Needs the lock."""
        size = sum(self._sizes[kept] for kept in self._cache)
        while len(self._cache) > 2 and size > self.cache_bytes:
            size -= self._sizes[self._cache.popitem(last=False)[0]]

    def _decode(self, group: _RowGroup) -> _Images:
        """Read and decode a row group.

        Raises SourceChanged, SourceError for damage, and OSError for errors of the machine, with the file's name.
        """
        file = self._files[group.file]
        try:
            self._check_unchanged(file)
            with pq.ParquetFile(file.path, metadata=file.metadata, page_checksum_verification=True) as parquet:
                chunks = parquet.read_row_group(group.number, columns=[file.leaf], use_threads=False).column(0).chunks
            if file.leaf.endswith(".bytes") and pa.types.is_struct(chunks[0].type):
                chunks = [pc.struct_field(chunk, "bytes") for chunk in chunks]
            chunks = [chunk.cast(pa.large_binary()) for chunk in chunks]
            column = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)  # more than 2 GiB come in several
            if len(column) != group.rows:
                raise SourceError(
                    f"{file.path}: row group {group.number} holds {len(column)} of {group.rows} rows; fetch it again"
                )
        except (SourceError, MemoryError):  # ArrowMemoryError is both a MemoryError and an ArrowException: no damage
            raise
        except (*_DAMAGE, IndexError) as error:  # IndexError: no chunk at all
            if isinstance(error, OSError) and error.errno is not None:
                raise OSError(error.errno, f"{file.path}: row group {group.number} cannot be read ({error})") from error
            self._check_unchanged(file)  # where the file was replaced meanwhile, its bytes look like damage
            raise SourceError(
                f"{file.path}: row group {group.number} is damaged ({error}); fetch the file again"
            ) from error
        _, offsets, data = column.buffers()
        ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1].tolist()
        view = memoryview(data if data is not None else b"")
        return _Images(view, ends, column.is_valid().to_pylist(), set(range(group.rows)))

    @staticmethod
    def _check_unchanged(file: _File) -> None:
        """Raise SourceChanged when the file is gone or has changed, OSError when the machine cannot tell."""
        try:
            status = os.stat(file.path)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            message = f"{file.path}: can no longer be opened ({error.strerror}); run again when it is back"
            raise SourceChanged(message) from error
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime):
            raise SourceChanged(f"{file.path}: has changed since it was listed; run again once nobody changes it")

    def release(self, but_for: int | None = None) -> None:
        with self._lock:
            for g in self._cache.keys() - ({self._group_of(but_for)} if but_for is not None else set()):
                del self._cache[g]
        pa.default_memory_pool().release_unused()  # pyarrow keeps freed memory otherwise

    def close(self) -> None:
        self.release()  # no file stays open between two reads
