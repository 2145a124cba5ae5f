"""The blocks of a baseline JPEG's scan (ITU-T T.81 annex F), one at a time: coefficients where they are wanted, else
passed over.

Where they are, a look-up gives up to two coefficients with their values. Where they are not, only DC differences
matter, and one look-up passes over as many coefficients as fit in its index (`tl_fast.jpeg.huffman`). A scan is read by
addresses (`tl_fast.maths.memory`), from a stream without stuffing.
"""

from __future__ import annotations

import numpy as np

from tl_fast.jpeg.huffman import INDEX_SHIFT, KEY, SLOTS, U0, U1, U3, U6, U16, U32, U56, U63, U64, U511, U, take_key
from tl_fast.jpeg.markers import COMPONENT, COMPONENTS, HUFFMAN, fill
from tl_fast.maths.compile import njit
from tl_fast.maths.memory import load_big, load_int16, load_uint8, load_uint64, store_int16

# An entry of a table of values, uint64. Bits 0..5: bits to consume; 6..12: what to advance by to the first coefficient;
# 13..20: to the last one, and BEYOND more where the block ends; 21..25: bits of the first alone; 26..30: bits of the
# code, where a closer look is needed; 32..47 and 48..63: the two values, int16. The index is short enough for a DC
# entry and four AC entries to fit in one refill of 56 bits.
VALUE_BITS = 10
VALUES = 1 << VALUE_BITS
BEYOND = 64  # leads out of any block: it ends
CLOSER = 127  # so does this, but the symbol does not fit in an entry; bits 32..39 have it where its code does
TRASH = 64  # where coefficients go that are none
BLOCK = 72  # int16 of room for a block's coefficients and the trash, a multiple of 16 bytes
VALUE_SHIFT = U(64 - VALUE_BITS)
U4, U10, U11, U13, U15, U17, U21, U26, U31, U48, U127, U255 = (
    U(n) for n in (4, 10, 11, 13, 15, 17, 21, 26, 31, 48, 127, 255)
)

_PLACES = sorted(np.ndindex(8, 8), key=lambda place: (sum(place), place[0] if sum(place) % 2 else place[1]))
ZIGZAG = np.array(
    [8 * row + column for row, column in _PLACES] + [TRASH] * 128, np.uint8
)  # an advance may lead 127 beyond the last one


@njit
def extend(bits, size):
    """The value that `size` extra bits stand for (T.81 F.2.2.1), uint64 modulo 2^64."""
    return bits if size == U0 or bits >> (size - U1) else bits - (U1 << size) + U1


@njit
def build_values(keys, key, is_dc, values, base):
    """The table at values[base : base + VALUES] for the codes at keys[key:], which are known to be a Huffman code.

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
                    value = np.int64(extend(U(i >> (VALUE_BITS - used) & ((1 << size) - 1)), U(size))) & 0xFFFF
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
                value = second >> 32 & 0xFFFF if second >> 13 & 255 < BEYOND else 0
                total = advance + (second >> 13 & 255)
                first = (
                    (used + (second & 63))
                    | advance << 6
                    | total << 13
                    | used << 21
                    | (first >> 32 & 0xFFFF) << 32
                    | value << 48
                )
        values[base + i] = U(first)


@njit
def prepare_values(data, record, keys, values):
    """The tables of values of a file whose other tables are prepared; keys, values: as `prepare_tables` has them, of
    their own."""
    for i in range(record[COMPONENTS]):
        tables = record[COMPONENT + 5 * i + 4]
        slot = i
        for other in range(i):
            if record[COMPONENT + 5 * other + 4] == tables and slot == i:
                slot = other
        if slot == i:
            for kind in range(2):
                key = (2 * slot + kind) * KEY
                if take_key(data, record[HUFFMAN + 4 * kind + (tables & 15 if kind else tables >> 4)], keys, key):
                    build_values(keys, key, kind == 0, values, (2 * slot + kind) * VALUES)


@njit
def top_up(stream, at, window, bits):
    """`refill` of a stream by its address."""
    window |= load_big(stream, at) >> bits
    return at + ((U63 - bits) >> U3), window, bits | U56


@njit
def read_closely(window, step, codes):
    """(bits of the code, symbol) of a symbol that its table's entry could not hold; (0, 0) where no code fits.

    codes: address of the table's key.
    """
    length = step >> U26 & U31
    if length:
        return length, step >> U32 & U255
    code, first, index = U0, U0, U16
    for length in range(U1, U17):
        count = U(load_uint8(codes, length - U1))
        code = window >> (U64 - length)
        if code < first + count:
            return length, U(load_uint8(codes, index + code - first))
        first, index = (first + count) << U1, index + count
    return U0, U0


@njit
def read_dc(stream, at, window, bits, values, codes):
    """The DC difference of a block, from a full window -> (at, window, bits, difference, whether the code is one)."""
    step = load_uint64(values, window >> VALUE_SHIFT)
    if step >> U13 & U255 != U127:
        used = step & U63
        return at, window << used, bits - used, step >> U32, True
    length, size = read_closely(window, step, codes)
    if length == U0 or size > U11:
        return at, window, bits, U0, False
    window <<= length
    value = extend(window >> U1 >> (U63 - size), size)
    at, window, bits = top_up(stream, at, window << size, bits - length - size)
    return at, window, bits, value, True


@njit
def read_ac(stream, at, window, bits, values, codes, zigzag, coefficients):
    """The AC coefficients of a block, from a window of 44 bits or more -> (at, window, bits, whether the codes are
    ones)."""
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
            at, window, bits = top_up(stream, at, window, bits)
            continue
        if k == U63:
            return at, window, bits, True
        first, total = step >> U6 & U127, step >> U13 & U255
        k -= total
        if total == U127:
            at, window, bits = top_up(stream, at, window, bits)
            length, symbol = read_closely(window, step, codes)
            run, size = symbol >> U4, symbol & U15
            if length == U0 or size > U10 or (size == U0 and run != U0 and run != U15):
                return at, window, bits, False
            window <<= length
            bits -= length
            if size == U0 and run == U0:
                return at, window, bits, True
            k += run + U1
            if k > U63:
                return at, window, bits, False
            if size:
                store_int16(coefficients, U(load_uint8(zigzag, k)), extend(window >> (U64 - size), size))
                window <<= size
                bits -= size
            if k == U63:
                return at, window, bits, True
            at, window, bits = top_up(stream, at, window, bits)
            continue
        if total >= U64 and (first == total or k + first < U63):
            return at, window, bits, True
        # The first coefficient was the block's last, so what follows it is the next block's; or the codes lead beyond
        # the block.
        single = step >> U21 & U31
        return at, before << single, bits + (step & U63) - single, k + first == U63


@njit
def skip_ac(stream, at, window, bits, lookup, codes):
    """Pass over the AC coefficients of a block -> (at, window, bits, whether the codes are ones)."""
    k = U0
    while True:
        at, window, bits = top_up(stream, at, window, bits)
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
                return at, window, bits, True
            continue
        at, window, bits = top_up(stream, at, before, bits - spent_before)
        length, symbol = read_closely(window, U0, codes)
        run, size = symbol >> U4, symbol & U15
        if length == U0 or size > U10 or (size == U0 and run != U0 and run != U15):
            return at, window, bits, False
        window, bits = window << length << size, bits - length - size
        k = k_before + run + U1
        if size == U0 and run == U0:
            return at, window, bits, True
        if k >= U63:
            return at, window, bits, k == U63
