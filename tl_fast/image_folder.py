"""A folder of images: which ones, in which order, of which class. Annotator and converter read it alike, so that their ids agree."""
from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import numpy as np

from tl_fast.sources import Source, SourceError, check_ids, reorder_classes

# torchvision.datasets.folder.IMG_EXTENSIONS, and .gif
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}


class ImageFolderError(SourceError):
    """A folder that is not laid out as expected; the message names it and the remedy."""


@dataclasses.dataclass(frozen=True)
class ImageList:
    """Images: `ids` relative to `root` (posix), class by class; `labels` int64 `[n]` and `class_names`, both None for a flat folder.

    sizes, mtimes: int64 `[n]`, bytes and nanoseconds. ignored: how many other files lie in the class folders.
    """

    root: Path
    ids: list[str]
    labels: np.ndarray | None
    class_names: list[str] | None
    sizes: np.ndarray
    mtimes: np.ndarray
    ignored: int = 0


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _scan(folder: str, prefix: str, found: list[tuple[str, int, int]], deep: bool) -> int:
    """Append (prefix + path, size, mtime) of every image in `folder`, below it too when `deep`; returns how many other files there are.

    No Path per file: a million of them would cost minutes and gigabytes. Raises OSError for what cannot be listed.
    """
    ignored, folders = 0, []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.name)
            elif is_image(entry.name):
                status = entry.stat()  # of a link's target; a broken link raises
                if not stat.S_ISREG(status.st_mode):
                    raise ImageFolderError(f"{entry.path!a}: named like an image, but no file; remove it")
                found.append((prefix + entry.name, status.st_size, status.st_mtime_ns))
            else:
                ignored += 1
    for name in folders if deep else ():
        ignored += _scan(f"{folder}/{name}", f"{prefix}{name}/", found, deep)
    return ignored


def list_images(root: Path) -> ImageList:
    """Class folders in sorted order (torchvision's layout, links followed), or the images right in `root`.

    Raises ImageFolderError naming the folder that does not exist or has no images, the image that lies beside class folders, what cannot
    be read (a broken link, a folder without permission) or has a name that is not UTF-8.
    """
    root = Path(root)
    if not root.is_dir():
        raise ImageFolderError(f"{root}: no such folder; give a folder of images, or of one folder per class")
    known = f"(their names end in {', '.join(sorted(EXTENSIONS))})"
    images: list[tuple[str, int, int]] = []
    counts, ignored = [], 0
    try:
        class_names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        strays: list[tuple[str, int, int]] = []
        _scan(str(root), "", strays, deep=False)
        strays.sort()
        if class_names and strays:
            raise ImageFolderError(
                f"{root}: {len(strays)} images ({strays[0][0]} first) lie beside class folders; move them into one or away"
            )
        if not class_names and not strays:
            raise ImageFolderError(f"{root}: no images {known} and no class folders")
        for name in class_names:
            found: list[tuple[str, int, int]] = []
            ignored += _scan(f"{root}/{name}", f"{name}/", found, deep=True)
            if not found:
                raise ImageFolderError(f"{root / name}: no images {known}; remove the folder or fill it")
            found.sort()
            images += found
            counts.append(len(found))
    except OSError as error:  # its text names the path
        raise ImageFolderError(f"{root}: cannot be listed ({error}); repair or remove what it names") from error
    images = images if class_names else strays
    ids = [name for name, _, _ in images]
    sizes, mtimes = (np.fromiter((image[column] for image in images), np.int64, len(images)) for column in (1, 2))
    try:
        check_ids(ids, lambda i: f"{root}/{ids[i]}")
    except SourceError as error:
        raise ImageFolderError(str(error)) from None
    labels = np.repeat(np.arange(len(counts)), counts) if class_names else None
    return ImageList(root, ids, labels, class_names or None, sizes, mtimes, ignored)


class ImageFolder(Source):
    """One folder per class (torchvision's layout); ids are paths relative to the folder.

    class_names: the classes in the order of their labels, when it is not that of the sorted folders or some have no folder.
    Raises ImageFolderError (see `list_images`), also for a folder without class folders.
    """

    kind = "image folder"

    def __init__(self, root: Path, class_names: list[str] | None = None) -> None:
        images = list_images(root)
        if images.class_names is None:
            raise ImageFolderError(f"{root}: has no class folders; put each class's images in a folder of its own")
        self.root, self.ids, self.ignored = str(root), images.ids, images.ignored
        self.labels, self.class_names = reorder_classes(images.labels, images.class_names, class_names, self.root)
        self.sizes, self._mtimes = images.sizes, images.mtimes

    @property
    def stamps(self) -> np.ndarray:
        """Size and modification time (ns) of each file."""
        return np.stack((self.sizes, self._mtimes), 1)

    def origin(self, i: int) -> str:
        return f"{self.root}/{self.ids[i]}"

    def read(self, i: int) -> bytes:
        size = int(self.sizes[i])
        file = os.open(f"{self.root}/{self.ids[i]}", os.O_RDONLY | os.O_CLOEXEC)  # one call each: Path.read_bytes takes ten
        try:
            data = os.read(file, size + 1)
            while len(data) < size and (more := os.read(file, size + 1 - len(data))):  # network file systems may answer in pieces
                data += more
        finally:
            os.close(file)
        if len(data) != size:
            now = f"more than {size}" if len(data) > size else len(data)
            raise SourceError(f"{self.origin(i)}: has {now} bytes, it had {size} when it was listed; run again once nobody changes it")
        return data
