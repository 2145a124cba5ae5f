"""Rows of JPEG samples -> RGB, bit for bit as libjpeg: chroma upsampled (jdsample.c), YCbCr converted (jdcolor.c).

Everything works on vectors and takes addresses (`tl_fast.maths.memory`).
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tl_fast.jpeg.bits import U0, U1, U2, U3, U4, U7, U8, U16, U
from tl_fast.jpeg.idct import BYTE, BYTES, INT, INTS, SHORT, SHORTS, same, to_bytes
from tl_fast.maths.compile import njit
from tl_fast.maths.memory import load_int16, load_uint8, store_int16, store_uint8


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


@intrinsic
def to_rgb(typingctx, luma, blue, red, out):
    """Eight RGB pixels at `out` from YCbCr (jdcolor.c), to the bit.

    All addresses (uint64) of eight samples: luma uint8; blue and red, the chroma, int16; out has 24 bytes. Nothing is
    checked.
    """

    def generate(context, builder, signature, arguments):
        y = builder.zext(builder.load(builder.inttoptr(arguments[0], BYTES.as_pointer()), align=1), INTS)
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
        pair = builder.shuffle_vector(red, green, ir.Constant(ir.VectorType(INT, 16), list(range(16))))
        rest = builder.shuffle_vector(blue, blue, ir.Constant(ir.VectorType(INT, 16), list(range(16))))
        order = [lane for n in range(8) for lane in (n, 8 + n, 16 + n)]
        pixels = builder.shuffle_vector(pair, rest, ir.Constant(ir.VectorType(INT, 24), order))
        builder.store(pixels, builder.inttoptr(arguments[3], ir.VectorType(BYTE, 24).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 4), generate


@njit
def repeat(near, other, first, stop, across, rounding, out):
    """Chroma of pixels `first` to `stop` (exclusive) where libjpeg does not smooth along rows.

    across: pixels a sample; with 1, libjpeg smooths down the columns, where `rounding` is added; with 4, not at all.
    All uint64 but across; near, other: as `upsample`; out: address of int16.
    """
    if across == 4:
        for x in range(first, stop):
            store_int16(out, x - first, U(load_uint8(near, x >> U2)))
    else:
        for x in range(first, stop):  # four times the sample where near and other are one row
            value = U3 * U(load_uint8(near, x)) + U(load_uint8(other, x)) + rounding
            store_int16(out, x - first, value >> U2)


@njit
def grey_row(luma, out, width):
    """RGB of `width` pixels without colour; both addresses (uint64)."""
    for x in range(width):
        for n in range(U3):
            store_uint8(out, U3 * x + n, U(load_uint8(luma, x)))


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


@njit
def colour_row(luma, blue, red, room, out, width):
    """RGB of `width` pixels; addresses as `to_rgb` has them; room: address of 24 bytes."""
    if width < U8:
        to_rgb(luma, blue, red, room)
        for n in range(U3 * width):
            store_uint8(out, n, U(load_uint8(room, n)))
        return
    x = U0
    while x < width:
        x = min(x, width - U8)  # the last eight overlap those before
        to_rgb(luma + x, blue + U2 * x, red + U2 * x, out + U3 * x)
        x += U8
