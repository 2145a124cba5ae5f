"""A folder of images: which images, in which order, of which class.

The annotator and the converter both list folders here, so their ids agree.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np

from tl_fast.sources.source import Source, SourceError, check_ids, read_listed, reorder_classes

# torchvision.datasets.folder.IMG_EXTENSIONS, and .gif
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}


class ImageFolderError(SourceError):
    """A folder that is not laid out as expected; the message names it and the remedy."""


@dataclasses.dataclass(frozen=True)
class ImageList:
    """The n images of a folder.

    ids: paths relative to `root` (posix), class by class. labels int64 `[n]` and class_names: both None for a flat
    folder. sizes, mtimes: int64 `[n]`, bytes and nanoseconds, both 0 for a link that leads nowhere. ignored: how many
    other files lie in the class folders.
    """

    root: Path
    ids: list[str]
    labels: np.ndarray | None
    class_names: list[str] | None
    sizes: np.ndarray
    mtimes: np.ndarray
    ignored: int = 0


# Errors that concern one link. All others concern the folder or the machine.
_ONE_FILE = {errno.ENOENT, errno.ELOOP, errno.EACCES, errno.ENOTDIR}


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _scan(folder: str, prefix: str, images: list[tuple[str, int, int]], deep: bool) -> int:
    """Append (prefix + path, size, mtime) of every image in `folder` to `images`; with `deep` of those below it too.

    Returns how many other files there are. Raises OSError for what cannot be listed. It makes no Path objects: a
    million of them would cost minutes and gigabytes.
    """
    ignored, folders = 0, []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir():
                    folders.append(entry.name)
                elif is_image(entry.name):
                    status = entry.stat()  # of a link's target
                    images.append((prefix + entry.name, status.st_size, status.st_mtime_ns))
                else:
                    ignored += 1
            except OSError as error:
                if error.errno not in _ONE_FILE or not is_image(entry.name):
                    raise
                images.append((prefix + entry.name, 0, 0))  # one bad sample: `read` says what is wrong with it
    for name in folders if deep else ():
        ignored += _scan(f"{folder}/{name}", f"{prefix}{name}/", images, deep)
    return ignored


def list_images(root: Path) -> ImageList:
    """List the class folders in sorted order (torchvision's layout, links followed), or the images right in `root`.

    Everything named like an image is listed, a link that leads nowhere too: reading it says what is wrong.
    Raises ImageFolderError naming the folder that does not exist, cannot be listed or has no images, or the image that
    lies beside class folders or has a name that is not UTF-8.
    """
    root = Path(root)
    if not root.is_dir():
        raise ImageFolderError(f"{root}: no such folder; give a folder of images, or of one folder per class")
    suffixes = f"(their names end in {', '.join(sorted(EXTENSIONS))})"
    images: list[tuple[str, int, int]] = []
    counts, ignored = [], 0
    try:
        class_names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        strays: list[tuple[str, int, int]] = []
        _scan(str(root), "", strays, deep=False)
        strays.sort()
        if class_names and strays:
            raise ImageFolderError(
                f"{root}: {len(strays)} images ({strays[0][0]} first) lie beside class folders; move them into one or"
                " away"
            )
        if not class_names and not strays:
            raise ImageFolderError(f"{root}: no images {suffixes} and no class folders")
        for name in class_names:
            class_images: list[tuple[str, int, int]] = []
            ignored += _scan(f"{root}/{name}", f"{name}/", class_images, deep=True)
            if not class_images:
                raise ImageFolderError(f"{root / name}: no images {suffixes}; remove the folder or fill it")
            class_images.sort()
            images += class_images
            counts.append(len(class_images))
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

    class_names: the classes in the order of their labels; needed where that is not the order of the sorted folders, or
    where some classes have no folder. unlabelled: a flat folder of images is accepted; its labels are -1.
    Raises ImageFolderError (see `list_images`), also for a folder without class folders unless `unlabelled`.
    """

    kind = "image folder"

    def __init__(self, root: Path, class_names: list[str] | None = None, unlabelled: bool = False) -> None:
        images = list_images(root)
        self.root, self.ids, self.ignored = str(root), images.ids, images.ignored
        if images.class_names is not None:
            self.labels, self.class_names = reorder_classes(images.labels, images.class_names, class_names, self.root)
        elif unlabelled:
            self.labels, self.class_names = np.full(len(self.ids), -1, np.int64), []
        else:
            raise ImageFolderError(f"{root}: has no class folders; put each class's images in a folder of its own")
        self.sizes, self._mtimes = images.sizes, images.mtimes

    @property
    def stamps(self) -> np.ndarray:
        """Size and modification time (ns) of each file."""
        return np.stack((self.sizes, self._mtimes), 1)

    def origin(self, i: int) -> str:
        return f"{self.root}/{self.ids[i]}"

    def read(self, i: int) -> bytes:
        return read_listed(self.origin(i), int(self.sizes[i]))
