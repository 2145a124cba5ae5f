"""A large file under construction: a kill or a power cut loses no more than its last seconds.

The file grows as `.NAME.partial` and takes its final name when it is whole. Beside it `.NAME.journal` says how much of
the file is known to be on the disk: the bytes are synced first, then a record is appended and synced. A record is

    magic 8 bytes, size of its JSON head u32, size of its data u64, CRC-32 of head and data u32, head, data

and a torn record at the end does not count. The first record holds the settings that the bytes depend on, the others
hold what the writer needs to go on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from tl_fast.beton.layout import BetonError
from tl_fast.convert.block_writer import write_all
from tl_fast.system.atomic import replace_synced
from tl_fast.system.crc import crc32

MAGIC = b"tlf_jrn1"
RECORD = struct.Struct("<8sIQI")


class PartialFile:
    """`handle`: the file descriptor to write to. `records`: (head, data) of every commit of the run that is being
    resumed, oldest first.

    settings: JSON-able; a resumed run must have the same. resume: go on from what an earlier run left, if it left
    anything; without it, that is dropped. Leaving the `with` block without `publish` keeps the file if there was a
    commit, and removes it if there was none.
    Raises BetonError when another process is writing the file, or the settings differ.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool = False) -> None:
        self.path = path
        self.partial, self._journal_path = partial_paths(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.handle = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._journal = -1
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        try:
            self._lock()
            self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            records = self._read_journal() if resume else []
            if records:
                self._compare(records[0][0], settings)
            self.records = records[1:]
            self._commits = len(self.records)
            os.ftruncate(self._journal, self._journal_size if records else 0)
            os.ftruncate(self.handle, self.records[-1][0]["size"] if self.records else 0)
            if not records:
                self._journal_size = 0
                self._append(settings, b"")
        except BaseException:
            self._close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks.
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise BetonError(
                    f"{self.path}: another process is writing it (it holds {self.partial}); wait for it or stop it"
                ) from error
        # The other process may have ended, and renamed the file, between our open and our lock.
        if not self.partial.exists() or os.fstat(self.handle).st_ino != self.partial.stat().st_ino:
            raise BetonError(
                f"{self.path}: another process has just written it; run again with --overwrite to replace it"
            )

    def _read_journal(self) -> list[tuple[dict[str, Any], bytes]]:
        """Every whole record whose bytes the partial file has; `_journal_size` is where the last one ends."""
        self._journal_size, limit = 0, os.fstat(self._journal).st_size
        size, records = os.fstat(self.handle).st_size, []
        while self._journal_size + RECORD.size <= limit:
            magic, head_size, data_size, crc = RECORD.unpack(os.pread(self._journal, RECORD.size, self._journal_size))
            end = self._journal_size + RECORD.size + head_size + data_size
            if magic != MAGIC or end > limit:
                break
            text = os.pread(self._journal, head_size + data_size, self._journal_size + RECORD.size)
            if crc32(text) != crc:
                break
            head = json.loads(text[:head_size])
            if records and head["size"] > size:
                break
            records.append((head, text[head_size:]))
            self._journal_size = end
        return records

    def _compare(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        ours = json.loads(json.dumps(ours))
        if different := sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)):
            key = different[0]
            values = " and now ".join(f"{str(value.get(key)):.100}" for value in (theirs, ours))
            raise BetonError(
                f"{self.path}: cannot be resumed, the unfinished run had other settings ({', '.join(different)}); {key}"
                f" was {values}. Give the same ones, or leave --resume out to start over"
            )

    def _append(self, head: dict[str, Any], data: bytes) -> None:
        text = json.dumps(head).encode("ascii")
        crc = crc32(data, crc32(text))
        record = b"".join((RECORD.pack(MAGIC, len(text), len(data), crc), text, data))
        try:
            write_all(self._journal, record, self._journal_size)
            os.fdatasync(self._journal)
        except OSError:
            os.ftruncate(self._journal, self._journal_size)
            raise
        self._journal_size += len(record)

    @property
    def committing(self) -> bool:
        """True while the last commit is on its way to the disk. Raises the OSError that it ended with."""
        if self._pending is not None and self._pending.done():
            pending, self._pending = self._pending, None
            pending.result()
        return self._pending is not None

    def commit(self, size: int, head: dict[str, Any], data: bytes) -> None:
        """Let a background thread make the file's first `size` bytes and then the record durable, in order with earlier
        commits."""

        def run(before: Future | None = self._pending) -> None:
            if before is not None:
                before.result()  # a record is worthless without the one before it
            os.fdatasync(self.handle)
            self._append({**head, "size": size}, data)
            self._commits += 1

        self._pending = self._pool.submit(run)

    def wait(self) -> None:
        """Wait until the last commit is on the disk. Raises OSError if it did not get there."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def publish(self) -> None:
        """Give the file its final name, with everything on the disk."""
        with contextlib.suppress(OSError):  # the sync below counts, not an earlier commit
            self.wait()
        os.fsync(self.handle)
        replace_synced(self.partial, self.path)
        self._journal_path.unlink(missing_ok=True)

    @property
    def resumable(self) -> bool:
        """True when something is committed that another run can go on from."""
        with contextlib.suppress(OSError):
            self.wait()
        return self._commits > 0

    def _close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for handle in (self.handle, self._journal):
            if handle >= 0:
                os.close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if self.partial.exists() and not self.resumable:
                self.partial.unlink(missing_ok=True)
                self._journal_path.unlink(missing_ok=True)
        finally:
            self._close()


def partial_paths(path: Path) -> tuple[Path, Path]:
    """Where `PartialFile(path)` keeps the file and its journal."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.journal")
