"""Asks the operating system to read mapped files ahead, and whether this process reads from a disk at all."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import resource
from collections.abc import Callable

import numpy as np


def will_need(addresses: np.ndarray, sizes: np.ndarray) -> None:
    """Let the operating system begin to read mapped bytes from the disk, without waiting for them.

    addresses, sizes: int64 [n], of spans of mapped files, sizes at least 1. A span of 30 KB that is in the page cache
    takes about 1.5 µs. It is a hint: where there is no such call, or the system refuses it, nothing happens. Raises
    OSError for a span that is not mapped, which is a mistake in the caller.

    `os.posix_fadvise` would need a second descriptor for every open file. `mmap.madvise` holds Python's interpreter
    lock, even while it waits for a disk that has enough to do.
    """
    madvise = _madvise()
    if madvise is None:
        return
    starts = addresses // mmap.PAGESIZE * mmap.PAGESIZE
    for start, size in zip(starts.tolist(), (addresses + sizes - starts).tolist(), strict=True):
        if madvise(start, size, mmap.MADV_WILLNEED) and ctypes.get_errno() in (errno.EINVAL, errno.ENOMEM):
            number = ctypes.get_errno()
            raise OSError(number, f"madvise of {size} bytes from address {start:#x}: {os.strerror(number)}")


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's call, which releases the interpreter lock; None where there is none."""
    madvise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
    if madvise is None or not hasattr(mmap, "MADV_WILLNEED"):
        return None
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


def disk_reads() -> tuple[int, int]:
    """What this process, with all its threads, has read from disks so far: page faults that waited for one (major
    faults), and blocks of 512 bytes.

    A page that `will_need` asked for causes no such fault, even where it is waited for, but counts as blocks. Blocks
    stay 0 where the file system does not count them, as some over networks and the kernels of some other systems.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_majflt, usage.ru_inblock
