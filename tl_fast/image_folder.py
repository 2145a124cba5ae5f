"""A folder of images: which ones, in which order, of which class. Annotator and converter read it alike, so that their ids agree."""
from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

# torchvision.datasets.folder.IMG_EXTENSIONS, and .gif
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}


class ImageFolderError(ValueError):
    """A folder that is not laid out as expected; the message names it and the remedy."""


@dataclasses.dataclass(frozen=True)
class ImageList:
    """Images: `ids` relative to `root` (posix), class by class; `labels` int64 `[n]` and `class_names`, both None for a flat folder.

    ignored: how many other files lie in the class folders.
    """

    root: Path
    ids: list[str]
    labels: np.ndarray | None
    class_names: list[str] | None
    ignored: int = 0


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def list_images(root: Path) -> ImageList:
    """Class folders in sorted order (torchvision's layout, links followed), or the images right in `root`.

    Raises ImageFolderError naming the folder that does not exist or has no images, or the image that lies beside class folders.
    """
    if not root.is_dir():
        raise ImageFolderError(f"{root}: no such folder; give a folder of images, or of one folder per class")
    known = f"(their names end in {', '.join(sorted(EXTENSIONS))})"
    class_names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    strays = sorted(path.name for path in root.iterdir() if path.is_file() and _is_image(path.name))
    if not class_names:
        if not strays:
            raise ImageFolderError(f"{root}: no images {known} and no class folders")
        return ImageList(root, strays, None, None)
    if strays:
        raise ImageFolderError(f"{root}: {len(strays)} images ({strays[0]} first) lie beside class folders; move them into one or away")
    ids, labels, ignored = [], [], 0
    for label, name in enumerate(class_names):
        files = [Path(folder, file) for folder, _, files in os.walk(root / name, followlinks=True) for file in files]
        found = sorted(file.relative_to(root).as_posix() for file in files if _is_image(file.name))
        if not found:
            raise ImageFolderError(f"{root / name}: no images {known}; remove the folder or fill it")
        ids += found
        labels += [label] * len(found)
        ignored += len(files) - len(found)
    return ImageList(root, ids, np.array(labels), class_names, ignored)
