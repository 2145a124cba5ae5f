"""Any image file → the YUV 4:2:0 planes that a beton stores (docs/file_format.md).

A 4:2:0 JPEG gives the planes that its decoder makes: they show its pixels to the bit. So does a greyscale one. JPEGs of
4:4:4, 4:2:2 and 4:4:0 keep their brightness and have their chroma halved. Where an image is too large, each plane is
resized on its own. Every other image goes through RGB.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from tl_fast.beton.layout import PLANES
from tl_fast.convert.image import Prepared, is_jpeg, left_out, without_loss
from tl_fast.convert.options import EncodeOptions
from tl_fast.jpeg import planes_loops
from tl_fast.jpeg.planes import chroma_size, split_planes
from tl_fast.jpeg.planes_loops import Decoded
from tl_fast.sources import planes_file
from tl_fast.sources.image import check_size, open_rgb
from tl_fast.system.crc import crc32

FILTER = Image.Resampling.LANCZOS
MAX_SIDE = 65_535  # pixels: the file keeps a side as 16 bits


def prepare_planes(data: bytes, options: EncodeOptions) -> Prepared:
    """The planes to store for an image file's bytes. Safe in threads. Raises as `tl_fast.convert.image.prepare`."""
    data = bytes(data)  # no copy of bytes
    stripped, decoded, rotated, action = 0, None, False, "converted"
    if planes_file.is_one(data):
        decoded, action = Decoded(*split_planes(*planes_file.unpack(data)), across=2, down=2), "copied"
    elif is_jpeg(data):
        # At its own size: planes are shrunk, not the JPEG.
        jpeg, record = without_loss(data, EncodeOptions(decode_check=options.decode_check, exif=options.exif))
        stripped = left_out(data, record)
        if jpeg is not None:
            check_size(jpeg.width, jpeg.height, len(jpeg.data), huffman=True)
            decoded, rotated, action = planes_loops.decode(jpeg.data), jpeg.rotated, "decoded"
    if decoded is not None:
        size = decoded.luma.shape
        stored = _stored_size(options, *size)
        planes = fit_planes(decoded, stored)
    else:
        image, orientation = open_rgb(data, options.exif)
        size, rotated, action = (image.height, image.width), orientation > 1, "converted"
        stored = _stored_size(options, *size)
        planes = planes_loops.from_rgb(np.asarray(image if stored == size else image.resize(stored[::-1], FILTER)))
    shrunk_from = None if stored == size else size
    if shrunk_from is not None:
        action = "resized"
    return Prepared(
        (planes.data,), *stored, action, stripped, rotated, crc32(planes), shrunk_from=shrunk_from, mode=PLANES
    )


def _stored_size(options: EncodeOptions, height: int, width: int) -> tuple[int, int]:
    """Raises ValueError for sides that the file cannot say."""
    size = options.stored_size(height, width, even=True)
    if max(size) > MAX_SIDE:
        raise ValueError(f"{width}×{height} pixels; a side has {MAX_SIDE} at most: set --max-resolution")
    return size


def fit_planes(decoded: Decoded, size: tuple[int, int]) -> np.ndarray:
    """4:2:0 planes, uint8 [planes_size], of (height, width) `size` from an image's samples.

    At the image's own size chroma of 4:4:4, 4:2:2 and 4:4:0 becomes the mean of the samples that share one, and that of
    4:2:0 stays. At another size each plane is resized on its own. A sample of chroma covers whole 2x2 pixels, so that
    chroma covers more than an image with an odd side. Of the old plane that part is taken which the new one covers.
    """
    height, width = decoded.luma.shape
    parts = [decoded.luma]
    if size == decoded.luma.shape:
        factors = 2 // decoded.across, 2 // decoded.down
        for plane in (decoded.blue, decoded.red):
            parts.append(plane if factors == (1, 1) else np.asarray(Image.fromarray(plane).reduce(factors)))
    else:
        parts = [_resize(decoded.luma, size, (height, width))]
        chroma = chroma_size(*size)
        for plane in (decoded.blue, decoded.red):
            rows = min(plane.shape[0], 2 * chroma[0] * height / size[0] / decoded.down)
            columns = min(plane.shape[1], 2 * chroma[1] * width / size[1] / decoded.across)
            parts.append(_resize(plane, chroma, (rows, columns)))
    return np.concatenate([part.reshape(-1) for part in parts])


def _resize(plane: np.ndarray, size: tuple[int, int], covered: tuple[float, float]) -> np.ndarray:
    """The plane's first `covered` (rows, columns) at another size."""
    return np.asarray(Image.fromarray(plane).resize(size[::-1], FILTER, box=(0, 0, covered[1], covered[0])))
