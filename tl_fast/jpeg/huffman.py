"""Huffman-coded JPEG data (ITU-T T.81 annex F) without pixels: decoded to its end to know that it is whole, or with
chroma spliced in.

Validating needs no coefficients, so one look-up passes over as many symbols as fit in its index, their extra bits
included. The loop over look-ups does not branch on what an entry says: the next table follows from the entry by masks.
Measured: 0.4 of the time that libjpeg-turbo needs to decode at 1/8 size. `tl_fast.jpeg.markers` reads what comes before
and between.
"""

from __future__ import annotations

import numpy as np

from tl_fast.jpeg.bits import copy_bits, fill, pad, put_bits, refill, skip_fill, unstuff
from tl_fast.jpeg.markers import (
    BAD_CODE,
    BAD_RESTART,
    BAD_TABLE,
    COLOUR,
    COMPONENTS,
    END,
    ENDS_IN_SCAN,
    EOI,
    GREY,
    NO_END,
    ODD,
    OK,
    RESTART,
    RST0,
    SCAN,
    SINGLE,
    STATUS,
    TABLES,
    WHERE,
    component,
    component_blocks,
    huffman_table,
    mcu_count,
    read_markers,
)
from tl_fast.jpeg.scan_markers import compare_head, find_end, walk_scans
from tl_fast.maths.compile import njit
from tl_fast.maths.memory import U0, U1, U4, U6, U8, U16, U17, U32, U63, U64, U511, U_WORD, U, address, load_uint8

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
MAX_DC_SIZE, MAX_AC_SIZE = 11, 10  # extra bits of a symbol in 8-bit data (T.81 tables F.1 and F.2)

INDEX_SHIFT = U(64 - INDEX_BITS)


# --- tables


@njit
def read_symbol(window, codes):
    """(bits of the code, symbol) by T.81 F.2.2.3, a bit at a time; (0, 0) where no code fits.

    All uint64; codes: address of the table's key.
    """
    first, index = U0, U16
    for length in range(U1, U17):
        count = U(load_uint8(codes, length - U1))
        code = window >> (U64 - length)
        if code < first + count:
            return length, U(load_uint8(codes, index + code - first))
        first, index = (first + count) << U1, index + count
    return U0, U0


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
        return length + symbol | 1 << 6 if symbol <= MAX_DC_SIZE else UNKNOWN
    run, size = symbol >> 4, symbol & 15
    if size == 0:
        return length | END_OF_BLOCK if run == 0 else (length | 16 << 6 if run == 15 else UNKNOWN)
    return length + size | (run + 1) << 6 if size <= MAX_AC_SIZE else UNKNOWN


@njit
def build(keys, key, is_dc, lookup, base):
    """Build the table at lookup[base:] for the codes at keys[key:] -> whether libjpeg takes them for a Huffman code."""
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
        # More codes than there are, or one of ones only, which T.81 excludes.
        if code >= 1 << length and index > key + 16:
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
def table_slot(record, number):
    """Where the tables of a component are kept: the number of the first component that uses the same ones."""
    tables = record[component(number) + TABLES]
    slot = 0
    while record[component(slot) + TABLES] != tables:
        slot += 1
    return slot


@njit
def prepare_tables(data, scan):
    """Tables and block order of a single scan, into scan.keys, .lookup and .layout -> (blocks of an MCU, status).

    scan: `ScanMemory`, of which the record is filled. Keys and look-up keep the last file's tables: most files use the
    same ones.
    """
    record, keys, lookup, layout = scan.record, scan.keys, scan.lookup, scan.layout
    blocks = 0
    for number in range(record[COMPONENTS]):
        slot = table_slot(record, number)
        if slot == number:
            for kind in range(2):
                key = (2 * slot + kind) * KEY
                if take_key(data, huffman_table(record, number, kind), keys, key):
                    if not build(keys, key, kind == 0, lookup, (2 * slot + kind) * TABLE):
                        fill(keys, key, key + 16, 0)  # not to be taken for a known one by the next file
                        return 0, BAD_TABLE
        for _ in range(component_blocks(record, number)):
            layout[blocks] = (2 * slot + 1) * TABLE
            blocks += 1
    for b in range(blocks - 1, -1, -1):  # backwards, since it needs the next one as it is now
        following = b + 1 if b + 1 < blocks else 0
        own, next_dc = layout[b], (layout[following] & U_WORD) ^ U(TABLE)
        layout[b] = own | (own ^ next_dc) << U16 | U(following) << U32
    return blocks, OK


@njit
def take_key(data, start, keys, key):
    """Copy a table from its DHT segment, data[start:], to keys[key:] -> False where it is there already."""
    size, same = 16, True
    for i in range(16):
        size += np.int64(data[start + i])
        same &= keys[key + i] == data[start + i]
    for i in range(16, size):
        same &= keys[key + i] == data[start + i]
    if same and size > 16:
        return False
    fill(keys, key + 16, key + KEY, 0)
    for i in range(size):
        keys[key + i] = data[start + i]
    return True


# --- blocks


@njit
def decode_blocks(stream, size, blocks, keys, lookup, layout, block_ends):
    """Decode `blocks` blocks (of whole MCUs) from stream[:size] -> (bits consumed, blocks decoded).

    Fewer blocks than asked for: the data is bad. keys, lookup, layout: as `ScanMemory` has them; block_ends: uint64
    [blocks], where the bit behind each block is put, or None (which is compiled apart: 10 % faster).
    """
    total, limit = U(blocks), U(size + 8)
    position, window, bits = U0, U0, U0
    # Blocks done, coefficients done of this block, its entry of the layout.
    count, k, block = U0, U0, layout[0]
    base = (block & U_WORD) ^ U(TABLE)
    while count != total and position <= limit:
        position, window, bits = refill(stream, position, window, bits)
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
            if block_ends is not None:
                block_ends[count] = position * U8 - bits + (spent & U63)
            count -= end
            if count == total:
                break
        if k <= U63:
            bits -= spent & U63
            continue
        # Not in the table, or it leads beyond the block, which may have ended within the entry: take a single symbol.
        bits -= spent_before & U63
        position, window, bits = refill(stream, position, before, bits)
        k, table = k_before, np.int64((block & U_WORD) >> U(INDEX_BITS))
        length, symbol = read_symbol(window, address(keys) + U((table - (k == U0)) * KEY))
        step = entry(np.int64(length), np.int64(symbol), k == U0)
        used = U(step) & U63
        k += U(step) >> U6 & U511
        if k > U64:
            return np.int64(position * U8 - bits), np.int64(count)
        window, bits, base = window << used, bits - used, block & U_WORD
        if step < 0 or k == U64:
            if block_ends is not None:
                block_ends[count] = position * U8 - bits
            base, block = (block ^ block >> U16) & U_WORD, layout[block >> U32]
            count, k = count + U1, U0
    return np.int64(position * U8 - bits), np.int64(count)


# --- scans


@njit
def check_scan(data, scan, block_ends, grey):
    """Decode a single scan to its EOI -> (status, bytes written to `grey`).

    OK is stricter than libjpeg, which is silent on: codes that do not exist (in its fast loop), runs beyond the 63rd
    coefficient, up to seven bytes too many before a marker, a restart marker behind the last MCU, other segments
    between the data and EOI, 0xFF before a stuffed one. The first two are BAD_CODE; the others are ODD, and libjpeg
    decides. scan: `ScanMemory` whose record is filled and whose stream holds n + PADDING bytes or more. grey: uint8,
    where the scan of a greyscale file goes with its chroma spliced in (`splice_grey`), and block_ends: uint64 [MCUs]
    for it; None for both otherwise.
    """
    record, stream = scan.record, scan.stream
    blocks, status = prepare_tables(data, scan)
    if status != OK:
        return status, 0
    left = mcu_count(record)
    interval = record[RESTART] if record[RESTART] else left
    start, restarts, odd, written = record[SCAN], 0, False, 0
    while True:
        size, end = unstuff(data, start, stream)
        wanted = min(interval, left) * blocks
        used, decoded = decode_blocks(stream, size, wanted, scan.keys, scan.lookup, scan.layout, block_ends)
        record[WHERE] = min(start + (used >> 3), end)
        start, code = skip_fill(data, end)
        if code == 0:  # 0xFF 0xFF 0x00, which libjpeg takes for a stuffed 0xFF and T.81 does not know
            return ODD, 0
        if used > 8 * size:
            return ENDS_IN_SCAN, 0
        if decoded < wanted:
            return BAD_CODE, 0
        odd |= 8 * size - used > 7 or start - end > 1
        if grey is not None:
            written = splice_grey(stream, block_ends, wanted, grey, written)
        left -= min(interval, left)
        record[WHERE] = end
        if code < 0:
            return NO_END, 0
        start += 1
        if left == 0:
            break
        if code != RST0 + (restarts & 7):
            return ENDS_IN_SCAN if code == EOI else BAD_RESTART, 0
        if grey is not None:
            grey[written], grey[written + 1] = 0xFF, code
            written += 2
        restarts += 1
    record[END] = start
    if code != EOI or odd:
        return ODD, 0
    return OK, written


@njit
def splice_grey(stream, block_ends, blocks, out, written):
    """Write `blocks` luma blocks of `stream`, each with four zero bits behind it -> bytes written to `out`.

    The zeros are two chroma blocks, each "no difference" and "end of block" in tables that have one code of one bit.
    """
    held, count, start = U0, U0, U0
    for i in range(blocks):
        held, count, written = copy_bits(stream, start, block_ends[i], held, count, out, written)
        start = block_ends[i]
        held, count, written = put_bits(U0, U4, held, count, out, written)
    return pad(held, count, out, written)


@njit
def inspect(data, decode, scan, accuracy):
    """Everything that must be known before a JPEG is copied, in one call without the GIL: scan.record and scan.head, as
    `read_markers` fills them, and record[STATUS], which is about the whole file.

    data: uint8 [n]; decode: decode the data of a file's only scan, else look for its end alone. A greyscale file's data
    is never decoded here but when chroma is spliced in. scan: `ScanMemory` whose stream holds n + PADDING bytes or
    more; accuracy: as `walk_scans`.
    """
    record = scan.record
    status = read_markers(data, record, scan.head)
    if status == OK:
        if record[SINGLE] == 0:
            status = walk_scans(data, record, accuracy)
        elif decode and record[COLOUR] != GREY:
            status, _ = check_scan(data, scan, None, None)
        else:
            status = find_end(data, record)
        if status == OK:
            compare_head(data, record, scan.head)
    record[STATUS] = status
