"""WebDataset shards: tars in which `KEY.jpg` and `KEY.cls`, next to each other, are one sample."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tl_fast.sources.source import SourceError, label_classes, names_beside
from tl_fast.sources.tar import Member, Tar
from tl_fast.sources.tar_source import TarSource, refuse_unless_file

IMAGES = ("jpg", "jpeg", "png", "webp")
_MAX_CLASS_BYTES = 1024


def split_name(name: str) -> tuple[str, str]:
    """A member's key and lower-case extension, split at the first dot of the base name, as webdataset does.

    Both are '' for a name that lacks one of them.
    """
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem, extension.lower()) if stem and extension else ("", "")


class WebDatasetTars(TarSource):
    """Shards in the order given, samples in the order of the shard.

    Ids are '<shard's stem>/<key>.<ext>'. The stem makes them unique, because keys often begin anew in each shard. The
    key comes last, because label maps are matched by its last part (and its folder, where it has one).
    Classes: `cls` members, ASCII whole numbers or names.
    """

    kind = "WebDataset"

    def _list(self, files: Sequence[str], class_names: list[str] | None) -> tuple[np.ndarray, list[str]]:
        rows, classes = array("q"), []
        stems: dict[str, str] = {}
        for index, tar in self.opened(files):
            stem = Path(tar.path).stem
            if (other := stems.setdefault(stem, tar.path)) != tar.path:
                raise SourceError(
                    f"{other} and {tar.path}: shards of one name, their samples' ids would be the same; rename one"
                )
            for key, image, text in self._samples(tar):
                self.ids.append(f"{stem}/{key}.{image.name.rsplit('/', 1)[-1].partition('.')[2]}")
                rows.extend((index, image.offset, image.size))
                classes.append(text)
        self.rows = np.frombuffer(rows, np.int64).reshape(-1, 3)
        return label_classes(classes, class_names or names_beside(files[0]), self.origin)

    def _samples(self, tar: Tar) -> Iterator[tuple[str, Member, str]]:
        """(key, image, class as text) of each sample of a shard."""
        for key, members in self._groups(tar):
            parts: dict[str, Member] = {}
            for extension, member in members:
                part = "image" if extension in IMAGES else extension
                if part not in ("image", "cls"):
                    self.ignored += 1
                    continue
                refuse_unless_file(member, f"{tar.path}:{member.name}")
                if part in parts:
                    parts_name = "images" if part == "image" else "classes"
                    raise SourceError(
                        f"{tar.path}: sample {key!a} has two {parts_name} ({parts[part].name!a} and {member.name!a});"
                        " repack it"
                    )
                parts[part] = member
            dotted = any(extension.rpartition(".")[2] in (*IMAGES, "cls") for extension, _ in members)
            if len(parts) == 2:
                yield key, parts["image"], self._class(tar, parts["cls"])
            elif parts or dotted:  # a README, say, is neither
                missing = "cls" if "image" in parts else f"image ({', '.join(IMAGES)})"
                hint = ""
                if dotted and not parts:
                    hint = "; a key ends at the first dot of the name, so it may have none itself"
                raise SourceError(
                    f"{tar.path}: sample {key!a} has no {missing} member (but {members[0][1].name!a}){hint}; repack it"
                )

    def _groups(self, tar: Tar) -> Iterator[tuple[str, list[tuple[str, Member]]]]:
        """(key, its members with their extensions), neighbours as one. Raises SourceError for a key that returns."""
        done: set[str] = set()
        key, members = "", []
        for member in tar.members():
            member_key, extension = ("", "") if member.kind == "folder" else split_name(member.name)
            if not member_key:
                self.ignored += member.kind != "folder"
                continue
            if member_key != key:
                if members:
                    yield key, members
                done.add(key)
                if member_key in done:
                    raise SourceError(
                        f"{tar.path}: sample {member_key!a} returns ({member.name!a}) after others; members of one key"
                        " must lie together"
                    )
                key, members = member_key, []
            members.append((extension, member))
        if members:
            yield key, members

    @staticmethod
    def _class(tar: Tar, member: Member) -> str:
        """The class that a `cls` member holds, as text."""
        if not 0 < member.size <= _MAX_CLASS_BYTES:
            raise SourceError(
                f"{tar.path}:{member.name}: {member.size} bytes are no class; a number or a name is expected"
            )
        try:
            text = tar.read(member.offset, member.size).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{tar.path}:{member.name}: is no text ({error}); a number or a name is expected"
            ) from error
        if not text:
            raise SourceError(f"{tar.path}:{member.name}: is empty; a number or a name is expected")
        return text

    def origin(self, i: int) -> str:
        tar = self.tars[self.rows[i, 0]].path
        return f"{tar}:{self.ids[i].removeprefix(Path(tar).stem + '/')}"
