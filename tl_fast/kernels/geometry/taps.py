"""The sum of weighted pixels that a warp makes for every output pixel, in vector instructions.

Numba leaves LLVM's vectoriser for straight-line code off, so a pixel's channels would be summed one by one. Here the
vectors are written down, and LLVM turns them into what the machine has.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_VECTOR, _INDEX = ir.VectorType(ir.FloatType(), 4), ir.IntType(32)
_UNDEFINED, _FIRST_LANE = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.VectorType(_INDEX, 4), [0] * 4)


@intrinsic
def add_taps(typingctx, pixels, first, stride, weights_x, weights_y, out, target):
    """out[target : target + 4] = the sum over n x n pixels of weights_y[row] * weights_x[column] * pixel (four floats).

    pixels: float32 [any], of which the first pixel begins at `first`, the next row's `stride` floats later; weights_x,
    weights_y: tuples of n float32; out: float32 [any]; first, stride, target: uint64. Indices are not checked.
    """

    def generate(context, builder, signature, arguments):
        pixels_value, row_start, step, x_values, y_values, out_value, end = arguments
        source = context.make_array(signature.args[0])(context, builder, pixels_value).data
        result = context.make_array(signature.args[5])(context, builder, out_value).data

        def spread(weights, n):
            lane = builder.insert_element(_UNDEFINED, builder.extract_value(weights, n), _INDEX(0))
            return builder.shuffle_vector(lane, _UNDEFINED, _FIRST_LANE)

        def add(total, term):
            return term if total is None else builder.fadd(total, term)

        total, columns = None, [spread(x_values, n) for n in range(len(weights_x))]
        for n in range(len(weights_y)):
            row = None
            for column, weight in enumerate(columns):
                address = builder.gep(source, [builder.add(row_start, ir.Constant(row_start.type, 4 * column))])
                pixel = builder.load(builder.bitcast(address, _VECTOR.as_pointer()), align=4)
                row = add(row, builder.fmul(pixel, weight))
            total = add(total, builder.fmul(row, spread(y_values, n)))
            row_start = builder.add(row_start, step)
        builder.store(total, builder.bitcast(builder.gep(result, [end]), _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(pixels, types.uint64, types.uint64, weights_x, weights_y, out, types.uint64), generate
