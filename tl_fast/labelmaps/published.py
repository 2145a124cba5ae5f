"""Reads label maps in the published format: one .pt file an image, in class folders, unpacked or still in an archive.

A file holds one tensor `[2, k, H, W]`: the annotator's k best logits of every cell, and their classes. The logits are
kept as they are, not relative to the cell's tail as in our own maps (`format.top_k_relative`): a class that is not
listed counts as logit 0, as it does in the published training code. `tl_fast.labelmaps.pt_file` reads one file.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from tl_fast.labelmaps import zip_header
from tl_fast.labelmaps.format import EXTENTS, LabelMapError, MapSpec, pack
from tl_fast.labelmaps.matching import match_maps
from tl_fast.labelmaps.store import LabelMapStore
from tl_fast.sources.source import SourceError, read_listed
from tl_fast.sources.tar import Tar, pread

SAMPLED = 32  # maps that are read to find the shape
MAX_BYTES = 64 << 20  # of one .pt file; the published ones have 7 KB
NEEDS_EXTENT = (
    "not a label-map store (no manifest.json). If it holds published label maps, say what they cover, extent (--extent)"
    " full or center_square: the files don't, the published generator script crops the image's centre square, and"
    " whether the released maps were made that way is not documented"
)


class _Files(Protocol):
    """A folder or archive of n .pt files. names: their paths inside, posix. ignored: number of other files. stamps:
    int64 [n, 2 or 4], see `PublishedMaps`.
    """

    names: list[str]
    ignored: int
    stamps: np.ndarray

    def read(self, j: int) -> bytes:
        """Thread-safe. Raises OSError, or ValueError saying what is wrong."""
        ...

    def close(self) -> None: ...


def _is_map(name: str) -> bool:
    """Whether a path is that of a label map. What macOS adds to archives ('__MACOSX/a/._b.pt') is none."""
    return name.endswith(".pt") and not name.startswith("__MACOSX/") and not name.rpartition("/")[2].startswith(".")


class _Folder:
    def __init__(self, root: str) -> None:
        self.root, self.names, self.ignored = root, [], 0
        stamps: list[tuple[int, int]] = []
        for name, entry in self._walk(root, ""):
            if _is_map(name):
                status = entry.stat()
                self.names.append(name)
                stamps.append((status.st_size, status.st_mtime_ns))
            else:
                self.ignored += 1
        self.stamps = np.array(stamps, np.int64).reshape(-1, 2)

    def _walk(self, folder: str, prefix: str) -> Iterator[tuple[str, os.DirEntry]]:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            if entry.is_dir():
                yield from self._walk(entry.path, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry

    def read(self, j: int) -> bytes:
        size = int(self.stamps[j, 0])
        if size > MAX_BYTES:
            raise ValueError(f"has more than {MAX_BYTES >> 20} MiB")
        return read_listed(f"{self.root}/{self.names[j]}", size)

    def close(self) -> None:
        pass


class _Zip:
    """Python's zipfile lists the members. They are read here, stored or deflated: zipfile reads under a lock."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(self.file)
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                # .pt files are zips too: in an archive that is cut off, zipfile takes the last whole one for it.
                if members and min(info.header_offset for info in members):
                    raise zipfile.BadZipFile("its directory is missing, it is cut off; download or copy the file again")
                members = [info for info in members if not info.is_dir()]
            maps = [info for info in members if _is_map(info.filename)]
        except BaseException:
            self.close()
            raise
        self.names, self.ignored = [info.filename for info in maps], len(members) - len(maps)
        rows = [(i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type, i.flag_bits & 1) for i in maps]
        self.rows = np.array(rows, np.int64).reshape(-1, 6)
        self.stamps = _archive_stamps(status.st_size, status.st_mtime_ns, self.rows[:, :2])

    def read(self, j: int) -> bytes:
        offset, stored, size, crc, method, encrypted = self.rows[j].tolist()
        if encrypted or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"is {'encrypted' if encrypted else f'compressed by method {method}'}; unpack the archive")
        if max(stored, size) > MAX_BYTES:
            raise ValueError(f"has more than {MAX_BYTES >> 20} MiB")
        start = zip_header.data_start(os.pread(self.file, zip_header.SIZE, offset), offset)
        data = pread(self.file, stored, start) if start is not None else b""
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise ValueError(f"is damaged ({error})") from error
        if start is None or len(data) != size or zlib.crc32(data) != crc:
            raise ValueError("is damaged: its bytes are not those that the archive's directory lists")
        return data

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None


class _Tar:
    def __init__(self, path: str) -> None:
        self.tar = Tar(path)
        self.names, self.ignored, rows = [], 0, []
        try:
            for member in self.tar.members():
                if member.kind == "file" and _is_map(member.name):
                    self.names.append(member.name)
                    rows.append((member.offset, member.size))
                else:
                    self.ignored += member.kind != "folder"
        except BaseException:
            self.close()
            raise
        self.rows = np.array(rows, np.int64).reshape(-1, 2)
        self.stamps = _archive_stamps(self.tar.size, self.tar.mtime, self.rows)

    def read(self, j: int) -> bytes:
        offset, size = self.rows[j].tolist()
        if size > MAX_BYTES:
            raise ValueError(f"has more than {MAX_BYTES >> 20} MiB")
        return self.tar.read(offset, size)

    def close(self) -> None:
        self.tar.close()


def _archive_stamps(size: int, mtime: int, rows: np.ndarray) -> np.ndarray:
    """An archive's size and modification time (ns) in front of each row."""
    return np.concatenate((np.broadcast_to(np.array([size, mtime], np.int64), (len(rows), 2)), rows), 1)


def _open_files(path: Path) -> _Files:
    """The .pt files of a folder, zip or tar. Raises LabelMapError for anything else."""
    try:
        if path.is_dir():
            return _Folder(str(path))
        with open(path, "rb") as file:
            start = file.read(4)
        return _Zip(str(path)) if start in (b"PK\3\4", b"PK\5\6") else _Tar(str(path))
    except (OSError, SourceError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        named = str(path) in str(error)
        raise LabelMapError(
            str(error) if named else f"{path}: cannot be read as a folder, zip or tar of label maps ({error})"
        ) from error


class PublishedMaps:
    """Published label maps, listed once, then read in any order from any thread.

    `spec`: the format of most maps, found from up to 32 maps spread over all of them. `class_names`: None, the format
    has none. `manifest`; `path`; `names` (paths of the .pt files); `rejects`: empty, the format does not list images
    that annotation left out; `ignored` (number of other files); `stamps` int64 `[n, 2]`: size and mtime (ns) of each
    file, or `[n, 4]`: of the archive, then two numbers that say where in it the map is.
    extent: `full` or `center_square`, required. num_classes: C, of the data set.
    Raises LabelMapError when there are no maps in `path`, or none that can be read.
    """

    def __init__(self, path: Path | str, *, extent: str | None, num_classes: int) -> None:
        self.path = Path(path)
        if extent not in EXTENTS:
            raise LabelMapError(
                f"{self.path}: {f'extent is {extent!r}' if extent is not None else NEEDS_EXTENT}; must be one of"
                f" {EXTENTS}"
            )
        # Imported here: torch takes seconds to import, and a conversion with a store does without it.
        from tl_fast.labelmaps.pt_file import PtReader

        self._files, self._reader = _open_files(self.path), PtReader(num_classes)
        self.names, self.ignored, self.stamps = self._files.names, self._files.ignored, self._files.stamps
        self.class_names: list[str] | None = None
        self.rejects: dict[int, str] = {}
        try:
            self.spec = self._find_spec(extent, num_classes)
        except BaseException:
            self.close()
            raise
        self.manifest: dict[str, Any] = {
            "model": "published maps",
            "source": self.path.resolve().name,
            "format": "one .pt an image, [2, k, H, W]: raw logits, classes",
            "scores": "logits as published, classes not listed count as 0",
            "spec": self.spec.to_dict(),
            "exif": "ignore",
        }

    def _find_spec(self, extent: str, num_classes: int) -> MapSpec:
        if not self.names:
            raise LabelMapError(
                f"{self.path}: no .pt files in it ({self.ignored} others); give the folder, zip or tar of the label"
                " maps, or a store that tl_fast.annotate made"
            )
        shapes: Counter[tuple[int, ...]] = Counter()
        problem = None
        for j in np.unique(np.linspace(0, len(self.names) - 1, SAMPLED).astype(np.int64)).tolist():
            try:
                shapes[self._read(j).shape] += 1
            except LabelMapError as error:
                problem = problem or error
        if not shapes:
            raise LabelMapError(
                f"{self.path}: none of {min(SAMPLED, len(self.names))} maps spread over it can be read; first {problem}"
            )
        _, k, height, width = shapes.most_common(1)[0][0]
        try:
            return MapSpec(k, height, width, num_classes, extent)
        except LabelMapError as error:
            raise LabelMapError(f"{self.path}: {error}") from error

    def _read(self, j: int) -> np.ndarray:
        try:
            return self._reader.read(self._files.read(j))
        except (OSError, ValueError) as error:
            named = str(error).startswith(self.origin(j))
            raise LabelMapError(str(error) if named else f"{self.origin(j)}: {error}") from error

    def __len__(self) -> int:
        return len(self.names)

    def origin(self, j: int) -> str:
        """How messages call map j: its path, or archive and member."""
        return f"{self.path}{'/' if isinstance(self._files, _Folder) else ':'}{self.names[j]}"

    def locate(self, ids: Sequence[str], class_names: Sequence[str], labels: np.ndarray) -> np.ndarray:
        """Index of each sample's map, int64 `[n]`, −1 where there is none; rules and errors: `matching.match_maps`."""
        return match_maps(self.names, ids, class_names, labels, self.origin)

    def record(self, j: int) -> np.void:
        """Map j as a record of `spec.dtype`. Raises LabelMapError that names it and says what is wrong with it."""
        values = self._read(j)
        if values.shape[1:] != self.spec.shape:
            raise LabelMapError(f"{self.origin(j)}: has (k, H, W) = {values.shape[1:]}, most others {self.spec.shape}")
        try:
            return pack(values[1], values[0], self.spec)
        except LabelMapError as error:
            raise LabelMapError(f"{self.origin(j)}: {error}") from error

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_label_maps(path: Path | str, *, extent: str | None, num_classes: int) -> LabelMapStore | PublishedMaps:
    """Open a store that `tl_fast.annotate` made, or published maps: a folder tree, zip or tar of .pt files.

    extent: what published maps cover, required for them; for a store it must be None or what the store itself says.
    num_classes: C of the data set, by which published maps are checked; a store has its own in `spec`. Raises
    LabelMapError.
    """
    path = Path(path)
    # A folder with either file is a store. If it lacks the other, LabelMapStore says so.
    if not any((path / name).is_file() for name in ("manifest.json", "ids.jsonl")):
        return PublishedMaps(path, extent=extent, num_classes=num_classes)
    store = LabelMapStore(path)
    if extent not in (None, store.spec.extent):
        raise LabelMapError(
            f"{path}: extent {extent!r} was given, the store says its maps cover {store.spec.extent!r}; leave it out"
        )
    return store
