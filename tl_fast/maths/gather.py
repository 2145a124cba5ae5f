"""Bytes from many places in memory, put together."""

from __future__ import annotations

from tl_fast.maths.compile import njit
from tl_fast.maths.memory import U, address, copy_bytes


@njit
def gather(sources, sizes, offsets, out):
    """Copy sizes[i] bytes from address sources[i] to out[offsets[i]] and on, for every i.

    sources, sizes, offsets: int64 [n]; out: uint8, large enough. Nothing is checked.
    """
    target = address(out)
    for i in range(sources.size):
        copy_bytes(U(sources[i]), target + U(offsets[i]), U(sizes[i]))
