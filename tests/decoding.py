"""What tests of decoders share: files in memory, and the pixels that samples show."""

from __future__ import annotations

import numpy as np

from tl_fast.maths.ycbcr import Pixels, row_room, write_row

CANARY, GUARD = 0xA5, 64


class Files:
    """What a `Decoder` reads: the files as they are, as if a beton held them."""

    def __init__(self, files: list[bytes]):
        self.files = [np.frombuffer(file, np.uint8) for file in files]
        self.heights, self.widths = np.zeros((2, len(files)), np.int64)
        self.stored_as_planes = np.zeros(len(files), bool)

    def image(self, sample_id: int) -> np.ndarray:
        return self.files[sample_id]

    def image_addresses(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        files = [self.files[i] for i in sample_ids]
        return np.array([file.ctypes.data for file in files]), np.array([file.size for file in files])

    def name(self, sample_id: int) -> str:
        return f"sample {sample_id}"


def show(pixels: Pixels, start: tuple[int, int], shape: tuple[int, int], size: int = 3) -> np.ndarray:
    """What `write_row` makes of a region of `pixels`, uint8 [h, w, size]; checks that nothing around each row of it and
    around the room to work in is written."""
    (top, left), (rows, columns) = map(int, start), map(int, shape)
    out = np.full((rows, columns * size + 2 * GUARD), CANARY, np.uint8)
    room = np.full(row_room(columns) + 2 * GUARD, CANARY, np.uint8)
    room_in = np.uint64(room.ctypes.data + GUARD)
    for n in range(rows):
        row = np.uint64(out[n].ctypes.data + GUARD)
        write_row(pixels, top + n, left, left + columns, np.uint64(size), room_in, row)
    for guarded in (out, room[None]):
        assert (guarded[:, :GUARD] == CANARY).all() and (guarded[:, -GUARD:] == CANARY).all()
    return out[:, GUARD:-GUARD].reshape(rows, columns, size)
