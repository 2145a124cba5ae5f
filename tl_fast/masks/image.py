"""Opens mask files: PNGs of 8-bit greys or of a palette, whose value or index is what a pixel is."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from tl_fast.masks.format import MaskError
from tl_fast.sources.image import REMEDY, in_our_words
from tl_fast.system.crc import crc32

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, PALETTE = 0, 3  # PNG's colour types
KINDS = {GREY: "grey", 2: "RGB", PALETTE: "palette", 4: "grey with alpha", 6: "RGB with alpha"}


def read_mask_file(data: bytes) -> np.ndarray:
    """The values of a mask file's pixels, uint8 [H, W]; the indices of a palette, whatever its colours.

    Raises ValueError, one line long, for a file that is no PNG, is damaged (every chunk's CRC is checked) or has other
    pixels: greys of another depth (Pillow scales those of fewer bits), colours, alpha.
    """
    _check_pixels(data)
    _check_chunks(data)
    with in_our_words(len(data)):
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        image.load()
    return np.asarray(image)


def palette_of(data: bytes) -> np.ndarray | None:
    """The palette of a mask file, uint8 [n, 3]; None where it has none, or cannot be read."""
    try:
        _check_pixels(data)
        with in_our_words(len(data)):
            image = Image.open(io.BytesIO(data), formats=["PNG"])
            palette = image.getpalette("RGB") if image.mode == "P" else None
    except ValueError:
        return None
    return None if palette is None else np.array(palette, np.uint8).reshape(-1, 3)


def _check_pixels(data: bytes) -> None:
    if not data.startswith(SIGNATURE) or data[12:16] != b"IHDR" or len(data) < 33:
        raise MaskError(f"not a PNG ({len(data)} bytes); masks must be PNGs of 8-bit greys or of a palette")
    depth, kind = data[24], data[25]
    if kind != PALETTE and (kind, depth) != (GREY, 8):
        raise MaskError(
            f"a PNG of {KINDS.get(kind, 'unknown')} pixels, {depth} bits; masks must be PNGs of 8-bit greys or of a"
            " palette, whose values or indices are the classes"
        )


def _check_chunks(data: bytes) -> None:
    """Raise MaskError unless all chunks are there, undamaged: Pillow does not check the CRCs of pixels."""
    start, kind, view = len(SIGNATURE), b"", memoryview(data)
    while kind != b"IEND":
        size = int.from_bytes(data[start : start + 4], "big")
        kind, end = data[start + 4 : start + 8], start + 8 + size
        if end + 4 > len(data):
            raise MaskError(f"truncated PNG: it ends within the chunk at byte {start} of {len(data)}; {REMEDY}")
        if crc32(view[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise MaskError(f"damaged PNG: the CRC of the chunk at byte {start} of {len(data)} is wrong; {REMEDY}")
        start = end + 4
