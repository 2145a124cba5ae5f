"""What the CUDA kernels share: device functions of `tl_fast.maths.scalar` in float32, and accesses to memory that numba
has no words for.

Importing it needs no GPU. Under numba's simulator (NUMBA_ENABLE_CUDASIM=1, set before numba is imported) the kernels
are plain Python, and so are the twins of the intrinsics here.

Kernels use `numba.cuda`, device functions use `gpu` for it. While a kernel runs, the simulator replaces the name `cuda`
in the kernel's module; for a device function of another module it would do so per call and for all threads at once, and
take the name away while other threads still need it.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from numba import cuda

from tl_fast.maths.compile import compile_scalar

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
ALIGNMENT = None if SIMULATED else 16  # bytes, of shared memory that is read 16 bytes at a time
ZERO, HALF, ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
I = np.int32  # numba makes int64 of every sum of int32: casts let the compiler go back  # noqa: E741


def device(function: Callable) -> Callable:
    """A device function, always inlined."""
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


if SIMULATED:
    from numba.cuda.simulator.kernel import _get_kernel_context

    class _Running:
        """`numba.cuda` as the running kernel has it."""

        def __getattr__(self, name):
            return getattr(_get_kernel_context(), name)

    gpu = _Running()
    scalar32 = compile_scalar(lambda function: function, np.float32)

    def store16(array, index, a, b, c, d):
        """Four float32 or uint32 as 16 bytes to `array` from element `index` on, which must be aligned to them."""
        data = np.array([a, b, c, d]).astype(np.float32 if isinstance(a, np.float32) else np.uint32).view(array.dtype)
        for n in range(data.size):
            array[index + n] = data[n]

    def load16(array, index):
        """Four float32 from `index` on, which must be a multiple of 4."""
        return array[index], array[index + 1], array[index + 2], array[index + 3]

    def in_step():
        """Wait for the other threads of the warp, and see what they have written. In the simulator a block is one group
        of any number of threads."""
        gpu.syncthreads()

    def warp_max(value, scratch, lane, lanes):
        """The highest value of a warp's threads. scratch: float32 in shared memory, one a thread, for the simulator."""
        gpu.syncthreads()
        scratch[lane] = value
        gpu.syncthreads()
        return np.float32(max(scratch[:lanes]))

    def warp_sum(value, scratch, lane, lanes):
        """The sum of a warp's values; arguments as of `warp_max`."""
        gpu.syncthreads()
        scratch[lane] = value
        gpu.syncthreads()
        return np.float32(sum(scratch[:lanes]))

    def peek(array, index):
        """array[index] for an index that is known not to be negative, which numba would check."""
        return array[index]

    def poke(array, index, value):
        """array[index] = value, likewise."""
        array[index] = value

    def load_word(array, index):
        """Four uint8 from `index` on, which must be a multiple of 4, as one uint32, the first in its low bits."""
        return (
            int(array[index]) | int(array[index + 1]) << 8 | int(array[index + 2]) << 16 | int(array[index + 3]) << 24
        )

    def store_word(array, index, word):
        """32 bits as four uint8 or two uint16 to `array` from `index` on, a multiple of as many; the low bits first."""
        data = np.array([int(word) & 0xFFFFFFFF], np.uint32).view(array.dtype)
        for n in range(data.size):
            array[index + n] = data[n]

    def pack_bfloat16(low, high):
        """Two float32, rounded to bfloat16 (to the nearest, halves to even), in one uint32."""
        bits = np.array([low, high], np.float32).view(np.uint32).astype(np.uint64)
        first, second = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
        return np.uint32(first | second << np.uint64(16))

else:
    from llvmlite import ir
    from numba.cuda import libdevice
    from numba.cuda.extending import intrinsic
    from numba.cuda.types import UniTuple, float32, int64, uint32, void

    gpu = cuda

    @device
    def _product(a, b):
        return libdevice.fmul_rn(np.float32(a), np.float32(b))

    scalar32 = compile_scalar(device, np.float32, product=_product)

    @device
    def in_step():
        gpu.syncwarp()

    @device
    def warp_max(value, scratch, lane, lanes):
        for n in range(5):
            value = max(value, gpu.shfl_xor_sync(0xFFFFFFFF, value, 16 >> n))
        return value

    @device
    def warp_sum(value, scratch, lane, lanes):
        for n in range(5):
            value += gpu.shfl_xor_sync(0xFFFFFFFF, value, 16 >> n)
        return value

    def _address(context, builder, array_type, array, index, pointee):
        data = context.make_array(array_type)(context, builder, array).data
        return builder.bitcast(builder.gep(data, [index]), ir.PointerType(pointee))

    @intrinsic
    def store16(typingctx, array, index, a, b, c, d):
        def codegen(context, builder, signature, args):
            kind = ir.VectorType(context.get_value_type(signature.args[2]), 4)
            vector = ir.Constant(kind, ir.Undefined)
            for n, value in enumerate(args[2:]):
                vector = builder.insert_element(vector, value, ir.Constant(ir.IntType(32), n))
            store = builder.store(vector, _address(context, builder, signature.args[0], args[0], args[1], kind))
            store.align = 16
            return context.get_dummy_value()

        kind = float32 if a == float32 else uint32
        return void(array, int64, kind, kind, kind, kind), codegen

    @intrinsic
    def load16(typingctx, array, index):
        def codegen(context, builder, signature, args):
            kind = ir.VectorType(ir.FloatType(), 4)
            load = builder.load(_address(context, builder, signature.args[0], args[0], args[1], kind))
            load.align = 16
            values = [builder.extract_element(load, ir.Constant(ir.IntType(32), n)) for n in range(4)]
            return context.make_tuple(builder, signature.return_type, values)

        return UniTuple(float32, 4)(array, int64), codegen

    @intrinsic
    def peek(typingctx, array, index):
        def codegen(context, builder, signature, args):
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            return context.unpack_value(builder, signature.return_type, builder.gep(data, [args[1]]))

        return array.dtype(array, int64), codegen

    @intrinsic
    def poke(typingctx, array, index, value):
        def codegen(context, builder, signature, args):
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            context.pack_value(builder, signature.args[2], args[2], builder.gep(data, [args[1]]))
            return context.get_dummy_value()

        return void(array, int64, array.dtype), codegen

    @intrinsic
    def load_word(typingctx, array, index):
        def codegen(context, builder, signature, args):
            load = builder.load(_address(context, builder, signature.args[0], args[0], args[1], ir.IntType(32)))
            load.align = 4
            return load

        return uint32(array, int64), codegen

    @intrinsic
    def store_word(typingctx, array, index, word):
        def codegen(context, builder, signature, args):
            store = builder.store(
                args[2], _address(context, builder, signature.args[0], args[0], args[1], ir.IntType(32))
            )
            store.align = 4
            return context.get_dummy_value()

        return void(array, int64, uint32), codegen

    @intrinsic
    def pack_bfloat16(typingctx, low, high):
        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(ir.IntType(32), [ir.FloatType(), ir.FloatType()])
            return builder.asm(kind, "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", args, False)

        return uint32(float32, float32), codegen


@device
def block_thread():
    """This thread's number in its block, and the block's number of threads, int32."""
    lanes, groups = gpu.blockDim.x, gpu.blockDim.y
    return I(gpu.threadIdx.y * lanes + gpu.threadIdx.x), I(lanes * groups)
