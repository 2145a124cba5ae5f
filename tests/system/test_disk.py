"""Reading ahead from a disk, as the operating system counts it."""

import ctypes
import mmap
import os

import numpy as np
import pytest

from tl_fast.system import disk

PAGES = 64


def mapped(path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A new file, mapped, that is not in the page cache; its pages' addresses and sizes."""
    with open(path, "wb+") as file:
        file.write(os.urandom(PAGES * mmap.PAGESIZE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    memory.madvise(mmap.MADV_RANDOM)  # so that a fault reads its page alone
    data = np.frombuffer(memory, np.uint8)
    starts = data.ctypes.data + mmap.PAGESIZE * np.arange(PAGES)
    return data, starts, np.full(PAGES, mmap.PAGESIZE)


def faults_of_reading(data: np.ndarray) -> int:
    before = disk.disk_reads()[0]
    data[:: mmap.PAGESIZE].sum()
    return disk.disk_reads()[0] - before


def test_no_fault_waits_for_a_disk_that_was_told_before(tmp_path):
    plain, *_ = mapped(tmp_path / "plain")
    if faults_of_reading(plain) < PAGES // 2:
        pytest.skip(f"{tmp_path} is not on a disk, or its file system keeps pages that it is told to drop")
    data, starts, sizes = mapped(tmp_path / "told")
    before = disk.disk_reads()[1]
    disk.will_need(starts + 100, sizes - 200)  # parts of pages
    assert faults_of_reading(data) <= 2  # but for other threads' of this process
    blocks = disk.disk_reads()[1] - before
    assert blocks == 0 or blocks >= data.size // 512  # not every file system counts them


def test_a_span_that_is_not_mapped_is_a_mistake():
    with pytest.raises(OSError, match="madvise of 4096 bytes from address 0x1000"):
        disk.will_need(np.array([4096]), np.array([4096]))


def test_a_system_without_the_call_or_that_refuses_it_is_left_alone(monkeypatch):
    nowhere = np.array([4096]), np.array([4096])
    monkeypatch.setattr(disk, "_madvise", lambda: None)
    disk.will_need(*nowhere)

    def refuse(*_: int) -> int:
        ctypes.set_errno(1)  # EPERM
        return -1

    monkeypatch.setattr(disk, "_madvise", lambda: refuse)
    disk.will_need(*nowhere)
