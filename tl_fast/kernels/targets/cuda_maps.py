"""Where the token targets' kernel gets its label maps: arrays on the device, or a beton's bytes, whose palette the
block reads first.

A source is two device functions. `open_*`, for all threads of a block together, checks the map of sample b and returns
it as a `Map`; `read_*` gives class and score of an entry of it. Nothing is read or written out of bounds, whatever the
map holds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tl_fast.kernels.cuda_device import I, block_thread, device, gpu, peek, poke
from tl_fast.labelmaps.loops import BAD_BITMAP, BAD_CLASS, BAD_INDEX, BAD_SIZE

PALETTE = 512  # classes that a palette may have
READERS = 32  # threads that read the bitmap
RANGE = 9  # where a block's floats have the scores' minimum and, next to it, their step
PLAIN, PLACES8, PLACES9, ARRAYS = 0, 1, 2, 3  # layouts of a map: docs/file_format.md's, or arrays of classes and scores


class Room(NamedTuple):
    """Shared memory for a map: uint16 [PALETTE] its classes; int32 [READERS] to count in; int32 flags, whose first is
    the code of what is wrong (`tl_fast.labelmaps.loops`); floats, of which RANGE and the next are the scores' minimum
    and step."""

    palette: Any
    counts: Any
    flags: Any
    floats: Any


class Map(NamedTuple):
    """A sample's label map: where the `entries` (k H W) begin in `source`, and in which layout."""

    source: Any
    layout: int
    first: int
    entries: int
    room: Room


@device
def open_arrays(source, sizes, b, entries, num_classes, room):
    """source: classes uint16 [B k H W], scores float32 [B k H W]; sizes: not used."""
    thread, threads = block_thread()
    first = np.int64(b) * entries
    wrong = I(0)
    for e in range(thread, entries, threads):
        if I(peek(source[0], first + e)) >= num_classes:
            wrong = I(BAD_CLASS)
    if wrong:
        gpu.atomic.max(room.flags, 0, wrong)
    return Map(source, I(ARRAYS), first, entries, room)


@device
def read_arrays(label_map, e):
    classes, scores = label_map.source
    index = label_map.first + e
    return I(peek(classes, index)), peek(scores, index)


@device
def _read_palette(maps, first, width, room):
    """The classes in a bitmap of `width` bytes, in order, to `room.palette` -> how many they are; if more than PALETTE,
    none is written.

    Each reader counts the classes in its part of the bitmap, then lists them behind those of the parts before.
    """
    thread, threads = block_thread()
    palette, counts, _, _ = room
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
    place, listed = I(0), I(0)
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
    return listed


@device
def open_bytes(source, sizes, b, entries, num_classes, room):
    """source: maps uint8 [M], bounds int64 [2 B], ranges float32 [2 B]; sizes: bytes of the layouts with a palette."""
    thread, threads = block_thread()
    maps = source[0]
    small, large = sizes
    flags, floats = room.flags, room.floats
    first = peek(source[1], 2 * b)
    size = I(peek(source[1], 2 * b + 1) - first)
    if thread == 0:
        floats[RANGE] = peek(source[2], 2 * b)
        floats[RANGE + 1] = peek(source[2], 2 * b + 1)
    layout, wrong, listed = I(PLAIN), I(0), I(0)
    if size != 3 * entries:
        layout = I(PLACES8) if size == small else I(PLACES9)
        if size != small and size != large:
            if thread == 0:
                gpu.atomic.max(flags, 0, BAD_SIZE)
            return Map(source, I(PLAIN), np.int64(0), entries, room)
        width = I((num_classes + 7) >> 3)
        listed = _read_palette(maps, first, width, room)
        if listed > PALETTE or (listed and room.palette[listed - 1] >= num_classes):
            wrong = I(BAD_BITMAP)
        first += width
    if not wrong:
        for e in range(thread, entries, threads):
            if layout == PLAIN:
                if I(peek(maps, first + 2 * e)) | I(peek(maps, first + 2 * e + 1)) << 8 >= num_classes:
                    wrong = I(BAD_CLASS)
            elif _place(maps, layout, first, entries, e) >= listed:
                wrong = I(BAD_INDEX)
    if wrong:
        gpu.atomic.max(flags, 0, wrong)
    return Map(source, layout, first, entries, room)


@device
def _place(maps, layout, first, entries, e):
    """Where the palette has the class of entry `e`."""
    place = I(peek(maps, first + e))
    if layout == PLACES9:
        place = I(place | (I(peek(maps, first + entries + (e >> 3))) >> (e & 7) & 1) << 8)
    return place


@device
def read_bytes(label_map, e):
    source, layout, first, entries, room = label_map
    maps = source[0]
    if layout == PLAIN:
        c = I(I(peek(maps, first + 2 * e)) | I(peek(maps, first + 2 * e + 1)) << 8)
        level_index = first + I(2 * entries + e)
    else:
        c = I(peek(room.palette, _place(maps, layout, first, entries, e)))
        level_index = first + I(entries + e)
        if layout == PLACES9:
            level_index += I((entries + 7) >> 3)
    level = np.float32(peek(maps, level_index))
    return c, level * level * peek(room.floats, RANGE + 1) + peek(room.floats, RANGE)
