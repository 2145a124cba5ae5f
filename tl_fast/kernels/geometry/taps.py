"""The sums of weighted pixels that a resize and a warp make, in vector instructions.

Numba leaves LLVM's vectoriser for straight-line code off, so a pixel's channels would be summed one by one. Here the
vectors are written down, and LLVM turns them into what the machine has. All addresses, indices and counts are uint64;
nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tl_fast.maths.compile import njit
from tl_fast.maths.memory import U0, U1, U2, U3, U4, U, load_int32
from tl_fast.maths.scalar import PRECISION
from tl_fast.maths.vectors import BYTE, INT

BLOCK = 4  # rows of pixels that are filtered at once
LANES = 16  # numbers of a vector: BLOCK pixels of four bytes, or bytes of a row
CHUNK = 32  # bytes of a row that are filtered at once

_LONG = ir.IntType(64)
_SUMS, _BYTES = ir.VectorType(INT, LANES), ir.VectorType(BYTE, LANES)


def _same(value: int) -> ir.Constant:
    return ir.Constant(_SUMS, [value] * LANES)


def _load(builder: ir.IRBuilder, kind: ir.Type, start: ir.Value, offset: ir.Value | int = 0) -> ir.Value:
    offset = ir.Constant(_LONG, offset) if isinstance(offset, int) else offset
    return builder.load(builder.inttoptr(builder.add(start, offset), kind.as_pointer()), align=1)


def _store(builder: ir.IRBuilder, value: ir.Value, start: ir.Value, offset: int = 0) -> None:
    place = builder.add(start, ir.Constant(_LONG, offset))
    builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=1)


def _everywhere(builder: ir.IRBuilder, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    lane = builder.insert_element(ir.Constant(kind, ir.Undefined), value, INT(0))
    return builder.shuffle_vector(lane, lane, ir.Constant(ir.VectorType(INT, kind.count), [0] * kind.count))


def _round(builder: ir.IRBuilder, total: ir.Value) -> ir.Value:
    """Sums of weighted bytes as bytes, rounded and clipped as Pillow's `clip8`."""
    values = builder.ashr(total, _same(PRECISION))
    for compare, bound in (("<", 0), (">", 255)):
        values = builder.select(builder.icmp_signed(compare, values, _same(bound)), _same(bound), values)
    return builder.trunc(values, _BYTES)


def _add_tap(builder: ir.IRBuilder, total: ir.Value, start: ir.Value, weight: ir.Value) -> ir.Value:
    pixels = builder.zext(_load(builder, _BYTES, start), _SUMS)
    return builder.add(total, builder.mul(pixels, weight))


def _sums(
    builder: ir.IRBuilder, taps: int | ir.Value, width: int, place: Callable, weights: ir.Value
) -> list[ir.Value]:
    """The sums over so many taps of `width` vectors each. place(n): the address of tap n; weights: address of int32."""

    def add(totals: Sequence[ir.Value], n: ir.Value) -> list[ir.Value]:
        weight = _everywhere(builder, _load(builder, INT, weights, builder.mul(n, ir.Constant(_LONG, 4))), _SUMS)
        start = place(n)
        return [
            _add_tap(builder, total, builder.add(start, ir.Constant(_LONG, LANES * m)), weight)
            for m, total in enumerate(totals)
        ]

    totals: list[ir.Value] = [_same(1 << (PRECISION - 1))] * width
    if isinstance(taps, int):
        for n in range(taps):
            totals = add(totals, ir.Constant(_LONG, n))
        return totals
    before, loop = builder.block, builder.append_basic_block("taps")
    behind = builder.append_basic_block("all_taps")
    builder.branch(loop)
    builder.position_at_end(loop)
    number, *sums = [builder.phi(kind) for kind in (_LONG, *[_SUMS] * width)]
    added = add(sums, number)
    following = builder.add(number, ir.Constant(_LONG, 1))
    for phi, first, later in zip((number, *sums), (ir.Constant(_LONG, 0), *totals), (following, *added), strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, builder.block)
    builder.cbranch(builder.icmp_unsigned("<", following, taps), loop, behind)
    builder.position_at_end(behind)
    return added


def _across(taps: int) -> Callable:
    @intrinsic
    def weigh(typingctx, block, weights, count, target):
        """16 bytes at `target`: the sum of `count` times 16 bytes from `block` on, each times its weight, int32."""

        def generate(context, builder, signature, arguments):
            block, weights, count, target = arguments

            def place(n: ir.Value) -> ir.Value:
                return builder.add(block, builder.mul(n, ir.Constant(_LONG, LANES)))

            (total,) = _sums(builder, taps or count, 1, place, weights)
            _store(builder, _round(builder, total), target)
            return context.get_dummy_value()

        return types.void(*[types.uint64] * 4), generate

    return weigh


def _down(taps: int) -> Callable:
    @intrinsic
    def weigh(typingctx, ring, first, mask, step, weights, count, target):
        """CHUNK bytes at `target`: the sum of `count` rows of `ring`, each times its weight, int32. Row n begins at
        ring + (n & mask) * step; the first one is `first`."""

        def generate(context, builder, signature, arguments):
            ring, first, mask, step, weights, count, target = arguments

            def place(n: ir.Value) -> ir.Value:
                row = builder.and_(builder.add(first, n), mask)
                return builder.add(ring, builder.mul(row, step))

            for m, total in enumerate(_sums(builder, taps or count, CHUNK // LANES, place, weights)):
                _store(builder, _round(builder, total), target, LANES * m)
            return context.get_dummy_value()

        return types.void(*[types.uint64] * 7), generate

    return weigh


_across_1, _across_2, _across_3, _across_4, _across_5, _across_n = map(_across, (1, 2, 3, 4, 5, 0))
_down_1, _down_2, _down_3, _down_4, _down_5, _down_n = map(_down, (1, 2, 3, 4, 5, 0))


def _mix(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, order: Sequence[int]) -> ir.Value:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, len(order)), list(order)))


@intrinsic
def interleave(typingctx, rows, step, target):
    """Eight pixels of four bytes of each of BLOCK rows, `step` bytes apart -> at `target` the rows' first pixels, then
    their second ones, and so on."""

    def generate(context, builder, signature, arguments):
        rows, step, target = arguments
        lines = []
        for _ in range(BLOCK):
            lines.append(_load(builder, ir.VectorType(INT, 8), rows))
            rows = builder.add(rows, step)
        low, high = (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)
        left, right = (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)
        pairs = [[_mix(builder, lines[n], lines[n + 1], order) for n in (0, 2)] for order in (low, high)]
        fours = [_mix(builder, *pair, order) for pair in pairs for order in (left, right)]  # pixels n and n + 4
        first, second = (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)
        for m, (order, n) in enumerate((order, n) for order in (first, second) for n in (0, 2)):
            _store(builder, _mix(builder, fours[n], fours[n + 1], order), target, 32 * m)
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 3), generate


@intrinsic
def separate(typingctx, block, rows, step, plane):
    """LANES pixels of BLOCK rows -> bytes of each row and channel side by side.

    block: address of the pixels, BLOCK of four bytes for each of LANES columns, the columns in the order 0, 4, 8, 12,
    1, 5, ... (`place_of`). Row n of channel c is written to rows + n * step + c * plane.
    """

    def generate(context, builder, signature, arguments):
        block, rows, step, plane = arguments
        size = 4 * LANES
        parts = [_load(builder, ir.VectorType(BYTE, size), block, size * n) for n in range(4)]

        def unpack(a: ir.Value, b: ir.Value, unit: int, high: bool) -> ir.Value:
            """Alternating units of `unit` bytes of the lower or upper halves of each 16 bytes."""
            order = []
            for lane in range(0, size, 16):
                for n in range(8 // unit):
                    start = lane + 8 * high + unit * n
                    order += [*range(start, start + unit), *range(size + start, size + start + unit)]
            return _mix(builder, a, b, order)

        pairs = [[unpack(parts[n], parts[n + 1], 1, high) for n in (0, 2)] for high in (False, True)]
        lines = [unpack(*pair, 2, high) for pair in pairs for high in (False, True)]
        words = ir.VectorType(INT, 16)
        for line in lines:
            line = builder.bitcast(line, words)
            line = _mix(builder, line, line, [4 * n + c for c in range(4) for n in range(4)])
            target = rows
            for c in range(3):
                _store(builder, _mix(builder, line, line, range(4 * c, 4 * c + 4)), target)
                target = builder.add(target, plane)
            rows = builder.add(rows, step)
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 4), generate


@njit
def place_of(x):
    """Where column x is put for `separate`."""
    return (x & ~U(15)) | ((x & U3) << U2) | ((x >> U2) & U3)


@njit
def filter_across(block, first, weights, taps, columns, flip, target):
    """Filter BLOCK rows at once along x: output column x, counted from the other end when `flip`, as 16 bytes at
    target + 16 place_of(x).

    block: address of the rows' pixels, as `interleave` puts them; first: address of int32 [columns]; weights: address
    of int32 [columns, taps].
    """
    ahead = U4 * taps
    for x in range(columns):
        start = block + U(LANES) * U(load_int32(first, x))
        out = target + U(LANES) * place_of(columns - U1 - x if flip else x)
        if taps == U2:
            _across_2(start, weights, taps, out)
        elif taps == U3:
            _across_3(start, weights, taps, out)
        elif taps == U4:
            _across_4(start, weights, taps, out)
        elif taps == U(5):
            _across_5(start, weights, taps, out)
        elif taps == U1:
            _across_1(start, weights, taps, out)
        else:
            _across_n(start, weights, taps, out)
        weights += ahead


@njit
def filter_down(ring, first, mask, step, weights, taps, size, target):
    """Filter `size` bytes, CHUNK or more, of rows in a ring along y -> `target`. As `weigh` of `_down` has them."""
    x = U0
    while x < size:
        x = min(x, size - U(CHUNK))  # the last ones overlap those before
        start, out = ring + x, target + x
        if taps == U2:
            _down_2(start, first, mask, step, weights, taps, out)
        elif taps == U3:
            _down_3(start, first, mask, step, weights, taps, out)
        elif taps == U4:
            _down_4(start, first, mask, step, weights, taps, out)
        elif taps == U(5):
            _down_5(start, first, mask, step, weights, taps, out)
        elif taps == U1:
            _down_1(start, first, mask, step, weights, taps, out)
        else:
            _down_n(start, first, mask, step, weights, taps, out)
        x += U(CHUNK)


@intrinsic
def merge_channels(typingctx, channels, plane, target):
    """LANES pixels of four bytes, the fourth 0, at `target` from a byte of each of three channels, `plane` bytes
    apart."""

    def generate(context, builder, signature, arguments):
        channels, plane, target = arguments
        parts = []
        for _ in range(3):
            parts.append(_load(builder, _BYTES, channels))
            channels = builder.add(channels, plane)
        halves = list(range(2 * LANES))
        first = _mix(builder, parts[0], parts[1], halves)
        second = _mix(builder, parts[2], ir.Constant(_BYTES, [0] * LANES), halves)
        _store(builder, _mix(builder, first, second, [LANES * c + n for n in range(LANES) for c in range(4)]), target)
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 3), generate


@intrinsic
def split_channels(typingctx, pixels, plane, target):
    """The three channels' bytes, `plane` bytes apart from `target` on, of LANES pixels of four bytes."""

    def generate(context, builder, signature, arguments):
        pixels, plane, target = arguments
        values = _load(builder, ir.VectorType(BYTE, 4 * LANES), pixels)
        for c in range(3):
            _store(builder, _mix(builder, values, values, [4 * n + c for n in range(LANES)]), target)
            target = builder.add(target, plane)
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 3), generate


# Of the weights around a point d (0..1) behind the pixel in the middle: polynomials in d, the constant first.
# The cubic ones are `tl_fast.maths.scalar.cubic_weights`.
LINEAR = ((1, -1), (0, 1))
CUBIC = ((0, -1, 2, -1), (1, 0, -2, 1), (0, 1, 1, -1), (0, 0, -1, 1))


def _around(weights: Sequence[Sequence[int]]) -> Callable:
    taps = len(weights)
    few, many = (ir.VectorType(ir.FloatType(), n * taps) for n in (1, 4))

    def at(builder: ir.IRBuilder, d: ir.Value, kind: ir.VectorType) -> ir.Value:
        """The weights at d, each of them `kind.count // taps` times."""
        points = _everywhere(builder, d, kind)
        total = None
        for factors in reversed(list(zip(*weights, strict=True))):
            factor = ir.Constant(kind, [float(number) for number in factors for _ in range(kind.count // taps)])
            total = factor if total is None else builder.fadd(builder.fmul(total, points), factor)
        return total

    @intrinsic
    def weigh(typingctx, pixels, stride, x, y, target):
        """A pixel of four bytes at `target`: the sum of taps x taps pixels of four bytes, weighted for a point x, y
        (0..1, float32) behind the middle ones, rounded and clipped.

        pixels: address of the first one; stride: bytes to the next row.
        """

        def generate(context, builder, signature, arguments):
            pixels, stride, x, y, target = arguments
            down, total = at(builder, y, few), None
            for n in range(taps):
                row = builder.uitofp(_load(builder, ir.VectorType(BYTE, 4 * taps), pixels), many)
                row = builder.fmul(row, _mix(builder, down, down, [n] * (4 * taps)))
                total = row if total is None else builder.fadd(total, row)
                pixels = builder.add(pixels, stride)
            total = builder.fmul(total, at(builder, x, many))
            while (size := total.type.count) > 4:
                low, high = (_mix(builder, total, total, range(n, n + size // 2)) for n in (0, size // 2))
                total = builder.fadd(low, high)
            total = builder.fadd(total, ir.Constant(total.type, [0.5] * 4))
            for compare, bound in (("<", 0.0), (">", 255.0)):
                limit = ir.Constant(total.type, [bound] * 4)
                total = builder.select(builder.fcmp_ordered(compare, total, limit), limit, total)
            values = builder.fptosi(total, ir.VectorType(INT, 4))
            _store(builder, builder.trunc(values, ir.VectorType(BYTE, 4)), target)
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64, types.float32, types.float32, types.uint64), generate

    return weigh


weigh_2_around, weigh_4_around = _around(LINEAR), _around(CUBIC)
