"""YUV 4:2:0 planes as an image file: a YUV4MPEG2 stream (.y4m) of one frame, full range, chroma sited as JPEG's.

Betons that hold planes are read as such files when they are converted or annotated again. `tl_fast.jpeg.planes` says
what the planes are.
"""

from __future__ import annotations

import re

import numpy as np

from tl_fast.jpeg.planes import planes_size

MAGIC = b"YUV4MPEG2 "
_HEAD = re.compile(rb"YUV4MPEG2 W(\d{1,5}) H(\d{1,5}) F1:1 Ip A1:1 C420jpeg XCOLORRANGE=FULL\nFRAME\n")


def pack(planes: np.ndarray, height: int, width: int) -> bytes:
    """planes: uint8 [planes_size(height, width)]."""
    head = f"YUV4MPEG2 W{width} H{height} F1:1 Ip A1:1 C420jpeg XCOLORRANGE=FULL\nFRAME\n".encode("ascii")
    return head + planes.tobytes()


def is_one(data: bytes) -> bool:
    return data.startswith(MAGIC)


def unpack(data: bytes) -> tuple[np.ndarray, int, int]:
    """The planes, a view of `data`, their height and width. Raises ValueError for what `pack` does not make."""
    head = _HEAD.match(data)
    if head is None:
        raise ValueError("a YUV4MPEG2 file other than one frame of C420jpeg with XCOLORRANGE=FULL; convert it to PNG")
    width, height = int(head[1]), int(head[2])
    size = len(data) - head.end()
    if height * width == 0 or size != planes_size(height, width):
        raise ValueError(
            f"damaged image: {size} bytes of planes for {width}×{height} pixels; replace or remove the file"
        )
    return np.frombuffer(data, np.uint8, offset=head.end()), height, width
