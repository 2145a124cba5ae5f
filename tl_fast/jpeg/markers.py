"""JPEG markers (ITU-T T.81 annex B) in one compiled pass: what a file says of itself, and the header to store in place
of its own.

Results go into an int64 record, `MARKERS` long, whose fields are the constants below. Data is hostile: every read is
checked first.
"""

from __future__ import annotations

import numpy as np

from tl_fast.jpeg.bits import fill, skip_fill, starts_with, two
from tl_fast.jpeg.exif import exif_orientation
from tl_fast.maths.compile import njit

# The verdict on a file. Above OK: not a file to copy. libjpeg warns or fails on those up to ODD; it accepts ODD ones,
# with or without a warning.
OK, NOT_JPEG, ENDS_IN_HEADER, NO_END, ENDS_IN_SCAN, BAD_CODE = range(6)
BAD_RESTART, BAD_MARKER, BAD_FRAME, BAD_SCAN, BAD_TABLE, ODD = range(6, 12)

# Fields of the record.
STATUS, WHERE, FRAME, PRECISION, HEIGHT, WIDTH, COMPONENTS, COLOUR, SURE, ORIENTATION, RESTART, SINGLE = range(12)
SCAN, END, HEAD, EXACT, METADATA, COMPLETE, JFIF, ADOBE, SCAN_COMPONENTS, KNOWN_SAMPLING = range(12, 22)
INDEX, INDEX_END = 22, 23  # where the body of a bit index's segment begins and ends (`tl_fast.jpeg.bit_index`); 0: none
COMPONENT = 24  # where the fields of component 0 begin; those of the others follow
QUANTISATION = 44  # where the 64 bytes of table 0..3 begin; 0: none, -1: 16-bit values
HUFFMAN = 48  # where the 16 counts of DC table 0..3 and AC table 0..3 begin; 0: none
MARKERS = 56

# Fields of a component: its id, its horizontal and vertical sampling factor, the number of its quantisation table, and
# 16 times the number of its DC table plus that of its AC table (-1: not in the scan).
IDENTIFIER, ACROSS, DOWN, QUANTISER, TABLES = range(5)
COMPONENT_FIELDS, MAX_COMPONENTS = 5, 4

GREY, YCBCR, RGB, OTHER = range(4)  # COLOUR, as libjpeg guesses it; SURE where every decoder must agree

TEM, SOF0, SOF1, SOF2, DHT, JPG, SOF9, SOF10, DAC, SOF15 = 0x01, 0xC0, 0xC1, 0xC2, 0xC4, 0xC8, 0xC9, 0xCA, 0xCC, 0xCF
RST0, RST7, SOI, EOI, SOS, DQT, DRI = 0xD0, 0xD7, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD
APP0, APP1, APP9, APP14 = 0xE0, 0xE1, 0xE9, 0xEE
HEAD_BYTES = 4096  # room for the new header; real ones need 330 to 900
MAX_SIDE = 65_500  # libjpeg's limit
MAX_BLOCKS = 10  # of an MCU (T.81 B.2.3)
BLOCKS_A_BYTE = 4  # at most: each block takes two bits at least
JFIF_LENGTH, ADOBE_LENGTH = 16, 14  # of the segments, less the marker
JFIF_NAME, ADOBE_NAME = np.frombuffer(b"JFIF\0", np.uint8), np.frombuffer(b"Adobe", np.uint8)
INDEX_NAME = np.frombuffer(b"TLFI\0", np.uint8)


# --- what a record says


@njit
def component(number):
    """Where the fields of a component begin in the record."""
    return COMPONENT + COMPONENT_FIELDS * number


@njit
def sampling(record):
    """Sampling factors (across, down) of the first component; (1, 1) where there is no other, whatever they say."""
    return (record[COMPONENT + ACROSS], record[COMPONENT + DOWN]) if record[COMPONENTS] > 1 else (1, 1)


@njit
def huffman_table(record, number, kind):
    """Where the 16 counts of a component's Huffman table begin, 0 where it is missing; kind: 0 DC, 1 AC."""
    tables = record[component(number) + TABLES]
    return record[HUFFMAN + 4 * kind + (tables & 15 if kind else tables >> 4)]


@njit
def component_blocks(record, number):
    """Blocks of a component in an MCU: one where there is no other component, whatever its sampling factors say."""
    c = component(number)
    return record[c + ACROSS] * record[c + DOWN] if record[COMPONENTS] > 1 else 1


@njit
def mcus_across(record):
    """MCUs in a row of a single scan."""
    return mcus_along(record, ACROSS, record[WIDTH])


@njit
def mcu_count(record):
    """MCUs of a single scan (T.81 A.2)."""
    return mcus_across(record) * mcus_along(record, DOWN, record[HEIGHT])


@njit
def mcus_along(record, factor, side):
    """MCUs along a side of the image, of so many pixels. factor: ACROSS or DOWN."""
    largest = 1
    if record[COMPONENTS] > 1:
        for i in range(record[COMPONENTS]):
            largest = max(largest, record[component(i) + factor])
    return -(-side // (8 * largest))


# --- the header


@njit
def read_markers(data, record, head):
    """Everything before the first scan's data -> status; fills `record` and writes the header to store into `head`.

    data: uint8 [n]; record: int64 [MARKERS]; head: uint8 [HEAD_BYTES], of which record[HEAD] are used: SOI, the
    segments that decoding needs, JFIF (without thumbnail) and Adobe, in the file's order; SOF1 becomes SOF0 where only
    the name differs. record[SINGLE]: one Huffman-coded scan of all components, for which `tl_fast.jpeg.huffman`
    decides; ODD then stands for nothing but is left to libjpeg.
    """
    fill(record, 0, len(record), 0)
    record[ADOBE] = -1
    if len(data) < 4 or data[0] != 0xFF or data[1] != SOI or data[2] != 0xFF:
        return NOT_JPEG
    head[0], head[1] = 0xFF, SOI
    used, start, odd, code = 2, 2, False, SOI
    while code != SOS:
        record[WHERE] = start
        status, code, body, stop = find_segment(data, start)
        if status != OK:
            return status
        status, keep = read_segment(data, code, body, stop, record)
        if status != OK and status != ODD:
            return status
        odd |= status == ODD
        if record[INDEX] != body:  # which is none
            record[METADATA] += stop - start - (keep + 2 if keep else 0)
        if keep:
            if used + keep + 2 <= HEAD_BYTES:
                used = keep_segment(data, code, body, keep, head, used)
            else:
                odd = True
        start = stop
    record[SCAN], record[HEAD], record[WHERE] = start, used, 0
    odd |= _colour(record)
    record[KNOWN_SAMPLING] = _known_sampling(record)
    record[SINGLE] = not odd and record[FRAME] <= SOF1 and _is_single(data, start, record)
    return OK


@njit
def find_segment(data, start):
    """The segment whose marker begins at `start` -> (status, code, where its body begins, where it ends).

    Its length stands in the two bytes before the body. Markers without a body, TEM and RST, end where it would begin.
    """
    if start >= len(data):
        return ENDS_IN_HEADER, 0, 0, 0
    if data[start] != 0xFF:
        return BAD_MARKER, 0, 0, 0
    position, code = skip_fill(data, start)
    position += 1
    if code == TEM or RST0 <= code <= RST7:
        return OK, code, position, position
    if code < 0 or code == EOI or position + 2 > len(data):
        return ENDS_IN_HEADER, 0, 0, 0
    if code == 0 or code == SOI or two(data, position) < 2:
        return BAD_MARKER, 0, 0, 0
    stop = position + two(data, position)
    return OK if stop <= len(data) else ENDS_IN_HEADER, code, position + 2, stop


@njit
def read_segment(data, code, body, stop, record):
    """Fill `record` from a segment -> (status, bytes of it to store, its length field included; 0: none)."""
    length = stop - body + 2
    if SOF0 <= code <= SOF15 and code != DHT and code != JPG and code != DAC:
        return _frame(data, body, stop, code, record), length
    if code == DHT:
        return _huffman(data, body, stop, record), length
    if code == DQT:
        return _quantisation(data, body, stop, record), length
    if code == SOS:
        return read_scan_header(data, body, stop, record), length
    if code == DRI:
        if length != 4:
            return BAD_MARKER, 0
        record[RESTART] = two(data, body)
        return OK, length
    if code == APP0 and length >= JFIF_LENGTH and starts_with(data, body, stop, JFIF_NAME):
        return _jfif(data, body, record)
    if code == APP14 and length >= ADOBE_LENGTH and starts_with(data, body, stop, ADOBE_NAME):
        return _adobe(data, body, record)
    if code == APP1 and record[ORIENTATION] == 0:
        record[ORIENTATION] = exif_orientation(data, body, stop)
    if code == APP9 and starts_with(data, body, stop, INDEX_NAME):
        record[INDEX], record[INDEX_END] = body, stop
    return OK, 0


@njit
def keep_segment(data, code, body, length, head, used):
    """Append the first `length` bytes of a segment, from its length field on, to head[:used] -> bytes used."""
    head[used], head[used + 1] = 0xFF, SOF0 if code == SOF1 else code
    for i in range(length):
        head[used + 2 + i] = data[body - 2 + i]
    if code == APP0 or code == APP14:
        head[used + 2], head[used + 3] = 0, length
    if code == APP0:
        head[used + 16], head[used + 17] = 0, 0  # width and height of a thumbnail
    return used + length + 2


@njit
def _jfif(data, body, record):
    """The first one is kept; ODD where its major version is one of which libjpeg warns."""
    keep = 0 if record[JFIF] else JFIF_LENGTH
    record[JFIF] = 1
    return OK if data[body + 5] == 1 else ODD, keep


@njit
def _adobe(data, body, record):
    """The first one is kept; ODD where another one contradicts it."""
    transform, before = np.int64(data[body + 11]), record[ADOBE]
    record[ADOBE] = transform
    return ODD if before >= 0 and before != transform else OK, 0 if before >= 0 else ADOBE_LENGTH


@njit
def _frame(data, body, stop, code, record):
    if record[FRAME] or stop - body < 6 or stop - body != 6 + 3 * np.int64(data[body + 5]):
        return BAD_FRAME
    record[FRAME], record[PRECISION] = code, np.int64(data[body])
    record[HEIGHT], record[WIDTH] = two(data, body + 1), two(data, body + 3)
    record[COMPONENTS] = np.int64(data[body + 5])
    shorter, longer = min(record[HEIGHT], record[WIDTH]), max(record[HEIGHT], record[WIDTH])
    if shorter == 0 or longer > MAX_SIDE or not 1 <= record[COMPONENTS] <= MAX_COMPONENTS:
        return BAD_FRAME
    status = OK
    for i in range(record[COMPONENTS]):
        c, entry = component(i), body + 6 + 3 * i
        record[c + IDENTIFIER], record[c + QUANTISER], record[c + TABLES] = data[entry], data[entry + 2], -1
        record[c + ACROSS], record[c + DOWN] = data[entry + 1] >> 4, data[entry + 1] & 15
        if not (1 <= record[c + ACROSS] <= 4 and 1 <= record[c + DOWN] <= 4 and record[c + QUANTISER] <= 3):
            return BAD_FRAME
        for other in range(i):
            if record[component(other) + IDENTIFIER] == record[c + IDENTIFIER]:
                status = ODD
    return status


@njit
def _huffman(data, body, stop, record):
    start = body
    while start < stop:
        kind_and_number = np.int64(data[start])
        if kind_and_number & 0xEC or start + 17 > stop:
            return BAD_TABLE
        symbols = 0
        for i in range(16):
            symbols += np.int64(data[start + 1 + i])
        if symbols > 256 or start + 17 + symbols > stop:
            return BAD_TABLE
        record[HUFFMAN + (kind_and_number >> 4) * 4 + (kind_and_number & 3)] = start + 1
        start += 17 + symbols
    return OK


@njit
def _quantisation(data, body, stop, record):
    start = body
    while start < stop:
        number, wide = np.int64(data[start]) & 15, np.int64(data[start]) >> 4
        if number > 3 or wide > 1 or start + 65 + 64 * wide > stop:
            return BAD_TABLE
        record[QUANTISATION + number] = -1 if wide else start + 1
        start += 65 + 64 * wide
    return OK


@njit
def read_scan_header(data, body, stop, record):
    """Sets the Huffman tables of a scan's components -> status; ODD where their order is not the frame's."""
    if record[FRAME] == 0 or stop - body < 6:
        return BAD_SCAN
    count = np.int64(data[body])
    if not 1 <= count <= MAX_COMPONENTS or stop - body != 4 + 2 * count:
        return BAD_SCAN
    record[SCAN_COMPONENTS] = count
    status = OK
    for i in range(record[COMPONENTS]):
        record[component(i) + TABLES] = -1
    for i in range(count):
        identifier, tables = data[body + 1 + 2 * i], data[body + 2 + 2 * i]
        number = 0
        while number < record[COMPONENTS]:
            c = component(number)
            if record[c + IDENTIFIER] == identifier and record[c + TABLES] < 0:
                break
            number += 1
        if number == record[COMPONENTS]:
            return BAD_SCAN
        if number != i:
            status = ODD
        record[component(number) + TABLES] = tables
    return status


@njit
def _colour(record):
    """Sets COLOUR by libjpeg's rules (default_decompress_parms) and SURE; True where libjpeg would warn."""
    count, jfif, adobe = record[COMPONENTS], record[JFIF], record[ADOBE]
    if count == 1:
        record[COLOUR], record[SURE] = GREY, 1
        return False
    if count != 3:
        record[COLOUR] = OTHER
        return False
    first, second, third = record[component(0)], record[component(1)], record[component(2)]
    letters = first == 82 and second == 71 and third == 66  # "RGB"
    numbered = first == 1 and second == 2 and third == 3
    rgb = not jfif and (adobe == 0 or (adobe < 0 and letters))
    record[COLOUR] = RGB if rgb else YCBCR
    record[SURE] = not rgb and not letters and (adobe < 0 or adobe == 1) and (jfif or adobe == 1 or numbered)
    return not jfif and adobe > 1


@njit
def _known_sampling(record):
    """Whether TurboJPEG and nvJPEG know the layout: one component, or chroma 1 x 1 and 4:4:4, 4:2:2, 4:4:0, 4:2:0 or
    4:1:1."""
    if record[COMPONENTS] == 1:
        return True
    for i in range(1, min(record[COMPONENTS], 3)):
        if component_blocks(record, i) != 1:
            return False
    across, down = sampling(record)
    return (across <= 2 and down <= 2) or (across == 4 and down == 1)


@njit
def _is_single(data, scan, record):
    """Whether the one scan holds everything and all tables are there, in the form that baseline decoders know."""
    if record[PRECISION] != 8 or record[SCAN_COMPONENTS] != record[COMPONENTS]:
        return False
    if data[scan - 3] != 0 or data[scan - 2] != 63 or data[scan - 1] != 0:  # first, last coefficient; accuracy
        return False
    blocks = 0
    for i in range(record[COMPONENTS]):
        c = component(i)
        if record[QUANTISATION + record[c + QUANTISER]] <= 0 or record[c + TABLES] & 0xEE:
            return False
        if huffman_table(record, i, 0) == 0 or huffman_table(record, i, 1) == 0:
            return False
        blocks += component_blocks(record, i)
    return blocks <= MAX_BLOCKS
