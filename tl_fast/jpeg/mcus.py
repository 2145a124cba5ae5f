"""MCUs of a baseline JPEG's scan (ITU-T T.81 annex A.2): read, with their coefficients or without, and made into
samples."""

from __future__ import annotations

from tl_fast.jpeg.bits import top_up
from tl_fast.jpeg.blocks import BLOCK, VALUES, read_ac, read_dc, skip_ac
from tl_fast.jpeg.huffman import KEY, TABLE, table_slot
from tl_fast.jpeg.idct import idct
from tl_fast.jpeg.markers import COMPONENTS, sampling
from tl_fast.maths.compile import njit
from tl_fast.maths.memory import U0, U1, U2, U, load_uint16, load_uint64, store_int16, store_uint16

STREAM_ROOM = 4096  # bytes behind the data that may be read: an MCU of damaged data takes up to 10 blocks of 216

# What the decoder knows of each block of an MCU (`lay_out_blocks`).
SLOT, NUMBER, OFFSET, DOWN_STEP, ACROSS_STEP, BLOCK_FIELDS = range(6)


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


@njit
def write_mcu(row, column, blocks, order, strides, coefficients, factors, planes):
    """Write the samples of the MCU that was read, `row` and `column` of the area, and set its coefficients to 0.

    order: as `lay_out_blocks` fills it; coefficients, factors, planes: addresses.
    """
    for b in range(blocks):
        target = order[b, OFFSET] + row * order[b, DOWN_STEP] + column * order[b, ACROSS_STEP]
        number = order[b, NUMBER]
        block = coefficients + U(2 * BLOCK * b)
        idct(block, factors + U(128 * number), planes + U(target), U(strides[number]))
