"""A folder of masks: which mask belongs to which image."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tl_fast.masks.classes import MaskClasses
from tl_fast.masks.format import MaskError
from tl_fast.masks.image import palette_of, read_mask_file
from tl_fast.sources.source import SourceError, read_listed

# Cityscapes: CITY/X_leftImg8bit.png has its classes in CITY/X_gtFine_labelIds.png. Files with other endings beside it
# (colours, instances, polygons) are no masks of an image.
_CITYSCAPES = re.compile(r"_gt(?:Fine|Coarse)_labelIds$")


class MaskFolder:
    """The masks below a folder: all files that end in .png, in sorted order, links followed.

    A mask belongs to the image whose id is its path below the folder, but for the suffix: `x/y.png` to `x/y.jpg`;
    Cityscapes' `X_gtFine_labelIds.png` to `X_leftImg8bit.png`. classes: what the files' values mean; where they have no
    colours, the palette of the first file gives them.

    `root`; `classes`; `spec`; `len()`; `stamps`, int64 [n, 2], size and modification time (ns) of each file. Raises
    MaskError naming a folder that does not exist, cannot be listed or holds no PNG.
    """

    def __init__(self, root: Path | str, classes: MaskClasses) -> None:
        self.root = str(root)
        if not os.path.isdir(self.root):
            raise MaskError(f"{self.root}: no such folder; give the folder of the masks, laid out as the images are")
        files: list[tuple[str, int, int]] = []
        try:
            _scan(self.root, "", files)
        except OSError as error:
            raise MaskError(f"{self.root}: cannot be listed ({error}); repair or remove what it names") from error
        if not files:
            raise MaskError(f"{self.root}: holds no masks (files that end in .png)")
        files.sort()
        self.names = [name for name, _, _ in files]
        self.stamps = np.array([stamp for _, *stamp in files], np.int64)
        if not classes.spec.colours and (palette := self._palette()) is not None:
            classes = classes.with_palette(palette)
        self.classes, self.spec = classes, classes.spec

    def _palette(self) -> np.ndarray | None:
        """The palette of the first file, uint8 [n, 3], or None: whichever images are packed, it is the same."""
        try:
            return palette_of(read_listed(self.origin(0), int(self.stamps[0, 0])))
        except (OSError, SourceError):
            return None

    def __len__(self) -> int:
        return len(self.names)

    def origin(self, j: int) -> str:
        """How messages call mask j: its path."""
        return f"{self.root}/{self.names[j]}"

    def locate(self, ids: Sequence[str]) -> np.ndarray:
        """The index of each image's mask, int64 [n], -1 where there is none.

        Raises MaskError when two masks fit an image or one mask two images, and when no mask fits any image.
        """
        of_stem: dict[str, int] = {}
        for j, name in enumerate(self.names):
            stem = _CITYSCAPES.sub("_leftImg8bit", name[: -len(".png")])
            if (other := of_stem.setdefault(stem, j)) != j:
                raise MaskError(f"{self.origin(other)} and {self.origin(j)}: two masks of one image; remove one")
        indices = np.fromiter((of_stem.get(os.path.splitext(name)[0], -1) for name in ids), np.int64, len(ids))
        if len(ids) and (indices < 0).all():
            raise MaskError(
                f"{self.root}: none of its {len(self)} masks belongs to an image: {self.names[0]} is the first mask,"
                f" {ids[0]} the first image; their paths below the two folders must be equal but for the suffix"
            )
        first: dict[int, int] = {}
        for i, j in enumerate(indices.tolist()):
            if j >= 0 and (other := first.setdefault(j, i)) != i:
                raise MaskError(f"{self.origin(j)}: is the mask of {ids[other]} and of {ids[i]}; rename or remove one")
        return indices

    def read(self, j: int) -> np.ndarray:
        """Mask j, uint8 [H, W]. Raises ValueError or OSError naming the file and what is wrong with it."""
        path = self.origin(j)
        data = read_listed(path, int(self.stamps[j, 0]))
        try:
            return self.classes.translate(read_mask_file(data))
        except ValueError as error:
            raise MaskError(f"its mask {path}: {error}") from error


def _scan(folder: str, prefix: str, files: list[tuple[str, int, int]]) -> None:
    """Append (path below the root, size, mtime) of every PNG in `folder` and below it to `files`."""
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(".png"):
                try:
                    status = entry.stat()
                    files.append((prefix + entry.name, status.st_size, status.st_mtime_ns))
                except FileNotFoundError:  # a link that leads nowhere: reading it says so
                    files.append((prefix + entry.name, 0, 0))
    for name in folders:
        _scan(f"{folder}/{name}", f"{prefix}{name}/", files)
