"""The pixels of a region of a baseline JPEG, to the bit libjpeg's of the whole image (accurate integer IDCT, smooth
chroma upsampling).

A decoder of a region must read every Huffman code above it and beside it; segments between restart markers that the
region does not touch are not read at all.
"""

from __future__ import annotations

import numpy as np

from tl_fast.jpeg.blocks import BLOCK, VALUES, prepare_values, read_ac, read_dc, skip_ac, top_up
from tl_fast.jpeg.colour import colour_row, grey_row, repeat, upsample
from tl_fast.jpeg.huffman import BLOCKS, KEY, TABLE, U0, U1, U2, U3, U8, U, prepare_tables, unstuff
from tl_fast.jpeg.idct import idct
from tl_fast.jpeg.markers import (
    BAD_CODE,
    BAD_RESTART,
    COLOUR,
    COMPONENT,
    COMPONENTS,
    ENDS_IN_SCAN,
    HEIGHT,
    KNOWN_SAMPLING,
    OK,
    QUANTISATION,
    RESTART,
    RST0,
    SCAN,
    SINGLE,
    SURE,
    WIDTH,
    YCBCR,
    fill,
    mcu_count,
    next_marker,
    read_markers,
    skip_fill,
)
from tl_fast.maths.compile import njit
from tl_fast.maths.memory import address, store_int16

UNFIT = -1  # a file that is left to other decoders
STREAM_ROOM = 4096  # bytes behind the data that may be read: an MCU of damaged data takes up to 10 blocks of 216
PLANE_ROOM = 96  # of rows and columns: MCUs that the region cuts, a margin of chroma, vectors read beyond a row's end
ROOM = 64  # bytes that vectors may write behind a row


@njit
def decode_planes(
    data,
    record,
    area,
    stream,
    keys,
    lookup,
    layout,
    value_keys,
    values,
    factors,
    zigzag,
    coefficients,
    planes,
    starts,
    strides,
):
    """Decode the MCUs of `area` into planes -> status.

    area: first MCU row, first MCU column, and the rows and columns behind the last ones; planes: uint8, component c's
    begins at starts[c] with rows of strides[c]; the rest as `decode_region`.
    """
    blocks, status = prepare_tables(data, record, keys, lookup, layout)
    if status != OK:
        return status
    prepare_values(data, record, value_keys, values)
    count = record[COMPONENTS]
    across, down = (record[COMPONENT + 1], record[COMPONENT + 2]) if count > 1 else (1, 1)
    row_mcus = -(-record[WIDTH] // (8 * across))
    slots, component, place = np.empty(BLOCKS, np.int64), np.empty(BLOCKS, np.int64), np.empty(BLOCKS, np.int64)
    down_step, across_step, previous = np.empty(4, np.int64), np.empty(4, np.int64), np.zeros(4, np.uint64)
    b = 0
    for c in range(count):
        slot = c
        for other in range(c):
            if record[COMPONENT + 5 * other + 4] == record[COMPONENT + 5 * c + 4] and slot == c:
                slot = other
        at_table = record[QUANTISATION + record[COMPONENT + 5 * c + 3]]
        for k in range(64):
            factors[64 * c + np.int64(zigzag[k])] = data[at_table + k]
        wide, high = (across, down) if c == 0 else (1, 1)
        for n in range(wide * high):
            slots[b], component[b], place[b] = slot, c, starts[c] + n // wide * 8 * strides[c] + n % wide * 8
            b += 1
        down_step[c], across_step[c] = high * 8 * strides[c], wide * 8
    stream_at, values_at, lookup_at, keys_at = address(stream), address(values), address(lookup), address(keys)
    zigzag_at, coefficients_at, factors_at, planes_at = (
        address(zigzag),
        address(coefficients),
        address(factors),
        address(planes),
    )
    fill(coefficients, 0, len(coefficients), 0)
    mcus = mcu_count(record)
    interval = record[RESTART] if record[RESTART] else mcus
    raw, first, restarts = record[SCAN], 0, 0
    while True:
        last = min(first + interval, mcus)
        # The first wanted MCU at or behind `first`.
        row, column = first // row_mcus, first % row_mcus
        if column >= area[3]:
            row, column = row + 1, 0
        row, column = max(row, area[0]), column if row >= area[0] and column > area[1] else area[1]
        if row >= area[2]:
            return OK
        if row * row_mcus + column >= last:
            raw = next_marker(data, raw)
        else:
            size, raw = unstuff(data, raw, stream)
            limit = U(size + 8)
            at, window, bits = top_up(stream_at, U0, U0, U0)
            fill(previous, 0, 4, 0)
            row, column = first // row_mcus, first % row_mcus - 1
            for _ in range(first, last):
                column += 1
                if column == row_mcus:
                    row, column = row + 1, 0
                if row >= area[2] or (row == area[2] - 1 and column >= area[3]):
                    return OK
                if at > limit:
                    return ENDS_IN_SCAN
                wanted = area[0] <= row and area[1] <= column < area[3]
                into = coefficients_at
                for b in range(blocks):
                    table, c = U(2 * slots[b]), component[b]
                    codes = keys_at + table * U(KEY)
                    at, window, bits = top_up(stream_at, at, window, bits)
                    at, window, bits, difference, good = read_dc(
                        stream_at, at, window, bits, values_at + table * U(8 * VALUES), codes
                    )
                    previous[c] += difference
                    codes += U(KEY)
                    table += U1
                    if wanted:
                        store_int16(into, U0, previous[c])
                        at, window, bits, fine = read_ac(
                            stream_at, at, window, bits, values_at + table * U(8 * VALUES), codes, zigzag_at, into
                        )
                        into += U(2 * BLOCK)
                    else:
                        at, window, bits, fine = skip_ac(
                            stream_at, at, window, bits, lookup_at + table * U(2 * TABLE), codes
                        )
                    if not (good and fine):
                        return BAD_CODE
                if wanted:
                    for b in range(blocks):
                        c = component[b]
                        target = place[b] + (row - area[0]) * down_step[c] + (column - area[1]) * across_step[c]
                        idct(
                            coefficients_at + U(2 * BLOCK * b),
                            factors_at + U(128 * c),
                            planes_at + U(target),
                            U(strides[c]),
                        )
            if U8 * at - bits > U(8 * size):
                return ENDS_IN_SCAN
        raw, code = skip_fill(data, raw)
        if last == mcus:
            return OK
        if code != RST0 + (restarts & 7):
            return BAD_RESTART
        raw, first, restarts = raw + 1, last, restarts + 1


@njit
def decode_region(
    data,
    region,
    record,
    head,
    stream,
    keys,
    lookup,
    layout,
    value_keys,
    values,
    factors,
    zigzag,
    coefficients,
    planes,
    room,
    out,
):
    """Pixels of rows region[0] to region[2] and columns region[1] to region[3] (exclusive) of a JPEG -> status.

    data: uint8 [n]; region: within the image; out: uint8 [rows * columns * 3 or more], RGB. OK: all of them are there.
    Any other status: the file is damaged, or of a kind that is left to others (UNFIT). The rest is working memory of a
    thread: record, head: as `read_markers`; keys, lookup, layout: as `prepare_tables`; value_keys, values: as
    `prepare_values`; stream: uint8 [n + STREAM_ROOM];
    factors: int16 [256]; zigzag: ZIGZAG; coefficients: int16 [BLOCKS * BLOCK]; planes: uint8 [3 (rows + PLANE_ROOM)
    (columns + PLANE_ROOM)]; room: uint8 [3 (2 columns + ROOM)].
    """
    status = read_markers(data, record, head)
    if status != OK:
        return status
    count = record[COMPONENTS]
    across, down = (record[COMPONENT + 1], record[COMPONENT + 2]) if count > 1 else (1, 1)
    if not (record[SINGLE] and record[KNOWN_SAMPLING] and (count == 1 or (record[COLOUR] == YCBCR and record[SURE]))):
        return UNFIT
    height, width = -(-record[HEIGHT] // down), -(-record[WIDTH] // across)  # of chroma
    if across == 2 and width < 3:  # libjpeg does not smooth narrower ones
        return UNFIT
    top, left, bottom, right = region
    if not (0 <= top < bottom <= record[HEIGHT] and 0 <= left < right <= record[WIDTH]):
        return UNFIT
    margin_x, margin_y = int(across == 2), int(down == 2)  # chroma samples beyond the region's own
    first_row, last_row = max(top // down - margin_y, 0), min((bottom - 1) // down + margin_y, height - 1)
    first_column = max(left // across - margin_x, 0)
    last_column = min((right - 1) // across + margin_x, width - 1)
    area = (first_row // 8, first_column // 8, last_row // 8 + 1, last_column // 8 + 1)
    columns, rows = 8 * (area[3] - area[1]), 8 * (area[2] - area[0])
    strides = (columns * across, columns, columns)
    starts = (0, rows * down * columns * across, rows * columns * (down * across + 1))
    status = decode_planes(
        data,
        record,
        area,
        stream,
        keys,
        lookup,
        layout,
        value_keys,
        values,
        factors,
        zigzag,
        coefficients,
        planes,
        starts,
        strides,
    )
    if status != OK:
        return status
    planes_at, room_at, out_at, pixels = address(planes), address(room), address(out), U(right - left)
    step = U(2 * (right - left) + ROOM)
    sums, chroma = room_at, (room_at + step, room_at + U2 * step)
    for y in range(top, bottom):
        luma = planes_at + U((y - 8 * down * area[0]) * strides[0] + left - 8 * across * area[1])
        if count == 1:
            grey_row(luma, out_at, pixels)
        else:
            near = y // down
            other = min(max(near - 1 + 2 * (y % down), 0), height - 1) if down == 2 else near
            for c in range(2):
                start = planes_at + U(starts[1 + c] - 8 * area[1])
                here, there = start + U((near - 8 * area[0]) * columns), start + U((other - 8 * area[0]) * columns)
                if across == 2:
                    upsample(here, there, U(left // 2), U((right - 1) // 2 + 1), U(width), down, sums, chroma[c])
                else:
                    repeat(here, there, U(left), U(right), across, U(1 + y % 2), chroma[c])
            skew = U(2 * (left % 2)) if across == 2 else U0
            colour_row(luma, chroma[0] + skew, chroma[1] + skew, room_at, out_at, pixels)
        out_at += U3 * pixels
    return OK
