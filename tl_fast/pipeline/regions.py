"""A batch's regions, decoded or as planes, wherever they lie in memory, and what a decoder of them is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from tl_fast.system.mistakes import Mistake


class DecodeError(Mistake, RuntimeError):
    """An image could not be decoded; the message names the sample and its file."""

    @classmethod
    def of(cls, samples: Images, sample_id: int) -> DecodeError:
        return cls(
            f"cannot decode {samples.name(sample_id)}: the JPEG is damaged; "
            "check the beton with `converters/to_beton.py verify FILE --decode` and convert again"
        )


class Images(Protocol):
    """What a decoder reads: `tl_fast.beton.samples.Samples`."""

    heights: np.ndarray
    widths: np.ndarray
    stored_as_planes: np.ndarray

    def image(self, sample_id: int) -> np.ndarray: ...

    def image_addresses(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def name(self, sample_id: int) -> str: ...


class Span:
    """Bytes from an address on, uint8, for whoever knows numpy's or CUDA's array interface.

    address: of the first byte; shape: of the array; on_gpu: whether the address is of a GPU's memory; memory: what is
    kept as long as the span is.
    """

    def __init__(self, address: int, shape: tuple[int, ...], on_gpu: bool, memory: Any):
        interface = {"shape": shape, "typestr": "|u1", "data": (address, False), "strides": None, "version": 3}
        if on_gpu:
            self.__cuda_array_interface__ = interface
        else:
            self.__array_interface__ = interface
        self._memory = memory


class Regions:
    """Regions of images, as long as this object lives: RGB pixels, uint8 [h, w, 3], or YUV 4:2:0 planes as
    `tl_fast.jpeg.plane_regions` lays them out. Index b gives region b as a tensor, of planes uint8 [bytes].

    addresses: int64 [B], of each region's first byte.
    shapes: int64 [B, 2], (rows, columns) of pixels of each.
    on_gpu: whether the regions are in a GPU's memory.
    memory: what they lie in, and what they are made from where a GPU may still be reading it.
    plane_bytes: int64 [B], bytes of the regions that are planes, 0 for those that are pixels; None: all are pixels.
    """

    def __init__(
        self,
        addresses: np.ndarray,
        shapes: np.ndarray,
        on_gpu: bool,
        memory: Any,
        plane_bytes: np.ndarray | None = None,
    ):
        self.addresses, self.shapes, self.on_gpu, self.memory = addresses, shapes, on_gpu, memory
        self.plane_bytes = np.zeros(len(addresses), np.int64) if plane_bytes is None else plane_bytes

    def __len__(self) -> int:
        return len(self.addresses)

    def __getitem__(self, b: int) -> torch.Tensor:
        size = int(self.plane_bytes[b])
        span = Span(
            int(self.addresses[b]), (size,) if size else (*self.shapes[b].tolist(), 3), self.on_gpu, self.memory
        )
        return torch.as_tensor(span if self.on_gpu else np.asarray(span))

    def span(self) -> tuple[Span, np.ndarray]:
        """One array, uint8 [M], from the first region to the last with whatever lies between them, and where in it each
        region begins, int64 [B]."""
        first = int(self.addresses.min())
        sizes = np.where(self.plane_bytes > 0, self.plane_bytes, 3 * self.shapes.prod(axis=1))
        size = int((self.addresses + sizes).max()) - first
        return Span(first, (size,), self.on_gpu, self.memory), self.addresses - first


# What a decoder's `start` returns: waits for the threads -> the regions, and the event after which they are there.
Started = Callable[[], tuple[Regions, torch.cuda.Event | None]]


class RegionsDecoder(Protocol):
    """Decodes regions of a data set's images, batch after batch.

    way: how, as `pipeline.Loader` takes `decode`.
    share: of the samples that nvJPEG decodes under 'hybrid', 0..1; None for other ways, and until it is measured.

    One thread at a time may ask for batches.
    """

    way: str
    share: float | None = None

    def __call__(self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray) -> Regions:
        """The regions' pixels.

        ids: int64 [B], samples.
        starts, shapes: int64 [B, 2], first pixel and size of each region, (row, column).

        Raises DecodeError naming the sample.
        """
        return self.start(ids, starts, shapes)()[0]

    def start(
        self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray, stream: torch.cuda.Stream | None = None
    ) -> Started:
        """Begin to decode a batch, as `__call__` does; the function returned ends it, in any thread.

        stream: what the pixels are uploaded or decoded on; they are there when the event has happened that is returned
        with them. None: they are there on return, and there is no event.
        """

    def begin(self) -> None:
        """An iteration over the data begins; called in the thread that takes the batches."""

    def taken(self, images: int) -> None:
        """A batch of so many images was taken; called in the thread that takes the batches."""

    def close(self) -> None:
        """Stop the threads and let go of the memory."""
