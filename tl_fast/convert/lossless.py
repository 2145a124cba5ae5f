"""libturbojpeg's lossless transform by ctypes: any JPEG that libjpeg reads → baseline with the same coefficients.

The image stays as it is or is turned upright. The library is loaded when the first file needs it; libjpeg-turbo 1.5 to
3.x have the functions used.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import shlex
import sys
from pathlib import Path

PERFECT, COPY_NO_MARKERS = 1, 64  # TJXOPT_PERFECT, TJXOPT_COPYNONE
# What turns an image of EXIF orientation 1..8 upright: TJXOP_NONE, _HFLIP, _ROT180, _VFLIP, _TRANSPOSE, _ROT90,
# _TRANSVERSE, _ROT270.
OPERATIONS = {1: 0, 2: 1, 3: 6, 4: 2, 5: 3, 6: 5, 7: 4, 8: 7}
WHOLE_ACROSS, WHOLE_DOWN = {2, 3, 7, 8}, {3, 4, 6, 7}  # orientations that need whole MCUs: in width, in height
TURNED_ASIDE = {5, 6, 7, 8}  # orientations whose upright image has the stored one's rows as columns


def is_lossless(orientation: int, height: int, width: int, across: int, down: int) -> bool:
    """Whether coefficients can be turned upright from an EXIF orientation, pixel for pixel.

    height, width: of the stored image; across, down: sampling factors of its first component; 1, 1 for grey. The right
    or lower edge can become the left or upper one only if no MCU (8 * across x 8 * down pixels) is cut off there. An
    image of 4:1:1 must not be laid on its side: other decoders do not know the layout that comes of it.
    """
    if orientation in TURNED_ASIDE and across == 4:
        return False
    fits_across = width % (8 * across) == 0 or orientation not in WHOLE_ACROSS
    return fits_across and (height % (8 * down) == 0 or orientation not in WHOLE_DOWN)


class TurboJpegMissing(RuntimeError):
    """libturbojpeg is not on this machine; the message says how to install it."""


class _Transform(ctypes.Structure):
    """tjtransform: nothing is cropped or filtered, so all but two fields stay zero."""

    _fields_ = [
        ("x", ctypes.c_int),
        ("y", ctypes.c_int),
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
        ("operation", ctypes.c_int),
        ("options", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("filter", ctypes.c_void_p),
    ]


def _find_library() -> str:
    """Path or name of libturbojpeg: the one in Python's prefix (conda's, or Debian's package unpacked there), else the
    system's."""
    for pattern in ("lib/libturbojpeg.so*", "usr/lib/*/libturbojpeg.so*"):
        if beside_python := sorted(Path(sys.prefix).glob(pattern)):
            return str(beside_python[0])
    # dlopen looks for the bare name in LD_LIBRARY_PATH too; find_library does so only where binutils are installed.
    return ctypes.util.find_library("turbojpeg") or "libturbojpeg.so.0"


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_find_library())  # its functions run without the GIL
        library.tjInitTransform.restype = ctypes.c_void_p
        library.tjGetErrorStr2.argtypes, library.tjGetErrorStr2.restype = [ctypes.c_void_p], ctypes.c_char_p
        library.tjDestroy.argtypes = [ctypes.c_void_p]
        library.tjFree.argtypes, library.tjFree.restype = [ctypes.c_void_p], None
        library.tjTransform.argtypes = [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_ulong,
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.POINTER(ctypes.c_ulong),
            ctypes.POINTER(_Transform),
            ctypes.c_int,
        ]
    except (OSError, AttributeError) as error:
        raise TurboJpegMissing(
            "progressive, arithmetic and multi-scan JPEGs become baseline ones, and others are turned upright, by"
            f" libturbojpeg, which cannot be loaded ({error}); install it: as root `apt-get install libturbojpeg0`;"
            f" without root on Debian `cd {shlex.quote(sys.prefix)} && apt-get download libturbojpeg0 && dpkg -x"
            " libturbojpeg0_*.deb .` (Ubuntu calls it libturbojpeg); with conda `conda install -c conda-forge"
            " libjpeg-turbo`; elsewhere put the folder of a libturbojpeg.so.0 into LD_LIBRARY_PATH"
        ) from error
    return library


def lossless_baseline(data: bytes, orientation: int = 1) -> bytes:
    """`data`, a JPEG of 8 bits and known sampling, as baseline JPEG with standard Huffman tables and no metadata.

    Its coefficients stay the same, and so do its pixels, to the bit. orientation: EXIF's; for 2..8 the image is turned
    upright, which must be possible (`is_lossless`); decoders then round a few pixels to another level.

    Safe in threads. Raises ValueError in libjpeg's words on any error or warning, TurboJpegMissing where there is no
    libturbojpeg. (Quantisation steps above 255 do not fit in baseline; such a file comes back as extended sequential.)
    """
    library = _library()
    handle = library.tjInitTransform()  # takes a few microseconds, the transform milliseconds
    if not handle:
        raise MemoryError("libturbojpeg cannot start a transform")
    output, size = ctypes.c_void_p(), ctypes.c_ulong()
    transform = _Transform(operation=OPERATIONS[orientation], options=COPY_NO_MARKERS | PERFECT)
    try:
        failed = library.tjTransform(
            handle, data, len(data), 1, ctypes.byref(output), ctypes.byref(size), ctypes.byref(transform), 0
        )
        if failed:
            raise ValueError(
                f"damaged JPEG: {library.tjGetErrorStr2(handle).decode(errors='replace')}; replace or remove the file"
            )
        return ctypes.string_at(output, size.value)
    finally:
        library.tjFree(output)
        library.tjDestroy(handle)
