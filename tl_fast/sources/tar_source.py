"""Sources whose samples are members of tar files: what the kinds of tars share.

No file is ever created under a member's name, so '..' and absolute names are harmless here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tl_fast.sources.source import Source, SourceError, check_ids
from tl_fast.sources.tar import Member, Tar

_MAX_OPEN = 256  # tars kept open; a read of any other tar opens it anew (many systems allow 1,024 open files)


def refuse_unless_file(member: Member, where: str) -> None:
    """Raise SourceError for an image (or class, or inner tar) that is a link, device or sparse file.

    Leaving it out would lose a sample.
    """
    if member.kind != "file":
        remedy = "pack the files themselves (tar --dereference --hard-dereference)"
        raise SourceError(f"{where}: is a {member.kind} in the tar; {remedy}")


class TarSource(Source):
    """Samples that are members of tar files. A subclass lists them in `_list` and names them in `origin`."""

    def __init__(self, files: Sequence[str], class_names: list[str] | None = None, **options: object) -> None:
        self.root = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        self.tars: list[Tar] = []
        self.ids, self.ignored = [], 0
        self.rows = np.zeros((0, 3), np.int64)  # of each sample: index of its tar in `tars`, offset and size
        try:
            self.labels, self.class_names = self._list(files, class_names, **options)
            if not self.ids:
                raise SourceError(f"{self.root}: no images in it ({self.ignored} other members)")
            check_ids(self.ids, lambda i: f"{self.origin(i)} (at byte {self.rows[i, 1]})")
        except BaseException:
            self.close()
            raise
        self.sizes = self.rows[:, 2]

    def _list(self, files: Sequence[str], class_names: list[str] | None) -> tuple[np.ndarray, list[str]]:
        """Fill `ids`, `rows` and `ignored`; returns labels and class names."""
        raise NotImplementedError

    def opened(self, files: Sequence[str]) -> Iterator[tuple[int, Tar]]:
        """Each file in turn, open for listing, with its index in `tars`. The first `_MAX_OPEN` stay open."""
        for index, path in enumerate(files):
            try:
                tar = Tar(path)
            except OSError as error:
                raise SourceError(f"{path}: cannot be opened ({error})") from error
            self.tars.append(tar)
            yield index, tar
            if index >= _MAX_OPEN:
                tar.close()

    @property
    def stamps(self) -> np.ndarray:
        """Size and modification time (ns) of the sample's tar; index of that tar, offset and size of the sample."""
        tars = np.array([(tar.size, tar.mtime) for tar in self.tars], np.int64)
        return np.concatenate((tars[self.rows[:, 0]], self.rows), 1)

    def read(self, i: int) -> bytes:
        tar, offset, size = self.rows[i].tolist()
        return self.tars[tar].read(offset, size)

    def close(self) -> None:
        for tar in self.tars:
            tar.close()
