"""The blocks of a baseline JPEG's scan (ITU-T T.81 annex F), one at a time, with their coefficients or without.

A wanted block's look-up gives up to two coefficients with their values. Of other blocks only DC differences matter, and
one look-up passes over as many coefficients as fit in its index (`tl_fast.jpeg.huffman`). A scan is read by addresses
(`tl_fast.maths.memory`), from a stream without stuffing.
"""

from __future__ import annotations

import numpy as np

from tl_fast.jpeg.bits import fill, top_up
from tl_fast.jpeg.huffman import INDEX_SHIFT, KEY, MAX_AC_SIZE, MAX_DC_SIZE, SLOTS, read_symbol, table_slot, take_key
from tl_fast.jpeg.markers import COMPONENTS, huffman_table
from tl_fast.maths.compile import njit
from tl_fast.maths.memory import (
    U0,
    U1,
    U4,
    U6,
    U13,
    U15,
    U21,
    U26,
    U31,
    U32,
    U48,
    U63,
    U64,
    U127,
    U255,
    U511,
    U,
    load_int16,
    load_uint8,
    load_uint64,
    store_int16,
)

# An entry of a table of values, uint64. Bits 0..5: bits to consume; 6..12: what to advance by to the first coefficient;
# 13..20: to the last one, and BEYOND more where the block ends; 21..25: bits of the first alone; 26..30: bits of the
# code, where a closer look is needed; 32..47 and 48..63: the two values, int16. The index is short enough for a DC
# entry and four AC entries to fit in one refill of 56 bits.
VALUE_BITS = 10
VALUES = 1 << VALUE_BITS
VALUE_MASK = 0xFFFF
BEYOND = 64  # leads out of any block: it ends
CLOSER = 127  # so does this, but the symbol does not fit in an entry; bits 32..39 have it where its code does
TRASH = 64  # where coefficients go that are none
BLOCK = 72  # int16 of room for a block's coefficients and the trash, a multiple of 16 bytes
VALUE_SHIFT = U(64 - VALUE_BITS)
LARGEST_DC, LARGEST_AC = U(MAX_DC_SIZE), U(MAX_AC_SIZE)

# (row, column) of a block in the order of T.81 figure 5: by diagonals, each walked the other way round.
_DIAGONALS = sorted(np.ndindex(8, 8), key=lambda cell: (sum(cell), cell[0] if sum(cell) % 2 else cell[1]))
# Coefficients behind the last one are written to TRASH: an advance may lead 127 beyond it.
ZIGZAG = np.array([8 * row + column for row, column in _DIAGONALS] + [TRASH] * 128, np.uint8)


@njit
def extend(bits, size):
    """The value that `size` extra bits stand for (T.81 F.2.2.1), uint64 modulo 2^64."""
    return bits if size == U0 or bits >> (size - U1) else bits - (U1 << size) + U1


@njit
def build_values(keys, key, is_dc, values, base):
    """Build the table values[base : base + VALUES] for the codes at keys[key:], which are known to be a Huffman code.

    values: uint64 [(2 SLOTS + 1) VALUES]; behind the last table is room to work.
    """
    single = 2 * SLOTS * VALUES
    fill(values, single, single + VALUES, CLOSER << 6 | CLOSER << 13)
    code, index = 0, key + 16
    for length in range(1, VALUE_BITS + 1):
        for _ in range(keys[key + length - 1]):
            symbol = np.int64(keys[index])
            index += 1
            run, size = (0, symbol) if is_dc else (symbol >> 4, symbol & 15)
            width = 1 << (VALUE_BITS - length)
            for i in range(width):
                step = CLOSER << 6 | CLOSER << 13 | length << 26 | symbol << 32
                used = length + size
                if used <= VALUE_BITS:
                    value = np.int64(extend(U(i >> (VALUE_BITS - used) & ((1 << size) - 1)), U(size))) & VALUE_MASK
                    step = used | used << 21 | value << 32 | value << 48
                    if is_dc:
                        pass
                    elif size:
                        step |= (run + 1) << 6 | (run + 1) << 13
                    elif run == 0:
                        step |= BEYOND << 6 | BEYOND << 13
                    elif run == 15:
                        step |= 16 << 6 | 16 << 13
                    else:
                        step = CLOSER << 6 | CLOSER << 13
                values[single + code * width + i] = step
            code += 1
        code <<= 1
    for i in range(VALUES):
        first = np.int64(values[single + i])
        used, advance = first & 63, first >> 13 & 255
        if not is_dc and advance < BEYOND:
            second = np.int64(values[single + (i << used & (VALUES - 1))])
            if second >> 13 & 255 != CLOSER and used + (second & 63) <= VALUE_BITS:
                value = second >> 32 & VALUE_MASK if second >> 13 & 255 < BEYOND else 0
                steps = advance << 6 | (advance + (second >> 13 & 255)) << 13
                pair = (first >> 32 & VALUE_MASK) << 32 | value << 48
                first = (used + (second & 63)) | steps | used << 21 | pair
        values[base + i] = U(first)


@njit
def prepare_values(data, record, keys, values):
    """Build the tables of values of a file whose other tables are prepared; keys, values: as `PixelMemory` has them."""
    for number in range(record[COMPONENTS]):
        if table_slot(record, number) == number:
            for kind in range(2):
                key = (2 * number + kind) * KEY
                if take_key(data, huffman_table(record, number, kind), keys, key):
                    build_values(keys, key, kind == 0, values, (2 * number + kind) * VALUES)


@njit
def read_closely(window, step, codes):
    """(bits of the code, symbol) of a symbol that its table's entry could not hold; (0, 0) where no code fits.

    codes: address of the table's key.
    """
    length = step >> U26 & U31
    if length:
        return length, step >> U32 & U255
    return read_symbol(window, codes)


@njit
def read_dc(stream, position, window, bits, values, codes):
    """Read a block's DC difference, from a full window -> (position, window, bits, difference, the code exists)."""
    step = load_uint64(values, window >> VALUE_SHIFT)
    if step >> U13 & U255 != U127:
        used = step & U63
        return position, window << used, bits - used, step >> U32, True
    length, size = read_closely(window, step, codes)
    if length == U0 or size > LARGEST_DC:
        return position, window, bits, U0, False
    window <<= length
    value = extend(window >> U1 >> (U63 - size), size)
    position, window, bits = top_up(stream, position, window << size, bits - length - size)
    return position, window, bits, value, True


@njit
def read_ac(stream, position, window, bits, values, codes, zigzag, coefficients):
    """Read a block's AC coefficients, from a window of 44 bits or more -> (position, window, bits, all codes exist)."""
    k = U0
    while True:
        before, step = window, U0
        for _ in range(4):
            before = window
            step = load_uint64(values, window >> VALUE_SHIFT)
            store_int16(coefficients, U(load_uint8(zigzag, k + (step >> U6 & U127))), step >> U32)
            store_int16(coefficients, U(load_uint8(zigzag, k + (step >> U13 & U255))), step >> U48)
            used = step & U63
            window <<= used
            bits -= used
            k += step >> U13 & U255
            if k >= U63:
                break
        if k < U63:
            position, window, bits = top_up(stream, position, window, bits)
            continue
        if k == U63:
            return position, window, bits, True
        first, total = step >> U6 & U127, step >> U13 & U255
        k -= total
        if total == U127:
            position, window, bits = top_up(stream, position, window, bits)
            length, symbol = read_closely(window, step, codes)
            run, size = symbol >> U4, symbol & U15
            if length == U0 or size > LARGEST_AC or (size == U0 and run != U0 and run != U15):
                return position, window, bits, False
            window <<= length
            bits -= length
            if size == U0 and run == U0:
                return position, window, bits, True
            k += run + U1
            if k > U63:
                return position, window, bits, False
            if size:
                store_int16(coefficients, U(load_uint8(zigzag, k)), extend(window >> (U64 - size), size))
                window <<= size
                bits -= size
            if k == U63:
                return position, window, bits, True
            position, window, bits = top_up(stream, position, window, bits)
            continue
        if total >= U64 and (first == total or k + first < U63):
            return position, window, bits, True
        # The first coefficient was the block's last, so what follows it is the next block's; or the codes lead beyond
        # the block.
        single = step >> U21 & U31
        return position, before << single, bits + (step & U63) - single, k + first == U63


@njit
def skip_ac(stream, position, window, bits, lookup, codes):
    """Pass over a block's AC coefficients -> (position, window, bits, whether all codes exist)."""
    k = U0
    while True:
        position, window, bits = top_up(stream, position, window, bits)
        before, spent_before, k_before, spent, step = window, U0, k, U0, U0
        for _ in range(3):
            before, spent_before, k_before = window, spent, k
            step = U(np.int64(load_int16(lookup, window >> INDEX_SHIFT)))
            window <<= step & U63
            spent += step & U63
            k += step >> U6 & U511
            if step >> U63 or k >= U63:
                break
        if k < U63:
            bits -= spent
            if step >> U63:
                return position, window, bits, True
            continue
        position, window, bits = top_up(stream, position, before, bits - spent_before)
        length, symbol = read_closely(window, U0, codes)
        run, size = symbol >> U4, symbol & U15
        if length == U0 or size > LARGEST_AC or (size == U0 and run != U0 and run != U15):
            return position, window, bits, False
        window, bits = window << length << size, bits - length - size
        k = k_before + run + U1
        if size == U0 and run == U0:
            return position, window, bits, True
        if k >= U63:
            return position, window, bits, k == U63
