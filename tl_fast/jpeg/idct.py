"""The inverse DCT of an 8 x 8 block, in vector instructions: libjpeg's accurate integer one (jidctint.c) to the bit.

Numba leaves LLVM's vectoriser for straight-line code off; here a vector holds a row of eight, and both passes run down
the columns with a transpose between.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tl_fast.maths.vectors import BYTES, INT, INTS, SHORT, SHORTS, same, to_bytes

CONST_BITS, PASS1_BITS = 13, 2

# FIX(x) of jidctint.c: x * 2^13, rounded
F_0_298631336, F_0_390180644, F_0_541196100 = 2446, 3196, 4433
F_0_765366865, F_0_899976223, F_1_175875602 = 6270, 7373, 9633
F_1_501321110, F_1_847759065, F_1_961570560 = 12299, 15137, 16069
F_2_053119869, F_2_562915447, F_3_072711026 = 16819, 20995, 25172


def _transform(builder: ir.IRBuilder, rows: Sequence[ir.Value], shift: int) -> list[ir.Value]:
    """One pass down the columns of eight rows: jidctint.c's steps under its names."""
    add, sub = builder.add, builder.sub

    def times(value: ir.Value, factor: int) -> ir.Value:
        return builder.mul(value, same(factor))

    z1 = times(add(rows[2], rows[6]), F_0_541196100)
    tmp2, tmp3 = sub(z1, times(rows[6], F_1_847759065)), add(z1, times(rows[2], F_0_765366865))
    tmp0 = builder.shl(add(rows[0], rows[4]), same(CONST_BITS))
    tmp1 = builder.shl(sub(rows[0], rows[4]), same(CONST_BITS))
    rounding = same(1 << (shift - 1))
    tmp0, tmp1 = add(tmp0, rounding), add(tmp1, rounding)
    tmp10, tmp13, tmp11, tmp12 = add(tmp0, tmp3), sub(tmp0, tmp3), add(tmp1, tmp2), sub(tmp1, tmp2)

    tmp0, tmp1, tmp2, tmp3 = rows[7], rows[5], rows[3], rows[1]
    z1, z2, z3, z4 = add(tmp0, tmp3), add(tmp1, tmp2), add(tmp0, tmp2), add(tmp1, tmp3)
    z5 = times(add(z3, z4), F_1_175875602)
    z1, z2 = times(z1, -F_0_899976223), times(z2, -F_2_562915447)
    z3, z4 = add(times(z3, -F_1_961570560), z5), add(times(z4, -F_0_390180644), z5)
    tmp0 = add(times(tmp0, F_0_298631336), add(z1, z3))
    tmp1 = add(times(tmp1, F_2_053119869), add(z2, z4))
    tmp2 = add(times(tmp2, F_3_072711026), add(z2, z3))
    tmp3 = add(times(tmp3, F_1_501321110), add(z1, z4))

    pairs = ((tmp10, tmp3), (tmp11, tmp2), (tmp12, tmp1), (tmp13, tmp0))
    sums, differences = [add(even, odd) for even, odd in pairs], [sub(even, odd) for even, odd in pairs]
    return [builder.ashr(value, same(shift)) for value in (*sums, *differences[::-1])]


def _transpose(builder: ir.IRBuilder, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """Eight vectors of eight: element j of vector i becomes element i of vector j, in three steps of interleaving."""
    lanes = ir.VectorType(INT, 8)

    def mix(a: ir.Value, b: ir.Value, order: Sequence[int]) -> ir.Value:
        return builder.shuffle_vector(a, b, ir.Constant(lanes, list(order)))

    # Within the halves of a vector, as the machine's instructions do.
    low, high = (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)
    ones = [mix(rows[i], rows[i + 1], order) for i in (0, 2, 4, 6) for order in (low, high)]
    left, right = (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)
    twos = [mix(ones[i + n], ones[i + n + 2], order) for i in (0, 4) for n in (0, 1) for order in (left, right)]
    first, second = (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)
    return [mix(twos[n], twos[n + 4], order) for order in (first, second) for n in range(4)]


@intrinsic
def idct(typingctx, coefficients, factors, plane, stride):
    """The 64 pixels of a block from its coefficients, which are then set to zero.

    All addresses (uint64): 64 coefficients and the 64 factors to multiply them by, int16, row by row; plane: uint8,
    the first pixel, with the next row `stride` bytes behind. Nothing is checked.
    """

    def generate(context, builder, signature, arguments):
        source, multipliers = (builder.inttoptr(argument, SHORT.as_pointer()) for argument in arguments[:2])
        start, step = arguments[2:]
        rows = []
        for n in range(8):
            row, factor = (
                builder.bitcast(builder.gep(base, [INT(8 * n)]), SHORTS.as_pointer()) for base in (source, multipliers)
            )
            rows.append(builder.sext(builder.mul(builder.load(row, align=2), builder.load(factor, align=2)), INTS))
            builder.store(ir.Constant(SHORTS, [0] * 8), row, align=2)
        rows = _transpose(builder, _transform(builder, rows, CONST_BITS - PASS1_BITS))
        rows = _transpose(builder, _transform(builder, rows, CONST_BITS + PASS1_BITS + 3))
        for row in rows:
            pixels = to_bytes(builder, builder.add(row, same(128)))
            builder.store(pixels, builder.inttoptr(start, BYTES.as_pointer()), align=1)
            start = builder.add(start, step)
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 4), generate
