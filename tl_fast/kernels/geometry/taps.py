"""The sum of weighted pixels that a warp makes for every output pixel, in vector instructions.

Numba leaves LLVM's vectoriser for straight-line code off, so that a pixel's channels would be summed one by one; here
the vectors are written down. LLVM turns them into what the machine has.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_VECTOR, _INDEX = ir.VectorType(ir.FloatType(), 4), ir.IntType(32)
_UNDEFINED, _FIRST_LANE = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.VectorType(_INDEX, 4), [0] * 4)


@intrinsic
def add_taps(typingctx, pixels, at, stride, weights_x, weights_y, out, to):
    """out[to : to + 4] = the sum over n x n pixels of weights_y[row] * weights_x[column] * pixel, each four floats.

    pixels: float32 [any], the first pixel begins at `at`, the next row's `stride` floats later, both uint64; weights_x,
    weights_y: tuples of n float32; out: float32 [any]; to: uint64. Indices are not checked.
    """

    def generate(context, builder, signature, arguments):
        pixels_value, start, step, x_values, y_values, out_value, end = arguments
        source = context.make_array(signature.args[0])(context, builder, pixels_value).data
        target = context.make_array(signature.args[5])(context, builder, out_value).data

        def spread(weights, n):
            lane = builder.insert_element(_UNDEFINED, builder.extract_value(weights, n), _INDEX(0))
            return builder.shuffle_vector(lane, _UNDEFINED, _FIRST_LANE)

        def add(total, term):
            return term if total is None else builder.fadd(total, term)

        total, columns = None, [spread(x_values, n) for n in range(len(weights_x))]
        for n in range(len(weights_y)):
            row = None
            for column, weight in enumerate(columns):
                place = builder.gep(source, [builder.add(start, ir.Constant(start.type, 4 * column))])
                pixel = builder.load(builder.bitcast(place, _VECTOR.as_pointer()), align=4)
                row = add(row, builder.fmul(pixel, weight))
            total = add(total, builder.fmul(row, spread(y_values, n)))
            start = builder.add(start, step)
        builder.store(total, builder.bitcast(builder.gep(target, [end]), _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(pixels, types.uint64, types.uint64, weights_x, weights_y, out, types.uint64), generate
