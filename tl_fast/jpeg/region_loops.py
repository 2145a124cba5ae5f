"""The pixels of a region of a baseline JPEG, to the bit libjpeg's of the whole image (accurate integer IDCT, smooth
chroma upsampling).

Outside the region the decoder only parses the Huffman codes; it makes no pixels there. Segments between restart markers
that the region does not touch are not read at all, nor is what an index of bit positions lets it pass over
(`tl_fast.jpeg.bit_index`).
"""

from __future__ import annotations

import numpy as np

from tl_fast.jpeg.bit_index import ENTRY, ROW, find_entry, find_index, take_dc
from tl_fast.jpeg.bits import fill, next_marker, skip_fill, top_up, unstuff
from tl_fast.jpeg.blocks import ZIGZAG, prepare_values
from tl_fast.jpeg.huffman import prepare_tables
from tl_fast.jpeg.markers import (
    BAD_CODE,
    BAD_RESTART,
    COLOUR,
    COMPONENTS,
    ENDS_IN_SCAN,
    HEIGHT,
    KNOWN_SAMPLING,
    MAX_BLOCKS,
    MAX_COMPONENTS,
    OK,
    QUANTISATION,
    QUANTISER,
    RESTART,
    RST0,
    SCAN,
    SINGLE,
    SURE,
    WIDTH,
    YCBCR,
    component,
    mcu_count,
    mcus_across,
    read_markers,
    sampling,
)
from tl_fast.jpeg.mcus import BLOCK_FIELDS, lay_out_blocks, read_mcu, write_mcu
from tl_fast.jpeg.plane_regions import copy_planes
from tl_fast.maths.compile import njit
from tl_fast.maths.memory import U0, U3, U8, U, address, bytes_from, keep, take_number
from tl_fast.maths.ycbcr import AS_GREY, AS_PLANES, Pixels, write_row

UNFIT = -1  # a file that is left to other decoders
BEHIND_AREA = -2  # see `decode_mcus`
PLANE_ROOM = 96  # of rows and columns: MCUs that the region cuts, a margin of chroma, vectors read beyond a row's end
INTO_NEXT = 2  # bytes read from where the last MCU wanted ends: one that it shares, and the zero behind that 0xFF


@njit
def decode_region(data, region, scan, memory, out):
    """Write the RGB pixels of a region of a JPEG to `out` -> status, as of `decode_pixels`.

    out: uint8 [rows * columns * 3 or more]; the rest as of `decode_pixels`.
    """
    status, pixels = decode_pixels(data, region, scan, memory)
    if status == OK:
        top, left, bottom, right = region
        target, room, line = address(out), address(memory.rows), U3 * U(right - left)
        for y in range(top, bottom):
            write_row(pixels, y, left, right, U3, room, target)
            target += line
    return status


@njit
def decode_pixels(data, region, scan, memory):
    """Decode the samples of a region of a JPEG into planes -> (status, `Pixels`).

    data: uint8 [n]; region: first row, first column, and the row and column behind the last ones. OK: all pixels are
    there, until `memory` is used again. Any other status: the file is damaged, or of a kind that is left to others
    (UNFIT), or the region leads outside the image. scan: `ScanMemory` whose stream holds n + STREAM_ROOM bytes or more;
    memory: `PixelMemory` with planes of 3 (rows + PLANE_ROOM) (columns + PLANE_ROOM) bytes or more.
    """
    record = scan.record
    status = read_markers(data, record, scan.head)
    if status == OK and not is_fit(record, region):
        status = UNFIT
    if status != OK:
        return status, Pixels(AS_GREY, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0)
    across, down = sampling(record)
    area = mcus_of(record, region)
    starts, strides = plane_places(area, across, down)
    columns = strides[1]  # of chroma
    status = decode_planes(data, area, scan, memory, starts, strides)
    planes = np.int64(address(memory.planes))
    # Of the image's first sample, which is before the area's.
    first = planes - 8 * (area[0] * down * strides[0] + area[1] * across)
    chroma = planes - 8 * (area[0] * columns + area[1])
    blue, red = chroma + starts[1], chroma + starts[2]
    kind = AS_GREY if record[COMPONENTS] == 1 else AS_PLANES
    height, width = -(-record[HEIGHT] // down), -(-record[WIDTH] // across)
    return status, Pixels(kind, first, strides[0], blue, red, columns, across, down, height, width, *region)


@njit
def plane_places(area, across, down):
    """Where the planes of an area of MCUs (`mcus_of`) begin, one behind the other, and the bytes of their rows."""
    rows, columns = 8 * (area[2] - area[0]), 8 * (area[3] - area[1])  # of chroma
    starts = (0, rows * down * columns * across, rows * columns * (down * across + 1))
    return starts, (columns * across, columns, columns)


@njit
def decode_regions(taken, images, regions, sides, starts, scan, memory, out):
    """Decode or copy region after region that no other thread has taken, until none is left (-1) or one has a status
    other than OK, as `decode_region` has it -> its number; the caller sees to that region and calls again.

    taken: int64 [1], regions taken so far, by all threads; images: uint64 [B, 2], address and size in bytes of each
    region's image; regions: int64 [B, 4], as `decode_region` takes one; sides: int64 [B, 2], height and width of the
    images that are planes, 0 for JPEGs; starts: int64 [B], of each region's bytes in `out`, uint8. scan, memory: as
    `decode_region` takes them, large enough for every JPEG's region.
    """
    counter, target = address(taken), address(out)
    while True:
        b = np.int64(take_number(counter))
        if b >= len(regions):
            return -1
        region = (regions[b, 0], regions[b, 1], regions[b, 2], regions[b, 3])
        if sides[b, 0] > 0:
            copy_planes(images[b, 0], region, sides[b, 0], sides[b, 1], target + U(starts[b]))
            continue
        data = bytes_from(images[b, 0], images[b, 1])
        if decode_region(data, region, scan, memory, out[starts[b] :]) != OK:
            return b


@njit
def is_fit(record, region):
    """Whether the region can be decoded here: in the image, and of a file of a kind known here."""
    top, left, bottom, right = region
    inside = 0 <= top < bottom <= record[HEIGHT] and 0 <= left < right <= record[WIDTH]
    return inside and (is_ycbcr(record) or (record[COMPONENTS] == 1 and record[SINGLE] != 0))


@njit
def is_ycbcr(record):
    """Whether a file is baseline of a single scan, and YCbCr to every decoder, in a sampling that is known here."""
    return record[SINGLE] != 0 and record[KNOWN_SAMPLING] != 0 and record[COLOUR] == YCBCR and record[SURE] != 0


@njit
def mcus_of(record, region):
    """The MCUs that a region's pixels take -> first row, first column, and the row and column behind the last ones."""
    across, down = sampling(record)
    height, width = -(-record[HEIGHT] // down), -(-record[WIDTH] // across)  # of chroma
    margin_x, margin_y = int(across == 2), int(down == 2)  # chroma samples beyond the region's own
    top, left, bottom, right = region
    first_row, last_row = max(top // down - margin_y, 0), min((bottom - 1) // down + margin_y, height - 1)
    first_column = max(left // across - margin_x, 0)
    last_column = min((right - 1) // across + margin_x, width - 1)
    return first_row // 8, first_column // 8, last_row // 8 + 1, last_column // 8 + 1


# --- samples


@njit
def decode_planes(data, area, scan, memory, starts, strides):
    """Decode the MCUs of `area` into planes -> status.

    area: as `mcus_of`; memory.planes: component c's samples begin at starts[c], with rows of strides[c]; scan, memory:
    as `decode_pixels`.
    """
    record = scan.record
    blocks, status = prepare_tables(data, scan)
    if status != OK:
        return status
    prepare_values(data, record, memory.keys, memory.values)
    copy_factors(data, record, memory.factors)
    order = np.empty((MAX_BLOCKS, BLOCK_FIELDS), np.int64)
    lay_out_blocks(record, starts, strides, order)
    across = mcus_across(record)
    if area != (0, 0, mcu_count(record) // across, across):
        index = find_index(data, record)
        if index != (0, 0) and decode_rows(data, area, scan, memory, index, blocks, order, strides) == OK:
            return OK
    return decode_scan(data, area, scan, memory, blocks, order, strides)


@njit
def decode_rows(data, area, scan, memory, index, blocks, order, strides):
    """Decode the MCUs of `area` from the entries before them -> status. index: as `find_index` gives it."""
    record, stream, (rows, spacing) = scan.record, scan.stream, index
    fill(memory.coefficients, 0, len(memory.coefficients), 0)
    previous = np.zeros(MAX_COMPONENTS, np.uint16)
    across = mcus_across(record)
    entries, last_row = -(-across // spacing), mcu_count(record) // across - 1
    first, behind = area[1] // spacing, -(-area[3] // spacing)
    start, row_bytes = record[SCAN], ROW + ENTRY * entries
    for row in range(area[0], area[2]):
        bit, entry = find_entry(data, rows, row_bytes, row, first)
        take_dc(entry, previous)
        end = len(data)
        if behind < entries or row < last_row:
            next_bit, _ = find_entry(data, rows, row_bytes, row + behind // entries, behind % entries)
            end = min(start + (next_bit >> 3) + INTO_NEXT, end)
        size, _ = unstuff(data[:end], start + (bit >> 3), stream)
        mcus = (row * across + first * spacing, row * across + area[3])
        status = decode_mcus(scan, memory, size, bit & 7, mcus, area, blocks, order, previous, strides)
        if status != OK:
            return status
    return OK


@njit
def decode_scan(data, area, scan, memory, blocks, order, strides):
    """Decode the MCUs of `area` by reading the scan from its beginning, or from the restart marker before -> status."""
    record, stream = scan.record, scan.stream
    fill(memory.coefficients, 0, len(memory.coefficients), 0)
    previous = np.zeros(MAX_COMPONENTS, np.uint16)
    row_mcus, mcus = mcus_across(record), mcu_count(record)
    interval = record[RESTART] if record[RESTART] else mcus
    byte, first, restarts = record[SCAN], 0, 0
    while True:
        stop = min(first + interval, mcus)
        wanted_mcu = next_wanted(first, row_mcus, area)
        if wanted_mcu < 0:
            return OK
        if wanted_mcu >= stop:
            byte = next_marker(data, byte)
        else:
            size, byte = unstuff(data, byte, stream)
            fill(previous, 0, MAX_COMPONENTS, 0)
            status = decode_mcus(scan, memory, size, 0, (first, stop), area, blocks, order, previous, strides)
            if status == BEHIND_AREA:
                return OK
            if status != OK:
                return status
        byte, code = skip_fill(data, byte)
        if stop == mcus:
            return OK
        if code != RST0 + (restarts & 7):
            return BAD_RESTART
        byte, first, restarts = byte + 1, stop, restarts + 1


@njit
def decode_mcus(scan, memory, size, bit, mcus, area, blocks, order, previous, strides):
    """Decode MCUs from the stream, those of `area` with their samples -> status; BEHIND_AREA where it left the area
    before the last one.

    scan.stream: of which the first `size` bytes are data, and the first MCU begins at a bit of the first byte; mcus:
    the first one's number in the scan, and that behind the last; memory.coefficients: 0, as they are again where the
    status is OK; order: as `lay_out_blocks` fills it; previous: uint16 [MAX_COMPONENTS], the DC values before the first
    one, which change.
    """
    # All of them addresses, as `read_mcu` and `write_mcu` take them.
    tables = (address(memory.values), address(scan.lookup), address(scan.keys), address(ZIGZAG))
    coefficients, factors, planes = address(memory.coefficients), address(memory.factors), address(memory.planes)
    bytes_in, order_in, previous_in = address(scan.stream), address(order), address(previous)
    limit = U(size + 8)
    position, window, bits = top_up(bytes_in, U0, U0, U0)
    window, bits = window << U(bit), bits - U(bit)
    row_mcus = mcus_across(scan.record)
    row, column = mcus[0] // row_mcus, mcus[0] % row_mcus - 1
    for _ in range(mcus[0], mcus[1]):
        column += 1
        if column == row_mcus:
            row, column = row + 1, 0
        if row >= area[2] or (row == area[2] - 1 and column >= area[3]):
            return BEHIND_AREA
        if position > limit:
            return ENDS_IN_SCAN
        wanted = area[0] <= row and area[1] <= column < area[3]
        position, window, bits, exist = read_mcu(
            bytes_in, position, window, bits, blocks, order_in, tables, previous_in, coefficients, wanted
        )
        if not exist:
            return BAD_CODE
        if wanted:
            write_mcu(row - area[0], column - area[1], blocks, order, strides, coefficients, factors, planes)
    keep((order, previous))
    return ENDS_IN_SCAN if U8 * position - bits > U(8 * size) else OK


@njit
def copy_factors(data, record, factors):
    """The quantisation tables of the components, row by row. factors: int16 [MAX_COMPONENTS * 64]."""
    for number in range(record[COMPONENTS]):
        table = record[QUANTISATION + record[component(number) + QUANTISER]]
        for k in range(64):
            factors[64 * number + np.int64(ZIGZAG[k])] = data[table + k]


@njit
def next_wanted(mcu, row_mcus, area):
    """The number of the first MCU of `area` that is not before `mcu`; -1 where there is none."""
    row, column = mcu // row_mcus, mcu % row_mcus
    if column >= area[3]:
        row, column = row + 1, 0
    if row < area[0] or column < area[1]:
        column = area[1]
    row = max(row, area[0])
    return row * row_mcus + column if row < area[2] else -1
