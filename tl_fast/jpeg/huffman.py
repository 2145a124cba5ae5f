"""Huffman-coded JPEG data (ITU-T T.81 annex F) without pixels: decoded to its end to know that it is whole, or with
chroma spliced in.

Validating needs no coefficients, so one look-up passes over as many symbols as fit in its index, their extra bits
included, and the loop over look-ups has no branch on what it finds: the next table follows from the entry by masks.
Measured: 0.4 of the time that libjpeg-turbo needs to decode at 1/8 size. `tl_fast.jpeg.markers` reads what comes before
and between.
"""

from __future__ import annotations

import numpy as np

from tl_fast.jpeg.markers import (
    BAD_CODE,
    BAD_RESTART,
    BAD_TABLE,
    COLOUR,
    COMPONENT,
    COMPONENTS,
    END,
    ENDS_IN_SCAN,
    EOI,
    GREY,
    HUFFMAN,
    NO_END,
    ODD,
    OK,
    RESTART,
    RST0,
    SCAN,
    SINGLE,
    STATUS,
    WHERE,
    compare_head,
    fill,
    find_end,
    first_ff,
    mcu_count,
    read_markers,
    skip_fill,
    walk_scans,
)
from tl_fast.maths.compile import njit
from tl_fast.maths.memory import address, copy_to_ff

U = np.uint64

# An entry of a look-up table, int16. Bits 0..5: bits to consume, 6..14: coefficients to advance by, 15 (the sign): the
# block ends.
INDEX_BITS = 11  # 10: 6 % slower; 12: 3 % faster, but its tables take 1.7 times as long to build
TABLE = 1 << INDEX_BITS
LONGEST = 18  # bits an entry may consume, so that three fit in one refill of 56 bits
UNKNOWN = 500 << 6  # no such code, or too long a one: the advance leads out of the block, so the loop stops at it
END_OF_BLOCK = -(1 << 15)
KEY = 16 + 256  # a table as its DHT segment says it: how many codes of each length, and their symbols
SLOTS = 4  # pairs of a DC and an AC table, each at 2 TABLE entries; behind them room for building
LOOKUP = (2 * SLOTS + 3) * TABLE
PADDING = 64  # zeros that the decoder may read behind the data
BLOCKS = 10  # of an MCU at most (T.81 B.2.3)

U0, U1, U2, U3, U6, U8, U16, U32, U56, U63, U64, U511, U_WORD = (
    U(n) for n in (0, 1, 2, 3, 6, 8, 16, 32, 56, 63, 64, 511, 0xFFFF)
)
INDEX_SHIFT = U(64 - INDEX_BITS)


# --- bits
# ------------------------------------------------------------------------------------------------------------------


@njit
def big(stream, at):
    """Eight bytes from `at` on (uint64), the first one highest; LLVM makes it one load."""
    high = (
        U(stream[at]) << U(56)
        | U(stream[at + U(1)]) << U(48)
        | U(stream[at + U(2)]) << U(40)
        | U(stream[at + U(3)]) << U(32)
    )
    low = (
        U(stream[at + U(4)]) << U(24)
        | U(stream[at + U(5)]) << U(16)
        | U(stream[at + U(6)]) << U(8)
        | U(stream[at + U(7)])
    )
    return high | low


@njit
def refill(stream, at, window, bits):
    """Top up to 56 bits or more, without a branch. window: next bits, the first one highest; bits: how many; at: the
    byte to read next."""
    window |= big(stream, at) >> bits
    return at + ((U63 - bits) >> U3), window, bits | U56


@njit
def unstuff(data, at, stream):
    """Copy entropy-coded bytes, less the zeros behind each 0xFF, up to the next marker -> (bytes copied, where its 0xFF
    stands).

    PADDING zeros follow. The place is len(data) where no marker comes.
    """
    count, last = 0, len(data) - 1
    while at < last:
        if at + 32 <= last:
            plain = np.int64(copy_to_ff(address(data) + U(at), address(stream) + U(count)))
            count, at = count + plain, at + plain
            if plain == 32:
                continue
        elif data[at] != 0xFF:
            stream[count] = data[at]
            count, at = count + 1, at + 1
            continue
        if data[at + 1] != 0:
            break
        stream[count] = 0xFF
        count, at = count + 1, at + 2
    else:
        if at == last and data[at] != 0xFF:
            stream[count] = data[at]
            count += 1
        at = len(data)
    fill(stream, count, count + PADDING, 0)
    return count, at


# --- tables
# ----------------------------------------------------------------------------------------------------------------


@njit
def read_symbol(window, keys, key):
    """(bits of the code, symbol) by T.81 F.2.2.3, a bit at a time; (0, 0) where no code fits."""
    code, first, index = 0, 0, key + 16
    for length in range(1, 17):
        count = np.int64(keys[key + length - 1])
        code = np.int64(window >> U(64 - length))
        if code - first < count:
            return length, np.int64(keys[index + code - first])
        first, index = (first + count) << 1, index + count
    return 0, 0


@njit
def entry(length, symbol, is_dc):
    """What one symbol with its extra bits does, as a table's entry that may be of any length; UNKNOWN for what 8-bit
    data cannot hold.

    libjpeg takes AC symbols of a run with no coefficient (0x10..0xE0) for end-of-block and 16 bits for a size; encoders
    write neither.
    """
    if length == 0:
        return UNKNOWN
    if is_dc:
        return length + symbol | 1 << 6 if symbol <= 11 else UNKNOWN
    run, size = symbol >> 4, symbol & 15
    if size == 0:
        return length | END_OF_BLOCK if run == 0 else (length | 16 << 6 if run == 15 else UNKNOWN)
    return length + size | (run + 1) << 6 if size <= 10 else UNKNOWN


@njit
def build(keys, key, is_dc, lookup, base):
    """The table at lookup[base:] for the codes at keys[key:]; False where they are no Huffman code in libjpeg's
    eyes."""
    single, lengths = 2 * SLOTS * TABLE, (2 * SLOTS + 1) * TABLE
    fill(lookup, single, single + TABLE, UNKNOWN)
    fill(lookup, lengths, lengths + TABLE, 99)
    code, index = 0, key + 16
    for length in range(1, 17):
        for _ in range(keys[key + length - 1]):
            symbol = np.int64(keys[index])
            index += 1
            if is_dc and symbol > 15:
                return False
            if length <= INDEX_BITS and code < 1 << length:
                step = entry(length, symbol, is_dc)
                if step & 63 <= LONGEST:
                    width = 1 << (INDEX_BITS - length)
                    for i in range(code * width, (code + 1) * width):
                        lookup[single + i], lookup[lengths + i] = step, length
            code += 1
        if (
            code >= 1 << length and index > key + 16
        ):  # more codes than there are, or one of ones only, which T.81 excludes
            return False
        code <<= 1
    for i in range(TABLE):
        step = np.int64(lookup[single + i])
        bits, advance, end = step & 63, step >> 6 & 511, step & END_OF_BLOCK
        while not is_dc and not end and advance <= 63:
            shifted = (i << bits) & (TABLE - 1)
            step = np.int64(lookup[single + shifted])
            if (
                bits + lookup[lengths + shifted] > INDEX_BITS
                or bits + (step & 63) > LONGEST
                or advance + (step >> 6 & 511) > 63
            ):
                break
            bits, advance, end = bits + (step & 63), advance + (step >> 6 & 511), step & END_OF_BLOCK
        lookup[base + i] = bits | advance << 6 | end
    return index > key + 16


@njit
def prepare_tables(data, record, keys, lookup, layout):
    """Tables and block order of a single scan -> (blocks of an MCU, status).

    keys: uint8 [2 * SLOTS * KEY] and lookup: int16 [LOOKUP] keep the last file's tables: most files use the same ones.
    layout: uint64 [BLOCKS], for each block of an MCU where its AC table is in `lookup` (16 bits), that xor the next
    block's DC table (16 bits) and the next block.
    """
    blocks = 0
    for i in range(record[COMPONENTS]):
        c = COMPONENT + 5 * i
        slot = i
        for other in range(i):
            if record[COMPONENT + 5 * other + 4] == record[c + 4] and slot == i:
                slot = other
        if slot == i:
            for kind in range(2):
                table = record[c + 4] & 15 if kind else record[c + 4] >> 4
                key = (2 * slot + kind) * KEY
                if take_key(data, record[HUFFMAN + 4 * kind + table], keys, key):
                    if not build(keys, key, kind == 0, lookup, (2 * slot + kind) * TABLE):
                        fill(keys, key, key + 16, 0)  # not to be taken for a known one by the next file
                        return 0, BAD_TABLE
        for _ in range(record[c + 1] * record[c + 2] if record[COMPONENTS] > 1 else 1):
            layout[blocks] = (2 * slot + 1) * TABLE
            blocks += 1
    for b in range(blocks - 1, -1, -1):  # backwards, since it needs the next one as it is now
        following = b + 1 if b + 1 < blocks else 0
        own, next_dc = layout[b], (layout[following] & U_WORD) ^ U(TABLE)
        layout[b] = own | (own ^ next_dc) << U16 | U(following) << U32
    return blocks, OK


@njit
def take_key(data, at, keys, key):
    """Copy a table from its DHT segment; False where it is the one that is there."""
    size, same = 16, True
    for i in range(16):
        size += np.int64(data[at + i])
        same &= keys[key + i] == data[at + i]
    for i in range(16, size):
        same &= keys[key + i] == data[at + i]
    if same and size > 16:
        return False
    fill(keys, key + 16, key + KEY, 0)
    for i in range(size):
        keys[key + i] = data[at + i]
    return True


# --- blocks
# ----------------------------------------------------------------------------------------------------------------


@njit
def decode_blocks(stream, size, blocks, keys, lookup, layout, marks):
    """Decode `blocks` blocks (of whole MCUs) from stream[:size] -> (bits consumed, blocks decoded); fewer where the
    data is bad.

    marks: uint64 [blocks], where the bit behind each block is put, or None (which is compiled apart: 10 % faster).
    """
    total, limit = U(blocks), U(size + 8)
    at, window, bits = U0, U0, U0
    count, k, block = (
        U0,
        U0,
        layout[0],
    )  # blocks behind, coefficients behind in the block, where the block is in the MCU
    base = (block & U_WORD) ^ U(TABLE)
    while count != total and at <= limit:
        at, window, bits = refill(stream, at, window, bits)
        spent = U0  # sum of entries, of which the low six bits count: at most 3 * 18 bits
        before, spent_before, k_before = window, spent, k
        for _ in range(3):
            before, spent_before, k_before = window, spent, k
            step = np.int64(lookup[base + (window >> INDEX_SHIFT)])
            end = U(step >> 15)  # all ones or zero
            window <<= U(step) & U63
            spent += U(step)
            k += U(step) >> U6 & U511
            if k > U63:
                break
            base = (block & U_WORD) ^ (end & (block >> U16 & U_WORD))
            block ^= end & (block ^ layout[block >> U32])
            k &= ~end
            if marks is not None:
                marks[count] = at * U8 - bits + (spent & U63)
            count -= end
            if count == total:
                break
        if k <= U63:
            bits -= spent & U63
            continue
        # Not in the table, or it leads beyond the block, which may have ended within the entry: take a single symbol.
        bits -= spent_before & U63
        at, window, bits = refill(stream, at, before, bits)
        k, table = k_before, np.int64((block & U_WORD) >> U(INDEX_BITS))
        length, symbol = read_symbol(window, keys, (table - (k == U0)) * KEY)
        step = entry(length, symbol, k == U0)
        used = U(step) & U63
        k += U(step) >> U6 & U511
        if k > U64:
            return np.int64(at * U8 - bits), np.int64(count)
        window, bits, base = window << used, bits - used, block & U_WORD
        if step < 0 or k == U64:
            if marks is not None:
                marks[count] = at * U8 - bits
            base, block = (block ^ block >> U16) & U_WORD, layout[block >> U32]
            count, k = count + U1, U0
    return np.int64(at * U8 - bits), np.int64(count)


# --- scans
# -----------------------------------------------------------------------------------------------------------------


@njit
def check_scan(data, record, stream, keys, lookup, layout, marks, grey):
    """Decode a single scan to its EOI -> (status, bytes written to `grey`).

    OK is stricter than libjpeg, which is silent on: codes that do not exist (in its fast loop), runs beyond the 63rd
    coefficient, up to seven bytes too many before a marker, a restart marker behind the last MCU, other segments
    between the data and EOI, 0xFF before a stuffed one. The first two are BAD_CODE; the others ODD, to be looked at by
    libjpeg. grey: uint8, where the scan of a greyscale file goes with its chroma spliced in (`splice_grey`), and marks:
    uint64 [MCUs] for it; None for both otherwise.
    """
    blocks, status = prepare_tables(data, record, keys, lookup, layout)
    if status != OK:
        return status, 0
    left = mcu_count(record)
    interval = record[RESTART] if record[RESTART] else left
    at, restarts, odd, written = record[SCAN], 0, False, 0
    while True:
        size, end = unstuff(data, at, stream)
        wanted = min(interval, left) * blocks
        used, decoded = decode_blocks(stream, size, wanted, keys, lookup, layout, marks)
        record[WHERE] = min(at + (used >> 3), end)
        at, code = skip_fill(data, end)
        if code == 0:  # 0xFF 0xFF 0x00, which libjpeg takes for a stuffed 0xFF and T.81 does not know
            return ODD, 0
        if used > 8 * size:
            return ENDS_IN_SCAN, 0
        if decoded < wanted:
            return BAD_CODE, 0
        odd |= 8 * size - used > 7 or at - end > 1
        if grey is not None:
            written = splice_grey(stream, marks, wanted, grey, written)
        left -= min(interval, left)
        record[WHERE] = end
        if code < 0:
            return NO_END, 0
        at += 1
        if left == 0:
            break
        if code != RST0 + (restarts & 7):
            return ENDS_IN_SCAN if code == EOI else BAD_RESTART, 0
        if grey is not None:
            grey[written], grey[written + 1] = 0xFF, code
            written += 2
        restarts += 1
    record[END] = at
    if code != EOI or odd:
        return ODD, 0
    return OK, written


@njit
def splice_grey(stream, marks, blocks, out, at):
    """Write `blocks` luma blocks of `stream`, each with four zero bits behind it -> where the next byte goes.

    The zeros are two chroma blocks, each "no difference" and "end of block" in tables that have one code of one bit.
    """
    held, fill, position = U0, U0, U0
    for i in range(blocks):
        held, fill, at = copy_bits(stream, position, marks[i], held, fill, out, at)
        position = marks[i]
        held, fill, at = _flush(held << U(4), fill + U(4), out, at)
    return pad(held, fill, out, at)


@njit
def copy_bits(stream, position, stop, held, fill, out, at):
    """Write bits [position, stop) of `stream` -> (held, fill, where the next byte goes).

    held: the lowest `fill` bits are those not yet written, at most 31 between calls.
    """
    while position < stop:
        n = min(U(32), stop - position)
        held = held << n | (big(stream, position >> U3) << (position & U(7))) >> (U64 - n)
        position += n
        held, fill, at = _flush(held, fill + n, out, at)
    return held, fill, at


@njit
def put_bits(bits, n, held, fill, out, at):
    """Write the lowest n <= 32 bits -> as `copy_bits`."""
    return _flush(held << n | bits, fill + n, out, at)


@njit
def pad(held, fill, out, at):
    """Write what is held, filled up to a byte -> where the next one goes."""
    spare = (U8 - fill % U8) % U8
    held, fill = (held << spare) | ((U1 << spare) - U1), fill + spare  # T.81 F.1.2.3: ones
    while fill:
        fill -= U8
        at = _put(out, at, (held >> fill) & U(255))
    return at


@njit
def _flush(held, fill, out, at):
    """Write 32 bits where there are so many."""
    if fill >= U(32):
        fill -= U(32)
        word = (held >> fill) & U(0xFFFFFFFF)
        if first_ff(word) == U8:
            to = U(at)
            out[to], out[to + U(1)], out[to + U(2)], out[to + U(3)] = word >> U(24), word >> U(16), word >> U(8), word
            at += 4
        else:
            for shift in (24, 16, 8, 0):
                at = _put(out, at, (word >> U(shift)) & U(255))
    return held, fill, at


@njit
def _put(out, at, byte):
    out[at] = byte
    if byte == U(255):
        out[at + 1] = 0
        return at + 2
    return at + 1


@njit
def inspect(data, decode, record, head, stream, keys, lookup, layout, accuracy):
    """All that is to know before a JPEG is copied, in one call without the GIL. Results: record, head (`read_markers`).

    data: uint8 [n]; decode: decode a single scan's data, else look for its end only, as with greyscale ones in any
    case, which are still to be spliced; stream: uint8 [n + PADDING or more]. record[STATUS] is about the whole file.
    The last five arrays are working memory of one thread at a time.
    """
    status = read_markers(data, record, head)
    if status == OK:
        if record[SINGLE] == 0:
            status = walk_scans(data, record, accuracy)
        elif decode and record[COLOUR] != GREY:
            status, _ = check_scan(data, record, stream, keys, lookup, layout, None, None)
        else:
            status = find_end(data, record)
        if status == OK:
            compare_head(data, record, head)
    record[STATUS] = status
