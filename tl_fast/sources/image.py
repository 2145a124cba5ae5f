"""Opens image files: bytes in, RGB pixels out, the same way for annotation, conversion, the loader and the pictures.

`open_rgb` decides which formats may be read, how each kind of pixel becomes RGB, how large an image may be and what an
EXIF orientation does. Needs Pillow and NumPy only, and Numba for planes.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tl_fast.sources import planes_file

Image.init()  # loads Pillow's plugins now, not in several worker threads at once
# Pillow warns of images that are half as large as those it refuses. Each warning states a size, so Python would not
# drop it as a repetition.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

# The formats that may be read. Pillow parses others too (EPS, PDF ...) and starts programs such as Ghostscript for
# them, which nobody wants for files of unknown origin.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
EXIF = ("ignore", "apply")  # what to do with an EXIF orientation
REMEDY = "replace or remove the file"

ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 0x0102, 0x0106  # TIFF tags
PIXELS_A_BYTE = 512  # at most, in a JPEG with Huffman codes: a block of 8 x 8 pixels takes at least one bit
_LAST_HUFFMAN_FRAME = 0xC2  # SOF2; arithmetic coding and the lossless frames have later codes

# How to turn an image upright, by EXIF orientation. 1 is upright. All but 6 and 8 are their own inverse.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INVERSE = {6: 8, 8: 6}


def open_rgb(data: bytes, exif: str = "ignore") -> tuple[Image.Image, int]:
    """Open an image file's bytes: returns its pixels and the EXIF orientation that it states.

    The pixels are a Pillow image of mode RGB without metadata: as stored for exif "ignore", turned upright for "apply".
    The orientation is 1..8, and 1 where the file states none or one that cannot be read. A TIFF states it in a tag of
    its own. XMP is not read.

    Alpha is dropped, as torchvision's image folder drops it. Greys of 12 and 16 bits are scaled to 8 bits, not clipped
    at 255. The first of several frames is returned. Planes (`tl_fast.sources.planes_file`) are shown as libjpeg shows
    them. Safe in threads.

    Raises ValueError, one line long, for a file that is not one of `FORMATS`, is truncated or damaged, has more pixels
    than `check_size` allows, or has values without a fixed range (floating point, 32-bit integers). A MemoryError is
    not turned into a ValueError.
    """
    if exif not in EXIF:
        raise ValueError(f"exif {exif!r} is not one of {', '.join(EXIF)}")
    data = bytes(data)  # no copy of bytes
    if data.startswith(b"\xff\xd8\xff"):
        rgb, orientation = _open_jpeg(data)
    elif planes_file.is_one(data):
        return _open_planes(data), 1
    else:
        opened = _open(data, len(data))
        rgb, orientation = _load_tiff(opened, len(data)) if opened.format == "TIFF" else _load(opened, len(data))
    rgb.info.clear()  # the EXIF data in it would make other code turn the image again
    return rgb.transpose(TURNS[orientation]) if exif == "apply" and orientation != 1 else rgb, orientation


def ignored_orientations(count: int) -> str:
    """The line that a run prints when it ignored the EXIF orientation of `count` images."""
    return (
        f"{count:,} images say by EXIF that they are to be turned, which was ignored, as ImageNet's training code does:"
        " photos of phones may lie on their side. --exif apply turns them, in annotation and in conversion"
    )


def check_size(width: int, height: int, size: int, huffman: bool) -> None:
    """Raise ValueError for a JPEG of more pixels than Pillow opens (2 * Image.MAX_IMAGE_PIXELS) or `size` bytes hold.

    huffman: the coefficients are, or may be, Huffman codes: then one byte holds at most `PIXELS_A_BYTE` pixels.
    """
    limit = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else math.inf
    if width * height > (min(limit, PIXELS_A_BYTE * size) if huffman else limit):
        raise ValueError(f"damaged JPEG: {width} × {height} pixels from {size} bytes; {REMEDY}")


def read_jpeg_header(data: bytes) -> tuple[int, int, bytes]:
    """Read a JPEG up to its first scan: (code of the frame's marker, EXIF orientation 1..8, the JPEG without metadata).

    The code is 0 where the scan, or damage, comes before any frame. The orientation is that of the first Exif segment
    that states a valid one, else 1. `tl_fast.jpeg.markers.read_markers` does the same in compiled code.
    """
    frame, orientation, start, kept = 0, 0, 2, [data[:2]]
    while data[start : start + 1] == b"\xff":
        body = start
        while data[body : body + 1] == b"\xff":  # a marker may begin with several bytes of 0xff
            body += 1
        code, body = data[body] if body < len(data) else 0, body + 1
        if code == 0x01 or 0xD0 <= code <= 0xD7:  # markers without a payload
            start = body
            continue
        length = int.from_bytes(data[body : body + 2], "big")
        if code in (0x00, 0xD8, 0xD9, 0xDA) or length < 2 or body + length > len(data):
            break
        start, payload = body + length, data[body + 2 : body + length]
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            frame = frame or code
        elif code == 0xE1 and not orientation and payload.startswith(b"Exif\0\0"):
            orientation = tiff_orientation(payload[6:])
        colour = (code == 0xE0 and length >= 16 and payload[:5] == b"JFIF\0") or (
            code == 0xEE and length >= 14 and payload[:5] == b"Adobe"
        )
        if colour or not (0xE0 <= code <= 0xEF or code == 0xFE):
            kept.append(data[body - 2 : start])
    kept.append(data[start:])
    return frame, orientation or 1, b"".join(kept)


def tiff_orientation(tiff: bytes) -> int:
    """The orientation 1..8 that an Exif segment's TIFF structure states; 0 for none or a damaged structure."""
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 0
    directory = int.from_bytes(tiff[4:8], order)
    if directory + 2 > len(tiff):
        return 0
    for i in range(int.from_bytes(tiff[directory : directory + 2], order)):
        entry = tiff[directory + 2 + 12 * i : directory + 14 + 12 * i]
        if len(entry) < 12:
            return 0
        if int.from_bytes(entry[:2], order) == ORIENTATION:
            width = 4 if int.from_bytes(entry[2:4], order) == 4 else 2  # the type is SHORT; some writers use LONG (4)
            value = int.from_bytes(entry[8 : 8 + width], order)
            return value if 1 <= value <= 8 else 0
    return 0


def _open(data: bytes, size: int) -> Image.Image:
    with in_our_words(size):
        return Image.open(io.BytesIO(data), formats=FORMATS)


def _open_jpeg(data: bytes) -> tuple[Image.Image, int]:
    """An opened JPEG: (RGB image as stored, orientation it states)."""
    frame, orientation, bare = read_jpeg_header(data)  # Pillow refuses some JPEGs for their metadata alone
    image = _open(bare, len(data))
    check_size(*image.size, len(data), huffman=frame <= _LAST_HUFFMAN_FRAME)
    with in_our_words(len(data)):
        image.load()
    return _to_rgb(image), orientation


def _open_planes(data: bytes) -> Image.Image:
    from tl_fast.jpeg.planes_loops import to_rgb  # here, since it takes numba

    return Image.fromarray(to_rgb(*planes_file.unpack(data)))


def _load(image: Image.Image, size: int) -> tuple[Image.Image, int]:
    """The same for an opened PNG, WebP or other image that Pillow does not turn."""
    with in_our_words(size):
        image.load()  # before the EXIF is read: in a PNG it may follow the pixels
    exif = image.info.get("exif", b"")
    profile = image.info.get("Raw profile type exif")  # as ImageMagick writes it into PNG
    if not exif and isinstance(profile, str):
        with contextlib.suppress(ValueError):
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
    return _to_rgb(image), tiff_orientation(exif.removeprefix(b"Exif\0\0")) or 1


def _load_tiff(image: Image.Image, size: int) -> tuple[Image.Image, int]:
    """The same for an opened TIFF. Pillow turns a TIFF upright when it loads it, and then removes the tag."""
    image.info.pop("xmp", None)  # Pillow would turn the image by it where the tag is missing
    with in_our_words(size):
        stated, bits, photometric = (image.tag_v2.get(tag) for tag in (ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC))
        image.load()
    rgb = _to_rgb(image, max(bits or [1]), photometric == 0)
    if stated not in TURNS:
        return rgb, 1
    turned = ORIENTATION not in image.tag_v2
    return rgb.transpose(TURNS[_INVERSE.get(stated, stated)]) if turned else rgb, stated


def _to_rgb(image: Image.Image, bits: int = 16, white_is_zero: bool = False) -> Image.Image:
    """A loaded image in RGB. bits, white_is_zero: a TIFF's tags for greys of more than 8 bits; Pillow ignores both."""
    if image.mode == "F":
        raise ValueError("a floating-point image has no fixed range; convert the file to 8 bit")
    if image.mode.startswith("I"):  # I;16 and its byte orders; I for 32-bit files and 16-bit ones that Pillow widens
        if bits > 16:
            raise ValueError(f"grey values of {bits}-bit integers have no fixed range; convert the file to 8 bit")
        grey = np.asarray(image)
        low, high = grey.min(), grey.max()
        if low < 0 or high >= 2**bits:
            raise ValueError(f"grey values {low}..{high} are outside {bits} bit; convert the file to 8 bit")
        grey = (grey >> (bits - 8)).astype(np.uint8)
        image = Image.fromarray(255 - grey if white_is_zero else grey)
    image.info.pop("transparency", None)  # dropped with the alpha; Pillow would warn of it
    return image.convert("RGB")


@contextlib.contextmanager
def in_our_words(size: int) -> Iterator[None]:
    """Inside, what Pillow raises for a file of `size` bytes becomes a ValueError."""
    try:
        yield
    except Image.UnidentifiedImageError as error:
        readable = ", ".join(FORMATS)
        raise ValueError(f"not an image that can be read ({size} bytes; readable formats: {readable})") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow: OSError, SyntaxError, EOFError, IndexError, TypeError ...
        raise ValueError(f"damaged image: {' '.join(str(error).split())}; {REMEDY}") from error
