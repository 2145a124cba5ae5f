"""Any image file → the JPEG that a beton stores: baseline, three components, YCbCr, 8 bit, which every decoder reads
alike.

A file that is such a JPEG is copied without its metadata, after a full check of its entropy-coded data. Another JPEG
becomes one without loss where its coefficients allow that. Everything else is decoded by Pillow and encoded anew. An
EXIF orientation is applied or ignored, as by `tl_fast.sources.image.open_rgb`, and never stored: every decoder shows a
stored image as its label map has it.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import pickle
import threading
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from tl_fast.beton.layout import JPEG
from tl_fast.convert.lossless import is_lossless, lossless_baseline
from tl_fast.convert.options import EncodeOptions
from tl_fast.jpeg import bit_index, huffman, restarts
from tl_fast.jpeg import markers as marks
from tl_fast.jpeg.bits import PADDING
from tl_fast.jpeg.mcus import STREAM_ROOM
from tl_fast.jpeg.memory import PixelMemory, ScanMemory, at_least
from tl_fast.sources.image import REMEDY, check_size, open_rgb
from tl_fast.system.crc import crc32

TRANSFORMABLE = {marks.SOF0, marks.SOF1, marks.SOF2, marks.SOF9, marks.SOF10}

# What to say of a file where libjpeg is silent, since it is laxer (`tl_fast.jpeg.huffman.check_scan`), or is not asked.
TRUNCATED = {
    marks.ENDS_IN_HEADER: "it ends before the image data",
    marks.NO_END: "no end-of-image marker follows the image data",
    marks.ENDS_IN_SCAN: "its image data ends before the last row",
}
DAMAGED = {
    marks.BAD_CODE: "a Huffman code that does not exist, or coefficients beyond the 64th",
    marks.BAD_RESTART: "restart markers out of order or not as many as its size needs",
    marks.BAD_MARKER: "no marker where one must be",
    marks.BAD_FRAME: "an unusable frame header",
    marks.BAD_SCAN: "an unusable scan header",
    marks.BAD_TABLE: "an unusable Huffman or quantisation table",
}

EOI = b"\xff\xd9"
JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
SOS_BYTES = 14  # of the scan header of three components
ZERO_TABLES = b"".join(bytes([table, 1]) + bytes(16) for table in (0x01, 0x11))  # symbol 0 as the only code, of one bit


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The image to store, a JPEG or planes.

    parts: its bytes in order, views of the source where they are copied; height, width: pixels; action: `copied` (the
    image data untouched), `transcoded` (without loss), `re-encoded` or `resized`, and of planes `decoded` (a JPEG's
    own) or `converted` (from RGB); stripped: bytes of metadata or behind the end left out (0 for files other than
    JPEGs); rotated: the source states an EXIF orientation other than upright, whether ignored or applied; crc: CRC-32
    (zlib's) of the parts; row_index: its restart markers, found or made as asked for, let regions be cut out of it
    (`tl_fast.jpeg.restarts.splice`); bit_index: an index of bit positions was asked for and made
    (`tl_fast.jpeg.bit_index`); shrunk_from: the (height, width) that a resized image had before; mode: what the parts
    are, as `tl_fast.beton.layout` says.
    """

    parts: tuple[bytes | memoryview, ...]
    height: int
    width: int
    action: str
    stripped: int
    rotated: bool
    crc: int
    row_index: bool = False
    bit_index: bool = False
    shrunk_from: tuple[int, int] | None = None
    mode: int = JPEG

    def __reduce_ex__(self, protocol: int):
        """Its bytes out of band where the protocol can (`tl_fast.convert.processes`)."""
        wrap = pickle.PickleBuffer if protocol >= 5 else bytes
        others = [getattr(self, field.name) for field in dataclasses.fields(self)[1:]]
        return Prepared, (tuple(wrap(part) for part in self.parts), *others)

    @property
    def data(self) -> bytes:
        """The parts as one."""
        return self.parts[0] if len(self.parts) == 1 and isinstance(self.parts[0], bytes) else b"".join(self.parts)


class _Workspace(threading.local):
    """What the compiled functions write to, one of each a thread, which keeps its last file's Huffman tables."""

    def __init__(self) -> None:
        self.scan = ScanMemory.create()
        self.accuracy = np.zeros((marks.MAX_COMPONENTS, 64), np.int8)
        self.block_ends, self.out = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
        self.pixels, self.index = PixelMemory.create(), np.zeros(bit_index.MAX_BODY, np.uint8)

    def inspect(self, data: bytes, decode: bool) -> list[int]:
        """`tl_fast.jpeg.huffman.inspect` -> its record."""
        self.scan = self.scan.with_stream(len(data) + PADDING)
        huffman.inspect(np.frombuffer(data, np.uint8), decode, self.scan, self.accuracy)
        return self.scan.record.tolist()

    def check_grey(self, data: bytes, splice: bool) -> tuple[int, bytes]:
        """Decode the inspected greyscale file's scan -> (status, the scan with chroma blocks when `splice`)."""
        array, mcus = np.frombuffer(data, np.uint8), marks.mcu_count(self.scan.record)
        if mcus > marks.BLOCKS_A_BYTE * len(data):
            return marks.ENDS_IN_SCAN, b""
        block_ends = np.empty(mcus, np.uint64) if splice else None
        out = np.empty(2 * len(data) + mcus + 64, np.uint8) if splice else None
        status, used = huffman.check_scan(array, self.scan, block_ends, out)
        return status, out[:used].tobytes() if splice and status == marks.OK else b""

    def insert_restarts(self, data: bytes) -> tuple[int, int, bytes]:
        """(status, interval, the scan of `data` to its end with a restart marker every `interval` MCUs), the scan only
        where status > 0.

        Status `restarts.MISSING`: a DC table lacks a code. 0: nothing to insert; the interval is then the file's own
        where that is fit.
        """
        array, record = np.frombuffer(data, np.uint8), self.scan.record
        if marks.read_markers(array, record, self.scan.head) != marks.OK:
            return 0, 0, b""
        if record[marks.RESTART]:
            return 0, int(record[marks.RESTART]) if restarts.segments(record)[0] else 0, b""
        across, down = record[marks.COMPONENT + marks.ACROSS].item(), record[marks.COMPONENT + marks.DOWN].item()
        mcus, row = marks.mcu_count(record), marks.mcus_across(record)
        interval, blocks = restarts.restart_interval(row, 8 * across), mcus * (across * down + 2)
        record[marks.RESTART] = interval
        if not restarts.segments(record)[0] or blocks > marks.BLOCKS_A_BYTE * len(data):
            return 0, 0, b""
        self.scan = self.scan.with_stream(len(data) + PADDING)
        self.block_ends = at_least(self.block_ends, blocks)
        self.out = at_least(self.out, 2 * len(data) + mcus // interval * restarts.GROWTH)
        used = restarts.insert_restarts(array, interval, self.scan, self.block_ends, self.out)
        return used, interval, self.out[: max(used, 0)].tobytes()

    def write_index(self, data: bytes) -> bytes:
        """`tl_fast.jpeg.bit_index.write_index` -> the segment's body; none for a file that gets no index."""
        self.scan = self.scan.with_stream(len(data) + STREAM_ROOM)
        size = bit_index.write_index(np.frombuffer(data, np.uint8), self.scan, self.pixels, self.index)
        return self.index[:size].tobytes()


_workspace = _Workspace()


@functools.cache
def compile_kernels(row_index: bool = False, bit_index: bool = False) -> None:
    """Compile, or load, everything that `prepare` calls with these options. To be called before threads do: numba's
    tables of a function's compiled versions get damaged where two threads call it for the first time at once (KeyError
    ever after)."""
    colour, grey = np.zeros((64, 64, 3), np.uint8), np.zeros((16, 16, 1), np.uint8)
    small = simplejpeg.encode_jpeg(grey, colorspace="GRAY", colorsubsampling="Gray")
    prepare(simplejpeg.encode_jpeg(colour, colorspace="RGB"), row_index=row_index, bit_index=bit_index)
    prepare(small)
    prepare(small, max_resolution=8)
    Image.fromarray(colour).save(png := io.BytesIO(), "PNG")
    prepare(png.getvalue())


def prepare(data: bytes, options: EncodeOptions | None = None, **changes: Any) -> Prepared:
    """The JPEG to store for an image file's bytes.

    options, changes: an EncodeOptions, or its fields. Images beyond its sizes are shrunk with Pillow's antialiased
    Lanczos filter. New encodes are 4:2:0. decode_check: decode what is copied to know that it is whole; without it only
    its markers are read and its end is found. row_index: with restart markers, so that regions can be cut out of it,
    where that is possible: the same pixels. bit_index: with an index of bit positions for our decoder, where that is
    possible: the scan as it is. exif: "apply" turns an image whose EXIF orientation is 2..8 upright, a JPEG
    without loss where that is possible (`tl_fast.convert.lossless.is_lossless`). Safe in threads; a file that is copied
    needs the GIL for about 10 µs.
    Raises ValueError with the reason on anything that is not a whole, undamaged image (any warning of libjpeg counts as
    damage), and `tl_fast.convert.lossless.TurboJpegMissing` where a file needs libturbojpeg and it is missing.
    """
    options = dataclasses.replace(options or EncodeOptions(), **changes)
    prepared, record = None, None
    if is_jpeg(data):
        data = bytes(data)  # no copy of bytes
        prepared, record = without_loss(data, options)
    if prepared is None:
        prepared = _encode(data, options, record)
    if options.row_index:
        return _with_row_index(prepared)
    return _with_bit_index(prepared) if options.bit_index else prepared


def is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def without_loss(data: bytes, options: EncodeOptions) -> tuple[Prepared | None, list[int]]:
    """A JPEG that shows the pixels of the JPEG `data`, copied or made baseline; None where it must be encoded anew. And
    the record of `data`.

    Raises ValueError for damage, TurboJpegMissing.
    """
    record = _workspace.inspect(data, options.decode_check)
    status, single, colour = record[marks.STATUS], record[marks.SINGLE], record[marks.COLOUR]
    fits = options.fits(record[marks.HEIGHT], record[marks.WIDTH])
    fits = fits and max(record[marks.HEIGHT], record[marks.WIDTH]) <= marks.MAX_SIDE
    turn = options.exif == "apply" and _rotated(record)
    unchanged = fits and not turn
    if status == marks.OK and single:
        if unchanged and colour == marks.YCBCR and record[marks.SURE] and record[marks.KNOWN_SAMPLING]:
            return _copy(data, record), record
        if colour == marks.GREY and (fits or options.decode_check):
            status, scan = _workspace.check_grey(data, splice=unchanged)
            if unchanged and status == marks.OK:
                return _grey(data, record, scan, left_out(data, record), _rotated(record)), record
    lossless = fits and _transformable(record) and (not turn or _turns_without_loss(record))
    if status != marks.OK or not single:
        # The lossless transform decodes too, with the same verdict.
        _refuse_damaged(data, record, status, decode=status != marks.OK or (options.decode_check and not lossless))
    return _transcode(data, record, record[marks.ORIENTATION] if turn else 1) if lossless else None, record


# --- the ways


def _copy(data: bytes, record: list[int]) -> Prepared:
    """The inspected file itself, or its scan behind the header that `inspect` wrote."""
    parts: tuple[bytes | memoryview, ...] = (data,)
    if not record[marks.EXACT]:
        head = _workspace.scan.head[: record[marks.HEAD]].tobytes()
        parts = (head, memoryview(data)[record[marks.SCAN] : record[marks.END]])
    index = record[marks.INDEX_END] - record[marks.INDEX] + 4 if record[marks.INDEX] else 0
    stripped = len(data) - sum(len(part) for part in parts) - index
    return _prepared(parts, record, "copied", stripped, _rotated(record))


def _prepared(
    parts: tuple[bytes | memoryview, ...], record: list[int], action: str, stripped: int, rotated: bool
) -> Prepared:
    crc = 0
    for part in parts:
        crc = crc32(part, crc)
    return Prepared(parts, record[marks.HEIGHT], record[marks.WIDTH], action, stripped, rotated, crc)


def _rotated(record: list[int]) -> bool:
    """Whether the file states an EXIF orientation other than upright."""
    return record[marks.ORIENTATION] > 1


def left_out(data: bytes, record: list[int]) -> int:
    """Bytes of metadata and behind the end."""
    return record[marks.METADATA] + (len(data) - record[marks.END] if record[marks.END] else 0)


def _transformable(record: list[int]) -> bool:
    """True for what a baseline file can show alike: 8 bit, grey or YCbCr of known sampling, all coefficients exact."""
    return bool(
        record[marks.FRAME] in TRANSFORMABLE
        and record[marks.PRECISION] == 8
        and record[marks.COLOUR] in (marks.GREY, marks.YCBCR)
        and record[marks.KNOWN_SAMPLING]
        and (record[marks.SINGLE] or record[marks.COMPLETE])
    )


def _turns_without_loss(record: list[int]) -> bool:
    across, down = record[marks.COMPONENT + marks.ACROSS], record[marks.COMPONENT + marks.DOWN]
    if record[marks.COMPONENTS] == 1:  # its sampling factors mean nothing
        across, down = 1, 1
    return is_lossless(record[marks.ORIENTATION], record[marks.HEIGHT], record[marks.WIDTH], across, down)


def _refuse_damaged(data: bytes, record: list[int], status: int, decode: bool) -> None:
    """Raise ValueError for damage that the markers show and, when `decode`, for any warning of libjpeg's."""
    where = f"at byte {record[marks.WHERE]} of {len(data)}"
    if status in TRUNCATED:
        raise ValueError(f"truncated JPEG: {TRUNCATED[status]} ({where}); {REMEDY}")
    if record[marks.PRECISION] not in (0, 8):
        raise ValueError(f"a JPEG of {record[marks.PRECISION]} bits a sample; convert the file to 8 bit")
    check_size(record[marks.WIDTH], record[marks.HEIGHT], len(data), huffman=record[marks.FRAME] <= marks.SOF2)
    if decode and record[marks.KNOWN_SAMPLING]:  # TurboJPEG's interface knows no other; set when the header is whole
        check_entropy(data, record[marks.COMPONENTS])
        if status == marks.BAD_RESTART:
            return  # one too many, behind the last row; of all others libjpeg warns
    if status in DAMAGED:
        raise ValueError(f"damaged JPEG: {DAMAGED[status]} ({where}); {REMEDY}")


def check_entropy(data: bytes, components: int) -> None:
    """Have libjpeg decode all of a JPEG, at 1/8 size to save time.

    Raises ValueError in its words on any error or warning.
    """
    colorspace = {1: "GRAY", 4: "CMYK"}.get(components, "RGB")
    try:
        simplejpeg.decode_jpeg(
            data, colorspace, fastdct=True, fastupsample=True, min_height=1, min_width=1, min_factor=8
        )
    except ValueError as error:
        raise ValueError(f"damaged JPEG: {error}; {REMEDY}") from error


def _transcode(data: bytes, record: list[int], orientation: int) -> Prepared | None:
    """The same coefficients, turned upright from `orientation`, as a baseline file.

    None where they need quantisation steps that baseline does not have.
    """
    stripped, rotated = left_out(data, record), _rotated(record)
    baseline = lossless_baseline(data, orientation)
    record = _workspace.inspect(baseline, True)
    if record[marks.STATUS] != marks.OK or not record[marks.SINGLE] or not record[marks.SURE]:
        return None
    if record[marks.COLOUR] == marks.GREY:
        status, scan = _workspace.check_grey(baseline, splice=True)
        return _grey(baseline, record, scan, stripped, rotated) if status == marks.OK else None
    return _prepared((baseline,), record, "transcoded", stripped, rotated)


def _grey(data: bytes, record: list[int], scan: bytes, stripped: int, rotated: bool) -> Prepared:
    """A greyscale file as three components without subsampling, of which Cb and Cr are 128 everywhere, so that R = G =
    B = Y exactly."""
    quantiser, tables = record[marks.COMPONENT + marks.QUANTISER], record[marks.COMPONENT + marks.TABLES]
    steps = record[marks.QUANTISATION + quantiser]
    head = [b"\xff\xd8", JFIF, _segment(marks.DQT, b"\0" + data[steps : steps + 64])]
    size = record[marks.HEIGHT].to_bytes(2, "big") + record[marks.WIDTH].to_bytes(2, "big")
    head.append(_segment(marks.SOF0, b"\x08" + size + b"\3\1\x11\0\2\x11\0\3\x11\0"))
    luma_tables = b""
    for kind, number in enumerate((tables >> 4, tables & 15)):
        start = record[marks.HUFFMAN + 4 * kind + number]
        luma_tables += bytes([16 * kind]) + data[start : start + 16 + sum(data[start : start + 16])]
    head.append(_segment(marks.DHT, luma_tables + ZERO_TABLES))
    if record[marks.RESTART]:
        head.append(_segment(marks.DRI, record[marks.RESTART].to_bytes(2, "big")))
    head.append(_segment(marks.SOS, b"\3\1\0\2\x11\3\x11\0\x3f\0"))
    return _prepared((b"".join(head), scan, EOI), record, "transcoded", stripped, rotated)


def _segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


def _encode(data: bytes, options: EncodeOptions, record: list[int] | None) -> Prepared:
    """Decode (`open_rgb`), shrink where needed, encode. record: of a JPEG."""
    image, orientation = open_rgb(data, options.exif)
    action, shrunk_from = "re-encoded", None
    # A JPEG's sides have 16 bits, and libjpeg's limit is a little lower.
    limited = dataclasses.replace(options, max_resolution=min(options.max_resolution or marks.MAX_SIDE, marks.MAX_SIDE))
    height, width = limited.stored_size(image.height, image.width)
    if (height, width) != (image.height, image.width):
        shrunk_from, action = (image.height, image.width), "resized"
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    encoded = simplejpeg.encode_jpeg(
        np.asarray(image), quality=options.quality, colorspace="RGB", colorsubsampling="420"
    )
    stripped = left_out(data, record) if record is not None else 0
    return Prepared(
        (encoded,),
        image.height,
        image.width,
        action,
        stripped,
        orientation > 1,
        crc32(encoded),
        shrunk_from=shrunk_from,
    )


# --- indices


def _with_row_index(prepared: Prepared) -> Prepared:
    """The same JPEG with restart markers, where that is possible."""
    data = prepared.data
    status, interval, scan = _workspace.insert_restarts(data)
    if status == restarts.MISSING:
        data = _with_all_dc_codes(data, _workspace.scan.record.tolist())
        status, interval, scan = _workspace.insert_restarts(data)
    if status <= 0:
        return dataclasses.replace(prepared, row_index=interval > 0 and status == 0)
    segment = _segment(marks.DRI, interval.to_bytes(2, "big"))
    return dataclasses.replace(_with_segment(prepared, data, segment, scan), row_index=True)


def _with_bit_index(prepared: Prepared) -> Prepared:
    """The same JPEG with an index of bit positions before its scan, where that is possible."""
    data = prepared.data
    index = _workspace.write_index(data)
    if not index:
        return prepared
    scan = memoryview(data)[int(_workspace.scan.record[marks.SCAN]) :]
    return dataclasses.replace(_with_segment(prepared, data, _segment(marks.APP9, index), scan), bit_index=True)


def _with_segment(prepared: Prepared, data: bytes, segment: bytes, scan: bytes | memoryview) -> Prepared:
    """`prepared` as the header of `data`, whose markers were read last, with a segment before the scan header, and a
    scan."""
    header = int(_workspace.scan.record[marks.SCAN]) - SOS_BYTES
    head = data[:header] + segment + data[header : header + SOS_BYTES]
    return dataclasses.replace(prepared, parts=(head, scan), crc=crc32(scan, crc32(head)))


def _with_all_dc_codes(data: bytes, record: list[int]) -> bytes:
    """`data`, which `_prepare` made, with codes for all DC sizes in its DC tables."""
    numbers = {record[marks.COMPONENT + marks.COMPONENT_FIELDS * i + marks.TABLES] >> 4 for i in range(3)}
    dc_tables = {record[marks.HUFFMAN + number] for number in numbers}
    start, parts = 2, [data[:2]]
    while start < record[marks.SCAN]:
        stop = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if data[start + 1] != marks.DHT:
            parts.append(data[start:stop])
        else:
            tables, counts = b"", start + 5
            while counts < stop:
                symbols = counts + 16
                end = symbols + sum(data[counts:symbols])
                table = data[counts:end]
                if counts in dc_tables:
                    table = _with_all_sizes(data[counts:symbols], data[symbols:end])
                tables += data[counts - 1 : counts] + table
                counts = end + 1
            parts.append(_segment(marks.DHT, tables))
        start = stop
    return b"".join(parts) + data[start:]


def _with_all_sizes(counts: bytes, symbols: bytes) -> bytes:
    """A DC table's 16 counts and its symbols, with codes for the sizes that it lacks; the other codes stay as they are.

    Longer codes follow the longest one: none may be of ones only (T.81 B.2.4.2), so one of each greater length is free.
    """
    new_counts = bytearray(counts)
    longest = max(length for length in range(1, 17) if counts[length - 1])
    missing = [size for size in range(huffman.MAX_DC_SIZE + 1) if size not in symbols]
    for length, size in zip(range(longest + 1, 17), missing, strict=False):
        new_counts[length - 1] = 1
        symbols += bytes([size])
    return bytes(new_counts) + symbols
