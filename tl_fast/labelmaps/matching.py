"""Matches label maps with images by class folder and file stem, for maps that do not have the images' ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from tl_fast.labelmaps.format import LabelMapError
from tl_fast.sources.image_folder import EXTENSIONS

_SUFFIXES = EXTENSIONS | {".pt"}
_WNID = re.compile(r"(.+)_(n\d{8})")  # Hugging Face's ImageNet has the class once more at the end of a name


def split_name(path: str) -> tuple[str, str]:
    """'train/n01440764/a.b.JPEG' → ('n01440764', 'a.b'): its folder ('' without one), its name without the suffix.

    Only a suffix of an image or of a .pt file is taken off.
    """
    folder, _, name = path.rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    return folder.rpartition("/")[2], stem if stem and f"{dot}{suffix}".lower() in _SUFFIXES else name


def match_maps(
    names: Sequence[str],
    ids: Sequence[str],
    class_names: Sequence[str],
    labels: np.ndarray,
    where: Callable[[int], str],
) -> np.ndarray:
    """Index in `names` (paths of the maps, posix) of every sample's map, int64 `[len(ids)]`, −1 where there is none.

    A sample's map has the sample's stem. It lies in a folder of the same name as the sample's; else in the one named
    for the sample's class, `class_names[labels[i]]`; else it is the only map of that stem that lies in no class's
    folder. Where none fits, a trailing '_n01440764' is taken off the stem, and names one more folder to look in.
    where: how messages call a map.
    Raises LabelMapError when two maps fit one sample, or one map two samples.
    """
    keys = ["/".join(split_name(name)) for name in names]
    in_folder: dict[str, int] = {}
    twice: dict[str, int] = {}
    for j, key in enumerate(keys):
        if in_folder.setdefault(key, j) != j:
            twice[key] = j
    of_stem: dict[str, int] = {}
    # Further maps of a stem. Nearly every stem has one map, and a list for each would be slow and large.
    more_of_stem: dict[str, list[int]] = {}
    classes = set(class_names)

    def refuse(i: int, one: int, other: int) -> NoReturn:
        raise LabelMapError(f"{ids[i]}: two label maps fit it, {where(one)} and {where(other)}; remove or rename one")

    def match(i: int, stem: str, folders: Sequence[str]) -> int:
        for folder in folders:
            key = f"{folder}/{stem}"
            if (j := in_folder.get(key, -1)) >= 0:
                if key in twice:
                    refuse(i, j, twice[key])
                return j
        if not of_stem:
            for j, key in enumerate(keys):
                name = key.partition("/")[2]
                if of_stem.setdefault(name, j) != j:
                    more_of_stem.setdefault(name, []).append(j)
        if stem not in of_stem:
            return -1
        fitting = [j for j in (of_stem[stem], *more_of_stem.get(stem, ())) if keys[j].partition("/")[0] not in classes]
        if len(fitting) > 1:
            refuse(i, *fitting[:2])
        return fitting[0] if fitting else -1

    indices = np.full(len(ids), -1, np.int64)
    for i, label in enumerate(np.asarray(labels).tolist()):
        folder, stem = split_name(ids[i])
        own = class_names[label] if 0 <= label < len(class_names) else folder
        j = match(i, stem, (folder, own))
        if j < 0 and (parts := _WNID.fullmatch(stem)):
            j = match(i, parts[1], (folder, own, parts[2]))
        indices[i] = j
    refuse_shared(indices, ids, where)
    return indices


def refuse_shared(indices: np.ndarray, ids: Sequence[str], where: Callable[[int], str]) -> None:
    """Raise LabelMapError when two samples have one map. indices: of each sample's map, −1 for none."""
    order = np.argsort(indices, kind="stable")
    ordered = indices[order]
    shared = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0))
    if len(shared):
        first, second = order[shared[0]], order[shared[0] + 1]
        raise LabelMapError(
            f"{ids[first]} and {ids[second]}: the label map {where(int(indices[first]))} fits both; rename one of them"
        )
