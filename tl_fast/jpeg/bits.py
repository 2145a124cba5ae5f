"""Bits and bytes of JPEG data: eight bytes at a time, a window of the next bits, and bits written with stuffing.

A window is a uint64 whose highest bit is the next one to read; `bits` says how many of its bits are real, and
`position` is the byte to read next.
"""

from __future__ import annotations

import numpy as np

from tl_fast.maths.compile import njit
from tl_fast.maths.memory import (
    U0,
    U1,
    U2,
    U3,
    U4,
    U6,
    U7,
    U8,
    U16,
    U24,
    U32,
    U40,
    U48,
    U56,
    U63,
    U64,
    U255,
    U,
    address,
    before_marker,
    copy_to_ff,
    load_big,
)

ONES, HIGHS, BYTE_NUMBERS = U(0x0101010101010101), U(0x8080808080808080), U(0x0001020304050607)
PADDING = 64  # zeros that a decoder may read behind the data


@njit
def fill(array, start, stop, value):
    """As a slice assignment, which takes numba a second to compile."""
    for i in range(start, stop):
        array[i] = value


# --- bytes


@njit
def two(data, position):
    """The two bytes at `position` as a number."""
    return np.int64(data[position]) << 8 | np.int64(data[position + 1])


@njit
def starts_with(data, start, stop, text):
    """Whether data[start:stop] begins with `text`, uint8 [n]."""
    if stop - start < len(text):
        return False
    for i in range(len(text)):
        if data[start + i] != text[i]:
            return False
    return True


@njit
def next_marker(data, position):
    """Where the next 0xFF stands that is followed by something other than a stuffed zero; len(data) for none."""
    last = len(data) - 1  # a 0xFF there has nothing behind it
    while position + 32 <= last:
        plain = np.int64(before_marker(address(data) + U(position)))
        position += plain
        if plain < 32:
            return position
    while position < last:
        if data[position] == 0xFF and data[position + 1] != 0:
            return position
        position += 1
    return len(data)


@njit
def skip_fill(data, position):
    """From a marker's first 0xFF to the marker's code: (where it stands, code); code -1 at the end of the data."""
    while position < len(data) and data[position] == 0xFF:
        position += 1
    return position, (np.int64(data[position]) if position < len(data) else -1)


@njit
def unstuff(data, position, stream):
    """Copy entropy-coded bytes, less the zeros behind each 0xFF, up to the next marker.

    Returns how many bytes were copied, and where the marker's 0xFF stands: len(data) where no marker comes. PADDING
    zeros follow the copied bytes.
    """
    count, last = 0, len(data) - 1
    while position < last:
        if position + 32 <= last:
            plain = np.int64(copy_to_ff(address(data) + U(position), address(stream) + U(count)))
            count, position = count + plain, position + plain
            if plain == 32:
                continue
        elif data[position] != 0xFF:
            stream[count] = data[position]
            count, position = count + 1, position + 1
            continue
        if data[position + 1] != 0:
            break
        stream[count] = 0xFF
        count, position = count + 1, position + 2
    else:
        if position == last and data[position] != 0xFF:
            stream[count] = data[position]
            count += 1
        position = len(data)
    fill(stream, count, count + PADDING, 0)
    return count, position


# --- bits read


@njit
def big(stream, position):
    """Eight bytes from `position` on (uint64), the first one highest; LLVM makes it one load."""
    high = (
        U(stream[position]) << U56
        | U(stream[position + U1]) << U48
        | U(stream[position + U2]) << U40
        | U(stream[position + U3]) << U32
    )
    low = (
        U(stream[position + U4]) << U24
        | U(stream[position + U(5)]) << U16
        | U(stream[position + U6]) << U8
        | U(stream[position + U7])
    )
    return high | low


@njit
def refill(stream, position, window, bits):
    """Fill the window up to 56 bits or more, without a branch -> (position, window, bits). stream: an array."""
    window |= big(stream, position) >> bits
    return position + ((U63 - bits) >> U3), window, bits | U56


@njit
def top_up(stream, position, window, bits):
    """`refill` of a stream by its address."""
    window |= load_big(stream, position) >> bits
    return position + ((U63 - bits) >> U3), window, bits | U56


# --- bits written


@njit
def first_ff(word):
    """Which byte of a word is the lowest 0xFF: 0..7; 8 for none."""
    # The high bits of bytes that are 0xFF; false ones lie above the first true one only, so zero means none.
    high_bits = (~word - ONES) & word & HIGHS
    if high_bits == U0:
        return U8
    return ((high_bits & (~high_bits + U1)) >> U7) * BYTE_NUMBERS >> U56


@njit
def copy_bits(stream, start, stop, held, count, out, written):
    """Write bits [start, stop) of `stream` -> (held, count, written).

    held: the lowest `count` bits are those not yet written, at most 31 between calls; written: bytes of `out`.
    """
    while start < stop:
        n = min(U32, stop - start)
        held = held << n | (big(stream, start >> U3) << (start & U7)) >> (U64 - n)
        start += n
        held, count, written = _flush(held, count + n, out, written)
    return held, count, written


@njit
def put_bits(bits, n, held, count, out, written):
    """Write the lowest n <= 32 of `bits` -> as `copy_bits`."""
    return _flush(held << n | bits, count + n, out, written)


@njit
def pad(held, count, out, written):
    """Write what is held, filled up to a byte -> bytes written."""
    spare = (U8 - count % U8) % U8
    held, count = (held << spare) | ((U1 << spare) - U1), count + spare  # T.81 F.1.2.3: ones
    while count:
        count -= U8
        written = _put(out, written, (held >> count) & U255)
    return written


@njit
def _flush(held, count, out, written):
    """Write 32 bits where there are so many."""
    if count >= U32:
        count -= U32
        word = (held >> count) & U(0xFFFFFFFF)
        if first_ff(word) == U8:
            to = U(written)
            out[to], out[to + U1], out[to + U2], out[to + U3] = word >> U24, word >> U16, word >> U8, word
            written += 4
        else:
            for shift in (24, 16, 8, 0):
                written = _put(out, written, (word >> U(shift)) & U255)
    return held, count, written


@njit
def _put(out, written, byte):
    out[written] = byte
    if byte == U255:
        out[written + 1] = 0
        return written + 2
    return written + 1
