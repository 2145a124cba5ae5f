"""ImageNet's tars as downloaded, read without unpacking.

The training tar holds 1,000 class tars, which may also have been taken out of it; the validation tar is flat.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tl_fast.sources.image_folder import is_image
from tl_fast.sources.source import Source, SourceError, label_classes, reorder_classes
from tl_fast.sources.tar import Member, Tar
from tl_fast.sources.tar_source import TarSource, refuse_unless_file
from tl_fast.sources.val_labels import read_val_labels
from tl_fast.sources.webdataset_tar import WebDatasetTars

_PEEK = 256  # members that are looked at to tell what a tar is
_WORDNET = re.compile(r"n\d{8}")


def open_tars(files: Sequence[str], labels: Path | None = None, class_names: list[str] | None = None) -> Source:
    """Open tars of one kind, which the first members of the first tar tell. Raises SourceError."""
    try:
        tar = Tar(files[0])
    except OSError as error:
        raise SourceError(f"{files[0]}: cannot be opened ({error})") from error
    try:
        first = [member.name for member in itertools.islice(tar.members(), _PEEK) if member.kind != "folder"]
    finally:
        tar.close()
    suffixes = {os.path.splitext(name)[1].lower() for name in first}
    if ".cls" in suffixes:
        kind = WebDatasetTars
    elif ".tar" in suffixes or _WORDNET.fullmatch(Path(files[0]).stem):
        kind = TrainTar
    elif labels is not None:
        return ValTar(files, class_names, labels=labels)
    else:
        seen = ", ".join(map(ascii, first[:3])) or "nothing"
        raise SourceError(
            f"{files[0]}: has images without classes, or none ({seen}). ImageNet's validation tar needs --labels (the"
            " devkit, or a list); its training tar holds class tars, WebDataset shards hold .cls members; unpack any"
            " other tar and give the folder"
        )
    if labels is not None:
        raise SourceError(
            f"{files[0]}: --labels {labels} is for ImageNet's validation tar, this one ({kind.kind}) has its classes"
            " inside"
        )
    return kind(files, class_names)


class TrainTar(TarSource):
    """`ILSVRC2012_img_train.tar`, or its class tars taken out: one tar per class, named after it.

    Ids ('n01440764/n01440764_10026.JPEG'), labels and order are those of the unpacked folder.
    """

    kind = "ImageNet tar"

    def _list(self, files: Sequence[str], class_names: list[str] | None) -> tuple[np.ndarray, list[str]]:
        classes: dict[str, list[tuple[str, int, int, int]]] = {}  # (file name, tar, offset, size)
        for index, tar in self.opened(files):
            if _WORDNET.fullmatch(stem := Path(tar.path).stem):
                self._list_class(classes, stem, index, tar, None)
                continue
            for member in tar.members():
                base = os.path.basename(member.name)
                where = f"{tar.path}:{member.name}"
                if base.lower().endswith(".tar"):
                    refuse_unless_file(member, where)
                    self._list_class(classes, base[: -len(".tar")], index, tar, member)
                elif is_image(base):
                    raise SourceError(
                        f"{where}: an image beside class tars; give files of one kind, training or validation"
                    )
                elif re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", base.lower()):
                    raise SourceError(f"{where}: a compressed class tar; decompress and pack again")
                else:
                    self.ignored += member.kind != "folder"
        names = sorted(classes)
        by_class = [sorted(classes[name]) for name in names]
        self.ids = [f"{name}/{row[0]}" for name, rows in zip(names, by_class, strict=True) for row in rows]
        self.rows = np.array([row[1:] for rows in by_class for row in rows], np.int64).reshape(-1, 3)
        labels = np.repeat(np.arange(len(names)), [len(rows) for rows in by_class])
        return reorder_classes(labels, names, class_names, self.root)

    def _list_class(self, classes: dict, name: str, index: int, tar: Tar, inner: Member | None) -> None:
        """Append the images of class tar `inner` (None: of `tar` itself) to classes[name]. index: the tar's, in
        `tars`."""
        images = classes.setdefault(name, [])
        before = len(images)
        for member in tar.members() if inner is None else tar.members(inner.name, inner.offset, inner.size):
            if is_image(member.name):
                refuse_unless_file(member, f"{tar.path}:{name}.tar:{member.name}")
                images.append((member.name.removeprefix(f"{name}/"), index, member.offset, member.size))
            else:
                self.ignored += member.kind != "folder"
        if len(images) == before:
            raise SourceError(f"{tar.path}{'' if inner is None else ':' + inner.name}: no images in this class tar")

    def origin(self, i: int) -> str:
        name, file = self.ids[i].split("/", 1)
        tar = self.tars[self.rows[i, 0]].path
        return f"{tar}:{file}" if Path(tar).stem == name else f"{tar}:{name}.tar:{file}"


class ValTar(TarSource):
    """`ILSVRC2012_img_val.tar`: a flat tar. The file `labels` holds its classes (see `read_val_labels`).

    Ids ('n01440764/ILSVRC2012_val_00000293.JPEG'), labels and order are those of the usual folder of class folders.
    """

    kind = "ImageNet tar"

    def _list(self, files: Sequence[str], class_names: list[str] | None, labels: Path) -> tuple[np.ndarray, list[str]]:
        images: list[tuple[str, int, int, int, str]] = []  # (file name, tar, offset, size, member)
        for index, tar in self.opened(files):
            for member in tar.members():
                if is_image(member.name):
                    refuse_unless_file(member, f"{tar.path}:{member.name}")
                    images.append((os.path.basename(member.name), index, member.offset, member.size, member.name))
                else:
                    self.ignored += member.kind != "folder"
        images.sort()
        for first, second in itertools.pairwise(images):
            if first[0] == second[0]:
                both = " and ".join(f"{self.tars[row[1]].path}:{row[4]} (at byte {row[2]})" for row in (first, second))
                raise SourceError(f"{both}: two images of one name; remove one")
        texts, names = read_val_labels(labels, [row[0] for row in images], self.root)
        numbers, class_names = label_classes(texts, class_names or names, lambda i: f"{labels}: {images[i][0]}")
        rows = sorted((class_names[label], *row) for label, row in zip(numbers.tolist(), images, strict=True))
        self.ids = [f"{name}/{file}" for name, file, *_ in rows]
        self._members = [row[5] for row in rows]
        label_of = {name: label for label, name in enumerate(class_names)}
        self.rows = np.array([row[2:5] for row in rows], np.int64).reshape(-1, 3)
        return np.array([label_of[row[0]] for row in rows], np.int64), class_names

    def origin(self, i: int) -> str:
        return f"{self.tars[self.rows[i, 0]].path}:{self._members[i]}"
