"""Members of a tar file without unpacking: listed once (headers only), then read at their offsets from any thread.

Nothing is ever written to a member's name, so '..' and absolute names are harmless here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tl_fast.sources.source import Source, SourceError, check_ids
from tl_fast.sources.tar import Member, Tar

_MAX_OPEN = 256  # tars kept open; of more, each read opens its tar (many systems allow 1,024 open files)


def refuse_unless_file(member: Member, where: str) -> None:
    """Raise SourceError for an image (or class, or inner tar) that is a link, device or sparse file: leaving it out
    would lose a sample."""
    if member.kind != "file":
        remedy = "pack the files themselves (tar --dereference --hard-dereference)"
        raise SourceError(f"{where}: is a {member.kind} in the tar; {remedy}")


class TarSource(Source):
    """Samples that are members of tar files. A kind says in `_list` which, and in `origin` what they are called."""

    def __init__(self, files: Sequence[str], class_names: list[str] | None = None, **options: object) -> None:
        self.root = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        self.tars: list[Tar] = []
        self.ids, self.ignored = [], 0
        self.rows = np.zeros((0, 3), np.int64)  # place of the tar, offset and size of each sample
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
        """Each file in turn, open for listing, with its place in `tars`; it stays open for reading unless they are
        many."""
        for place, path in enumerate(files):
            try:
                tar = Tar(path)
            except OSError as error:
                raise SourceError(f"{path}: cannot be opened ({error})") from error
            self.tars.append(tar)
            yield place, tar
            if place >= _MAX_OPEN:
                tar.close()

    @property
    def stamps(self) -> np.ndarray:
        """Size and modification time (ns) of the sample's tar; place of that tar, offset and size of the sample."""
        tars = np.array([(tar.size, tar.mtime) for tar in self.tars], np.int64)
        return np.concatenate((tars[self.rows[:, 0]], self.rows), 1)

    def read(self, i: int) -> bytes:
        tar, offset, size = self.rows[i].tolist()
        return self.tars[tar].read(offset, size)

    def close(self) -> None:
        for tar in self.tars:
            tar.close()
