"""Tells the operating system which bytes of the betons a batch needs as soon as it is planned, where they come from a
disk.

Betons are memory-mapped. Where their pages are not in the page cache, each thread would wait for one page fault after
the other, and at each of them the system would read as much around it as is set for the disk, needed or not.
"""

from __future__ import annotations

import numpy as np

from tl_fast.jpeg.planes import chroma_size
from tl_fast.maths import scalar
from tl_fast.pipeline.batch import BatchPlan
from tl_fast.pipeline.planner import BatchPlanner
from tl_fast.system.disk import disk_reads, will_need

GOES_ON = 32  # batches that are announced after a sign that a disk is read


class ReadAhead:
    """Plans batches, and announces the bytes that they are made from.

    planner: whose batches they are.
    check: whether whole images are read, for their CRC-32.

    Announcing an image whose bytes are in the page cache takes about 5 µs of the loader's thread, and costs a loader of
    planes on two cores a fifth of its rate. So batches are announced only while this process reads from a disk, which
    one system call a batch says: the first `GOES_ON` batches after a read (`disk_reads`), and so all of an epoch whose
    pages are not in the cache. Both numbers are looked at: where the file system counts no blocks, one batch in
    `GOES_ON` + 1 goes unannounced until its faults are seen.
    """

    def __init__(self, planner: BatchPlanner, check: bool):
        self._planner, self._check = planner, check
        self._reads: tuple[int, int] | None = None  # when the last batch began; None: before the first one
        self._left = 0  # batches to announce, this one included

    def plan(self, ids: np.ndarray, epoch: int) -> BatchPlan:
        """The planner's `plan` of these samples, int64 [B]."""
        reads = disk_reads()
        self._left = GOES_ON if reads != self._reads else max(self._left - 1, 0)
        self._reads = reads
        if self._left == 0:
            return self._planner.plan(ids, epoch)
        for addresses, sizes in self._planner.read_whole(ids):  # first, since masks are read to plan
            will_need(addresses, sizes)
        by_rows = self._planner.samples.stored_as_planes[ids] & (not self._check)
        addresses, sizes = self._planner.samples.image_addresses(ids)
        will_need(addresses[~by_rows], sizes[~by_rows])
        plan = self._planner.plan(ids, epoch)
        sides, tops = (plan.heights[by_rows], plan.widths[by_rows]), plan.starts[by_rows, 0]
        will_need(*plane_rows(addresses[by_rows], *sides, tops, tops + plan.shapes[by_rows, 0]))
        return plan


def plane_rows(
    addresses: np.ndarray, heights: np.ndarray, widths: np.ndarray, tops: np.ndarray, bottoms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of Y, Cb and Cr lie that rows `tops` to `bottoms` (exclusive) of images are made from, and their
    bytes, int64 [3 B] both.

    addresses: of the images' planes; heights, widths: in pixels; all int64 [B].
    """
    rows, columns = chroma_size(heights, widths)
    first, behind = scalar.chroma_range(tops, bottoms, heights)
    blue = addresses + heights * widths
    red = blue + rows * columns
    starts = [addresses + tops * widths, blue + first * columns, red + first * columns]
    luma, chroma = (bottoms - tops) * widths, (behind - first) * columns
    return np.concatenate(starts), np.concatenate([luma, chroma, chroma])
