"""The byte layout of a .beton file (docs/file_format.md): ffcv 1.0's types, and what tl_fast adds where ffcv has room.

ffcv itself is not imported: that takes 9 s where numpy takes 0.2 s, pulls in OpenCV, and training hosts need not have
it. tests/beton/test_beton.py compares these types with ffcv's own.
"""

from __future__ import annotations

import numpy as np

from tl_fast.jpeg.planes import chroma_size as chroma_size  # offered here too: they are part of the layout
from tl_fast.jpeg.planes import planes_size as planes_size
from tl_fast.labelmaps.format import LabelMapError, MapSpec
from tl_fast.system.mistakes import InputError

VERSION = 2  # of the FFCV format
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
LABEL_MAP = np.dtype([("ptr", "<u8"), ("score_min", "<f4"), ("score_step", "<f4")])
BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
JPEG, PLANES = 0, 2  # an image's mode: a JPEG, or YUV 4:2:0 planes; 1 is ffcv's raw RGB
INT, RGB_IMAGE, BYTES_FIELD, CUSTOM = 1, 2, 3, 255
# float, int, image, bytes, array, JSON, tensor: a sample's entry in the metadata table
STOCK_TYPES = {
    0: np.dtype("<f8"),
    INT: np.dtype("<i8"),
    RGB_IMAGE: IMAGE,
    BYTES_FIELD: BYTES,
    4: np.dtype("<u8"),
    5: BYTES,
    6: np.dtype("<u8"),
}
WITH_ARGUMENTS = (4, 6, CUSTOM)  # arrays and tensors keep their shape there; the others' argument bytes are zeros
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 1 << 21, 1 << 31  # ffcv's limits, powers of two
MAX_INFO = 4 << 20  # bytes: 65,535 class names of 60 bytes each

# Arguments of the `label_map` field: what ffcv's loader hands to our field class.
SPEC_MAGIC = b"tlf_map1"
SPEC_ARGUMENTS = np.dtype(
    [("magic", "S8"), ("k", "<u4"), ("height", "<u4"), ("width", "<u4"), ("num_classes", "<u4"), ("extent", "S32")]
)
# Arguments of the `image` field where some images are planes. It is a custom field then, for ffcv's own decoder would
# copy the planes as if they were RGB.
IMAGE_MAGIC = b"tlf_img1"
# Arguments of the `crc` field, which ffcv ignores (IntField.from_binary): where our own tables are, and the CRC-32 of
# all tables.
INDEX_MAGIC = b"tlf_idx1"
INDEX = np.dtype(
    [
        ("magic", "S8"),
        ("info_ptr", "<u8"),
        ("info_size", "<u8"),
        ("ids_ptr", "<u8"),
        ("ids_size", "<u8"),
        ("info_crc", "<u4"),
        ("ids_crc", "<u4"),
        ("metadata_crc", "<u4"),
        ("alloc_crc", "<u4"),
        ("head_crc", "<u4"),
    ]
)


class BetonError(InputError):
    """A beton that cannot be written or read; the message names the file, the field or sample, and the remedy."""


def metadata_dtype(types: list[np.dtype]) -> np.dtype:
    """One row of the metadata table, fields f0, f1, ... as in ffcv."""
    return np.dtype([("", kind) for kind in types], align=True)


def image_arguments() -> np.ndarray:
    """The image field's 1,024 argument bytes where some images are planes, uint8."""
    arguments = np.zeros(1024, np.uint8)
    arguments[: len(IMAGE_MAGIC)] = np.frombuffer(IMAGE_MAGIC, np.uint8)
    return arguments


def spec_to_arguments(spec: MapSpec) -> np.ndarray:
    """The label_map field's 1,024 argument bytes, uint8."""
    arguments = np.zeros(1024, np.uint8)
    values = np.array(
        (SPEC_MAGIC, spec.k, spec.height, spec.width, spec.num_classes, spec.extent.encode("ascii")), SPEC_ARGUMENTS
    )
    arguments[: SPEC_ARGUMENTS.itemsize] = np.frombuffer(values.tobytes(), np.uint8)
    return arguments


def spec_from_arguments(arguments: np.ndarray) -> MapSpec:
    """Inverse of `spec_to_arguments`. Raises LabelMapError on anything else."""
    values = np.frombuffer(np.asarray(arguments, np.uint8).tobytes()[: SPEC_ARGUMENTS.itemsize], SPEC_ARGUMENTS)[0]
    if values["magic"] != SPEC_MAGIC:
        raise LabelMapError(
            f"label_map field is not tl_fast's (magic {bytes(values['magic'])!r}, expected {SPEC_MAGIC!r})"
        )
    return MapSpec(
        int(values["k"]),
        int(values["height"]),
        int(values["width"]),
        int(values["num_classes"]),
        values["extent"].decode("ascii", "replace"),
    )
