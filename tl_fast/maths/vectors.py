"""What functions in vector instructions are put together from (llvmlite's IR)."""

from __future__ import annotations

from llvmlite import ir

BYTE, SHORT, INT = ir.IntType(8), ir.IntType(16), ir.IntType(32)
SHORTS, INTS, BYTES = (ir.VectorType(kind, 8) for kind in (SHORT, INT, BYTE))


def same(value: int) -> ir.Constant:
    return ir.Constant(INTS, [value] * 8)


def to_bytes(builder: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """Eight numbers as bytes, those beyond 0..255 as the nearer end."""
    for compare, bound in (("<", 0), (">", 255)):
        values = builder.select(builder.icmp_signed(compare, values, same(bound)), same(bound), values)
    return builder.trunc(values, BYTES)
