"""An index of bit positions in a JPEG: where in the scan every few MCUs of each row begin, and with which DC values.

With it a decoder of a region reads neither what is above the region nor, but for a few MCUs, what is beside it. The
scan itself stays as it is. The index lies in an application segment, APP9, which every other decoder passes over:

    "TLFI\\0", version (uint8), MCUs between entries, MCUs across, MCUs down (uint16 each), bytes of the scan (uint32)
    for each row of MCUs: the bit where its first MCU begins (uint32), then its entries, 7 bytes each:
        20 bits: bits from the row's first MCU to this one; 12 bits each: the DC value before it of Y, Cb and Cr
    a checksum over everything before and the scan's last bytes (uint64)

Numbers are big-endian, as JPEG's; DC values signed; positions count from the scan's first byte, stuffed bytes included.
An index whose checksum, sizes or length are wrong is ignored: it is damaged, or another scan's.
"""

from __future__ import annotations

import numpy as np

from tl_fast.jpeg.bits import top_up, two, unstuff
from tl_fast.jpeg.blocks import ZIGZAG, prepare_values
from tl_fast.jpeg.huffman import prepare_tables
from tl_fast.jpeg.markers import (
    COMPONENTS,
    EOI,
    INDEX,
    INDEX_END,
    INDEX_NAME,
    KNOWN_SAMPLING,
    MAX_BLOCKS,
    MAX_COMPONENTS,
    OK,
    RESTART,
    SCAN,
    SINGLE,
    mcu_count,
    mcus_across,
    read_markers,
)
from tl_fast.jpeg.mcus import BLOCK_FIELDS, lay_out_blocks, read_mcu
from tl_fast.maths.compile import njit
from tl_fast.maths.memory import U0, U8, U32, U, address, keep, load_big

VERSION = 1
SPACING = 4  # MCUs between entries; 2: files grow twice as much for 1 % more speed; 8: half as much, 2 % slower
HEAD = len(INDEX_NAME) + 11  # bytes before the rows
ROW, ENTRY, CHECKSUM = 4, 7, 8  # bytes
TAIL = 64  # bytes at the scan's end that the checksum covers
MAX_BODY = 65_533  # bytes of a segment, less its length field
MAX_IN_ROW = 1 << 20  # bits
MAX_DC = 1 << 11
PRIME = U(0x00000100000001B3)  # of FNV-1a with 64 bits
BASIS = U(0xCBF29CE484222325)


@njit
def body_size(across, down, spacing):
    """Bytes of the segment's body."""
    return HEAD + down * (ROW + ENTRY * -(-across // spacing)) + CHECKSUM


# --- reading


@njit
def find_index(data, record):
    """Where the index's rows begin in `data`, and the MCUs between its entries; (0, 0) where there is none that belongs
    to the scan. record: as `read_markers` fills it."""
    body, stop = record[INDEX], record[INDEX_END]
    if body == 0 or record[RESTART] or stop - body < HEAD + CHECKSUM:
        return 0, 0
    numbers = body + len(INDEX_NAME) + 1
    across, down = mcus_across(record), mcu_count(record) // mcus_across(record)
    spacing, size = two(data, numbers), two(data, numbers + 6) << 16 | two(data, numbers + 8)
    if data[numbers - 1] != VERSION or two(data, numbers + 2) != across or two(data, numbers + 4) != down:
        return 0, 0
    if spacing == 0 or stop - body != body_size(across, down, spacing):
        return 0, 0
    end = record[SCAN] + size
    if end + 2 > len(data) or data[end] != 0xFF or data[end + 1] != EOI:
        return 0, 0
    before = stop - CHECKSUM
    if load_big(address(data), U(before)) != checksum(data, body, before, data, record[SCAN], end):
        return 0, 0
    return body + HEAD, spacing


@njit
def checksum(index, start, stop, data, scan, end):
    """FNV-1a, by words of eight bytes, of index[start:stop] and of the last TAIL bytes of data[scan:end], uint64.

    Each step maps states one to one, so a change within one word always shows.
    """
    return _add(_add(BASIS, index, start, stop), data, max(scan, end - TAIL), end)


@njit
def _add(value, data, start, stop):
    words = (stop - start) // 8
    for i in range(words):
        value = (value ^ load_big(address(data), U(start + 8 * i))) * PRIME
    for i in range(start + 8 * words, stop):
        value = (value ^ U(data[i])) * PRIME
    return value


@njit
def find_entry(data, rows, row_bytes, row, number):
    """(bit where the row's MCU `number` * spacing begins, the entry itself, uint64). rows: where the rows begin;
    row_bytes: of each."""
    start = rows + row * row_bytes
    base = np.int64(load_big(address(data), U(start)) >> U32)
    entry = load_big(address(data), U(start + ROW + ENTRY * number)) >> U8
    return base + np.int64(entry >> U(36)), entry


@njit
def take_dc(entry, previous):
    """Set previous, uint16 [MAX_COMPONENTS], to the DC values before an entry's MCU."""
    for c in range(3):
        value = np.int64(entry >> U(24 - 12 * c)) & (2 * MAX_DC - 1)
        previous[c] = (value ^ MAX_DC) - MAX_DC


# --- writing


@njit
def write_index(data, scan, memory, out):
    """Write the body of a JPEG's index segment to `out` -> its bytes; 0 for a file that gets none.

    That is one with restart markers, or not baseline of a single scan, damaged, with a single entry, or with more than
    the fields hold. data: uint8 [n]; scan: `ScanMemory` whose stream holds n + STREAM_ROOM bytes or more; memory:
    `PixelMemory`; out: uint8 [MAX_BODY].
    """
    record = scan.record
    if read_markers(data, record, scan.head) != OK or record[SINGLE] == 0 or record[RESTART]:
        return 0
    if record[COMPONENTS] != 3 or record[KNOWN_SAMPLING] == 0:
        return 0
    across, mcus = mcus_across(record), mcu_count(record)
    down, spacing = mcus // across, SPACING
    while spacing < across and body_size(across, down, spacing) > MAX_BODY:
        spacing *= 2
    if body_size(across, down, spacing) > MAX_BODY or (down == 1 and spacing >= across):
        return 0
    entries = np.empty((down, -(-across // spacing), 4), np.uint64)
    bytes_of_scan = find_mcus(data, scan, memory, spacing, entries)
    if bytes_of_scan == 0:
        return 0
    written = len(INDEX_NAME) + 1
    for i in range(len(INDEX_NAME)):
        out[i] = INDEX_NAME[i]
    out[written - 1] = VERSION
    for value, size in ((spacing, 2), (across, 2), (down, 2), (bytes_of_scan, 4)):
        written = put_number(U(value), size, out, written)
    for row in range(down):
        base = entries[row, 0, 0]
        if base >> U32:
            return 0
        written = put_number(base, ROW, out, written)
        for number in range(entries.shape[1]):
            entry = entries[row, number, 0] - base
            if entry >= U(MAX_IN_ROW):
                return 0
            for c in range(3):
                value = np.int64(np.int16(entries[row, number, 1 + c]))
                if not -MAX_DC <= value < MAX_DC:
                    return 0
                entry = entry << U(12) | U(value & (2 * MAX_DC - 1))
            written = put_number(entry, ENTRY, out, written)
    end = record[SCAN] + bytes_of_scan
    return put_number(checksum(out, 0, written, data, record[SCAN], end), CHECKSUM, out, written)


@njit
def put_number(value, size, out, written):
    """Append the lowest `size` bytes of a uint64 to out[:written] -> bytes written."""
    for i in range(size):
        out[written + i] = value >> U(8 * (size - 1 - i))
    return written + size


@njit
def find_mcus(data, scan, memory, spacing, entries):
    """Decode a single scan -> its bytes, 0 where it is not whole. entries: uint64 [rows of MCUs, entries, 4], gets the
    bit where every `spacing`th MCU of each row begins and the DC values before it, of which 16 bits count."""
    record, stream = scan.record, scan.stream
    blocks, status = prepare_tables(data, scan)
    if status != OK:
        return 0
    prepare_values(data, record, memory.keys, memory.values)
    order = np.empty((MAX_BLOCKS, BLOCK_FIELDS), np.int64)
    lay_out_blocks(record, (0, 0, 0), (0, 0, 0), order)
    previous = np.zeros(MAX_COMPONENTS, np.uint16)
    size, end = unstuff(data, record[SCAN], stream)
    if end + 1 >= len(data) or data[end + 1] != EOI:
        return 0
    bytes_in, order_in, previous_in = address(stream), address(order), address(previous)
    tables, coefficients = (
        (address(memory.values), address(scan.lookup), address(scan.keys), address(ZIGZAG)),
        address(memory.coefficients),
    )
    position, window, bits = top_up(bytes_in, U0, U0, U0)
    raw, kept = record[SCAN], 0  # a byte of the scan, and its number among those without stuffing
    across = mcus_across(record)
    for mcu in range(mcu_count(record)):
        if position > U(size + 8):
            return 0
        row, column = mcu // across, mcu % across
        if column % spacing == 0:
            bit = np.int64(U8 * position - bits)
            while kept < bit >> 3:
                raw, kept = raw + (2 if data[raw] == 0xFF else 1), kept + 1
            entries[row, column // spacing, 0] = 8 * (raw - record[SCAN]) + (bit & 7)
            for c in range(3):
                entries[row, column // spacing, 1 + c] = previous[c]
        position, window, bits, exist = read_mcu(
            bytes_in, position, window, bits, blocks, order_in, tables, previous_in, coefficients, False
        )
        if not exist:
            return 0
    keep((order, previous))
    return end - record[SCAN] if U8 * position - bits <= U(8 * size) else 0
