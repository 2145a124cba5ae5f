"""CPU loops over masks, compiled by numba: they code a mask as its rows' runs, and read such a code.

docs/file_format.md describes the code. Every loop releases the GIL. Errors are numbers here; `tl_fast.masks.format`
puts them into words.
"""

from __future__ import annotations

import numpy as np

from tl_fast.maths.compile import njit
from tl_fast.maths.memory import address, leading_zeros, load_big

# What is wrong with a mask; 0 stands for nothing.
BAD_SIZE, BAD_CLASS, BAD_CODE, BAD_RUN = 1, 2, 3, 4

PLAIN, RUNS = 0, 1  # a mask's first byte: its pixels follow, or its rows' runs

# What a code word says of the next run. KEEP + d: as the next run of the row above, but starting d pixels to the right.
LONG, DROP, NEW, AGAIN = 1, 2, 3, 4
KEEP, REACH = 16, 3  # KEEP - REACH to KEEP + REACH

# The code words: what each says, and its bits. '000000' is no code word, so that zeros end in an error.
_WORDS = {
    KEEP: "1",
    KEEP - 1: "010",
    KEEP + 1: "011",
    KEEP - 2: "00100",
    KEEP + 2: "00101",
    DROP: "00110",
    LONG: "00111",
    NEW: "00010",
    AGAIN: "00011",
    KEEP - 3: "000010",
    KEEP + 3: "000011",
}
_WORD_BITS = 6
_CODE, _LENGTH = np.zeros(32, np.int64), np.zeros(32, np.int64)
_WORD_AT, _LENGTH_AT = np.zeros(1 << _WORD_BITS, np.int64), np.zeros(1 << _WORD_BITS, np.int64)
for _word, _bits in _WORDS.items():
    _CODE[_word], _LENGTH[_word] = int(_bits, 2), len(_bits)
    _first = int(_bits, 2) << _WORD_BITS - len(_bits)
    _WORD_AT[_first : _first + (1 << _WORD_BITS - len(_bits))] = _word
    _LENGTH_AT[_first : _first + (1 << _WORD_BITS - len(_bits))] = len(_bits)

LONGEST_HEAD = 2 + 256  # bytes: what kind of code, the palette's size, the palette
LONGEST_WORD = 48  # bits, at least what a word takes with its numbers
PADDING = 8  # zeros behind a code, for reads of eight bytes
MAX_PAIRS = 1 << 16  # pairs of runs, one of each of two rows, that the encoder compares at most


@njit
def _put(out: np.ndarray, position: int, value: int, count: int) -> int:
    """Write the `count` low bits of `value` from bit `position` of `out` on, which are zero; returns the next one."""
    for k in range(count):
        if value >> (count - 1 - k) & 1:
            bit = position + k
            out[bit >> 3] |= np.uint8(128 >> (bit & 7))
    return position + count


@njit
def _put_number(out: np.ndarray, position: int, value: int) -> int:
    """Write value >= 1 in Elias's gamma code: as many zeros as it has bits beyond the first, then its bits."""
    count = 1
    while value >> count:
        count += 1
    return _put(out, position, value, 2 * count - 1)


@njit
def _number_bits(value: int) -> int:
    """Bits of value >= 1 in Elias's gamma code."""
    count = 1
    while value >> count:
        count += 1
    return 2 * count - 1


@njit
def _keep_bits(shift: int) -> int:
    """Bits that keep a run of the row above, `shift` pixels further right."""
    if -REACH <= shift <= REACH:
        return _LENGTH[KEEP + shift]
    return _LENGTH[LONG] + 1 + _number_bits(abs(shift) - REACH)


@njit
def _count_bits(values: int) -> int:
    """Bits that hold the numbers 0 to values - 1."""
    count = 0
    while (values - 1) >> count:
        count += 1
    return count


@njit
def encode(mask: np.ndarray, out: np.ndarray) -> int:
    """Code a mask, uint8 [H, W], in `out`, uint8 [1 + H * W], written. Returns the size in bytes."""
    height, width = mask.shape
    seen = np.zeros(256, np.uint8)
    for y in range(height):
        for x in range(width):
            seen[mask[y, x]] = 1
    if len(out) > LONGEST_HEAD:
        index, count = np.zeros(256, np.int64), 0
        out[:] = 0
        out[0] = RUNS
        for value in range(256):
            if seen[value]:
                index[value] = count
                count += 1
                out[1 + count] = value
        out[1] = count - 1
        size = _encode_rows(mask, index, _count_bits(count), out[: len(out) - 1], 8 * (2 + count))
        if size > 0:
            return size
    out[0] = PLAIN
    for y in range(height):
        out[1 + y * width : 1 + (y + 1) * width] = mask[y]
    return len(out)


@njit
def _encode_rows(mask: np.ndarray, index: np.ndarray, index_bits: int, out: np.ndarray, position: int) -> int:
    """Code all rows from bit `position` on -> bytes used, or 0 where `out` is too small.

    index: int64 [256], each value's index in the palette, of `index_bits` bits.
    """
    height, width = mask.shape
    lists = np.zeros((2, width + 1), np.int64)
    above_count, bits, words = 0, np.zeros(0, np.int64), np.zeros(0, np.uint8)
    for y in range(height):
        row, row_above = mask[y], mask[max(y - 1, 0)]
        starts, above = lists[y & 1], lists[1 - (y & 1)]
        count = 0
        for x in range(width):
            if x == 0 or row[x] != row[x - 1]:
                starts[count] = x
                count += 1
        pairs = (above_count + 1) * (count + 1)
        compared = pairs <= MAX_PAIRS
        if compared and len(bits) < pairs:
            bits, words = np.zeros(2 * pairs, np.int64), np.zeros(2 * pairs, np.uint8)
        if compared:
            _choose_words(row, row_above, starts[:count], above[:above_count], index_bits, bits, words)
        i = j = 0
        while i < above_count or j < count:
            if position + LONGEST_WORD > 8 * len(out):
                return 0
            word = np.int64(words[i * (count + 1) + j]) if compared else DROP if i < above_count else NEW
            if word == DROP:
                position = _put(out, position, _CODE[DROP], _LENGTH[DROP])
                i += 1
            elif word == KEEP:
                shift = starts[j] - above[i]
                if -REACH <= shift <= REACH:
                    position = _put(out, position, _CODE[KEEP + shift], _LENGTH[KEEP + shift])
                else:
                    position = _put(out, position, _CODE[LONG], _LENGTH[LONG])
                    position = _put(out, position, 1 if shift < 0 else 0, 1)
                    position = _put_number(out, position, abs(shift) - REACH)
                i, j = i + 1, j + 1
            else:
                again = above_count > 0 and row_above[starts[j]] == row[starts[j]]
                word = AGAIN if again else NEW
                position = _put(out, position, _CODE[word], _LENGTH[word])
                position = _put_number(out, position, starts[j] - (starts[j - 1] if j else -1))
                if not again:
                    position = _put(out, position, index[row[starts[j]]], index_bits)
                j += 1
        position = _put(out, position, _CODE[KEEP], _LENGTH[KEEP])
        above_count = count
    return (position + 7) >> 3


@njit
def _choose_words(
    row: np.ndarray,
    row_above: np.ndarray,
    starts: np.ndarray,
    above: np.ndarray,
    index_bits: int,
    bits: np.ndarray,
    words: np.ndarray,
) -> None:
    """Find the words of fewest bits for a row whose runs begin at `starts` [n], below one whose runs begin at
    `above` [m], which is empty for the first row.

    words, uint8 [>= (m + 1) * (n + 1)], written: KEEP (of any shift), DROP or NEW (or AGAIN) for what is left when the
    first i runs above and the first j of this row are dealt with, at i * (n + 1) + j. bits: int64, the same size,
    written: how many bits the rest takes.
    """
    columns = len(starts) + 1
    for i in range(len(above), -1, -1):
        for j in range(len(starts), -1, -1):
            here = i * columns + j
            if i == len(above) and j == len(starts):
                bits[here] = 0
                continue
            fewest, word = np.int64(1) << 60, 0
            if i < len(above):
                fewest, word = bits[here + columns] + _LENGTH[DROP], DROP
            if j < len(starts):
                value, distance = row[starts[j]], starts[j] - (starts[j - 1] if j else -1)
                new = bits[here + 1] + _LENGTH[NEW] + _number_bits(distance)
                if len(above) == 0 or row_above[starts[j]] != value:
                    new += index_bits
                if new < fewest:
                    fewest, word = new, NEW
                if i < len(above) and row_above[above[i]] == value:
                    keep = bits[here + columns + 1] + _keep_bits(starts[j] - above[i])
                    if keep < fewest:
                        fewest, word = keep, KEEP
            bits[here], words[here] = fewest, word


@njit
def _gamma(window: int) -> tuple[int, int]:
    """The number that the bits of `window`, uint64, begin with in Elias's gamma code, and its bits.

    (0, 0): none below 65,536.
    """
    zeros = leading_zeros(window)
    if zeros >= np.uint64(16):
        return 0, 0
    window <<= zeros
    return np.int64(window >> (np.uint64(63) - zeros)), 2 * np.int64(zeros) + 1


@njit
def decode(data: np.ndarray, allowed: np.ndarray, out: np.ndarray) -> int:
    """Read a mask. Returns 0 or what is wrong.

    data: uint8 [size]; allowed: uint8 [256], not 0 for the values that a pixel may have; out: uint8 [H, W], written.
    Nothing is read or written out of bounds, whatever `data` holds.
    """
    height, width = out.shape
    if len(data) == 0:
        return BAD_SIZE
    if data[0] == PLAIN:
        if len(data) != 1 + height * width:
            return BAD_SIZE
        good = np.uint8(1)
        for y in range(height):
            row, target = data[1 + y * width : 1 + (y + 1) * width], out[y]
            for x in range(width):
                target[x] = row[x]
                good &= allowed[row[x]]
        return 0 if good else BAD_CLASS
    if data[0] != RUNS:
        return BAD_CODE
    if len(data) < 2 or len(data) < 3 + np.int64(data[1]):
        return BAD_SIZE
    palette = data[2 : 3 + np.int64(data[1])]
    for i in range(len(palette)):
        if not allowed[palette[i]]:
            return BAD_CLASS
    stream = np.zeros(len(data) + PADDING, np.uint8)
    stream[: len(data)] = data
    return _decode_rows(stream, 8 * len(data), palette, _count_bits(len(palette)), out)


@njit
def _decode_rows(stream: np.ndarray, end: int, palette: np.ndarray, index_bits: int, out: np.ndarray) -> int:
    """Read all rows, which follow the palette in `stream` and end before its bit `end`. Returns 0 or what is wrong."""
    height, width = out.shape
    base, position = address(stream), 8 * (2 + len(palette))
    # The runs of the row above and of this one: where they start, and their values.
    lists, lists_values = np.empty((2, width + 1), np.int64), np.empty((2, width + 1), np.uint8)
    above_count = 0
    for y in range(height):
        above, above_values = lists[y & 1], lists_values[y & 1]
        starts, values = lists[1 - (y & 1)], lists_values[1 - (y & 1)]
        row = out[y]
        i, count, start, value = 0, 0, -1, np.uint8(0)
        while True:
            if position > end:
                return BAD_SIZE
            # 57 bits at least, and a word with all that follows it has 46 at most.
            window = load_big(base, np.uint64(position >> 3)) << np.uint64(position & 7)
            first_bits = window >> np.uint64(64 - _WORD_BITS)
            word, length = _WORD_AT[first_bits], _LENGTH_AT[first_bits]
            if length == 0:
                return BAD_CODE
            position += length
            window <<= np.uint64(length)
            if word >= KEEP - REACH:
                if i == above_count:
                    if word == KEEP:
                        break
                    return BAD_RUN
                next_start, next_value = above[i] + (word - KEEP), above_values[i]
                i += 1
            elif word == DROP:
                if i == above_count:
                    return BAD_RUN
                i += 1
                continue
            elif word == LONG:
                if i == above_count:
                    return BAD_RUN
                number, length = _gamma(window << np.uint64(1))
                if length == 0:
                    return BAD_CODE
                position += 1 + length
                shift = number + REACH
                next_start, next_value = above[i] + (-shift if window >> np.uint64(63) else shift), above_values[i]
                i += 1
            else:
                number, length = _gamma(window)
                if length == 0:
                    return BAD_CODE
                position += length
                next_start = start + number
                if next_start >= width:
                    return BAD_RUN
                if word == AGAIN:
                    if y == 0:
                        return BAD_RUN
                    next_value = out[y - 1, next_start]
                else:
                    index = 0
                    if index_bits:
                        index = np.int64(window << np.uint64(length) >> np.uint64(64 - index_bits))
                        position += index_bits
                    if index >= len(palette):
                        return BAD_CLASS
                    next_value = palette[index]
            if next_start <= start or next_start >= width or (start < 0 and next_start > 0):
                return BAD_RUN
            if start >= 0:
                row[start:next_start] = value
            starts[count], values[count] = next_start, next_value
            start, value = next_start, next_value
            count += 1
        if count == 0:
            return BAD_RUN
        row[start:] = value
        above_count = count
    return 0 if position <= end < position + 8 else BAD_SIZE
