"""JPEGs whose restart markers cut them into a grid of segments: made without loss, and a region taken out of them
without decoding.

A decoder of a region must read every Huffman code above it and beside it. Where each MCU row begins a segment, and the
segments of all rows are equally wide, those that cover the region are a JPEG of their own: with another size in its
header and its markers counted anew.
"""

from __future__ import annotations

import math

import numpy as np

from tl_fast.jpeg.huffman import (
    KEY,
    TABLE,
    U0,
    U_WORD,
    U,
    big,
    copy_bits,
    decode_blocks,
    pad,
    prepare_tables,
    put_bits,
    read_symbol,
    unstuff,
)
from tl_fast.jpeg.markers import (
    COMPONENT,
    COMPONENTS,
    EOI,
    HEAD,
    HEAD_BYTES,
    HEIGHT,
    KNOWN_SAMPLING,
    MARKERS,
    OK,
    RESTART,
    RST0,
    SCAN,
    SINGLE,
    SOF0,
    WIDTH,
    mcu_count,
    next_marker,
    read_markers,
    two,
)
from tl_fast.maths.compile import njit

SEGMENT = 80  # pixels across that a segment should have: narrower ones cost bytes, wider ones are decoded for nothing
NARROWEST = 32
# bytes that a segment may add: its marker, padding and three DC codes of at most 27 bits, with all bytes stuffed
GROWTH = 26
MISSING = -1  # no code for a DC category


def restart_interval(mcus: int, pixels: int) -> int:
    """MCUs of a segment in rows of `mcus`, each `pixels` wide: a divisor, so that segments form a grid; a whole row
    where none is fit."""
    fit = [n for n in range(1, mcus + 1) if mcus % n == 0 and n * pixels >= NARROWEST]
    return min(fit, key=lambda n: abs(math.log(n * pixels / SEGMENT)), default=mcus)


# --- making them
# -----------------------------------------------------------------------------------------------------------


@njit
def find_code(keys, key, symbol):
    """(length, code) of a symbol in the table at keys[key:]; (0, 0) where it has none."""
    code, index = 0, key + 16
    for length in range(1, 17):
        for _ in range(keys[key + length - 1]):
            if keys[index] == symbol:
                return length, code
            code, index = code + 1, index + 1
        code <<= 1
    return 0, 0


@njit
def insert_restarts(data, record, interval, stream, keys, lookup, layout, marks, out):
    """Write the scan of `data` with a restart marker every `interval` MCUs, and EOI, to `out` -> bytes; 0 where the
    data is bad, MISSING.

    data: uint8 [n], a file of three components without restarts, known sampling and a single scan; record: what
    `read_markers` says of it.
    marks: uint64 [blocks of the scan]; out: uint8 [2 n + GROWTH a segment, or more]. stream, keys, lookup, layout: as
    `check_scan`. Differences of DC values start from 0 in each segment, so the first of each component is written anew;
    all other bits are copied.
    """
    blocks, status = prepare_tables(data, record, keys, lookup, layout)
    mcus = mcu_count(record)
    size, _ = unstuff(data, record[SCAN], stream)
    if status != OK:
        return 0
    used, decoded = decode_blocks(stream, size, mcus * blocks, keys, lookup, layout, marks)
    if decoded < mcus * blocks or used > 8 * size:
        return 0
    held, fill, at, position, begin, restarts = (
        U0,
        U0,
        0,
        U0,
        U0,
        0,
    )  # position: copied up to there; begin: of the block
    luma, blue, red = 0, 0, 0
    for mcu in range(mcus):
        first = mcu % interval == 0
        if first and mcu:
            held, fill, at = copy_bits(stream, position, begin, held, fill, out, at)
            at, position = pad(held, fill, out, at), begin
            held, fill = U0, U0
            out[at], out[at + 1] = 0xFF, RST0 + (restarts & 7)
            at, restarts = at + 2, restarts + 1
        for b in range(blocks):
            key = (np.int64(layout[b] & U_WORD) // TABLE - 1) * KEY
            window = big(stream, begin >> U(3)) << (begin & U(7))
            length, category = read_symbol(window, keys, key)
            value = 0
            if category:
                value = np.int64((window << U(length)) >> U(64 - category))
                if value >> (category - 1) == 0:
                    value -= (1 << category) - 1
            if b < blocks - 2:
                luma += value
                value = luma
            elif b == blocks - 2:
                blue += value
                value = blue
            else:
                red += value
                value = red
            if first and (b == 0 or b >= blocks - 2):
                held, fill, at = copy_bits(stream, position, begin, held, fill, out, at)
                position = begin + U(length + category)
                category, size_left = 0, abs(value)
                while size_left:
                    category, size_left = category + 1, size_left >> 1
                length, code = find_code(keys, key, category)
                if length == 0 or category > 11:
                    return MISSING
                if value < 0:
                    value += (1 << category) - 1
                held, fill, at = put_bits(U(code << category | value), U(length + category), held, fill, out, at)
            begin = marks[mcu * blocks + b]
    held, fill, at = copy_bits(stream, position, begin, held, fill, out, at)
    at = pad(held, fill, out, at)
    out[at], out[at + 1] = 0xFF, EOI
    return at + 2


# --- using them
# ------------------------------------------------------------------------------------------------------------


@njit
def segments(record):
    """Columns and rows of MCUs in each segment, when they form a grid of more than one; (0, 0) otherwise, and for what
    is not cut."""
    if record[SINGLE] == 0 or record[COMPONENTS] != 3 or record[KNOWN_SAMPLING] == 0 or record[RESTART] == 0:
        return 0, 0
    interval, across = record[RESTART], -(-record[WIDTH] // (8 * record[COMPONENT + 1]))
    if interval >= mcu_count(record):
        return 0, 0
    if across % interval == 0:
        return interval, 1
    if interval % across == 0:
        return across, interval // across
    return 0, 0


@njit
def cut(data, top, left, bottom, right, record, head, out):
    """The segments of `data` that cover rows top to bottom and columns left to right, as a JPEG in `out` -> (bytes,
    row, column).

    Row and column: the source's pixel that is its first one. No bytes where there is nothing to be cut: no segments, or
    damaged ones, all of them needed, or a region outside the image. data, out: uint8 [n]; record, head: as
    `read_markers`.
    """
    if read_markers(data, record, head) != OK:
        return 0, 0, 0
    columns, rows = segments(record)
    height, width = record[HEIGHT], record[WIDTH]
    if columns == 0 or not (0 <= top < bottom <= height and 0 <= left < right <= width):
        return 0, 0, 0
    # Smooth upsampling looks at chroma's neighbours.
    across, down = record[COMPONENT + 1], record[COMPONENT + 2]
    reach_x, reach_y = 2 * across if across > 1 else 0, 2 * down if down > 1 else 0
    tile_x, tile_y = columns * 8 * across, rows * 8 * down
    first_x, first_y = max(left - reach_x, 0) // tile_x, max(top - reach_y, 0) // tile_y
    stop_x, stop_y = -(-min(right + reach_x, width) // tile_x), -(-min(bottom + reach_y, height) // tile_y)
    wide, high = -(-width // tile_x), -(-height // tile_y)
    if (first_x == 0 and first_y == 0 and stop_x == wide and stop_y == high) or len(out) < len(data):
        return 0, 0, 0
    used = record[HEAD]
    _copy(head, 0, used, out, 0)
    at = 2
    while out[at + 1] != SOF0 and at < used:
        at += 2 + two(out, at + 2)
    new_height, new_width = (
        min(stop_y * tile_y, height) - first_y * tile_y,
        min(stop_x * tile_x, width) - first_x * tile_x,
    )
    out[at + 5], out[at + 6], out[at + 7], out[at + 8] = (
        new_height >> 8,
        new_height & 255,
        new_width >> 8,
        new_width & 255,
    )
    at, restarts = record[SCAN], 0
    for y in range(stop_y):
        for x in range(wide):
            end = next_marker(data, at)
            if end + 2 > len(data):
                return 0, 0, 0
            number = y * wide + x
            if np.int64(data[end + 1]) != (EOI if number == wide * high - 1 else RST0 + (number & 7)):
                return 0, 0, 0
            if y >= first_y and first_x <= x < stop_x:
                _copy(data, at, end, out, used)
                used += end - at
                out[used], out[used + 1] = 0xFF, RST0 + (restarts & 7)
                used, restarts = used + 2, restarts + 1
            at = end + 2
            if y == stop_y - 1 and x == stop_x - 1:
                break
    out[used - 1] = EOI
    return used, first_y * tile_y, first_x * tile_x


@njit
def _copy(data, start, stop, out, at):
    source, target = U(start), U(at)
    for i in range(U(stop - start)):
        out[target + i] = data[source + i]


def splice(jpeg: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """A smaller JPEG that shows pixels `start` to `stop` (row, column; exclusive) of `jpeg` bit for bit as every
    decoder shows them there.

    jpeg: uint8 [n], as `BetonReader.jpeg` gives it: not writeable, which is another type to numba. Returns the JPEG,
    uint8 [m], and which pixel of the source is its (0, 0); the source itself and (0, 0) where it has no grid of
    segments, is damaged or is needed whole. Without the GIL.
    """
    out = np.empty(jpeg.size, np.uint8)
    record, head = np.empty(MARKERS, np.int64), np.empty(HEAD_BYTES, np.uint8)
    used, row, column = cut(jpeg, int(start[0]), int(start[1]), int(stop[0]), int(stop[1]), record, head, out)
    return (out[:used], (row, column)) if used else (jpeg, (0, 0))
