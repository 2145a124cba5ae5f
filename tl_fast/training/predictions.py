"""Predicted classes as pictures: one file a sample, written while the network goes on."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image
from torch import Tensor

from tl_fast.sources.image_folder import EXTENSIONS
from tl_fast.system.atomic import write_atomic
from tl_fast.system.mistakes import InputError

OVERLAYS = "overlays"  # folder of the overlays, in that of the predictions
JPEG_QUALITY = 90  # of overlays
AHEAD = 4  # predictions a thread that may wait to be written


def voc_colours(count: int) -> np.ndarray:
    """PASCAL VOC's colours of the classes 0..count-1, uint8 [count, 3]: a class's bits, spread over the highest bits of
    red, green and blue."""
    classes, colours = np.arange(count), np.zeros((count, 3), np.uint8)
    for level in range(7, -1, -1):
        for channel in range(3):
            colours[:, channel] |= ((classes >> channel & 1) << level).astype(np.uint8)
        classes >>= 3
    return colours


def palette(num_classes: int, colours: Sequence[Sequence[int]] = ()) -> np.ndarray:
    """RGB of the values 0..255 of a prediction, uint8 [256, 3]: the classes' colours (none: VOC's), VOC's for the
    rest."""
    values = voc_colours(256)
    if len(colours):
        values[:num_classes] = colours
    return values


def file_names(ids: Sequence[str]) -> list[str]:
    """The predictions' names without extension, relative to their folder: the ids, sub-folders kept, without the
    extension of an image.

    Raises InputError naming an id that would lead out of the folder, or two ids that would share a file.
    """
    names, owners = [], {}
    for sample_id in ids:
        if {"", ".", ".."} & set(sample_id.split("/")) or "\0" in sample_id:
            raise InputError(
                f"sample id {sample_id!r} cannot name a file of a prediction: convert again from files whose names"
                " have no empty, '.' or '..' parts"
            )
        stem, dot, extension = sample_id.rpartition(".")
        name = stem if stem and not stem.endswith("/") and (dot + extension).lower() in EXTENSIONS else sample_id
        if name in owners:
            raise InputError(
                f"the predictions of {owners[name]!r} and {sample_id!r} would have one name, {name}.png: evaluate one"
                " beton at a time, or convert again from files that differ in more than their extension"
            )
        owners[name] = sample_id
        names.append(name)
    return names


class PredictionWriter:
    """Writes predictions into `folder` by threads, as a context that ends when all are on disk.

    A sample's prediction is NAME.png, 8 bits with a palette, of which the values are classes. With `overlays` there is
    also overlays/NAME.jpg, the image half covered by the classes' colours. A file appears when it is whole; one of the
    same name is replaced.

    names: of the samples, as `file_names` gives them. colours: uint8 [256, 3], RGB of the values.

    An OSError of a thread is raised by the next `write`, or at the end.
    """

    def __init__(self, folder: Path, names: Sequence[str], colours: np.ndarray, overlays: bool, threads: int) -> None:
        self._folder, self._names, self._colours, self._overlays = folder, names, colours, overlays
        self._limit = AHEAD * threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="predictions")
        self._pending: collections.deque[Future[None]] = collections.deque()

    def write(self, sample_id: int, image: Tensor, classes: Tensor) -> None:
        """Write a sample's classes uint8 [H, W]; image: uint8 [3, H, W]. Both are copied to the host here."""
        while len(self._pending) >= self._limit:
            self._pending.popleft().result()
        pixels = image.permute(1, 2, 0).cpu().numpy() if self._overlays else None
        self._pending.append(self._pool.submit(self._save, self._names[sample_id], pixels, classes.cpu().numpy()))

    def _save(self, name: str, pixels: np.ndarray | None, classes: np.ndarray) -> None:
        picture = Image.fromarray(classes)
        picture.putpalette(self._colours.tobytes())
        _write(self._folder / f"{name}.png", picture, "PNG")
        if pixels is not None:
            blend = (pixels.astype(np.uint16) + self._colours[classes] + 1) // 2
            _write(self._folder / OVERLAYS / f"{name}.jpg", Image.fromarray(blend.astype(np.uint8)), "JPEG")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()


def _write(path: Path, picture: Image.Image, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": JPEG_QUALITY} if kind == "JPEG" else {}
    write_atomic(path, lambda file: picture.save(file, format=kind, **options))
