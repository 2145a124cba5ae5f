"""What goes into one beton: which samples of a source, in which order, each with its label map; how much room they
take; and whether a finished beton is what would be made.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tl_fast.beton.layout import ALLOCATION, IMAGE, LABEL_MAP, BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.convert.encode import Sample, encode
from tl_fast.convert.write import Encoded
from tl_fast.labelmaps.published import PublishedMaps, open_label_maps
from tl_fast.labelmaps.store import LabelMapStore
from tl_fast.sources.rejects import reason_of
from tl_fast.sources.source import Source

MARGIN = 1.02  # of the space that is asked for: holes at page ends, and the estimate itself


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> Shard:
        """`3/8`, or `auto`: torchrun's RANK of WORLD_SIZE, or SLURM's array task or task. Raises BetonError."""
        if text == "auto":
            return cls._of_job(environment)
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise BetonError(f"--shard {text}: must be i/n with 0 <= i < n, or auto")
        return cls(int(index), int(count))

    @classmethod
    def _of_job(cls, environment: Mapping[str, str]) -> Shard:
        def number(name: str, default: str | None = None) -> int:
            text = environment.get(name, default)
            if text is None or not text.isdecimal():
                raise BetonError(f"--shard auto: the environment's {name} is {text!r}, no number; give i/n")
            return int(text)

        if {"RANK", "WORLD_SIZE"} <= environment.keys():
            words, index, count = "RANK of WORLD_SIZE", number("RANK"), number("WORLD_SIZE")
        elif {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"} <= environment.keys():
            task, count = number("SLURM_ARRAY_TASK_ID"), number("SLURM_ARRAY_TASK_COUNT")
            first, step = number("SLURM_ARRAY_TASK_MIN", "0"), max(number("SLURM_ARRAY_TASK_STEP", "1"), 1)
            last = number("SLURM_ARRAY_TASK_MAX", str(first + step * (count - 1)))
            if (last - first) // step + 1 != count or (task - first) % step:
                raise BetonError(
                    f"--shard auto: SLURM's array of {count} tasks from {first} to {last} has no even steps of {step},"
                    f" so which shard is task {task}'s is not known; give i/n, or an array as 0-{count - 1}"
                )
            words, index = f"SLURM's array task {task}", (task - first) // step
        elif {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys():
            words, index, count = "SLURM_PROCID of SLURM_NTASKS", number("SLURM_PROCID"), number("SLURM_NTASKS")
        else:
            raise BetonError(
                "--shard auto: neither torchrun's RANK and WORLD_SIZE nor SLURM's variables are set; give i/n"
            )
        if not 0 <= index < count:
            raise BetonError(f"--shard auto: {words} would be shard {index} of {count}; give i/n with 0 <= i < n")
        return cls(index, count)

    def path(self, out: Path) -> Path:
        """`train.beton` → `train-003-of-008.beton`."""
        return out.with_name(f"{out.stem}-{self.index:03d}-of-{self.count:03d}{out.suffix}")

    def cut(self, order: np.ndarray) -> np.ndarray:
        """This part of `order`: a contiguous piece, as large as the others or by one smaller."""
        return order[len(order) * self.index // self.count : len(order) * (self.index + 1) // self.count]


class Conversion:
    """The samples of one beton as `write_beton` takes them: sized, iterable; images and label maps are read when a
    worker asks for them.

    places: int64 `[n]`, indices into `source`. map_places: int64 `[n]`, indices into `maps`, -1 where an image has
    none; or None.
    """

    def __init__(self, source: Source, maps: LabelMapStore | PublishedMaps | None, places: np.ndarray) -> None:
        self.source, self.maps, self.places = source, maps, places
        self.refused = {} if maps is None else maps.rejects  # place among the maps -> annotation's reason
        self._stamps = source.stamps, None if maps is None else maps.stamps  # made when asked for
        self.map_places: np.ndarray | None = None
        if maps is not None:
            self.map_places = maps.locate(
                [source.ids[i] for i in places.tolist()], source.class_names, source.labels[places]
            )

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
        # An image that annotation rejected has no label map, whatever it looks like now: its reason comes first.
        image = label_map if label_map is not None and j in self.refused else functools.partial(source.read, i)
        return Sample(source.ids[i], int(source.labels[i]), image, label_map, source.origin(i), stamp.hex())

    @property
    def decodes_groups(self) -> bool:
        """As the source's: `write_beton` reads these in threads."""
        return self.source.decodes_groups

    @property
    def without_map(self) -> np.ndarray:
        """Indices into the source of the images that have no label map, int64."""
        if self.map_places is None:
            return self.places[:0]
        return self.places[(self.map_places < 0) | np.isin(self.map_places, list(self.refused))]

    def why_without(self, i: int) -> str:
        """Why image i of the source, one of `without_map`, has no label map."""
        j = int(self.map_places[np.flatnonzero(self.places == i)[0]])
        return (
            f"has no label map in {self.maps.path}"
            if j < 0
            else f"has no label map, as annotation rejected it: {self.refused[j]}"
        )

    def inputs(self) -> dict[str, str | None]:
        """Digests of what the samples are made from: their ids and labels, in order; sizes and times of the images, and
        of the label maps.
        """
        ids = "\n".join(self.source.ids[i] for i in self.places.tolist()).encode("utf-8", "surrogateescape")
        maps = None
        if self.map_places is not None:
            maps = _digest(self._stamps[1][self.map_places], self.map_places < 0)
        return {
            "ids": _digest(ids),
            "labels": _digest(self.source.labels[self.places]),
            "images": _digest(self._stamps[0][self.places]),
            "label_maps": maps,
        }


def _digest(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part))
    return digest.hexdigest()


_INPUTS = {
    "ids": "the images' names or their order",
    "labels": "the images' classes",
    "images": "the images' sizes or times",
    "label_maps": "the label maps, their sizes or times",
}


def difference(
    out: Path,
    conversion: Conversion,
    *,
    record: dict[str, Any],
    annotator: dict[str, Any] | None,
    max_rejects: int | None,
) -> str | None:
    """What the finished beton `out` has first that these inputs and options would not give, in words; None: it is what
    they give.

    record: as `write_beton` is told in `conversion`. max_rejects: how many samples may have been left out; None: any
    number. Raises BetonError when `out` is no beton, or damaged.
    """
    source, spec = conversion.source, None if conversion.maps is None else conversion.maps.spec
    with BetonReader(out) as reader:
        then = reader.conversion or {}
        if "inputs" not in then:
            return "it does not say what it was made from (an earlier version of tl_fast wrote it, or another program)"
        if reader.class_names != list(source.class_names):
            pairs = zip(reader.class_names, source.class_names, strict=False)
            first = next((f"class {i} was {a!r} and is now {b!r}" for i, (a, b) in enumerate(pairs) if a != b), None)
            counts = f"it has {len(reader.class_names)}, now there are {len(source.class_names)}"
            return f"its classes are others: {first or counts}"
        if (reader.spec is None) != (spec is None):
            return f"it was made with{'out' if reader.spec is None else ''} label maps"
        if reader.spec != spec:
            return f"its label maps were {reader.spec} and are now {spec}"
        for key, before, now in _changed(reader.annotator, annotator):
            return f"the label maps' {key} was {before!s:.100} and is now {now!s:.100}"
        for key, before, now in _changed(then, record, "inputs", "rejected"):
            return f"{key} was {before} and is now {now}"
        for key, _, _ in _changed(then["inputs"], record["inputs"]):
            return f"{_INPUTS[key]} have changed since it was made{_which(reader, conversion) if key == 'ids' else ''}"
        if max_rejects is not None and then.get("rejected", 0) > max_rejects:
            return f"{then['rejected']} samples were left out of it, {max_rejects} may be"
    return None


def _changed(before: dict[str, Any] | None, now: dict[str, Any] | None, *apart: str) -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value now) of all keys with different values, but for the keys `apart`."""
    before, now = before or {}, now or {}
    for key in [*now, *(key for key in before if key not in now)]:
        if key not in apart and before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def _which(reader: BetonReader, conversion: Conversion) -> str:
    """The first sample that is new or gone, in words; nothing where only the order differs."""
    ids = [conversion.source.ids[i] for i in conversion.places.tolist()]
    now = set(ids)
    if gone := next((name for name in reader.source_ids if name not in now), None):
        return f": {gone} is no longer there"
    before = set(reader.source_ids)
    new = [name for name in ids if name not in before]
    return f": {new[0]} is new" if len(new) > (reader.conversion or {}).get("rejected", 0) else ""


def open_maps(path: Path, extent: str | None, source: Source, exif: str = "ignore") -> LabelMapStore | PublishedMaps:
    """Open the label maps of `source`, whose images' EXIF orientations `exif` (ignore or apply) settles.

    Raises BetonError unless they are of its classes and of images of the same orientation, LabelMapError when they
    cannot be used.
    """
    maps = open_label_maps(path, extent=extent, num_classes=len(source.class_names))
    try:
        _check_maps(maps, path, source, exif)
    except BaseException:
        maps.close()
        raise
    return maps


def _check_maps(maps: LabelMapStore | PublishedMaps, path: Path, source: Source, exif: str) -> None:
    if (theirs := maps.manifest.get("exif", "ignore")) != exif:  # stores of before the option ignored orientations
        raise BetonError(
            f"{path}: its label maps were made with --exif {theirs}, the images are to be packed with --exif {exif}, so"
            f" a turned photo and its map would not fit; pack with --exif {theirs}, or annotate again"
        )
    remedy = (
        "token targets and labels must be of the same classes: annotate this data set with --classes (keep the logits"
        " of its classes) or --fit-head (a head for them), or name all classes of the label maps with --class-names"
    )
    if maps.spec.num_classes != len(source.class_names):
        raise BetonError(
            f"{path}: its label maps know {maps.spec.num_classes} classes, {source.root} has {len(source.class_names)};"
            f" {remedy}"
        )
    if maps.class_names is not None and list(maps.class_names) != list(source.class_names):
        i, (theirs, ours) = next(
            (i, pair)
            for i, pair in enumerate(zip(maps.class_names, source.class_names, strict=True))
            if pair[0] != pair[1]
        )
        raise BetonError(f"{path}: its class {i} is {theirs!r}, that of {source.root} is {ours!r}; {remedy}")
    if isinstance(maps, LabelMapStore) and maps.missing_parts:
        raise BetonError(
            f"{path}: {len(maps.missing_parts)} parts are missing ({maps.missing_parts[0]} first); run the same"
            " tl_fast.annotate command again to finish it"
        )


def annotator_record(maps: LabelMapStore | PublishedMaps | None) -> dict[str, Any] | None:
    """What the manifest says about how the maps were made."""
    known_elsewhere = {"class_names", "num_samples", "complete", "spec", "exif"}
    return None if maps is None else {key: value for key, value in maps.manifest.items() if key not in known_elsewhere}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a conversion will do, from `tried` samples: how many of them got which `actions`; `problems` are those that
    would be rejected.

    size: bytes of the file. seconds: on one core.
    """

    tried: int
    actions: Counter[str]
    problems: list[str]
    size: int
    seconds: float


def estimate(
    conversion: Conversion,
    *,
    max_resolution: int | None,
    quality: int,
    decode_check: bool,
    row_index: bool = False,
    exif: str = "ignore",
    tries: int = 32,
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
        result = encode(sample, spec, max_resolution, quality, decode_check, row_index, exif)
        if isinstance(result, Encoded):
            actions[result.image.action] += 1
            actions["stripped"] += result.image.stripped > 0
            actions["rotated"] += result.image.rotated
            read += int(conversion.source.sizes[conversion.places[at]])
            written += sum(map(len, result.image.parts))
        else:
            problems.append(f"{sample.name}: {reason_of(result)}")
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
            f"{path}: needs about {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free; free some, choose another"
            " folder, limit --max-resolution, or give --no-space-check if you know better"
        )
