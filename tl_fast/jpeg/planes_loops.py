"""YUV 4:2:0 planes (`tl_fast.jpeg.planes`) from JPEGs and from RGB, and back to RGB, in compiled loops.

Safe in threads; the working memory is one of each a thread.
"""

from __future__ import annotations

import functools
import threading
from typing import NamedTuple

import numpy as np

from tl_fast.jpeg.markers import HEIGHT, OK, WIDTH, read_markers, sampling
from tl_fast.jpeg.mcus import STREAM_ROOM
from tl_fast.jpeg.memory import PixelMemory, ScanMemory
from tl_fast.jpeg.planes import chroma_size, planes_size
from tl_fast.jpeg.region_loops import PLANE_ROOM, UNFIT, decode_planes, is_ycbcr, plane_places
from tl_fast.maths.compile import njit
from tl_fast.maths.memory import U3, U, address, keep
from tl_fast.maths.ycbcr import PADDING, planes_at, row_room, write_row

_compiling = threading.Lock()


class _Workspace(threading.local):
    def __init__(self) -> None:
        self.scan, self.pixels = ScanMemory.create(), PixelMemory.create()


_workspace = _Workspace()


class Decoded(NamedTuple):
    """The samples of a JPEG before any conversion. luma: uint8 [h, w]; blue, red: Cb and Cr, uint8 [ceil(h / down),
    ceil(w / across)]."""

    luma: np.ndarray
    blue: np.ndarray
    red: np.ndarray
    across: int
    down: int


def decode(jpeg: bytes) -> Decoded | None:
    """Decode a baseline JPEG of YCbCr in 4:4:4, 4:2:2, 4:4:0 or 4:2:0.

    None for every other JPEG, and for one that is damaged before its last row.
    """
    compile_loops()
    data = np.frombuffer(jpeg, np.uint8)
    _workspace.scan = _workspace.scan.with_stream(data.size + STREAM_ROOM)
    status, height, width, across, down = fits(data, _workspace.scan)
    if status != OK:
        return None
    _workspace.pixels = _workspace.pixels.with_room(3 * (height + PLANE_ROOM) * (width + PLANE_ROOM), 0)
    chroma = -(-height // down), -(-width // across)
    decoded = Decoded(np.empty((height, width), np.uint8), *np.empty((2, *chroma), np.uint8), across, down)
    status = decode_image(data, _workspace.scan, _workspace.pixels, decoded.luma, decoded.blue, decoded.red)
    return decoded if status == OK else None


def to_rgb(planes: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels that planes show, uint8 [h, w, 3]. planes: uint8 [planes_size(height, width)]."""
    compile_loops()
    out = np.empty((height, width, 3), np.uint8)
    planes = np.ascontiguousarray(planes).view()
    planes.flags.writeable = False  # which is another type to numba
    write_rgb(planes, height, width, out.reshape(-1))
    return out


def from_rgb(pixels: np.ndarray) -> np.ndarray:
    """Planes, uint8 [planes_size(h, w)], of pixels uint8 [h, w, 3].

    Chroma is the mean of 2x2 pixels (where a side is odd, the last ones count twice), rounded once.
    """
    compile_loops()
    height, width, _ = pixels.shape
    out = np.empty(planes_size(height, width), np.uint8)
    pixels = np.ascontiguousarray(pixels).view()
    pixels.flags.writeable = False
    write_planes(pixels, *chroma_size(height, width), out)
    return out


def compile_loops() -> None:
    """Compile, or load, the loops. To be called before threads are forked; threads call it themselves, for numba does
    not bear two threads that compile one function."""
    with _compiling:
        _compile()


@functools.cache
def _compile() -> None:
    scan, pixels, out = ScanMemory.create(), PixelMemory.create(), np.zeros(6, np.uint8)
    nothing, plane = np.frombuffer(bytes(4), np.uint8), np.zeros((0, 0), np.uint8)
    fits(nothing, scan)
    decode_image(nothing, scan, pixels, plane, plane, plane)
    rgb = np.zeros((2, 2, 3), np.uint8)
    rgb.flags.writeable = False
    write_planes(rgb, 1, 1, out)
    write_rgb(np.frombuffer(bytes(6), np.uint8), 2, 2, np.zeros(12, np.uint8))


@njit
def fits(data, scan):
    """Read the header -> (OK or why the file is left to others, height, width, sampling factors across and down)."""
    record = scan.record
    status = read_markers(data, record, scan.head)
    if status != OK:
        return status, 0, 0, 0, 0
    across, down = sampling(record)
    if not is_ycbcr(record) or across > 2:
        return UNFIT, 0, 0, 0, 0
    return OK, record[HEIGHT], record[WIDTH], across, down


@njit
def decode_image(data, scan, pixels, luma, blue, red):
    """Decode all of a JPEG that `fits` -> status; its samples at luma, blue and red, uint8 [rows, columns] each.

    scan: as `fits` left it, with a stream of n + STREAM_ROOM bytes; pixels: with planes of 3 (rows + PLANE_ROOM)
    (columns + PLANE_ROOM) bytes.
    """
    if luma.size == 0:
        return UNFIT
    across, down = sampling(scan.record)
    area = (0, 0, (blue.shape[0] + 7) // 8, (blue.shape[1] + 7) // 8)
    starts, strides = plane_places(area, across, down)
    status = decode_planes(data, area, scan, pixels, starts, strides)
    if status != OK:
        return status
    for start, stride, plane in (
        (starts[0], strides[0], luma),
        (starts[1], strides[1], blue),
        (starts[2], strides[2], red),
    ):
        for y in range(plane.shape[0]):
            plane[y] = pixels.planes[start + y * stride : start + y * stride + plane.shape[1]]
    return OK


@njit
def write_rgb(planes, height, width, out):
    """The pixels that planes show. planes: uint8 [planes_size(height, width)]; out: uint8 [height * width * 3]."""
    padded, room = np.zeros(planes.size + PADDING, np.uint8), np.empty(row_room(width), np.uint8)
    padded[: planes.size] = planes
    pixels = planes_at(np.int64(address(padded)), height, width)
    for y in range(height):
        write_row(pixels, y, 0, width, U3, address(room), address(out) + U(3 * y * width))
    keep((padded, room, out))


@njit
def write_planes(pixels, chroma_rows, chroma_columns, out):
    """Full-range BT.601 in fixed point (jccolor.c's factors). pixels: uint8 [h, w, 3]; out: uint8 [planes_size]."""
    height, width = pixels.shape[0], pixels.shape[1]
    luma = out[: height * width].reshape(height, width)
    chroma = out[height * width :].reshape(2, chroma_rows, chroma_columns)
    for y in range(height):
        for x in range(width):
            red, green, blue = np.int32(pixels[y, x, 0]), np.int32(pixels[y, x, 1]), np.int32(pixels[y, x, 2])
            luma[y, x] = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    for y in range(chroma_rows):
        top, bottom = 2 * y, min(2 * y + 1, height - 1)
        for x in range(chroma_columns):
            left, right = 2 * x, min(2 * x + 1, width - 1)
            red = sum_of_four(pixels, top, bottom, left, right, 0)
            green = sum_of_four(pixels, top, bottom, left, right, 1)
            blue = sum_of_four(pixels, top, bottom, left, right, 2)
            # 128 and a half, of four pixels; less one, so that the largest value is 255 and not 256.
            chroma[0, y, x] = (-11059 * red - 21709 * green + 32768 * blue + (128 << 18) + (1 << 17) - 1) >> 18
            chroma[1, y, x] = (32768 * red - 27439 * green - 5329 * blue + (128 << 18) + (1 << 17) - 1) >> 18


@njit
def sum_of_four(pixels, top, bottom, left, right, c):
    """The sum of one colour over 2x2 pixels."""
    return (
        np.int32(pixels[top, left, c])
        + np.int32(pixels[top, right, c])
        + np.int32(pixels[bottom, left, c])
        + np.int32(pixels[bottom, right, c])
    )
