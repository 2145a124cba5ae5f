"""The pixels of a region of a baseline JPEG, to the bit libjpeg's of the whole image (accurate integer IDCT, smooth
chroma upsampling).

Outside the region the decoder only parses the Huffman codes; it makes no pixels there. Segments between restart markers
that the region does not touch are not read at all.
"""

from __future__ import annotations

import numpy as np

from tl_fast.jpeg.bits import U0, U1, U2, U3, U8, U, fill, next_marker, skip_fill, top_up, unstuff
from tl_fast.jpeg.blocks import BLOCK, VALUES, ZIGZAG, prepare_values, read_ac, read_dc, skip_ac
from tl_fast.jpeg.colour import colour_row, grey_row, repeat, upsample
from tl_fast.jpeg.huffman import KEY, TABLE, prepare_tables, table_slot
from tl_fast.jpeg.idct import idct
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
    read_markers,
    sampling,
)
from tl_fast.maths.compile import njit
from tl_fast.maths.memory import (
    address,
    bytes_from,
    load_uint16,
    load_uint64,
    store_int16,
    store_uint16,
    take_number,
)

UNFIT = -1  # a file that is left to other decoders
STREAM_ROOM = 4096  # bytes behind the data that may be read: an MCU of damaged data takes up to 10 blocks of 216
PLANE_ROOM = 96  # of rows and columns: MCUs that the region cuts, a margin of chroma, vectors read beyond a row's end
ROW_ROOM = 64  # bytes that vectors may write behind a row

# What the decoder knows of each block of an MCU (`lay_out_blocks`).
SLOT, NUMBER, OFFSET, DOWN_STEP, ACROSS_STEP, BLOCK_FIELDS = range(6)


@njit
def decode_region(data, region, scan, pixels, out):
    """Write the RGB pixels of a region of a JPEG to `out` -> status.

    data: uint8 [n]; region: first row, first column, and the row and column behind the last ones; out: uint8 [rows *
    columns * 3 or more]. OK: all pixels are there. Any other status: the file is damaged, or of a kind that is left to
    others (UNFIT), or the region leads outside the image. scan: `ScanMemory` whose stream holds n + STREAM_ROOM bytes
    or more; pixels: `PixelMemory` with planes of 3 (rows + PLANE_ROOM) (columns + PLANE_ROOM) bytes and rows of
    3 (2 columns + ROW_ROOM) bytes or more.
    """
    record = scan.record
    status = read_markers(data, record, scan.head)
    if status != OK:
        return status
    if not is_fit(record, region):
        return UNFIT
    across, down = sampling(record)
    area = mcus_of(record, region)
    rows, columns = 8 * (area[2] - area[0]), 8 * (area[3] - area[1])  # of chroma
    strides = (columns * across, columns, columns)
    starts = (0, rows * down * columns * across, rows * columns * (down * across + 1))
    status = decode_planes(data, area, scan, pixels, starts, strides)
    if status == OK:
        write_pixels(record, region, area, pixels, starts, strides, out)
    return status


@njit
def decode_regions(taken, jpegs, regions, starts, scan, pixels, out):
    """Decode region after region that no other thread has taken, until none is left (-1) or one has a status other
    than OK, as `decode_region` has it -> its number; the caller sees to that region and calls again.

    taken: int64 [1], regions taken so far, by all threads; jpegs: uint64 [B, 2], address and size in bytes of each
    region's JPEG; regions: int64 [B, 4], as `decode_region` takes one; starts: int64 [B], of each region's pixels in
    `out`, uint8. scan, pixels: as `decode_region` takes them, large enough for every region.
    """
    counter = address(taken)
    while True:
        b = np.int64(take_number(counter))
        if b >= len(regions):
            return -1
        data = bytes_from(jpegs[b, 0], jpegs[b, 1])
        region = (regions[b, 0], regions[b, 1], regions[b, 2], regions[b, 3])
        if decode_region(data, region, scan, pixels, out[starts[b] :]) != OK:
            return b


@njit
def is_fit(record, region):
    """Whether the region can be decoded here: in the image, and of a file of a kind known here."""
    grey = record[COMPONENTS] == 1
    if not (record[SINGLE] and record[KNOWN_SAMPLING] and (grey or (record[COLOUR] == YCBCR and record[SURE]))):
        return False
    if sampling(record)[0] == 2 and -(-record[WIDTH] // 2) < 3:  # libjpeg does not smooth chroma that narrow
        return False
    top, left, bottom, right = region
    return 0 <= top < bottom <= record[HEIGHT] and 0 <= left < right <= record[WIDTH]


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
def decode_planes(data, area, scan, pixels, starts, strides):
    """Decode the MCUs of `area` into planes -> status.

    area: as `mcus_of`; pixels.planes: component c's samples begin at starts[c], with rows of strides[c]; scan, pixels:
    as `decode_region`.
    """
    record, stream = scan.record, scan.stream
    blocks, status = prepare_tables(data, scan)
    if status != OK:
        return status
    prepare_values(data, record, pixels.keys, pixels.values)
    copy_factors(data, record, pixels.factors)
    order = np.empty((MAX_BLOCKS, BLOCK_FIELDS), np.int64)
    lay_out_blocks(record, starts, strides, order)
    fill(pixels.coefficients, 0, len(pixels.coefficients), 0)
    previous = np.zeros(MAX_COMPONENTS, np.uint16)  # DC value of each component's last block
    bytes_in, order_in, previous_in = address(stream), address(order), address(previous)
    tables = (address(pixels.values), address(scan.lookup), address(scan.keys), address(ZIGZAG))
    coefficients, factors, planes = address(pixels.coefficients), address(pixels.factors), address(pixels.planes)
    row_mcus = -(-record[WIDTH] // (8 * sampling(record)[0]))
    mcus = mcu_count(record)
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
            limit = U(size + 8)
            position, window, bits = top_up(bytes_in, U0, U0, U0)
            fill(previous, 0, MAX_COMPONENTS, 0)
            row, column = first // row_mcus, first % row_mcus - 1
            for _ in range(first, stop):
                column += 1
                if column == row_mcus:
                    row, column = row + 1, 0
                if row >= area[2] or (row == area[2] - 1 and column >= area[3]):
                    return OK
                if position > limit:
                    return ENDS_IN_SCAN
                wanted = area[0] <= row and area[1] <= column < area[3]
                position, window, bits, exist = read_mcu(
                    bytes_in, position, window, bits, blocks, order_in, tables, previous_in, coefficients, wanted
                )
                if not exist:
                    return BAD_CODE
                if wanted:
                    for b in range(blocks):
                        target = order[b, OFFSET]
                        target += (row - area[0]) * order[b, DOWN_STEP] + (column - area[1]) * order[b, ACROSS_STEP]
                        number = order[b, NUMBER]
                        block = coefficients + U(2 * BLOCK * b)
                        idct(block, factors + U(128 * number), planes + U(target), U(strides[number]))
            if U8 * position - bits > U(8 * size):
                return ENDS_IN_SCAN
        byte, code = skip_fill(data, byte)
        if stop == mcus:
            return OK
        if code != RST0 + (restarts & 7):
            return BAD_RESTART
        byte, first, restarts = byte + 1, stop, restarts + 1


@njit
def copy_factors(data, record, factors):
    """The quantisation tables of the components, row by row. factors: int16 [MAX_COMPONENTS * 64]."""
    for number in range(record[COMPONENTS]):
        table = record[QUANTISATION + record[component(number) + QUANTISER]]
        for k in range(64):
            factors[64 * number + np.int64(ZIGZAG[k])] = data[table + k]


@njit
def lay_out_blocks(record, starts, strides, order):
    """Fill `order`, int64 [blocks of an MCU, BLOCK_FIELDS].

    SLOT: where its tables are (`table_slot`); NUMBER: of its component; OFFSET: in the planes, of its first sample in
    the area's first MCU; DOWN_STEP, ACROSS_STEP: what to add for the MCU below and the one to the right.
    """
    b = 0
    for number in range(record[COMPONENTS]):
        across, down = sampling(record) if number == 0 else (1, 1)
        for n in range(across * down):
            order[b, SLOT], order[b, NUMBER] = table_slot(record, number), number
            order[b, OFFSET] = starts[number] + n // across * 8 * strides[number] + n % across * 8
            order[b, DOWN_STEP], order[b, ACROSS_STEP] = down * 8 * strides[number], across * 8
            b += 1


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


@njit
def read_mcu(stream, position, window, bits, blocks, order, tables, previous, coefficients, wanted):
    """Read the blocks of an MCU, their coefficients too where they are wanted -> (position, window, bits, whether all
    codes exist).

    All addresses, since numba would count references to arrays at each call: stream; order, as `lay_out_blocks` fills
    it; tables, which are values, look-up, keys and ZIGZAG; previous, uint16, the last DC value of each component;
    coefficients.
    """
    values, lookup, keys, zigzag = tables
    for _ in range(blocks):
        table, number = U2 * load_uint64(order, U(SLOT)), load_uint64(order, U(NUMBER))
        order += U(8 * BLOCK_FIELDS)
        codes = keys + table * U(KEY)
        position, window, bits = top_up(stream, position, window, bits)
        position, window, bits, difference, dc_exists = read_dc(
            stream, position, window, bits, values + table * U(8 * VALUES), codes
        )
        value = U(load_uint16(previous, number)) + difference
        store_uint16(previous, number, value)
        codes += U(KEY)
        table += U1
        if wanted:
            store_int16(coefficients, U0, value)
            position, window, bits, ac_exist = read_ac(
                stream, position, window, bits, values + table * U(8 * VALUES), codes, zigzag, coefficients
            )
            coefficients += U(2 * BLOCK)
        else:
            position, window, bits, ac_exist = skip_ac(
                stream, position, window, bits, lookup + table * U(2 * TABLE), codes
            )
        if not (dc_exists and ac_exist):
            return position, window, bits, False
    return position, window, bits, True


# --- pixels


@njit
def write_pixels(record, region, area, pixels, starts, strides, out):
    """Turn the planes that `decode_planes` filled into the region's RGB pixels at `out`."""
    across, down = sampling(record)
    height, width = -(-record[HEIGHT] // down), -(-record[WIDTH] // across)  # of chroma
    top, left, bottom, right = region
    planes, rows, target, count = address(pixels.planes), address(pixels.rows), address(out), U(right - left)
    step = U(2 * (right - left) + ROW_ROOM)
    sums, chroma = rows, (rows + step, rows + U2 * step)
    for y in range(top, bottom):
        luma = planes + U((y - 8 * down * area[0]) * strides[0] + left - 8 * across * area[1])
        if record[COMPONENTS] == 1:
            grey_row(luma, target, count)
        else:
            near = y // down
            other = min(max(near - 1 + 2 * (y % down), 0), height - 1) if down == 2 else near
            for c in range(2):
                start, stride = planes + U(starts[1 + c] - 8 * area[1]), strides[1 + c]
                near_row, other_row = (
                    start + U((near - 8 * area[0]) * stride),
                    start + U((other - 8 * area[0]) * stride),
                )
                if across == 2:
                    stop = U((right - 1) // 2 + 1)
                    upsample(near_row, other_row, U(left // 2), stop, U(width), down, sums, chroma[c])
                else:
                    repeat(near_row, other_row, U(left), U(right), across, U(1 + y % 2), chroma[c])
            skew = U(2 * (left % 2)) if across == 2 else U0
            colour_row(luma, chroma[0] + skew, chroma[1] + skew, rows, target, count)
        target += U3 * count
