"""Checks a whole beton: every table, and of every sample its entry in the tables, its bytes, label map and mask."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tl_fast.beton.reader import BetonReader
from tl_fast.masks.format import compile_loops
from tl_fast.system.threads import ordered_map

VERIFY_CHUNK = 64  # samples per task; a task costs some 20 µs of its own


def _layout_problems(reader: BetonReader) -> list[str]:
    """Problems that our reader does not mind but ffcv or another reader may; no writer of ours makes them."""
    problems = []
    starts, sizes = reader._places(0, len(reader))
    ends = starts + sizes
    first_page, last_page = starts.min(axis=0) // reader.page_size, (ends.max(axis=0) - 1) // reader.page_size
    if len(crossing := np.flatnonzero(first_page != last_page)):
        problems.append(
            f"page_size: the data of {len(crossing)} samples, {reader._name(crossing[0])} first, lie in several pages"
            f" of {reader.page_size} bytes: stock ffcv would read them wrong; convert again"
        )
    # Each part of a sample has its own entry, which was checked when the file was opened. Are there more entries?
    if reader._allocations > starts.size:
        ptr, size, _ = reader._read_allocations()
        if len(unused := np.flatnonzero(~np.isin(ptr, reader._pointers()))):
            problems.append(
                f"allocation table: {len(unused)} entries with {size[unused].sum()} bytes, at {ptr[unused[0]]} first,"
                " are no sample's data; convert again"
            )
    del starts, sizes, ends, first_page, last_page  # the ids take much memory too
    if len(names := set(reader.source_ids)) < len(reader):
        seen: set[str] = set()
        again = next(i for i, name in enumerate(reader.source_ids) if name in seen or seen.add(name))
        problems.append(
            f"ids: {len(reader) - len(names)} samples have the id of another, {reader._name(again)} first; remove"
            " duplicates from the source and convert again"
        )
    return [f"{reader.path}: {problem}" for problem in problems]


def _read_block(reader: BetonReader, handle: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the bytes of samples first to last − 1 with as few calls as possible.

    Returns them, uint8, and where in them each JPEG, label map and mask begins, int64 `[parts, samples]`. Raises
    OSError, also where the file has become shorter.
    """
    starts, sizes = reader._places(first, last)
    low, high, total = int(starts.min()), int((starts + sizes).max()), int(sizes.sum())
    if high - low <= total + total // 4:  # side by side, as our writer puts them: one read with little waste
        pieces, offsets = [(low, high - low)], starts - low
    else:
        pieces = list(zip(starts.ravel().tolist(), sizes.ravel().tolist(), strict=True))
        offsets = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
    block, filled = np.empty(sum(size for _, size in pieces), np.uint8), 0
    for start, size in pieces:
        done = 0
        while done < size:  # one call reads 2 GiB at most
            count = os.preadv(handle, [block[filled + done : filled + size]], start + done)
            if count == 0:
                raise OSError(f"it ends {size - done} bytes early: it has been shortened")
            done += count
        filled += size
    return block, offsets


def verify(
    path: Path | str, decode: bool = False, workers: int = 1, progress: Callable[[int], None] | None = None
) -> list[str]:
    """Check a whole file; returns the problems, each beginning with file and field.

    Checked are every table, every label map and mask, and of every sample its entry in the tables, its CRC-32 (in files
    of ours) and the size in its JPEG's header; with `decode` every JPEG's coded data too. progress: called with the
    number of samples done. Raises BetonError where the tables are damaged, because they do not tell then where samples
    are.
    """

    def problems_of(first: int) -> list[str]:
        last = min(first + VERIFY_CHUNK, len(reader))
        try:
            block, starts = _read_block(reader, file.fileno(), first, last)
            return reader._problems(first, block, starts, decode)
        except OSError:  # find out which samples cannot be read
            sample_problems = []
            for i in range(first, last):
                try:
                    block, starts = _read_block(reader, file.fileno(), i, i + 1)
                    sample_problems += reader._problems(i, block, starts, decode)
                except OSError as error:
                    sample_problems.append(
                        f"{reader.path}: image: {reader._name(i)} cannot be read ({error}); check the disk, copy the"
                        " file anew"
                    )
            return sample_problems

    with BetonReader(path) as reader, open(path, "rb") as file:
        problems = _layout_problems(reader)
        reader._metadata = reader._metadata.copy()  # from here on nothing is read through the mapping
        if reader.spec is not None:
            # Compile now: threads that compile at once hinder one another (`tl_fast.convert.image.compile_kernels`).
            reader._expand(np.zeros(0, np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64))
        if reader.mask_spec is not None:
            compile_loops()
        chunks = ordered_map(workers, problems_of, range(0, len(reader), VERIFY_CHUNK))
        for chunk, chunk_problems in enumerate(chunks, 1):
            problems += chunk_problems
            if progress is not None:
                progress(min(chunk * VERIFY_CHUNK, len(reader)))
    return problems
