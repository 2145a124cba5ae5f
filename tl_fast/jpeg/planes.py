"""YUV 4:2:0 planes: an image as a JPEG of that sampling holds it, decoded up to the colours.

Y uint8 [h, w], then Cb and Cr uint8 [ceil(h / 2), ceil(w / 2)] each, one behind the other: full-range BT.601, each
sample of chroma centred between its 2x2 pixels. The pixels that planes show are those that libjpeg makes of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def chroma_size(height: Any, width: Any) -> tuple[Any, Any]:
    """Rows and columns of Cb, and of Cr, of an image of `height` x `width` pixels; integers, or arrays of them."""
    return (height + 1) // 2, (width + 1) // 2


def planes_size(height: Any, width: Any) -> Any:
    """Bytes of all three planes; integers, or arrays of them, int64 then."""
    if isinstance(height, (np.ndarray, np.generic)):
        height = height.astype(np.int64)
    rows, columns = chroma_size(height, width)
    return height * width + 2 * rows * columns


def split_planes(data: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Views of Y, Cb and Cr in `data`, uint8 [planes_size(height, width)]."""
    rows, columns = chroma_size(height, width)
    luma, chroma = height * width, rows * columns
    planes = data[:luma], data[luma : luma + chroma], data[luma + chroma : luma + 2 * chroma]
    return planes[0].reshape(height, width), planes[1].reshape(rows, columns), planes[2].reshape(rows, columns)
