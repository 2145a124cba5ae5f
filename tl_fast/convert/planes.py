"""Any image file → the YUV 4:2:0 planes that a beton stores (docs/file_format.md).

A 4:2:0 JPEG gives the planes that its decoder makes: they show its pixels to the bit. Where it is too large, each plane
is resized on its own. Every other image goes through RGB.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from tl_fast.beton.layout import PLANES
from tl_fast.convert.image import Prepared, is_jpeg, left_out, without_loss
from tl_fast.convert.options import EncodeOptions
from tl_fast.jpeg import planes_loops
from tl_fast.jpeg.planes import chroma_size, split_planes
from tl_fast.sources import planes_file
from tl_fast.sources.image import open_rgb
from tl_fast.system.crc import crc32

FILTER = Image.Resampling.LANCZOS
MAX_SIDE = 65_535  # pixels: the file keeps a side as 16 bits


def prepare_planes(data: bytes, options: EncodeOptions) -> Prepared:
    """The planes to store for an image file's bytes. Safe in threads. Raises as `tl_fast.convert.image.prepare`."""
    data = bytes(data)  # no copy of bytes
    stripped = 0
    if planes_file.is_one(data):
        planes, height, width = planes_file.unpack(data)
        return _prepared(planes, (height, width), "copied", options)
    if is_jpeg(data):
        whole = EncodeOptions(decode_check=options.decode_check, exif=options.exif)  # at its own size
        jpeg, record = without_loss(data, whole)
        stripped = left_out(data, record)
        decoded = planes_loops.decode(jpeg.data) if jpeg is not None else None
        if decoded is not None:
            planes, height, width = decoded
            return _prepared(planes, (height, width), "decoded", options, stripped, jpeg.rotated)
    image, orientation = open_rgb(data, options.exif)
    size = _stored_size(options, image.height, image.width)
    resized = image.resize(size[::-1], FILTER) if size != (image.height, image.width) else image
    planes = planes_loops.from_rgb(np.asarray(resized))
    shrunk_from = (image.height, image.width) if resized is not image else None
    action = "converted" if shrunk_from is None else "resized"
    return Prepared(
        (planes.data,), *size, action, stripped, orientation > 1, crc32(planes), shrunk_from=shrunk_from, mode=PLANES
    )


def _prepared(
    planes: np.ndarray,
    size: tuple[int, int],
    action: str,
    options: EncodeOptions,
    stripped: int = 0,
    rotated: bool = False,
) -> Prepared:
    """Planes of `size`, at the size at which they are stored."""
    stored, shrunk_from = _stored_size(options, *size), None
    if stored != size:
        planes, action, shrunk_from = resize_planes(planes, size, stored), "resized", size
    return Prepared(
        (planes.data,), *stored, action, stripped, rotated, crc32(planes), shrunk_from=shrunk_from, mode=PLANES
    )


def _stored_size(options: EncodeOptions, height: int, width: int) -> tuple[int, int]:
    """Raises ValueError for sides that the file cannot say."""
    size = options.stored_size(height, width, even=True)
    if max(size) > MAX_SIDE:
        raise ValueError(f"{width}×{height} pixels; a side has {MAX_SIDE} at most: set --max-resolution")
    return size


def resize_planes(planes: np.ndarray, size: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Planes of (height, width) `size` as planes of `new`, each resized on its own; both uint8 [planes_size].

    A plane of chroma covers whole 2x2 pixels, and so more than an image with an odd side. Of the old plane that part is
    taken which the new one covers.
    """
    parts = []
    for number, plane in enumerate(split_planes(planes, *size)):
        rows, columns = plane.shape
        new_rows, new_columns = new
        if number:
            new_rows, new_columns = chroma_size(*new)
            rows = min(rows, new_rows * size[0] / new[0])
            columns = min(columns, new_columns * size[1] / new[1])
        image = Image.fromarray(plane).resize((new_columns, new_rows), FILTER, box=(0, 0, columns, rows))
        parts.append(np.asarray(image).reshape(-1))
    return np.concatenate(parts)
