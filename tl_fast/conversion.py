"""What goes into one beton: which samples of a source, in which order, each with its label map, and how much room they take."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tl_fast.beton_layout import ALLOCATION, IMAGE, LABEL_MAP, BetonError
from tl_fast.beton_write import Encoded, Sample, encode, reason
from tl_fast.labelmap import LabelMapStore
from tl_fast.published_maps import PublishedMaps, open_label_maps
from tl_fast.sources import Source

MARGIN = 1.02  # of the space that is asked for: holes at page ends, and the estimate itself


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> Shard:
        """`3/8`, or `auto`: torchrun's RANK of WORLD_SIZE, or SLURM's task or array task. Raises BetonError."""
        if text == "auto":
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
            for index, count, start in (
                ("RANK", "WORLD_SIZE", 0),
                ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", first),
                ("SLURM_PROCID", "SLURM_NTASKS", 0),
            ):
                if index in environment and count in environment:
                    return cls(int(environment[index]) - start, int(environment[count]))
            raise BetonError("--shard auto: neither torchrun's RANK and WORLD_SIZE nor SLURM's variables are set; give i/n")
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise BetonError(f"--shard {text}: must be i/n with 0 <= i < n, or auto")
        return cls(int(index), int(count))

    def path(self, out: Path) -> Path:
        """`train.beton` → `train-003-of-008.beton`."""
        return out.with_name(f"{out.stem}-{self.index:03d}-of-{self.count:03d}{out.suffix}")

    def cut(self, order: np.ndarray) -> np.ndarray:
        """This part of `order`: a contiguous piece, as large as the others or by one smaller."""
        return order[len(order) * self.index // self.count : len(order) * (self.index + 1) // self.count]


class Conversion:
    """The samples of one beton as `write_beton` takes them: sized, iterable; images and label maps are read when a worker asks for them.

    places: int64 `[n]`, indices into `source`. map_places: int64 `[n]`, indices into `maps`, -1 where an image has none; or None.
    """

    def __init__(self, source: Source, maps: LabelMapStore | PublishedMaps | None, places: np.ndarray) -> None:
        self.source, self.maps, self.places = source, maps, places
        self._stamps = source.stamps, None if maps is None else maps.stamps  # made when asked for
        self.map_places: np.ndarray | None = None
        if maps is not None:
            self.map_places = maps.locate([source.ids[i] for i in places.tolist()], source.class_names, source.labels[places])

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Sample]:
        return (self[at] for at in range(len(self)))

    def __getitem__(self, at: int) -> Sample:
        i, label_map = int(self.places[at]), None
        stamp = self._stamps[0][i].tobytes()
        if self.map_places is not None and (j := int(self.map_places[at])) >= 0:
            label_map = functools.partial(self.maps.record, j)
            stamp += self._stamps[1][j].tobytes()
        source = self.source
        return Sample(source.ids[i], int(source.labels[i]), functools.partial(source.read, i), label_map, source.origin(i), stamp.hex())

    @property
    def decodes_groups(self) -> bool:
        """As the source's: `write_beton` reads these in threads."""
        return self.source.decodes_groups

    @property
    def without_map(self) -> np.ndarray:
        """Indices into the source of the images that have no label map, int64."""
        return self.places[:0] if self.map_places is None else self.places[self.map_places < 0]

    def same_as(self, ids: list[str], rejected: set[str]) -> bool:
        """True when these are the samples, `rejected` ones left out."""
        return ids == [self.source.ids[i] for i in self.places.tolist() if self.source.ids[i] not in rejected]


def open_maps(path: Path, extent: str | None, source: Source) -> LabelMapStore | PublishedMaps:
    """Open the label maps of `source`. Raises BetonError unless they are of its classes, LabelMapError when they cannot be used."""
    maps = open_label_maps(path, extent=extent, num_classes=len(source.class_names))
    remedy = (
        "token targets and labels must be of the same classes: annotate this data set with --classes (keep the logits of its classes) or "
        "--fit-head (a head for them), or name all classes of the label maps with --class-names"
    )
    if maps.spec.num_classes != len(source.class_names):
        raise BetonError(
            f"{path}: its label maps know {maps.spec.num_classes} classes, {source.root} has {len(source.class_names)}; {remedy}"
        )
    if maps.class_names is not None and list(maps.class_names) != list(source.class_names):
        i, (theirs, ours) = next((i, pair) for i, pair in enumerate(zip(maps.class_names, source.class_names, strict=True)) if pair[0] != pair[1])
        raise BetonError(f"{path}: its class {i} is {theirs!r}, that of {source.root} is {ours!r}; {remedy}")
    if isinstance(maps, LabelMapStore) and maps.missing_parts:
        raise BetonError(
            f"{path}: {len(maps.missing_parts)} parts are missing ({maps.missing_parts[0]} first); run the same tl_fast.annotate command "
            "again to finish it"
        )
    return maps


def annotator_record(maps: LabelMapStore | PublishedMaps | None) -> dict[str, Any] | None:
    """What the manifest says about how the maps were made."""
    known_elsewhere = {"class_names", "num_samples", "complete", "spec"}
    return None if maps is None else {key: value for key, value in maps.manifest.items() if key not in known_elsewhere}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a conversion will do, from `tried` samples: how many of them got which `actions`; `problems` are those that would be rejected.

    size: bytes of the file. seconds: on one core.
    """

    tried: int
    actions: Counter[str]
    problems: list[str]
    size: int
    seconds: float


def estimate(
    conversion: Conversion, *, max_resolution: int | None, quality: int, decode_check: bool, row_index: bool = False, tries: int = 32
) -> Estimate:
    """Convert `tries` samples, evenly spread, to nowhere, and scale by the sizes of the inputs."""
    spec = None if conversion.maps is None else conversion.maps.spec
    tried = np.unique(np.linspace(0, len(conversion) - 1, tries).astype(int)).tolist()
    actions: Counter[str] = Counter()
    problems, read, written, started = [], 0, 0, time.perf_counter()
    for at in sorted(tried, key=conversion.places.__getitem__):
        # What was decoded beside the samples before would stay in memory during the conversion.
        conversion.source.release(but_for=int(conversion.places[at]))
        sample = conversion[at]
        result = encode(sample, spec, max_resolution, quality, decode_check, row_index)
        if isinstance(result, Encoded):
            actions[result.image.action] += 1
            actions["stripped"] += result.image.stripped > 0
            actions["rotated"] += result.image.rotated
            read += int(conversion.source.sizes[conversion.places[at]])
            written += sum(map(len, result.image.parts))
        else:
            problems.append(f"{sample.name}: {reason(result)}")
    seconds = (time.perf_counter() - started) / len(tried) * len(conversion)
    conversion.source.release()
    images = int(conversion.source.sizes[conversion.places].sum()) * (written / read if read else 1)
    maps = 0 if spec is None else spec.dtype.itemsize + LABEL_MAP.itemsize + ALLOCATION.itemsize
    ids = sum(len(conversion.source.ids[i]) for i in conversion.places.tolist())
    tables = len(conversion) * (maps + IMAGE.itemsize + ALLOCATION.itemsize + 16 + 4) + ids
    return Estimate(len(tried), actions, problems, int(images + tables), seconds)


def free_space(path: Path) -> int:
    """Bytes that can be written beside `path`, whose folders may not exist yet."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_space(path: Path, size: int, there: int = 0) -> None:
    """Raises BetonError unless a file of `size` bytes fits; `there`: bytes of it that an earlier run left."""
    needed, free = int(size * MARGIN) - there, free_space(path)
    if needed > free:
        raise BetonError(
            f"{path}: needs about {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free; free some, choose another folder, limit "
            "--max-resolution, or give --no-space-check if you know better"
        )
