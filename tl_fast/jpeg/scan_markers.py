"""JPEG markers behind the header, in one compiled pass: where a file's scans end, and whether they hold everything.

Data is hostile, as for `tl_fast.jpeg.markers`, which reads the header.
"""

from __future__ import annotations

import numpy as np

from tl_fast.jpeg.bits import fill, next_marker, skip_fill, two
from tl_fast.jpeg.markers import (
    BAD_MARKER,
    BAD_RESTART,
    BLOCKS_A_BYTE,
    COMPLETE,
    COMPONENTS,
    DAC,
    DHT,
    DQT,
    DRI,
    END,
    ENDS_IN_SCAN,
    EOI,
    EXACT,
    FRAME,
    HEAD,
    MAX_COMPONENTS,
    METADATA,
    NO_END,
    ODD,
    OK,
    RESTART,
    RST0,
    RST7,
    SCAN,
    SOF2,
    SOF10,
    SOI,
    SOS,
    TABLES,
    TEM,
    WHERE,
    component,
    component_blocks,
    mcu_count,
    read_scan_header,
)
from tl_fast.maths.compile import njit


@njit
def find_end(data, record):
    """The end of a single scan by its markers alone -> status.

    Restart markers must come in order, as many as the size asks for, and then EOI.
    """
    position, restarts, odd = record[SCAN], 0, False
    while True:
        marker = next_marker(data, position)
        record[WHERE] = marker
        position, code = skip_fill(data, marker)
        if code < 0:
            return NO_END
        odd |= position - marker > 1
        position += 1
        if RST0 <= code <= RST7:
            if code != RST0 + (restarts & 7):
                return BAD_RESTART
            restarts += 1
        elif code != 0:
            break
    record[END] = position
    if code != EOI or odd:
        return ODD
    blocks, interval = 0, record[RESTART]
    for i in range(record[COMPONENTS]):
        blocks += component_blocks(record, i)
    if mcu_count(record) * blocks > BLOCKS_A_BYTE * (position - record[SCAN]):
        return ENDS_IN_SCAN
    return OK if restarts == ((mcu_count(record) - 1) // interval if interval else 0) else BAD_RESTART


@njit
def walk_scans(data, record, accuracy):
    """The markers of all scans -> status, for what `SINGLE` excludes: progressive, multi-scan, arithmetic.

    accuracy: int8 [4, 64], the lowest bit known of each component's coefficients (-1: none). record[COMPLETE] says that
    all are exact: libjpeg smooths the others of a progressive file, without a warning.
    """
    for i in range(MAX_COMPONENTS):
        fill(accuracy[i], 0, 64, -1)
    position, code = record[SCAN], SOS
    while True:
        if code == SOS:
            _note_accuracy(data, position, record, accuracy)
        start = next_marker(data, position)
        record[WHERE] = start
        position, code = skip_fill(data, start)
        if code < 0:
            return NO_END
        position += 1
        if RST0 <= code <= RST7 or code == TEM or code == 0:
            continue
        if code == EOI:
            record[END], record[COMPLETE] = position, _is_exact(record, accuracy)
            return OK
        if position + 2 > len(data):
            return NO_END
        stop = position + two(data, position)
        if code == SOI or stop < position + 2:
            return BAD_MARKER
        if stop > len(data):
            return NO_END
        if code == SOS:
            status = read_scan_header(data, position + 2, stop, record)
            if status != OK and status != ODD:
                return status
        elif code != DHT and code != DQT and code != DRI and code != DAC:
            record[METADATA] += stop - start
        position = stop


@njit
def _note_accuracy(data, scan, record, accuracy):
    """Set `accuracy` of the coefficients in the scan whose data begins at `scan`."""
    first, last, low = np.int64(data[scan - 3]), np.int64(data[scan - 2]), np.int64(data[scan - 1]) & 15
    if record[FRAME] != SOF2 and record[FRAME] != SOF10:
        first, last, low = 0, 63, 0
    for i in range(record[COMPONENTS]):
        if record[component(i) + TABLES] >= 0:
            fill(accuracy[i], first, min(last, 63) + 1, low)


@njit
def _is_exact(record, accuracy):
    for i in range(record[COMPONENTS]):
        for k in range(64):
            if accuracy[i, k] != 0:
                return False
    return True


@njit
def compare_head(data, record, head):
    """Sets EXACT where the header to store and the scan's data are the whole file, byte for byte."""
    if record[HEAD] == record[SCAN] and record[END] == len(data):
        for i in range(record[HEAD]):
            if head[i] != data[i]:
                return
        record[EXACT] = 1
