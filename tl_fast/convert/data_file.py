"""The bytes of a beton, written sample after sample, then the tables (docs/file_format.md)."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from tl_fast.beton.layout import (
    ALLOCATION,
    BYTES,
    BYTES_FIELD,
    CUSTOM,
    FIELD,
    HEADER,
    IMAGE,
    INDEX,
    INDEX_MAGIC,
    INT,
    LABEL_MAP,
    PLANES,
    RGB_IMAGE,
    STOCK_TYPES,
    VERSION,
    image_arguments,
    metadata_dtype,
    spec_to_arguments,
)
from tl_fast.convert.block_writer import BlockWriter, write_all
from tl_fast.labelmaps.format import MapSpec
from tl_fast.masks.format import MaskSpec
from tl_fast.system.crc import crc32

if TYPE_CHECKING:
    from tl_fast.convert.image import Prepared


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A sample as it goes into the file.

    payloads: of its label map and its mask, those that the file has, in this order: the bytes that follow the image,
    and what the sample's row in the metadata table says of them behind the pointer. crc: of all parts of the image and
    then the payloads.
    """

    image: Prepared
    payloads: tuple[tuple[bytes, tuple], ...]
    crc: int

    def __reduce__(self):
        """Pickled in a third of the time that a frozen dataclass takes."""
        return Encoded, (self.image, self.payloads, self.crc)


class BetonFile:
    """Appends samples to the file of `blocks`, then closes it with tables and header.

    reserved: samples to come, at most. page_size: bytes. spec, masks: of the label maps and the masks; None: there are
    none. payloads: names of the fields of `Encoded.payloads`.
    """

    def __init__(
        self, blocks: BlockWriter, reserved: int, page_size: int, spec: MapSpec | None, masks: MaskSpec | None
    ) -> None:
        self.blocks, self.page_size = blocks, page_size
        payloads = [("label_map", CUSTOM, LABEL_MAP)] if spec is not None else []
        payloads += [("mask", BYTES_FIELD, BYTES)] if masks is not None else []
        self.payloads = [name for name, _, _ in payloads]
        kinds = [("image", RGB_IMAGE, IMAGE), ("label", INT, STOCK_TYPES[INT]), *payloads]
        kinds += [("crc", INT, STOCK_TYPES[INT])]
        self.fields = np.zeros(len(kinds), FIELD)
        self.fields["name"], self.fields["type_id"] = [name for name, _, _ in kinds], [kind for _, kind, _ in kinds]
        if spec is not None:
            self.fields["arguments"][2] = spec_to_arguments(spec)
        self.metadata = np.zeros(reserved, metadata_dtype([dtype for _, _, dtype in kinds]))
        self.allocations = np.zeros(reserved * (1 + len(payloads)), ALLOCATION)
        self.offset, self.samples, self.allocated = HEADER.itemsize + self.fields.nbytes + self.metadata.nbytes, 0, 0
        self._rows: list[tuple] = []
        self._allocations: list[tuple[int, int, int]] = []
        blocks.begin(self.offset)

    def add(self, sample: Encoded, label: int) -> None:
        """Append one sample, all of it in one page: ffcv's process cache maps whole pages and nothing across them.

        Each part begins at an even offset, as label maps are uint16. The sample is in the file after the next `flush`.
        Raises ValueError when it is larger than a page.
        """
        image_size = size = sum(map(len, sample.image.parts))
        offsets = []
        for data, _ in sample.payloads:
            offsets.append(size + size % 2)
            size = offsets[-1] + len(data)
        if size > self.page_size:
            raise ValueError(
                f"its {size} bytes do not fit in a page of {self.page_size}; set --page-size"
                f" {1 << (size - 1).bit_length()} or limit --max-resolution or"
                " --short-side"
            )
        start = self.offset + self.offset % 2
        if self.page_size - start % self.page_size < size:
            start += -start % self.page_size
        if start > self.offset:
            self.blocks.write(bytes(start - self.offset))
        for part in sample.image.parts:
            self.blocks.write(part)
        number = self.samples + len(self._rows)
        self._allocations.append((number, start, image_size))
        entries, end = [], image_size
        for offset, (data, more) in zip(offsets, sample.payloads, strict=True):
            self.blocks.write(bytes(offset - end) + data)
            self._allocations.append((number, start + offset, len(data)))
            entries.append((start + offset, *more))
            end = offset + len(data)
        image = (sample.image.mode, sample.image.width, sample.image.height, start)
        self._rows.append((image, label, *entries, sample.crc))
        self.offset = start + size

    def list_rows(self) -> None:
        """Put the samples added since the last call into the tables: one call a sample would take longer."""
        rows, allocations = len(self._rows), len(self._allocations)
        self.metadata[self.samples : self.samples + rows] = self._rows
        self.allocations[self.allocated : self.allocated + allocations] = self._allocations
        self.samples, self.allocated = self.samples + rows, self.allocated + allocations
        self._rows, self._allocations = [], []

    def flush(self) -> None:
        """Every sample added is in the file and the tables now. Raises OSError."""
        self.blocks.flush()
        self.list_rows()

    def restore(self, offset: int, metadata: bytes, allocations: bytes) -> None:
        """Go on behind the samples of these rows and allocations, whose data ends at `offset`."""
        rows, table = np.frombuffer(metadata, self.metadata.dtype), np.frombuffer(allocations, ALLOCATION)
        self.metadata[: len(rows)], self.allocations[: len(table)] = rows, table
        self.offset, self.samples, self.allocated = offset, len(rows), len(table)
        self.blocks.begin(offset)

    def close(self, info: dict[str, Any], ids: list[str]) -> None:
        """Write the tables behind the data, then the header and table before it: until the header is there nothing
        takes the file for a beton.
        """
        self.flush()
        if (self.metadata["f0"]["mode"][: self.samples] == PLANES).any():
            self.fields["type_id"][0], self.fields["arguments"][0] = CUSTOM, image_arguments()
        texts = [json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8") for value in (info, ids)]
        metadata, allocations = self.metadata[: self.samples].tobytes(), self.allocations[: self.allocated].tobytes()
        starts, end = [], self.offset
        # ffcv reads the allocation table to the end of the file, so it must be the last.
        for part in (*texts, allocations):
            starts.append(end + -end % 8)
            write_all(self.blocks.handle, part, starts[-1])
            end = starts[-1] + len(part)
        crcs = [crc32(part) for part in (*texts, metadata, allocations)]
        header = np.array([(VERSION, len(self.fields), self.page_size, self.samples, starts[2])], HEADER).tobytes()

        def head(head_crc: int) -> bytes:
            row = (INDEX_MAGIC, starts[0], len(texts[0]), starts[1], len(texts[1]), *crcs, head_crc)
            index = np.array([row], INDEX)
            self.fields["arguments"][-1, : INDEX.itemsize] = index.view(np.uint8)
            return header + self.fields.tobytes()

        # The CRC-32 of the head covers its own four bytes as zeros.
        write_all(self.blocks.handle, head(crc32(head(0))) + metadata, 0)
