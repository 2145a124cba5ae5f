"""Where the token targets' kernel gets its label maps: arrays on the device, or a beton's bytes, whose palette the
block reads first.

A source is two device functions. `open_*`, for all threads of a block together, checks the map of sample b and returns
(layout, first element, classes in the palette); what is wrong goes to flags[0] (`tl_fast.labelmaps.loops`' codes), the
scores' minimum and step to floats[RANGE ...]. `read_*` then gives class and score of an entry. Nothing is read or
written out of bounds, whatever the map holds.
"""

from __future__ import annotations

import numpy as np

from tl_fast.kernels.cuda_device import device, gpu, peek, poke
from tl_fast.labelmaps.loops import BAD_BITMAP, BAD_CLASS, BAD_INDEX, BAD_SIZE

PALETTE = 512  # classes that a palette may have
READERS = 32  # threads that read the bitmap
RANGE = 9  # where a block's floats have the scores' minimum and, next to it, their step
PLAIN, PLACES8, PLACES9, ARRAYS = 0, 1, 2, 3  # layouts of a map: docs/file_format.md's, or arrays of classes and scores
I = np.int32  # numba makes int64 of every sum of int32: casts let the compiler go back  # noqa: E741


@device
def open_arrays(source, b, entries, num_classes, small, large, palette, counts, flags, floats, thread, threads):
    """source: classes uint16 [B k H W], scores float32 [B k H W]."""
    first = I(b * entries)
    wrong = I(0)
    for e in range(thread, entries, threads):
        if I(peek(source[0], first + e)) >= num_classes:
            wrong = I(BAD_CLASS)
    if wrong:
        gpu.atomic.max(flags, 0, wrong)
    return I(ARRAYS), first, I(0)


@device
def read_arrays(source, layout, first, floats, entries, palette, e):
    at = first + e
    return I(peek(source[0], at)), peek(source[1], at)


@device
def open_bytes(source, b, entries, num_classes, small, large, palette, counts, flags, floats, thread, threads):
    """source: maps uint8 [M], starts int64 [B+1], ranges float32 [2 B]; small, large: bytes of the layouts with a
    palette."""
    maps = source[0]
    first = I(peek(source[1], b))
    size = I(peek(source[1], b + 1) - first)
    if thread == 0:
        floats[RANGE] = peek(source[2], 2 * b)
        floats[RANGE + 1] = peek(source[2], 2 * b + 1)
    layout, wrong, listed = I(PLAIN), I(0), I(0)
    if size != 3 * entries:
        layout = I(PLACES8) if size == small else I(PLACES9)
        if size != small and size != large:
            if thread == 0:
                gpu.atomic.max(flags, 0, BAD_SIZE)
            return I(PLAIN), I(0), I(0)
        width = I((num_classes + 7) >> 3)
        # Each reader counts the classes in its part of the bitmap, then lists them behind those of the parts before.
        readers = I(min(threads, READERS))
        part = I((width + readers - 1) // readers)
        begin = I(min(thread * part, width))
        end = I(min(begin + part, width))
        if thread < readers:
            count = I(0)
            for j in range(begin, end):
                count = I(count + gpu.popc(np.uint32(peek(maps, first + j))))
            counts[thread] = count
        gpu.syncthreads()
        place = I(0)
        for n in range(readers):
            count = peek(counts, n)
            if n < thread:
                place = I(place + count)
            listed = I(listed + count)
        if thread < readers and listed <= PALETTE:
            for j in range(begin, end):
                byte = I(peek(maps, first + j))
                while byte:
                    bit = I(byte & -byte)
                    byte = I(byte ^ bit)
                    poke(palette, place, 8 * j + gpu.popc(np.uint32(bit - 1)))
                    place = I(place + 1)
        gpu.syncthreads()
        if listed > PALETTE or (listed and palette[listed - 1] >= num_classes):
            wrong = I(BAD_BITMAP)
        first = I(first + width)
    if not wrong:
        for e in range(thread, entries, threads):
            if layout == PLAIN:
                if I(peek(maps, first + 2 * e)) | I(peek(maps, first + 2 * e + 1)) << 8 >= num_classes:
                    wrong = I(BAD_CLASS)
            elif _place(maps, layout, first, entries, e) >= listed:
                wrong = I(BAD_INDEX)
    if wrong:
        gpu.atomic.max(flags, 0, wrong)
    return layout, first, listed


@device
def _place(maps, layout, first, entries, e):
    place = I(peek(maps, first + e))
    if layout == PLACES9:
        place = I(place | (I(peek(maps, first + entries + (e >> 3))) >> (e & 7) & 1) << 8)
    return place


@device
def read_bytes(source, layout, first, floats, entries, palette, e):
    maps = source[0]
    if layout == PLAIN:
        c = I(I(peek(maps, first + 2 * e)) | I(peek(maps, first + 2 * e + 1)) << 8)
        at = I(first + 2 * entries + e)
    else:
        c = I(peek(palette, _place(maps, layout, first, entries, e)))
        at = I(first + entries + e)
        if layout == PLACES9:
            at = I(at + ((entries + 7) >> 3))
    level = np.float32(peek(maps, at))
    return c, level * level * peek(floats, RANGE + 1) + peek(floats, RANGE)
