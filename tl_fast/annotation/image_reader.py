"""Reads, opens and squashes a data set's images for the annotator, on threads and in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tl_fast.annotation.annotator import AnnotateError, Preprocessing, squash
from tl_fast.sources.rejects import FATAL, reason_of
from tl_fast.sources.source import Source, SourceChanged
from tl_fast.system.threads import ordered_map


@dataclasses.dataclass
class ImageReader:
    """Reads and squashes a data set's images on threads.

    exif: 'ignore' or 'apply'. stop: whether the first image that cannot be read is an error. rotated: how many images
    read so far state an EXIF orientation other than upright.
    """

    source: Source
    preprocessing: Preprocessing
    exif: str
    workers: int
    batch_size: int
    stop: bool
    rotated: int = 0

    def batches(
        self, groups: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, Sequence[int], Tensor | None, dict[int, str]]]:
        """All groups of images in order, in pieces of at most `batch_size`, none of which crosses a group.

        Yields (position in `groups`, the piece, its images as uint8 `[B, 3, S, S]` or None where none can be read,
        {image: why it cannot be read}). Raises AnnotateError where the machine is to blame, or at the first image that
        cannot be read where `stop` says so; SourceChanged for a file of many images that has changed.
        """
        pieces = [
            (position, group[i : i + self.batch_size])
            for position, group in enumerate(groups)
            for i in range(0, len(group), self.batch_size)
        ]
        ahead = max(4, -(-2 * self.batch_size // self.workers))  # two batches at least
        results = ordered_map(self.workers, self._read, (i for _, piece in pieces for i in piece), ahead)
        for position, piece in pieces:
            images, bad = [], {}
            for i in piece:
                result, orientation = next(results)
                self.rotated += orientation > 1
                if isinstance(result, Exception):
                    bad[i] = reason_of(result)
                    if self.stop:
                        raise AnnotateError(
                            f"{self.source.origin(i)}: {bad[i]}. Repair it, or give --on-error quarantine to leave "
                            "out such images; the same command goes on from what is done"
                        ) from result
                else:
                    images.append(result)
            yield position, piece, torch.from_numpy(np.stack(images)) if images else None, bad

    def _read(self, i: int) -> tuple[np.ndarray | Exception, int]:
        try:
            return squash(self.source.read(i), self.preprocessing, self.exif)
        except SourceChanged:
            raise
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in FATAL:
                raise AnnotateError(f"{self.source.origin(i)}: {error}; the image is not to blame") from error
            return error, 1
