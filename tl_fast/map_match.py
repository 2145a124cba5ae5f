"""Which label map belongs to which image, when they come from different places: by class folder and file stem."""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from tl_fast.image_folder import EXTENSIONS
from tl_fast.labelmap import LabelMapError

_SUFFIXES = EXTENSIONS | {".pt"}
_WNID = re.compile(r"(.+)_(n\d{8})")  # Hugging Face's ImageNet has the class once more at the end of a name


def split_name(path: str) -> tuple[str, str]:
    """'train/n01440764/a.b.JPEG' → ('n01440764', 'a.b'): the folder it lies in ('' without one), the name without its one known suffix."""
    folder, _, name = path.rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    return folder.rpartition("/")[2], stem if stem and f"{dot}{suffix}".lower() in _SUFFIXES else name


def match_maps(
    names: Sequence[str], ids: Sequence[str], class_names: Sequence[str], labels: np.ndarray, where: Callable[[int], str]
) -> np.ndarray:
    """Place in `names` (paths of the maps, posix) of every sample's map, int64 `[len(ids)]`, −1 where there is none.

    A sample's map has its stem and lies in the folder that the sample itself lies in; else in the one named for its class,
    `class_names[labels[i]]`; else it is the only map of that stem in no other class's folder. Last, a trailing '_n01440764' is taken off the
    stem (and is one more folder to look in). where: how messages call a map.
    Raises LabelMapError when two maps fit one sample, or one map two samples.
    """
    in_folder: dict[str, int] = {}
    of_stem: dict[str, list[int]] = {}
    twice: dict[str, int] = {}
    folders = []
    for j, name in enumerate(names):
        folder, stem = split_name(name)
        folders.append(folder)
        key = f"{folder}/{stem}"
        if in_folder.setdefault(key, j) != j:
            twice[key] = j
    classes = set(class_names)

    def by_stem(i: int, stem: str, own: str) -> int:
        if not of_stem:
            for key, j in in_folder.items():
                of_stem.setdefault(key.partition("/")[2], []).append(j)
        fitting = [j for j in of_stem.get(stem, ()) if folders[j] == own or folders[j] not in classes]
        if len(fitting) > 1:
            raise LabelMapError(f"{ids[i]}: two label maps fit it, {where(fitting[0])} and {where(fitting[1])}; remove or rename one")
        return fitting[0] if fitting else -1

    def match(i: int, label: int, sample: str) -> int:
        folder, stem = split_name(sample)
        own = class_names[label] if 0 <= label < len(class_names) else ""
        parts = _WNID.fullmatch(stem)
        for name, places in ((stem, (folder, own)), (parts[1], (folder, own, parts[2])) if parts else (stem, ())):
            for place in places:
                if (j := in_folder.get(f"{place}/{name}", -1)) >= 0:
                    if f"{place}/{name}" in twice:
                        raise LabelMapError(f"{sample}: two label maps fit it, {where(j)} and {where(twice[f'{place}/{name}'])}; "
                                            "give the folder of one, or remove the other")
                    return j
            if places and (j := by_stem(i, name, own)) >= 0:
                return j
        return -1

    found = np.fromiter(map(match, range(len(ids)), labels, ids), np.int64, len(ids))
    refuse_shared(found, ids, where)
    return found


def refuse_shared(found: np.ndarray, ids: Sequence[str], where: Callable[[int], str]) -> None:
    """Raises LabelMapError when two samples have one map."""
    order = np.argsort(found, kind="stable")
    shared = np.flatnonzero((found[order][1:] == found[order][:-1]) & (found[order][1:] >= 0))
    if len(shared):
        first, second = order[shared[0]], order[shared[0] + 1]
        raise LabelMapError(f"{ids[first]} and {ids[second]}: the label map {where(int(found[first]))} fits both; rename one of them")
