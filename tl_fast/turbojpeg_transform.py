"""libturbojpeg's lossless transform by ctypes: any JPEG that libjpeg reads → baseline with the same coefficients, hence the same pixels.

The library is looked for when the first file needs it. The functions used are those of libjpeg-turbo 1.5 to 3.x.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import sys
from pathlib import Path

NO_OPERATION, COPY_NO_MARKERS = 0, 64  # TJXOP_NONE, TJXOPT_COPYNONE


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


@functools.cache
def _library() -> ctypes.CDLL:
    beside_python = sorted(Path(sys.prefix, "lib").glob("libturbojpeg.so*"))  # conda's, which find_library does not see
    name = str(beside_python[0]) if beside_python else ctypes.util.find_library("turbojpeg")
    try:
        if name is None:
            raise OSError("no libturbojpeg found")
        library = ctypes.CDLL(name)  # its functions run without the GIL
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
            f"progressive, arithmetic and multi-scan JPEGs become baseline ones by libturbojpeg, which cannot be loaded ({error}); "
            "install it (apt-get install libturbojpeg0, on Ubuntu libturbojpeg; conda install -c conda-forge libjpeg-turbo)"
        ) from error
    return library


def lossless_baseline(data: bytes) -> bytes:
    """`data`, a JPEG of 8 bits and known sampling, as baseline JPEG with standard Huffman tables and no metadata, bit-identical in pixels.

    Safe in threads. Raises ValueError in libjpeg's words on any error or warning, TurboJpegMissing where there is no libturbojpeg.
    (Quantisation steps above 255 do not fit in baseline; such a file comes back as extended sequential.)
    """
    library = _library()
    handle = library.tjInitTransform()  # one a call: a few microseconds of the milliseconds to come
    if not handle:
        raise MemoryError("libturbojpeg cannot start a transform")
    output, size = ctypes.c_void_p(), ctypes.c_ulong()
    transform = _Transform(operation=NO_OPERATION, options=COPY_NO_MARKERS)
    try:
        failed = library.tjTransform(handle, data, len(data), 1, ctypes.byref(output), ctypes.byref(size), ctypes.byref(transform), 0)
        if failed:
            raise ValueError(f"damaged JPEG: {library.tjGetErrorStr2(handle).decode(errors='replace')}; replace or remove the file")
        return ctypes.string_at(output, size.value)
    finally:
        library.tjFree(output)
        library.tjDestroy(handle)
