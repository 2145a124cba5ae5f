"""Finds the bytes of a zip's member by the local header in front of them."""

from __future__ import annotations

import struct

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, lengths of the name and of the extra field that follow
SIZE = _LOCAL_HEADER.size


def data_start(header: bytes, position: int) -> int | None:
    """Where a member's bytes begin in its zip; None where `header` is no local header, or not a whole one.

    header: `SIZE` bytes of the zip from `position` on.
    """
    if len(header) != SIZE:
        return None
    magic, name, extra = _LOCAL_HEADER.unpack(header)
    return position + SIZE + name + extra if magic == b"PK\3\4" else None
