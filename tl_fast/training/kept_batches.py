"""Validation's batches are the same every time, so they need not be decoded every time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tl_fast.pipeline.batch import Batch
from tl_fast.pipeline.batch_loader import BatchLoader

# Bytes a rank. Of ImageNet's validation set an eighth at 224 px takes 0.94e9.
LIMIT = 1 << 30


class KeptBatches:
    """The batches of an evaluation loader. The first pass keeps in host memory what fits into `limit` bytes of images
    and masks; later passes decode the rest alone."""

    def __init__(self, loader: BatchLoader, limit: int = LIMIT) -> None:
        self.loader = loader
        self._kept: list[Batch] = []
        self._room = limit

    def __iter__(self) -> Iterator[Batch]:
        yield from tuple(self._kept)
        self.loader.set_epoch(0, len(self._kept))
        for batch in self.loader:
            size = batch.images.nbytes + (0 if batch.masks is None else batch.masks.nbytes)
            if size <= self._room:
                self._kept.append(_on_host(batch))
                self._room -= size
            else:  # what is kept are the first batches, without a gap
                self._room = 0
            yield batch


def _on_host(batch: Batch) -> Batch:
    """A CPU loader's batch as it is; a GPU's in pinned memory, from which it goes back without the host's waiting."""
    if batch.images.device.type == "cpu":
        return batch
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return Batch(**{name: None if tensor is None else tensor.cpu().pin_memory() for name, tensor in tensors.items()})
