"""Reads and writes at an address, for inner loops that are functions of their own; and a count of zero bits.

Numba counts references to the arrays that a function is given, with atomic instructions at each call. An address is a
plain number, which costs nothing. Nothing is checked, and the caller keeps the array alive.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

U = np.uint64
# Numba turns uint64 with int64 into a float; so loops over uint64 need their constants as uint64.
U0, U1, U2, U3, U4, U6, U7, U8, U13, U15, U16, U17 = (U(n) for n in (0, 1, 2, 3, 4, 6, 7, 8, 13, 15, 16, 17))
U21, U24, U26, U31, U32, U40, U48, U56, U63, U64 = (U(n) for n in (21, 24, 26, 31, 32, 40, 48, 56, 63, 64))
U127, U255, U511, U_WORD = U(127), U(255), U(511), U(0xFFFF)

VECTOR = ir.VectorType(ir.IntType(8), 32)


@intrinsic
def address(typingctx, array):
    """Where an array's first element is, uint64."""

    def generate(context, builder, signature, arguments):
        return builder.ptrtoint(
            context.make_array(signature.args[0])(context, builder, arguments[0]).data, ir.IntType(64)
        )

    return types.uint64(array), generate


@intrinsic
def keep(typingctx, arrays):
    """Nothing, but the arrays of this tuple stay alive until here, whose addresses alone are in use."""
    return types.void(arrays), lambda context, builder, signature, arguments: context.get_dummy_value()


@intrinsic
def bytes_from(typingctx, start, size):
    """The `size` bytes from address `start` on as an array, uint8 [size], not writeable. Both uint64."""
    kind = types.Array(types.uint8, 1, "C", readonly=True)

    def generate(context, builder, signature, arguments):
        array = make_array(kind)(context, builder)
        populate_array(
            array,
            data=builder.inttoptr(arguments[0], array.data.type),
            shape=cgutils.pack_array(builder, [arguments[1]]),
            strides=cgutils.pack_array(builder, [ir.Constant(ir.IntType(64), 1)]),
            itemsize=ir.Constant(ir.IntType(64), 1),
            meminfo=None,
        )
        return array._getvalue()

    return kind(types.uint64, types.uint64), generate


@intrinsic
def take_number(typingctx, counter):
    """The number at address `counter`, which is one higher afterwards; no other thread gets the same. Both uint64."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.uint64(types.uint64), generate


def _raw(kind: types.Type) -> ir.Type:
    return ir.FloatType() if kind == types.float32 else ir.IntType(kind.bitwidth)


def _load(kind: types.Type, swapped: bool = False) -> Callable:
    @intrinsic
    def load(typingctx, start, index):
        """Element `index` of the numbers from address `start` on; both uint64."""

        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], (ir.IntType(8) if swapped else _raw(kind)).as_pointer())
            element = builder.bitcast(builder.gep(pointer, [arguments[1]]), _raw(kind).as_pointer())
            value = builder.load(element, align=1 if swapped else kind.bitwidth // 8)
            return builder.bswap(value) if swapped else value

        return kind(types.uint64, types.uint64), generate

    return load


load_uint8, load_int16, load_int32, load_uint16, load_uint64 = (
    _load(kind) for kind in (types.uint8, types.int16, types.int32, types.uint16, types.uint64)
)
load_float32 = _load(types.float32)
load_big = _load(types.uint64, swapped=True)  # the eight bytes from byte `index` on, the first one highest


def _store(kind: types.Type) -> Callable:
    taken = kind if kind == types.float32 else types.uint64

    @intrinsic
    def store(typingctx, start, index, value):
        """Set element `index` of the numbers from address `start` on, both uint64. value: float32, or a uint64 of which
        the lowest bits are stored."""

        def generate(context, builder, signature, arguments):
            element = builder.gep(builder.inttoptr(arguments[0], _raw(kind).as_pointer()), [arguments[1]])
            value = arguments[2] if taken == kind else builder.trunc(arguments[2], _raw(kind))
            builder.store(value, element, align=kind.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64, taken), generate

    return store


store_uint8, store_int16, store_uint16, store_float32 = (
    _store(kind) for kind in (types.uint8, types.int16, types.uint16, types.float32)
)


@intrinsic
def leading_zeros(typingctx, word):
    """How many zeros a word's bits begin with, the highest bit first; 64 of 0. Both uint64."""

    def generate(context, builder, signature, arguments):
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@intrinsic
def copy_bytes(typingctx, source, target, size):
    """Copy `size` bytes between addresses that do not overlap, as C's memcpy. All uint64."""

    def generate(context, builder, signature, arguments):
        start, end = (builder.inttoptr(argument, ir.IntType(8).as_pointer()) for argument in arguments[:2])
        cgutils.raw_memcpy(builder, end, start, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 3), generate


@intrinsic
def copy_past_caches(typingctx, source, target):
    """Copy 64 bytes between addresses, both uint64. The target, a multiple of 64, is written past the caches: it is not
    read first and is not kept in them.

    Such writes may reach other cores late: `publish` before another thread is told of them.
    """

    def generate(context, builder, signature, arguments):
        line = ir.VectorType(ir.IntType(32), 16).as_pointer()
        data = builder.load(builder.inttoptr(arguments[0], line), align=4)
        store = builder.store(data, builder.inttoptr(arguments[1], line), align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generate


@intrinsic
def publish(typingctx):
    """Whoever sees a write after this sees all writes before it, those past the caches included."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def copy_to_ff(typingctx, source, target):
    """Copy 32 bytes between addresses -> how many of them stand before the first 0xFF, 32 where there is none. All
    uint64."""

    def generate(context, builder, signature, arguments):
        data = builder.load(builder.inttoptr(arguments[0], VECTOR.as_pointer()), align=1)
        builder.store(data, builder.inttoptr(arguments[1], VECTOR.as_pointer()), align=1)
        return _first(builder, builder.icmp_unsigned("==", data, ir.Constant(VECTOR, [0xFF] * 32)))

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic
def before_marker(typingctx, source):
    """How many of the 32 bytes at an address stand before the first 0xFF that is not followed by 0; 32 where there is
    none. Reads 33 bytes. Both uint64."""

    def generate(context, builder, signature, arguments):
        addresses = arguments[0], builder.add(arguments[0], ir.Constant(ir.IntType(64), 1))
        data, following = (
            builder.load(builder.inttoptr(address, VECTOR.as_pointer()), align=1) for address in addresses
        )
        is_ff = builder.icmp_unsigned("==", data, ir.Constant(VECTOR, [0xFF] * 32))
        not_zero = builder.icmp_unsigned("!=", following, ir.Constant(VECTOR, [0] * 32))
        return _first(builder, builder.and_(is_ff, not_zero))

    return types.uint64(types.uint64), generate


def _first(builder: ir.IRBuilder, flags: ir.Value) -> ir.Value:
    """The number of the first true flag of 32, i64; 32 where none is."""
    mask = builder.zext(builder.bitcast(flags, ir.IntType(32)), ir.IntType(64))
    mask = builder.or_(mask, ir.Constant(ir.IntType(64), 1 << 32))
    return builder.cttz(mask, ir.Constant(ir.IntType(1), 1))
