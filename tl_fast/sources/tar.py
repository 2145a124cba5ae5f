"""Members of a tar file without unpacking: listed once (headers only), then read at their offsets from any thread."""

from __future__ import annotations

import os
import struct
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from tl_fast.sources.source import SourceChanged, SourceError

_BLOCK = tarfile.BLOCKSIZE


_MAX_EXTENSION = 1 << 20  # bytes of a long name or of pax records; real ones have some hundred


_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


# What tarfile raises on damaged headers, besides its own errors; RecursionError: long names of long names of ...
_DAMAGE = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError, struct.error)


class Member(NamedTuple):
    """An archive member. name: without './' in front. offset, size: of its data in the file, in bytes, checked to lie
    inside.

    kind: 'file', 'folder', or 'link', 'sparse file', 'device' for what can't be read in place.
    """

    name: str
    offset: int
    size: int
    kind: str


class _Window:
    """The part of an open file that ends at `end`, as a file object for tarfile, which may ask for as much as a header
    claims."""

    def __init__(self, file: int, position: int, end: int) -> None:
        self.file, self.position, self.end = file, position, end

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        self.position = position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_EXTENSION or self.position < 0:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        data = os.pread(self.file, min(size, max(self.end - self.position, 0)), self.position)
        self.position += len(data)
        return data


class Tar:
    """A tar file, open until it is closed. path; size in bytes, mtime in ns, both when it was opened."""

    def __init__(self, path: str) -> None:
        self.path, self.file = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self.file)
        self.size, self.mtime = status.st_size, status.st_mtime_ns

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def members(self, archive: str | None = None, start: int = 0, size: int | None = None) -> Iterator[Member]:
        """Members of the tar, or of the tar `archive` that lies in it as `size` bytes at `start`.

        Raises SourceError naming file and member for what is cut off, damaged, compressed or reaches beyond the
        archive.
        """
        end = self.size if size is None else start + size
        where = self.path if archive is None else f"{self.path}:{archive}"
        last = "its first header"

        def damaged(what: str) -> SourceError:
            return SourceError(f"{where}: {what}; download or copy the file again")

        position, extended, slow = start, None, False
        while True:
            header = os.pread(self.file, min(_BLOCK, end - position), position)
            if len(header) < _BLOCK:
                raise damaged(
                    f"is cut off after {position - start + len(header)} bytes, behind {last}: a tar ends with a mark"
                )
            if not any(header):
                tail = os.pread(self.file, min(_MAX_EXTENSION, end - position), position)
                if tail.strip(b"\0"):
                    raise SourceError(
                        f"{where}: more data follow the tar's end behind {last} (tars joined by cat?); split or"
                        " repack it"
                    )
                return
            # The headers of nearly all tars are plain: reading those here is five times as fast as tarfile, which gets
            # the others.
            name = b"" if slow else header[:100].rstrip(b"\0")
            digits = header[124:135]
            if (
                name
                and header[156] in b"0\0"
                and not header[345]
                and b"\0" not in name
                and name[-1] != 0x2F
                and not digits.strip(b"01234567")
                and header[135] in b" \0"
                and _sum_is_right(header)
            ):
                member_name, length, kind, data = (
                    name.decode("utf-8", "surrogateescape"),
                    int(digits, 8),
                    "file",
                    position + _BLOCK,
                )
            else:
                if position == start and (
                    packed := next((kind for magic, kind in _MAGIC.items() if header.startswith(magic)), None)
                ):
                    raise SourceError(
                        f"{where}: is {packed}, nothing in it can be read without all before it; decompress or"
                        " unpack it"
                    )
                try:
                    if extended is None:
                        window = _Window(self.file, position, end)
                        extended = tarfile.TarFile(fileobj=window, encoding="utf-8", errors="surrogateescape")
                        info = extended.firstmember
                    else:
                        extended.firstmember = None
                        window.position = extended.offset = position
                        info = extended.next()
                except _DAMAGE as error:
                    raise damaged(
                        f"the header behind {last} (at byte {position - start}) is damaged ({error})"
                    ) from error
                if info is None:
                    raise damaged(f"the header behind {last} (at byte {position - start}) is damaged")
                extended.members.clear()  # tarfile would keep them all
                slow = bool(extended.pax_headers)  # records for all later members
                member_name, length, data, kind = info.name, info.size, info.offset_data, _kind(info)
                if kind != "file":
                    length = max(extended.offset - data, 0)
            while member_name.startswith("./"):
                member_name = member_name[2:]
            if length < 0 or not position < data or data + length > end:
                raise damaged(
                    f"{member_name!a} is cut off: {length} bytes at byte {data - start}, the archive has {end - start}"
                )
            position = data + -(-length // _BLOCK) * _BLOCK
            if position > end:
                raise damaged(f"is cut off behind {member_name!a}: a tar ends with a mark")
            last = ascii(member_name)
            yield Member(member_name, data, length, kind)

    def read(self, offset: int, size: int) -> bytes:
        """Thread-safe. Raises SourceChanged when the file is another or shorter, OSError when it is gone."""
        if self.file is not None:
            data = pread(self.file, size, offset)
        else:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                status = os.fstat(file)
                if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime):
                    message = f"{self.path}: has changed since it was listed; run again once nobody changes it"
                    raise SourceChanged(message)
                data = pread(file, size, offset)
            finally:
                os.close(file)
        if len(data) != size:
            raise SourceChanged(
                f"{self.path}: is shorter than the {self.size} bytes it was listed with; run again with the whole file"
            )
        return data


def pread(file: int, size: int, offset: int) -> bytes:
    """`os.pread` until `size` bytes are there or the file ends: network file systems may answer in pieces."""
    data = os.pread(file, size, offset)
    while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
        data += more
    return data


def _sum_is_right(header: bytes) -> bool:
    """The checksum is the sum of the header's bytes with its own 8 as spaces, in octal."""
    stated = header[148:156].strip(b" \0")
    total = (
        sum(header.translate(None, b"\0")) - sum(header[148:156]) + 256
    )  # of three quarters zeros, quicker without them
    return bool(stated) and not stated.strip(b"01234567") and total == int(stated, 8)


def _kind(info: tarfile.TarInfo) -> str:
    if info.issparse():
        return "sparse file"
    if info.isfile():
        return "file"
    return "folder" if info.isdir() else "link" if info.islnk() or info.issym() else "device"
