"""A folder of images as the annotator reads it: which images in which order, and each squashed to the network's square input."""
from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import tl_fast.compat  # noqa: F401  before timm
from timm.data.transforms import str_to_pil_interp

from tl_fast.annotator import AnnotateError, Preprocessing

# torchvision.datasets.folder.IMG_EXTENSIONS, and .gif; the converter's list
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}


@dataclasses.dataclass(frozen=True)
class ImageList:
    """Images: `ids` relative to `root` (posix), class by class; `labels` int64 `[n]` and `class_names`, both None for a flat folder."""

    root: Path
    ids: list[str]
    labels: np.ndarray | None
    class_names: list[str] | None


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


def list_images(root: Path) -> ImageList:
    """Class folders in sorted order (torchvision's layout, links followed), or the images right in `root`.

    Raises AnnotateError naming the folder that does not exist or has no images, or the image that lies beside class folders.
    """
    if not root.is_dir():
        raise AnnotateError(f"{root}: no such folder; give a folder of images, or of one folder per class")
    class_names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not class_names:
        ids = sorted(path.name for path in root.iterdir() if _is_image(path))
        if not ids:
            raise AnnotateError(f"{root}: no images (their names end in {', '.join(sorted(EXTENSIONS))}) and no class folders")
        return ImageList(root, ids, None, None)
    if strays := sorted(path.name for path in root.iterdir() if path.is_file() and _is_image(path)):
        raise AnnotateError(f"{root}: {len(strays)} images ({strays[0]} first) lie beside class folders; move them into one or away")
    ids, labels = [], []
    for label, name in enumerate(class_names):
        paths = [Path(folder, file) for folder, _, files in os.walk(root / name, followlinks=True) for file in files]
        found = sorted(path.relative_to(root).as_posix() for path in paths if _is_image(path))
        if not found:
            raise AnnotateError(f"{root / name}: no images; remove the folder or fill it")
        ids += found
        labels += [label] * len(found)
    return ImageList(root, ids, np.array(labels), class_names)


class SquashedImages(Dataset):
    """Item i: image i as uint8 RGB `[3, S, S]`, or the AnnotateError that says what is wrong with it, to be raised by the caller.

    (Raised in a worker it would reach the caller buried in the worker's traceback.) EXIF orientation is ignored.
    """

    def __init__(self, images: ImageList, preprocessing: Preprocessing) -> None:
        self.images, self.size = images, preprocessing.img_size
        self.resample = str_to_pil_interp(preprocessing.interpolation)

    def __len__(self) -> int:
        return len(self.images.ids)

    def __getitem__(self, index: int) -> Tensor | AnnotateError:
        path = self.images.root / self.images.ids[index]
        try:
            with Image.open(path) as image:
                squashed = image.convert("RGB").resize((self.size, self.size), self.resample)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's for files it cannot read
            return AnnotateError(f"{path} cannot be read as an image ({error}); repair or remove it, then run the same command again")
        return torch.from_numpy(np.array(squashed)).permute(2, 0, 1).contiguous()


def stack(items: list[Tensor | AnnotateError]) -> Tensor | AnnotateError:
    """Collate items to `[B, 3, S, S]`, or to the first error among them."""
    return next((item for item in items if isinstance(item, AnnotateError)), None) or torch.stack(items)
