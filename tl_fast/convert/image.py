"""Any image file → the JPEG bytes a beton stores: baseline, three components, YCbCr, 8 bit, which every decoder reads
alike.

Files that are so already are copied less their metadata, after a full check of their entropy-coded data; other JPEGs
become so without loss where coefficients allow it; everything else is decoded by Pillow and encoded anew. An EXIF
orientation is applied or ignored, as by `tl_fast.sources.image.open_rgb`, and never stored: every decoder shows a
stored image as its label map has it.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import pickle
import threading

import numpy as np
import simplejpeg
from PIL import Image

from tl_fast.convert.lossless import is_lossless, lossless_baseline
from tl_fast.jpeg import huffman, restarts
from tl_fast.jpeg import markers as marks
from tl_fast.jpeg.bits import PADDING
from tl_fast.jpeg.memory import ScanMemory, at_least
from tl_fast.sources.image import EXIF, REMEDY, check_size, open_rgb
from tl_fast.system.crc import crc32

TRANSFORMABLE = {marks.SOF0, marks.SOF1, marks.SOF2, marks.SOF9, marks.SOF10}

# What to say of a file on which libjpeg has nothing to say, being laxer (`tl_fast.jpeg.huffman.check_scan`), or need
# not be asked.
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
    """The JPEG to store.

    parts: its bytes in order, views of the source where they are copied; height, width: pixels; action: `copied` (the
    image data untouched), `transcoded` (without loss), `re-encoded` or `resized`; stripped: bytes of metadata or behind
    the end left out (0 for files other than JPEGs); rotated: the source states an EXIF orientation other than upright,
    whether ignored or applied; crc: CRC-32 (zlib's) of the parts; row_index: its restart markers let regions be cut out
    of it (`tl_fast.jpeg.restarts.splice`), asked for and so made or found.
    """

    parts: tuple[bytes | memoryview, ...]
    height: int
    width: int
    action: str
    stripped: int
    rotated: bool
    crc: int
    row_index: bool = False

    def __reduce_ex__(self, protocol: int):
        """Its bytes out of band where the protocol can (`tl_fast.convert.processes`)."""
        wrap = pickle.PickleBuffer if protocol >= 5 else bytes
        parts = tuple(wrap(part) for part in self.parts)
        return Prepared, (
            parts,
            self.height,
            self.width,
            self.action,
            self.stripped,
            self.rotated,
            self.crc,
            self.row_index,
        )

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
        mcus, row = marks.mcu_count(record), -(-record[marks.WIDTH].item() // (8 * across))
        interval, blocks = restarts.restart_interval(row, 8 * across), mcus * (across * down + 2)
        record[marks.RESTART] = interval
        if not restarts.segments(record)[0] or blocks > marks.BLOCKS_A_BYTE * len(data):
            return 0, 0, b""
        self.scan = self.scan.with_stream(len(data) + PADDING)
        self.block_ends = at_least(self.block_ends, blocks)
        self.out = at_least(self.out, 2 * len(data) + mcus // interval * restarts.GROWTH)
        used = restarts.insert_restarts(array, interval, self.scan, self.block_ends, self.out)
        return used, interval, self.out[: max(used, 0)].tobytes()


_workspace = _Workspace()


@functools.cache
def compile_kernels() -> None:
    """Compile, or load, everything that `prepare` calls. To be called before threads do: numba's tables of a function's
    compiled versions get damaged where two threads call it for the first time at once (KeyError ever after)."""
    colour, grey = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 1), np.uint8)
    small = simplejpeg.encode_jpeg(grey, colorspace="GRAY", colorsubsampling="Gray")
    cut = prepare(simplejpeg.encode_jpeg(np.zeros((64, 64, 3), np.uint8), colorspace="RGB"), row_index=True)
    restarts.splice(np.frombuffer(cut.data, np.uint8), np.array([0, 0]), np.array([1, 1]))
    prepare(simplejpeg.encode_jpeg(colour, colorspace="RGB"))
    prepare(small)
    prepare(small, max_resolution=8)
    Image.fromarray(colour).save(png := io.BytesIO(), "PNG")
    prepare(png.getvalue())


def prepare(
    data: bytes,
    max_resolution: int | None = None,
    quality: int = 90,
    decode_check: bool = True,
    row_index: bool = False,
    exif: str = "ignore",
) -> Prepared:
    """The JPEG to store for an image file's bytes.

    max_resolution: largest side in pixels (as ffcv's), larger images are shrunk to it with Pillow's antialiased Lanczos
    filter. quality: 1..100 of new encodes, which are 4:2:0. decode_check: decode what is copied to know that it is
    whole; without it only its markers are read and its end is found. row_index: with restart markers, so that regions
    can be cut out of it, where that is possible: the same pixels. exif: one of `tl_fast.sources.image.EXIF`; "apply"
    turns an image whose EXIF orientation is 2..8 upright, a JPEG without loss where that is possible
    (`tl_fast.convert.lossless.is_lossless`). Safe in threads; a file that is copied needs the GIL for about 10 µs.
    Raises ValueError with the reason on anything that is not a whole, undamaged image (any warning of libjpeg counts as
    damage), and `tl_fast.convert.lossless.TurboJpegMissing` where a file needs libturbojpeg and it is missing.
    """
    if exif not in EXIF:
        raise ValueError(f"exif {exif!r} is not one of {', '.join(EXIF)}")
    prepared = _prepare(data, max_resolution, quality, decode_check, exif)
    return _with_restarts(prepared) if row_index else prepared


def _with_restarts(prepared: Prepared) -> Prepared:
    data = prepared.data
    status, interval, scan = _workspace.insert_restarts(data)
    if status == restarts.MISSING:
        data = _with_all_categories(data, _workspace.scan.record.tolist())
        status, interval, scan = _workspace.insert_restarts(data)
    if status <= 0:
        return dataclasses.replace(prepared, row_index=interval > 0 and status == 0)
    start = int(_workspace.scan.record[marks.SCAN])
    head = (
        data[: start - SOS_BYTES] + _segment(marks.DRI, interval.to_bytes(2, "big")) + data[start - SOS_BYTES : start]
    )
    return dataclasses.replace(prepared, parts=(head, scan), crc=crc32(scan, crc32(head)), row_index=True)


def _with_all_categories(data: bytes, record: list[int]) -> bytes:
    """`data`, what `_prepare` makes, with codes for the DC categories that its optimised tables lack; all others stay
    as they are.

    Longer codes follow the longest one: none may be of ones only (T.81 B.2.4.2), so one of each greater length is free.
    """
    tables = {record[marks.HUFFMAN + (record[marks.COMPONENT + 5 * i + 4] >> 4)] for i in range(3)}
    at, parts = 2, [data[:2]]
    while at < record[marks.SCAN]:
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        body, place = b"", at + 4
        while data[at + 1] == marks.DHT and place < stop:
            counts = bytearray(data[place + 1 : place + 17])
            symbols = data[place + 17 : place + 17 + sum(counts)]
            end = place + 17 + len(symbols)
            if place + 1 in tables:
                longest = max(length for length in range(1, 17) if counts[length - 1])
                for length, symbol in enumerate((n for n in range(12) if n not in data[place + 17 : end]), longest + 1):
                    if length <= 16:
                        counts[length - 1], symbols = 1, symbols + bytes([symbol])
            body, place = body + data[place : place + 1] + counts + symbols, end
        parts.append(_segment(marks.DHT, body) if body else data[at:stop])
        at = stop
    return b"".join(parts) + data[at:]


def _prepare(data: bytes, max_resolution: int | None, quality: int, decode_check: bool, exif: str) -> Prepared:
    limit = max_resolution or marks.MAX_SIDE
    if data[:3] != b"\xff\xd8\xff":
        return _encode(data, limit, quality, exif)
    data = bytes(data)  # no copy of bytes
    record = _workspace.inspect(data, decode_check)
    height, width, status = record[marks.HEIGHT], record[marks.WIDTH], record[marks.STATUS]
    fits = max(height, width) <= limit
    turn = exif == "apply" and record[marks.ORIENTATION] > 1
    as_it_is = fits and not turn
    if status == marks.OK and record[marks.SINGLE]:
        if as_it_is and record[marks.COLOUR] == marks.YCBCR and record[marks.SURE] and record[marks.KNOWN_SAMPLING]:
            return _copy(data, record)
        if record[marks.COLOUR] == marks.GREY and (fits or decode_check):
            status, scan = _workspace.check_grey(data, splice=as_it_is)
            if as_it_is and status == marks.OK:
                return _grey(data, record, scan, _left_out(data, record), record[marks.ORIENTATION] > 1)
    transform = fits and _transformable(record) and (not turn or _turns_without_loss(record))
    if status != marks.OK or not record[marks.SINGLE]:
        _refuse_damaged(data, record, status, decode=status != marks.OK or (decode_check and not transform))
    if transform:  # which decodes, with the same verdict
        prepared = _transcode(data, record, record[marks.ORIENTATION] if turn else 1)
        if prepared is not None:
            return prepared
    return _encode(data, limit, quality, exif, record)


def _copy(data: bytes, record: list[int]) -> Prepared:
    if record[marks.EXACT]:
        parts: tuple[bytes | memoryview, ...] = (data,)
    else:
        parts = (
            _workspace.scan.head[: record[marks.HEAD]].tobytes(),
            memoryview(data)[record[marks.SCAN] : record[marks.END]],
        )
    left_out = len(data) - sum(len(part) for part in parts)
    return _prepared(parts, record, "copied", left_out, record[marks.ORIENTATION] > 1)


def _prepared(
    parts: tuple[bytes | memoryview, ...], record: list[int], action: str, stripped: int, rotated: bool
) -> Prepared:
    crc = 0
    for part in parts:
        crc = crc32(part, crc)
    return Prepared(parts, record[marks.HEIGHT], record[marks.WIDTH], action, stripped, rotated, crc)


def _left_out(data: bytes, record: list[int]) -> int:
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
    grey = record[marks.COMPONENTS] == 1  # whose sampling factors mean nothing
    across, down = (1, 1) if grey else record[marks.COMPONENT + 1 : marks.COMPONENT + 3]
    return is_lossless(record[marks.ORIENTATION], record[marks.HEIGHT], record[marks.WIDTH], across, down)


def _refuse_damaged(data: bytes, record: list[int], status: int, decode: bool) -> None:
    """Raise ValueError for damage that the markers show and, when `decode`, unless libjpeg decodes all without a
    warning."""
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
    """Have libjpeg decode all of a JPEG, at 1/8 size to save time. Raises ValueError in its words on any error or
    warning."""
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
    stripped, rotated = _left_out(data, record), record[marks.ORIENTATION] > 1
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
    _, _, _, quantisation, huffman = record[marks.COMPONENT : marks.COMPONENT + 5]
    steps = record[marks.QUANTISATION + quantisation]
    head = [b"\xff\xd8", JFIF, _segment(marks.DQT, b"\0" + data[steps : steps + 64])]
    size = record[marks.HEIGHT].to_bytes(2, "big") + record[marks.WIDTH].to_bytes(2, "big")
    head.append(_segment(marks.SOF0, b"\x08" + size + b"\3\1\x11\0\2\x11\0\3\x11\0"))
    tables = b""
    for kind, table in enumerate((huffman >> 4, huffman & 15)):
        start = record[marks.HUFFMAN + 4 * kind + table]
        tables += bytes([16 * kind]) + data[start : start + 16 + sum(data[start : start + 16])]
    head.append(_segment(marks.DHT, tables + ZERO_TABLES))
    if record[marks.RESTART]:
        head.append(_segment(marks.DRI, record[marks.RESTART].to_bytes(2, "big")))
    head.append(_segment(marks.SOS, b"\3\1\0\2\x11\3\x11\0\x3f\0"))
    return _prepared((b"".join(head), scan, EOI), record, "transcoded", stripped, rotated)


def _segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


def _encode(data: bytes, limit: int, quality: int, exif: str, record: list[int] | None = None) -> Prepared:
    """Decode (`open_rgb`), shrink to `limit` where needed, encode. record: of a JPEG."""
    image, orientation = open_rgb(data, exif)
    longest, action = max(image.size), "re-encoded"
    if longest > limit:
        image = image.resize(
            [max(1, (side * limit + longest // 2) // longest) for side in image.size], Image.Resampling.LANCZOS
        )
        action = "resized"
    encoded = simplejpeg.encode_jpeg(np.asarray(image), quality=quality, colorspace="RGB", colorsubsampling="420")
    stripped = _left_out(data, record) if record is not None else 0
    return Prepared((encoded,), image.height, image.width, action, stripped, orientation > 1, crc32(encoded))
