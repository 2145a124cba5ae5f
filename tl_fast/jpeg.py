"""Any image file → the JPEG bytes a beton stores: baseline, three components, YCbCr, 8 bit, which every decoder reads alike.

Such files are copied untouched after a full check of their entropy-coded data; everything else is decoded by Pillow and encoded anew.
EXIF orientation is ignored, as torchvision's image folder and tl_fast.annotate do: label maps and stored pixels have the same orientation.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import simplejpeg
from PIL import Image

Image.init()  # loads Pillow's plugins now, not in several worker threads at once

# What an image folder may hold. Others (EPS, PDF ...) are parsers one does not want to run over a million files of unknown origin.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
# Luma sampling factors that, with chroma 1×1, make 4:4:4, 4:2:2, 4:4:0, 4:2:0 and 4:1:1, the layouts TurboJPEG and nvJPEG know.
LUMA_SAMPLING = {(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)}
MAX_SIDE = 65_500  # libjpeg's limit

START_OF_SCAN, END_OF_IMAGE, APP0, APP14 = 0xDA, 0xD9, 0xE0, 0xEE
FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start-of-frame markers; the three others are tables
NO_PAYLOAD = {0x01, *range(0xD0, 0xD8)}  # TEM and restart markers


@dataclasses.dataclass(frozen=True)
class JpegHeader:
    """What the markers before the first scan say.

    components: (id, horizontal, vertical sampling factor) each. adobe: APP14's colour transform, or None.
    """

    frame: int
    precision: int
    height: int
    width: int
    components: tuple[tuple[int, int, int], ...]
    scan_components: int
    jfif: bool
    adobe: int | None

    @property
    def known_sampling(self) -> bool:
        sampling = [component[1:] for component in self.components]
        return len(sampling) == 1 or (sampling[0] in LUMA_SAMPLING and all(factors == (1, 1) for factors in sampling[1:3]))

    @property
    def plain(self) -> bool:
        """True when all decoders agree on what it shows: baseline, one scan, 8 bit, three components that are YCbCr beyond doubt."""
        ids = tuple(component[0] for component in self.components)
        ycbcr = self.adobe in (None, 1) and (self.jfif or self.adobe == 1 or ids == (1, 2, 3))
        return (
            self.frame == 0xC0
            and self.precision == 8
            and len(ids) == 3
            and self.scan_components == 3
            and ycbcr
            and self.known_sampling
            and self.height > 0
            and self.width > 0
        )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Bytes to store, their size in pixels, and what was done: `copied`, `re-encoded` or `resized`."""

    data: bytes
    height: int
    width: int
    action: str


def parse_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None when `data` does not start like one. Raises ValueError when the markers end before a scan begins."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    position, frame, jfif, adobe = 2, None, False, None
    while True:
        position = data.find(b"\xff", position)
        if position < 0:
            raise ValueError("truncated JPEG: it ends before the image data")
        while data[position : position + 1] == b"\xff":  # fill bytes
            position += 1
        marker = data[position] if position < len(data) else END_OF_IMAGE
        position += 1
        if marker in NO_PAYLOAD or marker == 0:
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        if marker == END_OF_IMAGE or length < 2 or position + length > len(data):
            raise ValueError("truncated JPEG: it ends before the image data")
        payload = data[position + 2 : position + length]
        if marker in FRAMES:
            frame = marker, payload
        elif marker == APP0 and length >= 16 and payload[:5] == b"JFIF\0":
            jfif = True
        elif marker == APP14 and length >= 14 and payload[:5] == b"Adobe":
            adobe = payload[11]
        elif marker == START_OF_SCAN:
            break
        position += length
    if frame is None or not payload or len(frame[1]) < 6 or len(frame[1]) < 6 + 3 * frame[1][5]:
        raise ValueError("damaged JPEG: no usable frame header before the image data")
    kind, head = frame
    components = tuple((head[i], head[i + 1] >> 4, head[i + 1] & 15) for i in range(6, 6 + 3 * head[5], 3))
    return JpegHeader(
        kind, head[0], int.from_bytes(head[1:3], "big"), int.from_bytes(head[3:5], "big"), components, payload[0], jfif, adobe
    )


def check_entropy(data: bytes, header: JpegHeader) -> None:
    """Decode all entropy-coded data, at 1/8 size to save time. Raises ValueError in libjpeg's words on any error or warning."""
    colorspace = {1: "GRAY", 4: "CMYK"}.get(len(header.components), "RGB")
    try:
        simplejpeg.decode_jpeg(data, colorspace, fastdct=True, fastupsample=True, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        raise ValueError(f"damaged JPEG: {error}; replace or remove the file") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Pillow's RGB conversion, as torchvision's image folder does it (alpha dropped); 16-bit greys are scaled, not clipped at 255."""
    if image.mode.startswith("I"):  # I;16 and its byte orders, or I where Pillow widens 16-bit files
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65_535:
            raise ValueError(f"grey values {grey.min()}..{grey.max()} are outside 16 bit; convert the file to 8 bit")
        image = Image.fromarray((grey.astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("a floating-point image has no fixed range; convert the file to 8 bit")
    return image.convert("RGB")


def prepare(data: bytes, max_resolution: int | None = None, quality: int = 90) -> Prepared:
    """The JPEG to store for an image file's bytes.

    max_resolution: largest side in pixels (as ffcv's), larger images are shrunk to it with Pillow's antialiased Lanczos filter. quality:
    1..100 of new encodes, which are 4:2:0. Raises ValueError with the reason on anything that is not a whole, undamaged image.
    """
    header = parse_header(data)
    limit = max_resolution or MAX_SIDE
    if header is not None and header.known_sampling and header.precision == 8:
        check_entropy(data, header)
        if header.plain and max(header.height, header.width) <= limit:
            return Prepared(data, header.height, header.width, "copied")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            image = to_rgb(opened)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"not an image that can be read ({len(data)} bytes; readable formats: {', '.join(FORMATS)})") from error
    except (
        OSError,
        SyntaxError,
        EOFError,
        IndexError,
        Image.DecompressionBombError,
    ) as error:  # what Pillow's plugins raise on damaged files
        raise ValueError(f"damaged image: {error}; replace or remove the file") from error
    longest, action = max(image.size), "re-encoded"
    if longest > limit:
        image = image.resize([max(1, (side * limit + longest // 2) // longest) for side in image.size], Image.Resampling.LANCZOS)
        action = "resized"
    encoded = simplejpeg.encode_jpeg(np.asarray(image), quality=quality, colorspace="RGB", colorsubsampling="420")
    return Prepared(encoded, image.height, image.width, action)
