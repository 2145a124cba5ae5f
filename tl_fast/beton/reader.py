"""Reads a data set from an FFCV .beton file, memory-mapped.

`tl_fast.beton.verify` checks a whole file, `tl_fast.convert.write` writes one. The bytes are laid out as ffcv 1.0 lays
them out, so stock `ffcv.Loader` opens the file; docs/file_format.md has the tables. Beyond that a file of ours holds
label maps, masks, a CRC-32 for every sample and every table, class names, source ids and the annotator's manifest.
"""

from __future__ import annotations

from typing import Self

import numpy as np

from tl_fast.beton.layout import BetonError
from tl_fast.beton.tables import DAMAGED, BetonTables
from tl_fast.jpeg.planes import split_planes
from tl_fast.labelmaps.format import LEVELS, encoded_sizes
from tl_fast.masks.format import MaskError
from tl_fast.masks.format import decode as decode_mask
from tl_fast.sources import planes_file
from tl_fast.system.crc import crc32

# No JPEG holds more: a block of 8×8 pixels takes at least one bit. No memory is taken for a header that claims more.
PIXELS_PER_BYTE = 512


def frame_size(jpeg: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) in pixels as the JPEG's own header says; None where it has no frame header.

    Takes microseconds; decoding takes milliseconds.
    """
    start = 2 if jpeg[:2] == b"\xff\xd8" else len(jpeg)
    while start + 9 <= len(jpeg) and jpeg[start] == 0xFF:
        marker = jpeg[start + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame; these three are tables
            height, width = jpeg[start + 5 : start + 7], jpeg[start + 7 : start + 9]
            return int.from_bytes(height, "big"), int.from_bytes(width, "big")
        start += 1 if marker == 0xFF else 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")
    return None


class BetonReader(BetonTables):
    """Read access to a beton, memory-mapped; needs numpy only.

    Files of the stock ffcv writer open too, without ids, class names and CRCs.

    `len()` or `num_samples`; `heights`, `widths` int32 `[n]` in pixels; `stored_as_planes` bool `[n]`, which images are
    YUV 4:2:0 planes and not JPEGs; `labels` int64 `[n]`; `spec` (None without label maps); `mask_spec` (None without
    masks); `class_names`; `source_ids`; `annotator` (the label-map store's manifest, or None); `conversion` (what was
    converted and how, or None). Picklable: another process opens the file itself. Every table is checked when the file
    is opened; a sample's bytes are checked by `check`. Raises BetonError that names file and field, OSError if there is
    no such file.

    The file must stay as it is while it is open. If it is shortened, or its disk or server fails, the operating system
    ends the process with SIGBUS, as with every memory-mapped file; no code of ours can prevent that. So replace a file
    by renaming a new one (as `write_beton`, `mv` within a file system, and rsync without --inplace do): open readers
    then keep the old file. Never `cp` over it. `verify` reads without mapping, and reports what cannot be read.
    """

    def __len__(self) -> int:
        return self.num_samples

    @property
    def has_crc(self) -> bool:
        return self._index is not None

    @property
    def fields(self) -> list[str]:
        """Names of the fields that every sample has."""
        return list(self._fields)

    @property
    def image_sizes(self) -> np.ndarray:
        """Bytes of every sample's image, int64 `[n]`."""
        return self._image_size

    @property
    def label_map_sizes(self) -> np.ndarray | None:
        """Bytes of every sample's label map, int64 `[n]`; None without label maps."""
        return None if self.spec is None else self._map_size

    @property
    def mask_sizes(self) -> np.ndarray | None:
        """Bytes of every sample's mask, int64 `[n]`; None without masks."""
        return None if self.mask_spec is None else self._mask_size

    def _places(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the images, label maps and masks of samples first to last − 1 begin in the file, and their bytes.

        Both int64 `[parts, samples]`, the image first.
        """
        starts, sizes = [self._image_ptr], [self._image_size]
        if self.spec is not None:
            starts, sizes = [*starts, self._map_ptr], [*sizes, self._map_size]
        if self.mask_spec is not None:
            starts, sizes = [*starts, self._mask_ptr], [*sizes, self._mask_size]
        return np.stack([start[first:last] for start in starts]), np.stack([size[first:last] for size in sizes])

    def image(self, i: int) -> np.ndarray:
        """Sample i's image as it is stored, a JPEG file or planes: uint8 `[size]`, a read-only view of the mapped
        file."""
        start = int(self._image_ptr[i])
        return self._bytes[start : start + int(self._image_size[i])]

    def image_file(self, i: int) -> bytes:
        """Sample i's image as a file that `tl_fast.sources.image.open_rgb` reads: its JPEG, or its planes behind a
        header."""
        if self.stored_as_planes[i]:
            return planes_file.pack(self.image(i), int(self.heights[i]), int(self.widths[i]))
        return self.image(i).tobytes()

    def image_addresses(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in memory the images of the samples `indices` [B] begin, and their sizes in bytes, int64 [B] both.
        Valid as long as the file is open."""
        return self._bytes.ctypes.data + self._image_ptr[indices], self._image_size[indices]

    def planes(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Y, Cb and Cr of sample i: uint8 `[h, w]`, and twice `[ceil(h / 2), ceil(w / 2)]`, read-only views of the
        file.

        Raises BetonError where the image is a JPEG.
        """
        if not self.stored_as_planes[i]:
            raise self._error(
                "image", f"{self._name(i)} is a JPEG; convert with --store yuv420, or decode `image({i})`"
            )
        return split_planes(self.image(i), int(self.heights[i]), int(self.widths[i]))

    def _map_bytes(self, i: int) -> np.ndarray:
        start = int(self._map_ptr[i])
        return self._bytes[start : start + int(self._map_size[i])]

    def label_maps(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """classes uint16 `[B, k, H, W]` and dequantised scores float32 `[B, k, H, W]` of the samples `indices` `[B]`.

        Raises BetonError when the file has no label maps, or when a map lists a class that does not exist or refers
        beyond its palette.
        """
        if self.spec is None:
            raise self._error("label_map", "the file has no label maps; convert with --label-maps")
        indices = np.asarray(indices, np.int64)
        classes, scores, bad, wrong = self._expand(self._bytes, self._map_ptr[indices], indices)
        if wrong:
            raise self.map_error(int(indices[bad]), wrong)
        return classes, scores

    def raw_label_maps(self, indices: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """The label maps of the samples `indices` [B] as they lie in the file (docs/file_format.md), unchecked.

        Returns uint8 views, and float32 [B, 2] = (score_min, score_step). Raises BetonError when the file has no label
        maps.
        """
        ranges = self.label_map_ranges(indices)
        return [self._map_bytes(int(i)) for i in indices], ranges

    def label_map_addresses(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in memory the label maps of the samples `indices` [B] begin, and their sizes in bytes, int64 [B] both.
        Valid as long as the file is open."""
        return self._bytes.ctypes.data + self._map_ptr[indices], self._map_size[indices]

    def label_map_ranges(self, indices: np.ndarray) -> np.ndarray:
        """(score_min, score_step) of the label maps of the samples `indices` [B], float32 [B, 2].

        Raises BetonError when the file has no label maps.
        """
        if self.spec is None:
            raise self._error("label_map", "the file has no label maps; convert with --label-maps")
        metadata = self._column("label_map")[indices]
        return np.stack([metadata["score_min"], metadata["score_step"]], axis=1).astype(np.float32)

    def mask_bytes(self, i: int) -> np.ndarray:
        """Sample i's mask as it lies in the file (docs/file_format.md), unchecked: uint8 `[size]`, a read-only view.

        Raises BetonError when the file has no masks.
        """
        if self.mask_spec is None:
            raise self._error("mask", "the file has no masks; convert with --masks")
        start = int(self._mask_ptr[i])
        return self._bytes[start : start + int(self._mask_size[i])]

    def mask_addresses(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in memory the masks of the samples `indices` [B] begin, and their sizes in bytes, int64 [B] both. Valid
        as long as the file is open."""
        return self._bytes.ctypes.data + self._mask_ptr[indices], self._mask_size[indices]

    def mask(self, i: int) -> np.ndarray:
        """Sample i's mask, uint8 `[H, W]`, as large as its image: a class, or `mask_spec.ignore_index`. A new array.

        Call `tl_fast.masks.format.compile_loops` before threads call this. Raises BetonError when the file has no
        masks, or this one is damaged.
        """
        return self._decode_mask(i, self.mask_bytes(i), int(self._image_size[i]))

    def _decode_mask(self, i: int, data: np.ndarray, image_size: int) -> np.ndarray:
        height, width = int(self.heights[i]), int(self.widths[i])
        if height * width > PIXELS_PER_BYTE * image_size:
            raise self._error(
                "mask", f"{self._name(i)}: {width}×{height} pixels beside an image of {image_size} bytes; {DAMAGED}"
            )
        try:
            return decode_mask(data, height, width, self.mask_spec)
        except MaskError as error:
            raise self._error("mask", f"{self._name(i)}: {error}; {DAMAGED}") from error

    def _expand(
        self, data: np.ndarray, starts: np.ndarray, indices: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, int, int]:
        """`label_maps` of maps that lie in `data` at `starts`; also the first wrong row, and how it is wrong or 0."""
        from tl_fast.labelmaps import loops  # here: opening a beton takes 0.2 s without numba

        classes = np.empty((len(indices), *self.spec.shape), np.uint16)
        scores = np.empty(classes.shape, np.float32)
        metadata = self._column("label_map")[indices]
        data = data.view()
        # Read-only here, contiguous copies below: the types stay the same, so the function is compiled once.
        data.flags.writeable = False
        row, wrong = loops.read_maps(
            data,
            starts,
            self._map_size[indices],
            metadata["score_min"].copy(),
            metadata["score_step"].copy(),
            LEVELS,
            self.spec.num_classes,
            encoded_sizes(self.spec),
            classes.reshape(len(indices), self.spec.cells),
            scores.reshape(len(indices), self.spec.cells),
        )
        return classes, scores, row, wrong

    def map_error(self, i: int, wrong: int) -> BetonError:
        """The error for sample i, whose label map is wrong as the code `wrong` of `labelmaps.loops` says."""
        from tl_fast.labelmaps import loops

        problem = {
            loops.BAD_CLASS: f"it lists a class outside 0..{self.spec.num_classes - 1}",
            loops.BAD_BITMAP: f"its palette has more than 512 classes, or one outside 0..{self.spec.num_classes - 1}",
            loops.BAD_INDEX: "it refers to a class beyond its palette",
            loops.BAD_SIZE: f"it has {self._map_size[i]} bytes",
        }[wrong]
        return self._error("label_map", f"{self._name(i)}: {problem}; {DAMAGED}")

    @property
    def crcs(self) -> np.ndarray | None:
        """Every sample's stored CRC-32 (`crc`), integers `[n]`; None in files of the stock writer."""
        return None if self._index is None else self._column("crc")

    def crc(self, i: int) -> int:
        """The stored CRC-32 of sample i, over the image's bytes, then the label map's, then the mask's.

        Raises BetonError in files of the stock writer.
        """
        if self._index is None:
            raise self._error("crc", "the file has none (written by stock ffcv)")
        return int(self._column("crc")[i])

    def check(self, i: int) -> None:
        """Raise BetonError when sample i's bytes are not those that were written."""
        stored, computed = self.crc(i), crc32(self.image(i))
        if self.spec is not None:
            computed = crc32(self._map_bytes(i), computed)
        if self.mask_spec is not None:
            computed = crc32(self.mask_bytes(i), computed)
        if computed != stored:
            raise self._crc_error(i, computed)

    def _crc_error(self, i: int, computed: int) -> BetonError:
        problem = f"CRC-32 is {computed:08x}, the file says {self.crc(i):08x}"
        return self._error("crc", f"{self._name(i)}: {problem}; {DAMAGED}")

    def _problems(self, first: int, block: np.ndarray, starts: np.ndarray, decode: bool) -> list[str]:
        """Problems of the samples from `first` on, whose parts lie in `block` at `starts` (`verify._read_block`)."""
        errors: dict[int, BetonError] = {}  # the first of each sample
        count, data = starts.shape[1], block.data
        sizes = self._places(first, first + count)[1]
        crcs = self._column("crc")[first : first + count].tolist() if self.has_crc else [None] * count
        bounds = np.stack([starts, starts + sizes]).T.tolist()
        for i, crc, part_bounds in zip(range(first, first + count), crcs, bounds, strict=True):
            parts = [data[start:end] for start, end in part_bounds]
            if crc is not None:
                value = 0
                for part in parts:
                    value = crc32(part, value)
                if value != crc:
                    errors[i] = self._crc_error(i, value)
                    continue
            try:
                if not self.stored_as_planes[i]:  # of planes, any bytes are pixels, and their number is known to fit
                    self._check_size(i, parts[0])
                    if decode:
                        self.check_decode(i, parts[0])
                if self.mask_spec is not None:
                    self._decode_mask(i, block[part_bounds[-1][0] : part_bounds[-1][1]], len(parts[0]))
            except BetonError as error:
                errors[i] = error
        rows = np.array([i for i in range(first, first + count) if self.spec is not None and i not in errors], np.int64)
        while len(rows):
            *_, bad, wrong = self._expand(block, starts[1, rows - first], rows)
            if wrong:
                errors[int(rows[bad])] = self.map_error(int(rows[bad]), wrong)
            rows = rows[bad + 1 :]
        return [str(errors[i]) for i in sorted(errors)]

    def _check_size(self, i: int, jpeg: bytes | memoryview) -> None:
        """Raise BetonError unless the JPEG's own header says the size that the file says."""
        size = frame_size(jpeg)
        if size is None:
            raise self._error("image", f"{self._name(i)} is no JPEG: no frame header; {DAMAGED}")
        if size != (self.heights[i], self.widths[i]):
            stated = f"the file says {self.widths[i]}×{self.heights[i]}"
            raise self._error("image", f"{self._name(i)} is {size[1]}×{size[0]}, {stated}; {DAMAGED}")

    def check_decode(self, i: int, jpeg: memoryview | None = None) -> None:
        """Raise BetonError when sample i's JPEG does not decode, without a warning, to the size that the file says.
        Planes need no decoding.

        jpeg: its bytes, where they have been read and `_check_size` has checked them already. Needs simplejpeg.
        """
        import simplejpeg

        if self.stored_as_planes[i]:
            return
        if jpeg is None:
            jpeg = self.image(i).data
            self._check_size(i, jpeg)
        if int(self.heights[i]) * int(self.widths[i]) > PIXELS_PER_BYTE * len(jpeg):
            raise self._error(
                "image", f"{self._name(i)}: {len(jpeg)} bytes for {self.widths[i]}×{self.heights[i]} pixels; {DAMAGED}"
            )
        try:  # at 1/8 of the size: all of the coded data is read, little memory written
            simplejpeg.decode_jpeg(jpeg, fastdct=True, fastupsample=True, min_height=1, min_width=1, min_factor=8)
        except ValueError as error:
            raise self._error("image", f"{self._name(i)} does not decode: {error}; {DAMAGED}") from error

    def close(self) -> None:
        """Let go of the file. Arrays that `image` returned stay valid; the reader can read no more."""
        self._bytes = self._metadata = self._index = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        return BetonReader, (self.path,)
