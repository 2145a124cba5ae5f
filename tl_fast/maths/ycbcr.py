"""Rows of an image's samples in memory -> RGB, bit for bit as libjpeg: chroma upsampled (jdsample.c), YCbCr converted
(jdcolor.c).

Everything works on vectors and takes addresses (`tl_fast.maths.memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tl_fast.maths.compile import njit
from tl_fast.maths.memory import U0, U1, U2, U3, U4, U7, U8, U16, U, load_int16, load_uint8, store_int16, store_uint8
from tl_fast.maths.vectors import BYTE, BYTES, INT, INTS, SHORT, SHORTS, same, to_bytes


@intrinsic
def weigh_rows(typingctx, near, other, out):
    """Sixteen int16 at `out`: three times the bytes at `near` plus those at `other`.

    All addresses (uint64). Nothing is checked.
    """

    def generate(context, builder, signature, arguments):
        bytes16, shorts16 = ir.VectorType(BYTE, 16), ir.VectorType(SHORT, 16)
        first, second = (
            builder.zext(builder.load(builder.inttoptr(start, bytes16.as_pointer()), align=1), shorts16)
            for start in arguments[:2]
        )
        total = builder.add(builder.mul(first, ir.Constant(shorts16, [3] * 16)), second)
        builder.store(total, builder.inttoptr(arguments[2], shorts16.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 3), generate


@intrinsic
def widen(typingctx, sums, early, late, out):
    """Sixteen int16 at `out` from eight at `sums` and their neighbours.

    Pairs of (3 s[i] + s[i - 1] + early) >> 4 and (3 s[i] + s[i + 1] + late) >> 4. sums, out: addresses (uint64); early,
    late: uint64. Nothing is checked.
    """

    def generate(context, builder, signature, arguments):
        before, centre, behind = (
            builder.load(
                builder.inttoptr(builder.add(arguments[0], ir.Constant(ir.IntType(64), 2 * n)), SHORTS.as_pointer()),
                align=2,
            )
            for n in (-1, 0, 1)
        )

        def everywhere(value: ir.Value) -> ir.Value:
            lane = builder.insert_element(ir.Constant(SHORTS, ir.Undefined), builder.trunc(value, SHORT), INT(0))
            return builder.shuffle_vector(lane, lane, ir.Constant(INTS, [0] * 8))

        centre = builder.mul(centre, ir.Constant(SHORTS, [3] * 8))
        left, right = (
            builder.lshr(builder.add(builder.add(centre, beside), everywhere(rounding)), ir.Constant(SHORTS, [4] * 8))
            for beside, rounding in ((before, arguments[1]), (behind, arguments[2]))
        )
        order = ir.Constant(ir.VectorType(INT, 16), [lane for n in range(8) for lane in (n, 8 + n)])
        target = builder.inttoptr(arguments[3], ir.VectorType(SHORT, 16).as_pointer())
        builder.store(builder.shuffle_vector(left, right, order), target, align=2)
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 4), generate


def _store_pixels(builder: ir.IRBuilder, channels: Sequence[ir.Value], size: int, out: ir.Value) -> None:
    """Eight pixels of `size` bytes at `out`, from three vectors of eight bytes; a fourth byte is 0."""
    red, green, blue = channels
    lanes = ir.VectorType(INT, 16)
    pair = builder.shuffle_vector(red, green, ir.Constant(lanes, list(range(16))))
    rest = builder.shuffle_vector(blue, ir.Constant(BYTES, [0] * 8), ir.Constant(lanes, list(range(16))))
    order = [lane + 8 * channel for lane in range(8) for channel in range(size)]
    pixels = builder.shuffle_vector(pair, rest, ir.Constant(ir.VectorType(INT, len(order)), order))
    builder.store(pixels, builder.inttoptr(out, ir.VectorType(BYTE, len(order)).as_pointer()), align=1)


def _bytes_at(builder: ir.IRBuilder, start: ir.Value) -> ir.Value:
    return builder.load(builder.inttoptr(start, BYTES.as_pointer()), align=1)


def _from_ycbcr(size: int) -> Callable:
    @intrinsic
    def convert(typingctx, luma, blue, red, out):
        """Eight RGB pixels at `out` from YCbCr (jdcolor.c), to the bit.

        All addresses (uint64) of eight samples: luma uint8; blue and red, the chroma, int16. Nothing is checked.
        """

        def generate(context, builder, signature, arguments):
            y = builder.zext(_bytes_at(builder, arguments[0]), INTS)
            cb, cr = (
                builder.sub(
                    builder.sext(builder.load(builder.inttoptr(start, SHORTS.as_pointer()), align=2), INTS), same(128)
                )
                for start in arguments[1:3]
            )
            half = same(1 << 15)

            def add(*terms: ir.Value) -> ir.Value:
                total = half
                for term in terms:
                    total = builder.add(total, term)
                return to_bytes(builder, builder.add(y, builder.ashr(total, same(16))))

            red = add(builder.mul(cr, same(91881)))  # 1.402 * 2^16, and so on
            green = add(builder.mul(cb, same(-22554)), builder.mul(cr, same(-46802)))
            blue = add(builder.mul(cb, same(116130)))
            _store_pixels(builder, (red, green, blue), size, arguments[3])
            return context.get_dummy_value()

        return types.void(*[types.uint64] * 4), generate

    return convert


def _from_grey(size: int) -> Callable:
    @intrinsic
    def convert(typingctx, luma, out):
        """Eight pixels without colour at `out`, both addresses (uint64)."""

        def generate(context, builder, signature, arguments):
            _store_pixels(builder, [_bytes_at(builder, arguments[0])] * 3, size, arguments[1])
            return context.get_dummy_value()

        return types.void(*[types.uint64] * 2), generate

    return convert


ycbcr_to_rgb, ycbcr_to_rgbx, grey_to_rgb, grey_to_rgbx = _from_ycbcr(3), _from_ycbcr(4), _from_grey(3), _from_grey(4)


@intrinsic
def rgb_to_rgbx(typingctx, source, out):
    """Eight pixels of four bytes at `out`, the fourth 0, from eight of three; both addresses (uint64)."""

    def generate(context, builder, signature, arguments):
        kind = ir.VectorType(BYTE, 24)
        pixels = builder.load(builder.inttoptr(arguments[0], kind.as_pointer()), align=1)
        order = [24 if n % 4 == 3 else 3 * (n // 4) + n % 4 for n in range(32)]
        wide = builder.shuffle_vector(pixels, ir.Constant(kind, [0] * 24), ir.Constant(ir.VectorType(INT, 32), order))
        builder.store(wide, builder.inttoptr(arguments[1], ir.VectorType(BYTE, 32).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 2), generate


@njit
def repeat(near, other, first, stop, across, rounding, out):
    """Chroma of pixels `first` to `stop` (exclusive) where libjpeg does not smooth along rows.

    across: pixels a sample; with 1, libjpeg smooths down the columns, where `rounding` is added; with 2 or 4, not at
    all. All uint64 but across; near, other: as `upsample`; out: address of int16.
    """
    if across == 1:
        for x in range(first, stop):  # four times the sample where near and other are one row
            value = U3 * U(load_uint8(near, x)) + U(load_uint8(other, x)) + rounding
            store_int16(out, x - first, value >> U2)
    else:
        shift = U1 if across == 2 else U2
        for x in range(first, stop):
            store_int16(out, x - first, U(load_uint8(near, x >> shift)))


@njit
def upsample(near, other, first, stop, width, down, sums, out):
    """Chroma of columns `first` to `stop` (exclusive) at twice the resolution, as jdsample.c's "fancy" routines make
    it.

    All uint64. near, other: addresses of column 0 of the nearest row of samples (uint8) and of the second nearest one,
    the same where chroma has a row for each row of pixels (down = 1); width: columns of the whole image's chroma, the
    outermost of which are repeated beyond; sums, out: addresses of int16, with room for 16 more than the columns need.
    """
    low = first - U1 if first else U0
    count = stop - first
    shift = sums + U2 * (low + U1 - first)
    for x in range(U0, min(stop + U1, width) - low, U16):
        weigh_rows(near + low + x, other + low + x, shift + U2 * x)
    if first == U0:
        store_int16(sums, U0, U(load_int16(sums, U1)))
    if stop == width:
        store_int16(sums, count + U1, U(load_int16(sums, count)))
    early, late = (U8, U7) if down == 2 else (U4, U8)
    for x in range(U0, count, U8):
        widen(sums + U2 * (x + U1), early, late, out + U4 * x)


class Pixels(NamedTuple):
    """Where the samples of an image, or of a part of it, lie in memory; all int64.

    kind: AS_RGB (three bytes a pixel), AS_GREY (luma alone) or AS_PLANES. first, blue, red: the addresses that row 0,
    column 0 of the image's pixels or luma and of its chroma have, or would have if it were there. stride,
    chroma_stride: bytes from one row to the next. across, down: pixels a chroma sample. chroma_rows, chroma_columns: of
    the whole image. top, left, bottom, right: the pixels that are there.

    For the sake of vectors, `PADDING` bytes behind the samples must be readable.
    """

    kind: int
    first: int
    stride: int
    blue: int
    red: int
    chroma_stride: int
    across: int
    down: int
    chroma_rows: int
    chroma_columns: int
    top: int
    left: int
    bottom: int
    right: int


AS_RGB, AS_GREY, AS_PLANES = range(3)
PADDING = 64
ROW_ROOM = 64  # bytes that vectors may write behind a row
SMOOTHED = 3  # columns of chroma, of two pixels each, from which on libjpeg smooths it; narrower, it repeats samples


def planes_of(image: np.ndarray, height: int, width: int) -> Pixels:
    """The pixels of an image stored as planes (docs/file_format.md), uint8 [size], which must stay where it is."""
    return planes_at.py_func(image.ctypes.data, height, width)


@njit
def planes_at(first, height, width):
    """The pixels of planes that begin at an address. All int64."""
    rows, columns = (height + 1) // 2, (width + 1) // 2
    blue = first + height * width
    chroma = blue, blue + rows * columns, columns, 2, 2, rows, columns
    return Pixels(AS_PLANES, first, width, *chroma, 0, 0, height, width)


def pixels_of(region: np.ndarray, top: int, left: int) -> Pixels:
    """The pixels of a region uint8 [h, w, 3], contiguous, whose first one is pixel (top, left) of an image. It must
    stay where it is."""
    rows, columns = region.shape[:2]
    first = region.ctypes.data - 3 * (top * columns + left)
    return Pixels(AS_RGB, first, 3 * columns, 0, 0, 0, 1, 1, 0, 0, top, left, top + rows, left + columns)


@njit
def row_room(columns):
    """Bytes that `write_row` works in for rows of `columns` pixels."""
    return 3 * (2 * columns + ROW_ROOM)


@njit
def write_row(pixels, y, left, right, size, room, out):
    """RGB of the pixels `left` to `right` (exclusive) of row y at `out`, as libjpeg shows them.

    pixels: `Pixels`, which has these; size: bytes a pixel, 3 or 4 (the fourth is 0); room: address of `row_room` bytes;
    out: address. y, left, right: int64; size, addresses: uint64.
    """
    count = U(right - left)
    luma = U(pixels.first + y * pixels.stride)
    if pixels.kind == AS_RGB:
        luma += U3 * U(left)
        if size == U3:
            for x in range(U3 * count):
                store_uint8(out, x, U(load_uint8(luma, x)))
        else:
            x = U0
            while x + U8 <= count:
                rgb_to_rgbx(luma + U3 * x, out + U4 * x)
                x += U8
            while x < count:
                for n in range(U3):
                    store_uint8(out, U4 * x + n, U(load_uint8(luma, U3 * x + n)))
                store_uint8(out, U4 * x + U3, U0)
                x += U1
        return
    luma += U(left)
    step = U(2 * (right - left) + ROW_ROOM)
    blue, red = room + step, room + U2 * step
    if pixels.kind == AS_PLANES:
        near, width = y // pixels.down, U(pixels.chroma_columns)
        smooth = pixels.across == 2 and pixels.chroma_columns >= SMOOTHED
        other = min(max(near - 1 + 2 * (y % 2), 0), pixels.chroma_rows - 1) if pixels.down == 2 else near
        for start, chroma in ((pixels.blue, blue), (pixels.red, red)):
            near_row, other_row = U(start + near * pixels.chroma_stride), U(start + other * pixels.chroma_stride)
            if smooth:
                stop = U((right - 1) // 2 + 1)
                upsample(near_row, other_row, U(left // 2), stop, width, pixels.down, room, chroma)
            else:
                repeat(near_row, other_row, U(left), U(right), pixels.across, U(1 + y % 2), chroma)
        if smooth:
            skew = U(2 * (left % 2))
            blue, red = blue + skew, red + skew
    if count < U8:
        _write_eight(pixels.kind, size, luma, blue, red, room)
        for n in range(size * count):
            store_uint8(out, n, U(load_uint8(room, n)))
        return
    x = U0
    while x < count:
        x = min(x, count - U8)  # the last eight overlap those before
        _write_eight(pixels.kind, size, luma + x, blue + U2 * x, red + U2 * x, out + size * x)
        x += U8


@njit
def _write_eight(kind, size, luma, blue, red, out):
    if kind == AS_PLANES:
        if size == U3:
            ycbcr_to_rgb(luma, blue, red, out)
        else:
            ycbcr_to_rgbx(luma, blue, red, out)
    elif size == U3:
        grey_to_rgb(luma, out)
    else:
        grey_to_rgbx(luma, out)
