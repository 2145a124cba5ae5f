"""JPEG markers (ITU-T T.81 annex B) in one compiled pass: what a file says of itself, and the header to store in place
of its own.

Results go into an int64 record, `MARKERS` long, whose fields are the constants below. Data is hostile: every read is
checked first.
"""

from __future__ import annotations

import numpy as np

from tl_fast.maths.compile import njit
from tl_fast.maths.memory import address, before_marker

# What was found. Above OK: not a file to copy. libjpeg warns or fails on those up to ODD; it accepts ODD ones, with or
# without a warning.
(
    OK,
    NOT_JPEG,
    ENDS_IN_HEADER,
    NO_END,
    ENDS_IN_SCAN,
    BAD_CODE,
    BAD_RESTART,
    BAD_MARKER,
    BAD_FRAME,
    BAD_SCAN,
    BAD_TABLE,
    ODD,
) = range(12)

# Fields of the record.
STATUS, WHERE, FRAME, PRECISION, HEIGHT, WIDTH, COMPONENTS, COLOUR, SURE, ORIENTATION, RESTART, SINGLE = range(12)
SCAN, END, HEAD, EXACT, METADATA, COMPLETE, JFIF, ADOBE, SCAN_COMPONENTS, KNOWN_SAMPLING = range(12, 22)
COMPONENT = 24  # five each: id, horizontal and vertical sampling factor, quantisation table, 16 * DC + AC Huffman table
QUANTISATION = 44  # where the 64 bytes of table 0..3 begin; 0: none, -1: 16-bit values
HUFFMAN = 48  # where the 16 counts of DC table 0..3 and AC table 0..3 begin; 0: none
MARKERS = 56

GREY, YCBCR, RGB, OTHER = range(4)  # COLOUR, as libjpeg guesses it; SURE where every decoder must agree

SOF0, SOF1, SOF2, SOF9, SOF10, DHT, RST0, RST7, SOI, EOI, SOS, DQT, DRI, APP0, APP1, APP14, TEM, DAC = (
    0xC0,
    0xC1,
    0xC2,
    0xC9,
    0xCA,
    0xC4,
    0xD0,
    0xD7,
    0xD8,
    0xD9,
    0xDA,
    0xDB,
    0xDD,
    0xE0,
    0xE1,
    0xEE,
    0x01,
    0xCC,
)
HEAD_BYTES = 4096  # room for the new header; real ones need 330 to 900
MAX_SIDE = 65_500  # libjpeg's limit
JFIF_LENGTH, ADOBE_LENGTH = 16, 14

ONES, HIGHS, BYTE_NUMBERS = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080), np.uint64(0x0001020304050607)


@njit
def fill(array, start, stop, value):
    """As a slice assignment, which takes numba a second to compile."""
    for i in range(start, stop):
        array[i] = value


@njit
def little(data, at):
    """Eight bytes from `at` on (uint64), the first one lowest; LLVM makes it one load."""
    low = (
        np.uint64(data[at])
        | np.uint64(data[at + np.uint64(1)]) << np.uint64(8)
        | np.uint64(data[at + np.uint64(2)]) << np.uint64(16)
    )
    low |= np.uint64(data[at + np.uint64(3)]) << np.uint64(24) | np.uint64(data[at + np.uint64(4)]) << np.uint64(32)
    high = np.uint64(data[at + np.uint64(5)]) << np.uint64(40) | np.uint64(data[at + np.uint64(6)]) << np.uint64(48)
    return low | high | np.uint64(data[at + np.uint64(7)]) << np.uint64(56)


@njit
def find_ff(word):
    """The high bits of bytes that are 0xFF; false ones lie above the first true one only, so zero means none."""
    return (~word - ONES) & word & HIGHS


@njit
def first_ff(word):
    """Which byte of a `little` word is the first 0xFF: 0..7; 8 for none."""
    found = find_ff(word)
    if found == np.uint64(0):
        return np.uint64(8)
    return ((found & (~found + np.uint64(1))) >> np.uint64(7)) * BYTE_NUMBERS >> np.uint64(56)


@njit
def next_marker(data, at):
    """Where the next 0xFF stands that is followed by something other than a stuffed zero; len(data) where there is
    none."""
    last = len(data) - 1  # a 0xFF there has nothing behind it
    while at + 32 <= last:
        plain = np.int64(before_marker(address(data) + np.uint64(at)))
        at += plain
        if plain < 32:
            return at
    while at < last:
        if data[at] == 0xFF and data[at + 1] != 0:
            return at
        at += 1
    return len(data)


@njit
def skip_fill(data, at):
    """From a marker's first 0xFF to the marker's code: (where it stands, code); code -1 at the end of the data."""
    while at < len(data) and data[at] == 0xFF:
        at += 1
    return at, (np.int64(data[at]) if at < len(data) else -1)


@njit
def two(data, at):
    return np.int64(data[at]) << 8 | np.int64(data[at + 1])


@njit
def starts_with(data, at, stop, text):
    if stop - at < len(text):
        return False
    for i in range(len(text)):
        if data[at + i] != text[i]:
            return False
    return True


EXIF, JFIF_NAME, ADOBE_NAME = (np.frombuffer(text, np.uint8) for text in (b"Exif\0\0", b"JFIF\0", b"Adobe"))


@njit
def exif_orientation(data, at, stop):
    """The orientation tag (1..8) of an EXIF segment's payload [at, stop); 0 where there is none or the TIFF structure
    leads outside."""
    if not starts_with(data, at, stop, EXIF) or stop - at < 14:
        return 0
    tiff = at + 6
    little_endian = data[tiff] == 0x49
    if data[tiff] != data[tiff + 1] or not (little_endian or data[tiff] == 0x4D):
        return 0
    directory = tiff + _number(data, tiff + 4, 4, little_endian)
    if directory + 2 > stop:
        return 0
    for i in range(_number(data, directory, 2, little_endian)):
        entry = directory + 2 + 12 * i
        if entry + 12 > stop:
            return 0
        if _number(data, entry, 2, little_endian) == 0x0112:
            kind = _number(data, entry + 2, 2, little_endian)
            value = _number(data, entry + 8, 4 if kind == 4 else 2, little_endian)
            return value if 1 <= value <= 8 else 0
    return 0


@njit
def _number(data, at, size, little_endian):
    value = 0
    for i in range(size):
        value = value << 8 | np.int64(data[at + (size - 1 - i if little_endian else i)])
    return value


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
    size = len(data)
    if size < 4 or data[0] != 0xFF or data[1] != SOI or data[2] != 0xFF:
        return NOT_JPEG
    head[0], head[1] = 0xFF, SOI
    used, at, odd = 2, 2, False
    while True:
        record[WHERE] = start = at
        if at >= size:
            return ENDS_IN_HEADER
        if data[at] != 0xFF:
            return BAD_MARKER
        at, code = skip_fill(data, at)
        at += 1
        if code == TEM or RST0 <= code <= RST7:
            record[METADATA] += at - start
            continue
        if code < 0 or code == EOI or at + 2 > size:
            return ENDS_IN_HEADER
        if code == 0 or code == SOI or two(data, at) < 2:
            return BAD_MARKER
        body, stop = at + 2, at + two(data, at)
        if stop > size:
            return ENDS_IN_HEADER
        length = stop - at
        keep = length
        status = OK
        if (
            code == SOF0
            or code == SOF1
            or code == SOF2
            or (code > DHT and code <= 0xCF and code != 0xC8 and code != DAC)
            or code == 0xC3
        ):
            status = _frame(data, body, stop, code, record)
        elif code == DHT:
            status = _huffman(data, body, stop, record)
        elif code == DQT:
            status = _quantisation(data, body, stop, record)
        elif code == DRI:
            if length != 4:
                return BAD_MARKER
            record[RESTART] = two(data, body)
        elif code == APP0 and length >= JFIF_LENGTH and starts_with(data, body, stop, JFIF_NAME):
            odd |= data[body + 5] != 1  # a major version of which libjpeg warns
            keep = 0 if record[JFIF] else JFIF_LENGTH
            record[JFIF] = 1
        elif code == APP14 and length >= ADOBE_LENGTH and starts_with(data, body, stop, ADOBE_NAME):
            transform = np.int64(data[body + 11])
            odd |= record[ADOBE] >= 0 and record[ADOBE] != transform
            keep = 0 if record[ADOBE] >= 0 else ADOBE_LENGTH
            record[ADOBE] = transform
        elif code == SOS:
            status = _scan(data, body, stop, record)
        else:
            keep = 0
            if code == APP1 and record[ORIENTATION] == 0:
                record[ORIENTATION] = exif_orientation(data, body, stop)
        if status == ODD:
            odd = True
        elif status != OK:
            return status
        record[METADATA] += stop - start - (keep + 2 if keep else 0)
        if keep and used + keep + 2 <= HEAD_BYTES:
            head[used], head[used + 1] = 0xFF, code
            for i in range(keep):
                head[used + 2 + i] = data[at + i]
            if code == APP0 or code == APP14:
                head[used + 2], head[used + 3] = 0, keep
            if code == APP0:
                head[used + 16], head[used + 17] = 0, 0  # width and height of a thumbnail
            if code == SOF1:
                head[used + 1] = SOF0
            used += keep + 2
        elif keep:
            odd = True
        at = stop
        if code == SOS:
            break
    record[SCAN], record[HEAD], record[WHERE] = at, used, 0
    odd |= _colour(record)
    record[KNOWN_SAMPLING] = _known_sampling(record)
    record[SINGLE] = not odd and record[FRAME] <= SOF1 and _is_single(data, at, record)
    return OK


@njit
def _frame(data, at, stop, code, record):
    if record[FRAME] or stop - at < 6 or stop - at != 6 + 3 * np.int64(data[at + 5]):
        return BAD_FRAME
    record[FRAME], record[PRECISION] = code, np.int64(data[at])
    record[HEIGHT], record[WIDTH], record[COMPONENTS] = two(data, at + 1), two(data, at + 3), np.int64(data[at + 5])
    if (
        record[HEIGHT] == 0
        or record[WIDTH] == 0
        or max(record[HEIGHT], record[WIDTH]) > MAX_SIDE
        or not 1 <= record[COMPONENTS] <= 4
    ):
        return BAD_FRAME
    status = OK
    for i in range(record[COMPONENTS]):
        c = COMPONENT + 5 * i
        entry = at + 6 + 3 * i
        record[c], record[c + 1], record[c + 2] = data[entry], data[entry + 1] >> 4, data[entry + 1] & 15
        record[c + 3], record[c + 4] = data[entry + 2], -1
        if not (1 <= record[c + 1] <= 4 and 1 <= record[c + 2] <= 4 and record[c + 3] <= 3):
            return BAD_FRAME
        for other in range(i):
            if record[COMPONENT + 5 * other] == record[c]:
                status = ODD
    return status


@njit
def _huffman(data, at, stop, record):
    while at < stop:
        which = np.int64(data[at])
        if which & 0xEC or at + 17 > stop:
            return BAD_TABLE
        symbols = 0
        for i in range(16):
            symbols += np.int64(data[at + 1 + i])
        if symbols > 256 or at + 17 + symbols > stop:
            return BAD_TABLE
        record[HUFFMAN + (which >> 4) * 4 + (which & 3)] = at + 1
        at += 17 + symbols
    return OK


@njit
def _quantisation(data, at, stop, record):
    while at < stop:
        which, wide = np.int64(data[at]) & 15, np.int64(data[at]) >> 4
        if which > 3 or wide > 1 or at + 65 + 64 * wide > stop:
            return BAD_TABLE
        record[QUANTISATION + which] = -1 if wide else at + 1
        at += 65 + 64 * wide
    return OK


@njit
def _scan(data, at, stop, record):
    """Scan header: marks its components' Huffman tables; ODD where the order is not the frame's."""
    if record[FRAME] == 0 or stop - at < 6:
        return BAD_SCAN
    count = np.int64(data[at])
    if not 1 <= count <= 4 or stop - at != 4 + 2 * count:
        return BAD_SCAN
    record[SCAN_COMPONENTS] = count
    status = OK
    for c in range(record[COMPONENTS]):
        record[COMPONENT + 5 * c + 4] = -1
    for i in range(count):
        found = -1
        for c in range(record[COMPONENTS]):
            if record[COMPONENT + 5 * c] == data[at + 1 + 2 * i] and record[COMPONENT + 5 * c + 4] < 0 and found < 0:
                found = c
        if found < 0:
            return BAD_SCAN
        if found != i:
            status = ODD
        record[COMPONENT + 5 * found + 4] = data[at + 2 + 2 * i]
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
    a, b, c = record[COMPONENT], record[COMPONENT + 5], record[COMPONENT + 10]
    letters = a == 82 and b == 71 and c == 66
    rgb = not jfif and (adobe == 0 or (adobe < 0 and letters))
    record[COLOUR] = RGB if rgb else YCBCR
    record[SURE] = (
        not rgb and not letters and (adobe < 0 or adobe == 1) and (jfif or adobe == 1 or (a == 1 and b == 2 and c == 3))
    )
    return not jfif and adobe > 1


@njit
def _known_sampling(record):
    """One component, or 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1 (chroma 1 x 1): the layouts that TurboJPEG and nvJPEG
    know."""
    if record[COMPONENTS] == 1:
        return True
    for i in range(1, min(record[COMPONENTS], 3)):
        if record[COMPONENT + 5 * i + 1] != 1 or record[COMPONENT + 5 * i + 2] != 1:
            return False
    across, down = record[COMPONENT + 1], record[COMPONENT + 2]
    return (across <= 2 and down <= 2) or (across == 4 and down == 1)


@njit
def _is_single(data, scan, record):
    """Whether the one scan holds everything and all tables are there, in the form that baseline decoders know."""
    if record[PRECISION] != 8 or record[SCAN_COMPONENTS] != record[COMPONENTS]:
        return False
    if data[scan - 3] != 0 or data[scan - 2] != 63 or data[scan - 1] != 0:
        return False
    blocks = 0
    for i in range(record[COMPONENTS]):
        c = COMPONENT + 5 * i
        blocks += record[c + 1] * record[c + 2]
        tables = record[c + 4]
        if record[QUANTISATION + record[c + 3]] <= 0 or tables & 0xEE:
            return False
        if record[HUFFMAN + (tables >> 4)] == 0 or record[HUFFMAN + 4 + (tables & 15)] == 0:
            return False
    return blocks <= 10 or record[COMPONENTS] == 1


@njit
def find_end(data, record):
    """The end of a single scan by its markers alone: restart markers in order and as many as the size asks for, then
    EOI -> status."""
    at, restarts, odd = record[SCAN], 0, False
    while True:
        at = next_marker(data, at)
        record[WHERE] = at
        fill = at
        at, code = skip_fill(data, at)
        if code < 0:
            return NO_END
        odd |= at - fill > 1
        at += 1
        if RST0 <= code <= RST7:
            if code != RST0 + (restarts & 7):
                return BAD_RESTART
            restarts += 1
        elif code != 0:
            break
    record[END] = at
    if code != EOI or odd:
        return ODD
    blocks, interval = 0, record[RESTART]
    for i in range(record[COMPONENTS]):
        blocks += record[COMPONENT + 5 * i + 1] * record[COMPONENT + 5 * i + 2] if record[COMPONENTS] > 1 else 1
    if mcu_count(record) * blocks > 4 * (at - record[SCAN]):  # each block takes two bits at least
        return ENDS_IN_SCAN
    return OK if restarts == ((mcu_count(record) - 1) // interval if interval else 0) else BAD_RESTART


@njit
def mcu_count(record):
    """MCUs of a single scan (T.81 A.2): of one block each where there is one component, whatever its sampling factors
    say."""
    across, down = 1, 1
    if record[COMPONENTS] > 1:
        for i in range(record[COMPONENTS]):
            across, down = max(across, record[COMPONENT + 5 * i + 1]), max(down, record[COMPONENT + 5 * i + 2])
    return -(-record[WIDTH] // (8 * across)) * -(-record[HEIGHT] // (8 * down))


@njit
def walk_scans(data, record, accuracy):
    """The markers of all scans -> status, for what `SINGLE` excludes: progressive, multi-scan, arithmetic.

    accuracy: int8 [4, 64], the lowest bit known of each component's coefficients (-1: none). record[COMPLETE] says that
    all are exact: libjpeg smooths the others of a progressive file, without a warning.
    """
    for c in range(4):
        fill(accuracy[c], 0, 64, -1)
    at = record[SCAN]
    while True:
        first, last, low = np.int64(data[at - 3]), np.int64(data[at - 2]), np.int64(data[at - 1]) & 15
        if record[FRAME] != SOF2 and record[FRAME] != SOF10:
            first, last, low = 0, 63, 0
        for c in range(record[COMPONENTS]):
            if record[COMPONENT + 5 * c + 4] >= 0:
                for i in range(first, min(last, 63) + 1):
                    accuracy[c, i] = low
        while True:  # segments up to the next scan
            at = next_marker(data, at)
            record[WHERE] = start = at
            at, code = skip_fill(data, at)
            if code < 0:
                return NO_END
            at += 1
            if RST0 <= code <= RST7 or code == TEM or code == 0:
                continue
            if code == EOI:
                record[END], record[COMPLETE] = at, 1
                for c in range(record[COMPONENTS]):
                    for i in range(64):
                        record[COMPLETE] &= accuracy[c, i] == 0
                return OK
            if at + 2 > len(data):
                return NO_END
            stop = at + two(data, at)
            if code == SOI or stop < at + 2:
                return BAD_MARKER
            if stop > len(data):
                return NO_END
            if code == SOS:
                status = _scan(data, at + 2, stop, record)
                if status != OK and status != ODD:
                    return status
                at = stop
                break
            if code != DHT and code != DQT and code != DRI and code != DAC:
                record[METADATA] += stop - start
            at = stop


@njit
def compare_head(data, record, head):
    """Sets EXACT where the header to store and the scan's data are the whole file, byte for byte."""
    if record[HEAD] == record[SCAN] and record[END] == len(data):
        for i in range(record[HEAD]):
            if head[i] != data[i]:
                return
        record[EXACT] = 1
