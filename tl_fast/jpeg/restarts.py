"""JPEGs whose restart markers cut them into a grid of segments: made without loss, and a region taken out of them
without decoding.

A decoder of a region must read every Huffman code above it and beside it. Where each MCU row begins a segment, and the
segments of all rows are equally wide, those that cover the region are a JPEG of their own: with another size in its
header and its markers counted anew.
"""

from __future__ import annotations

import math

import numpy as np

from tl_fast.jpeg.bits import big, copy_bits, next_marker, pad, put_bits, two, unstuff
from tl_fast.jpeg.blocks import extend
from tl_fast.jpeg.huffman import KEY, MAX_DC_SIZE, TABLE, decode_blocks, prepare_tables, read_symbol
from tl_fast.jpeg.markers import (
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
    mcus_across,
    read_markers,
    sampling,
)
from tl_fast.maths.compile import njit
from tl_fast.maths.memory import U0, U3, U7, U64, U_WORD, U, address

SEGMENT = 80  # pixels across that a segment should have: narrower ones cost bytes, wider ones are decoded for nothing
NARROWEST = 32
# bytes that a segment may add: its marker, padding and three DC codes of at most 27 bits, with all bytes stuffed
GROWTH = 26
MISSING = -1  # no code for a DC size


def restart_interval(mcus: int, pixels: int) -> int:
    """MCUs of a segment in rows of `mcus`, each `pixels` wide: a divisor, so that segments form a grid; a whole row
    where none is fit."""
    fit = [n for n in range(1, mcus + 1) if mcus % n == 0 and n * pixels >= NARROWEST]
    return min(fit, key=lambda n: abs(math.log(n * pixels / SEGMENT)), default=mcus)


# --- making them


@njit
def insert_restarts(data, interval, scan, block_ends, out):
    """Write the scan of `data` with a restart marker every `interval` MCUs, and EOI, to `out` -> bytes written.

    0 where the data is bad; MISSING where a DC table lacks a code that is needed.

    data: uint8 [n], a file of three components without restarts, known sampling and a single scan; scan: `ScanMemory`,
    of which the record is filled and the stream holds n + PADDING bytes or more; block_ends: uint64 [blocks of the scan
    or more]; out: uint8 [2 n + GROWTH a segment, or more]. Differences of DC values start from 0 in each segment, so
    the first of each component is written anew; all other bits are copied.
    """
    stream, keys, layout = scan.stream, scan.keys, scan.layout
    blocks, status = prepare_tables(data, scan)
    mcus = mcu_count(scan.record)
    size, _ = unstuff(data, scan.record[SCAN], stream)
    if status != OK:
        return 0
    used, decoded = decode_blocks(stream, size, mcus * blocks, keys, scan.lookup, layout, block_ends)
    if decoded < mcus * blocks or used > 8 * size:
        return 0
    held, count, written, restarts = U0, U0, 0, 0
    copied, begin = U0, U0  # bits: those copied so far, and where the block begins
    luma, blue, red = 0, 0, 0
    for mcu in range(mcus):
        first = mcu % interval == 0
        if first and mcu:
            held, count, written = copy_bits(stream, copied, begin, held, count, out, written)
            written, copied = pad(held, count, out, written), begin
            held, count = U0, U0
            out[written], out[written + 1] = 0xFF, RST0 + (restarts & 7)
            written, restarts = written + 2, restarts + 1
        for b in range(blocks):
            key = (np.int64(layout[b] & U_WORD) // TABLE - 1) * KEY
            window = big(stream, begin >> U3) << (begin & U7)
            value, bits = dc_difference(window, address(keys) + U(key))
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
                held, count, written = copy_bits(stream, copied, begin, held, count, out, written)
                copied = begin + bits
                code, length = dc_code(value, keys, key)
                if length == 0:
                    return MISSING
                held, count, written = put_bits(U(code), U(length), held, count, out, written)
            begin = block_ends[mcu * blocks + b]
    held, count, written = copy_bits(stream, copied, begin, held, count, out, written)
    written = pad(held, count, out, written)
    out[written], out[written + 1] = 0xFF, EOI
    return written + 2


@njit
def dc_difference(window, codes):
    """(difference, bits that say it) of the block whose bits fill the window; codes: as `read_symbol`."""
    length, size = read_symbol(window, codes)
    if size == U0:
        return 0, length
    return np.int64(extend((window << length) >> (U64 - size), size)), length + size


@njit
def dc_code(value, keys, key):
    """(code with its extra bits, how many bits they are) of a DC difference; (0, 0) where the table has no code."""
    size, magnitude = 0, abs(value)
    while magnitude:
        size, magnitude = size + 1, magnitude >> 1
    length, code = find_code(keys, key, size)
    if length == 0 or size > MAX_DC_SIZE:
        return 0, 0
    if value < 0:
        value += (1 << size) - 1
    return code << size | value, length + size


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


# --- using them


@njit
def segments(record):
    """Columns and rows of MCUs in each segment, when segments form a grid of more than one; else (0, 0)."""
    if record[SINGLE] == 0 or record[COMPONENTS] != 3 or record[KNOWN_SAMPLING] == 0 or record[RESTART] == 0:
        return 0, 0
    interval, across = record[RESTART], mcus_across(record)
    if interval >= mcu_count(record):
        return 0, 0
    if across % interval == 0:
        return interval, 1
    if interval % across == 0:
        return across, interval // across
    return 0, 0


@njit
def cut(data, region, record, head, out):
    """The segments of `data` that cover a region, as a JPEG in `out` -> (bytes, row, column).

    region: first row, first column, and the row and column behind the last ones. Row and column: the source's pixel
    that is the new JPEG's first one. No bytes where there is nothing to be cut: no segments, or damaged ones, all of
    them needed, or a region outside the image. data, out: uint8 [n]; record, head: as `read_markers`.
    """
    if read_markers(data, record, head) != OK:
        return 0, 0, 0
    columns, rows = segments(record)
    height, width = record[HEIGHT], record[WIDTH]
    top, left, bottom, right = region
    if columns == 0 or not (0 <= top < bottom <= height and 0 <= left < right <= width):
        return 0, 0, 0
    # Smooth upsampling looks at chroma's neighbours.
    across, down = sampling(record)
    reach_x, reach_y = 2 * across if across > 1 else 0, 2 * down if down > 1 else 0
    tile_x, tile_y = columns * 8 * across, rows * 8 * down
    first_x, first_y = max(left - reach_x, 0) // tile_x, max(top - reach_y, 0) // tile_y
    stop_x, stop_y = -(-min(right + reach_x, width) // tile_x), -(-min(bottom + reach_y, height) // tile_y)
    wide, high = -(-width // tile_x), -(-height // tile_y)
    if (first_x == 0 and first_y == 0 and stop_x == wide and stop_y == high) or len(out) < len(data):
        return 0, 0, 0
    new_height = min(stop_y * tile_y, height) - first_y * tile_y
    new_width = min(stop_x * tile_x, width) - first_x * tile_x
    used = record[HEAD]
    _copy(head, 0, used, out, 0)
    _set_size(out, used, new_height, new_width)
    used = copy_segments(data, record[SCAN], (wide, high), (first_y, first_x, stop_y, stop_x), out, used)
    return used, first_y * tile_y, first_x * tile_x


@njit
def _set_size(head, used, height, width):
    """Write height and width into the frame header of head[:used]."""
    frame = 2
    while head[frame + 1] != SOF0 and frame < used:
        frame += 2 + two(head, frame + 2)
    head[frame + 5], head[frame + 6] = height >> 8, height & 255
    head[frame + 7], head[frame + 8] = width >> 8, width & 255


@njit
def copy_segments(data, start, grid, wanted, out, used):
    """Append the wanted segments, with their markers counted anew, and EOI to out[:used] -> bytes used.

    0 where a marker is not the one that its place in the grid asks for. start: where the scan's data begins; grid:
    segments across and down; wanted: first row, first column, and the row and column behind the last ones.
    """
    wide, high = grid
    first_y, first_x, stop_y, stop_x = wanted
    restarts = 0
    for number in range((stop_y - 1) * wide + stop_x):
        y, x = number // wide, number % wide
        end = next_marker(data, start)
        if end + 2 > len(data):
            return 0
        if np.int64(data[end + 1]) != (EOI if number == wide * high - 1 else RST0 + (number & 7)):
            return 0
        if y >= first_y and first_x <= x < stop_x:
            _copy(data, start, end, out, used)
            used += end - start
            out[used], out[used + 1] = 0xFF, RST0 + (restarts & 7)
            used, restarts = used + 2, restarts + 1
        start = end + 2
    out[used - 1] = EOI
    return used


@njit
def _copy(source, start, stop, target, position):
    first, to = U(start), U(position)
    for i in range(U(stop - start)):
        target[to + i] = source[first + i]


def splice(jpeg: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """A smaller JPEG that holds pixels `start` to `stop` (row, column; exclusive) of `jpeg`, the same to every decoder.

    jpeg: uint8 [n], as `BetonReader.image` gives it: not writeable, which is another type to numba. Returns the JPEG,
    uint8 [m], and which pixel of the source is its (0, 0); the source itself and (0, 0) where it has no grid of
    segments, is damaged or is needed whole. Without the GIL.
    """
    out = np.empty(jpeg.size, np.uint8)
    record, head = np.empty(MARKERS, np.int64), np.empty(HEAD_BYTES, np.uint8)
    region = int(start[0]), int(start[1]), int(stop[0]), int(stop[1])
    used, row, column = cut(jpeg, region, record, head, out)
    return (out[:used], (row, column)) if used else (jpeg, (0, 0))
