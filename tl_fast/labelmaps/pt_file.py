"""Reads one published label map from the bytes of its .pt file, without torch.load where the result must be the same.

torch.load takes 230 µs with the GIL held, which would limit a whole conversion. A file's pickle alone decides what
torch.load does with the file. So the first file of each different pickle goes through torch.load (`weights_only=True`:
no code of the file is run); of later files with the very same pickle only the numbers are taken, at their offset.
"""

from __future__ import annotations

import io
import struct
import sys
import zlib

import numpy as np
import torch

from tl_fast.labelmaps import zip_header
from tl_fast.labelmaps.format import LabelMapError

_MAX_NUMBERS = 1 << 26  # of one map; published ones have 3,240
_MAX_KNOWN = 64  # different pickles that are remembered; files of one program have one or two
# The number of classes up to which a dtype holds every class index exactly; None: more than a label map can have.
_MAX_CLASSES = {torch.float16: 2049, torch.bfloat16: 257, torch.float32: None, torch.float64: None}

# A zip's end: magic, disks, entries here and in all, size and offset of the directory, length of the comment.
_END = struct.Struct("<4sHHHHIIH")
# An entry of the directory: magic, method, CRC, stored and true size, lengths of 3 texts, offset of the local header.
_ENTRY = struct.Struct("<4s6xH4xIIIHHH8xI")
_STORED = 0


def _parts(data: bytes) -> dict[str, bytes] | None:
    """A zip's stored members by the last part of their path ('data.pkl', '0', ...); None leaves the file to torch.load.

    '0' is the tensor's storage, the only one; its CRC-32 is checked.
    """
    try:
        magic, *_, entries, size, entry, comment = _END.unpack_from(data, len(data) - _END.size)
        if magic != b"PK\5\6" or comment or not 0 < entries <= 32:
            return None
        parts = {}
        for _ in range(entries):
            magic, method, crc, stored, size, name, extra, comment, header = _ENTRY.unpack_from(data, entry)
            path = data[entry + _ENTRY.size : entry + _ENTRY.size + name].decode("utf-8")
            entry += _ENTRY.size + name + extra + comment
            start = zip_header.data_start(data[header : header + zip_header.SIZE], header)
            if start is None:
                return None
            part = data[start : start + size]
            key = path.rpartition("/")[2]
            if (
                magic != b"PK\1\2"
                or method != _STORED
                or stored != size
                or len(part) != size
                or key in parts
                or "/data/" in path
                and (key != "0" or zlib.crc32(part) != crc)
            ):
                return None
            parts[key] = part
        return parts
    except (struct.error, ValueError):
        return None


def load(data: bytes, num_classes: int) -> torch.Tensor:
    """torch.load of a .pt file's bytes: a tensor [2, k, H, W] of a float dtype.

    Raises LabelMapError saying what is wrong with it.
    """
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes raise anything; nothing of them is run
        reason = str(error).strip().split("\n")[0]
        raise LabelMapError(f"torch.load refuses it ({type(error).__name__}: {reason[:200]})") from error
    if (
        not isinstance(tensor, torch.Tensor)
        or tensor.layout != torch.strided
        or tensor.device.type != "cpu"
        or tensor.is_neg()
    ):
        raise LabelMapError(f"holds {type(tensor).__name__}, not a plain tensor [2, k, H, W]")
    if tensor.dtype not in _MAX_CLASSES:
        raise LabelMapError(f"is {tensor.dtype}; label maps are float16, bfloat16, float32 or float64")
    if tensor.ndim != 4 or tensor.shape[0] != 2 or not 0 < tensor.numel() <= _MAX_NUMBERS:
        raise LabelMapError(f"has shape {tuple(tensor.shape)}; a published label map is [2, k, H, W]: logits, classes")
    limit = _MAX_CLASSES[tensor.dtype]
    if limit is not None and num_classes > limit:
        raise LabelMapError(
            f"is {tensor.dtype}, which holds class indices exactly only of up to {limit} classes, here are"
            f" {num_classes}"
        )
    return tensor.detach()


class PtReader:
    """Reads published maps of a data set of `num_classes`; remembers the pickles it has seen. Thread-safe."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._known: dict[bytes, tuple[np.dtype, tuple[int, ...]]] = {}

    def read(self, data: bytes) -> np.ndarray:
        """The logits and classes in the bytes of a .pt file: float16, 32 or 64 `[2, k, H, W]`.

        Raises LabelMapError saying what is wrong with it.
        """
        parts = _parts(data) or {}
        pickle, numbers = parts.get("data.pkl"), parts.get("0", b"")
        direct = sys.byteorder == "little" and parts.get("byteorder", b"little") == b"little"
        if direct and pickle in self._known:
            dtype, shape = self._known[pickle]
            if len(numbers) == dtype.itemsize * int(np.prod(shape)):
                return np.frombuffer(numbers, dtype).reshape(shape)
        tensor = load(data, self.num_classes)
        values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        if (
            direct
            and pickle is not None
            and len(self._known) < _MAX_KNOWN
            and tensor.is_contiguous()
            and tensor.storage_offset() == 0
            and tensor.untyped_storage().nbytes() == len(numbers)
            and numbers == values.tobytes()
        ):
            self._known[pickle] = values.dtype, values.shape
        return values
