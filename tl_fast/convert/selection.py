"""What goes into one beton: which samples of a source, in which order, each with its label map and mask; and whether a
finished beton is what would be made.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tl_fast.beton.layout import BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.convert.encode import Sample
from tl_fast.labelmaps.published import PublishedMaps, open_label_maps
from tl_fast.labelmaps.store import LabelMapStore
from tl_fast.masks.folder import MaskFolder
from tl_fast.sources.source import Source


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
    """The samples of one beton as `write_beton` takes them, with a length, indexable, iterable; images, label maps and
    masks are read when a worker asks for them.

    indices: int64 `[n]`, indices into `source`. map_indices, mask_indices: int64 `[n]`, indices into `maps` and
    `masks`, -1 where an image has none; or None.
    """

    def __init__(
        self,
        source: Source,
        maps: LabelMapStore | PublishedMaps | None,
        indices: np.ndarray,
        masks: MaskFolder | None = None,
    ) -> None:
        self.source, self.maps, self.indices, self.masks = source, maps, indices, masks
        self.refused = {} if maps is None else maps.rejects  # index into the maps -> annotation's reason
        self.num_planes: int | None = None  # of the samples, so many are stored as planes; None: as the options say
        self._stamps = source.stamps, None if maps is None else maps.stamps  # made when asked for
        self.map_indices = self.mask_indices = None
        ids = [source.ids[i] for i in indices.tolist()]
        if maps is not None:
            self.map_indices = maps.locate(ids, source.class_names, source.labels[indices])
        if masks is not None:
            self.mask_indices = masks.locate(ids)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Sample:
        source, i = self.source, int(self.indices[number])
        image, label_map, mask = functools.partial(source.read, i), None, None
        stamp = self._stamps[0][i].tobytes()
        if self.map_indices is not None and (j := int(self.map_indices[number])) >= 0:
            label_map = functools.partial(self.maps.record, j)
            stamp += self._stamps[1][j].tobytes()
            if j in self.refused:  # reading its map raises annotation's reason, whatever the image looks like now
                image = label_map
        if self.mask_indices is not None and (j := int(self.mask_indices[number])) >= 0:
            mask = functools.partial(self.masks.read, j)
            stamp += self.masks.stamps[j].tobytes()
        label, origin = int(source.labels[i]), source.origin(i)
        planes = self.as_planes(number)
        return Sample(source.ids[i], label, image, label_map, origin, stamp.hex(), mask, planes)

    def as_planes(self, number: int) -> bool | None:
        """Whether sample `number` is stored as planes: `num_planes` of them are, evenly spread; None: as the options
        say."""
        if self.num_planes is None:
            return None
        return (number + 1) * self.num_planes // len(self) > number * self.num_planes // len(self)

    @property
    def decodes_groups(self) -> bool:
        """Whether reading one image decodes others too, as the source says; `write_beton` then reads in threads."""
        return self.source.decodes_groups

    @property
    def without_map(self) -> np.ndarray:
        """Indices into the source of the images that have no label map, int64."""
        if self.map_indices is None:
            return self.indices[:0]
        return self.indices[(self.map_indices < 0) | np.isin(self.map_indices, list(self.refused))]

    @property
    def without_mask(self) -> np.ndarray:
        """Indices into the source of the images that have no mask, int64."""
        return self.indices[:0] if self.mask_indices is None else self.indices[self.mask_indices < 0]

    def why_without(self, i: int) -> str:
        """Why image i of the source, one of `without_map`, has no label map."""
        j = int(self.map_indices[np.flatnonzero(self.indices == i)[0]])
        return (
            f"has no label map in {self.maps.path}"
            if j < 0
            else f"has no label map, as annotation rejected it: {self.refused[j]}"
        )

    def inputs(self) -> dict[str, str | None]:
        """Digests of the inputs: the samples' ids and labels, in order; sizes and times of the images and of the label
        maps; where there are masks, of these too, and of the meaning of their values.
        """
        ids = "\n".join(self.source.ids[i] for i in self.indices.tolist()).encode("utf-8", "surrogateescape")
        maps = None
        if self.map_indices is not None:
            maps = _digest(self._stamps[1][self.map_indices], self.map_indices < 0)
        masks = {}
        if self.mask_indices is not None:
            stamps = self.masks.stamps[self.mask_indices]
            masks = {"masks": _digest(stamps, self.mask_indices < 0, self.masks.classes.values)}
        return {
            "ids": _digest(ids),
            "labels": _digest(self.source.labels[self.indices]),
            "images": _digest(self._stamps[0][self.indices]),
            "label_maps": maps,
            **masks,
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
    "masks": "the masks, their sizes or times, or which values are which classes,",
}


def difference(
    out: Path,
    conversion: Conversion,
    *,
    record: dict[str, Any],
    annotator: dict[str, Any] | None,
    max_rejects: int | None,
) -> str | None:
    """The first difference, in words, between the finished beton `out` and what these inputs and options would give;
    None: there is none.

    record: what `write_beton` gets as `conversion`. max_rejects: how many samples may have been left out; None: any
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
        masks = None if conversion.masks is None else conversion.masks.spec
        if (reader.mask_spec is None) != (masks is None):
            return f"it was made with{'out' if reader.mask_spec is None else ''} masks"
        if reader.mask_spec != masks:
            return f"its masks were of {reader.mask_spec} and are now of {masks}, or have other names or colours"
        for key, before, now in _changed(reader.annotator, annotator):
            return f"the label maps' {key} was {before!s:.100} and is now {now!s:.100}"
        for key, before, now in _changed(then, record, "inputs", "rejected", "planes"):
            return f"{key} was {before} and is now {now}"
        for key, _, _ in _changed(then["inputs"], record["inputs"]):
            which = _first_changed(reader, conversion) if key == "ids" else ""
            return f"{_INPUTS[key]} have changed since it was made{which}"
        if max_rejects is not None and then.get("rejected", 0) > max_rejects:
            return f"{then['rejected']} samples were left out of it, {max_rejects} may be"
    return None


def _changed(before: dict[str, Any] | None, now: dict[str, Any] | None, *apart: str) -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value now) of all keys whose values differ, but for the keys `apart`."""
    before, now = before or {}, now or {}
    for key in [*now, *(key for key in before if key not in now)]:
        if key not in apart and before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def _first_changed(reader: BetonReader, conversion: Conversion) -> str:
    """The first sample that is new or gone, in words; '' where only the order differs."""
    ids = [conversion.source.ids[i] for i in conversion.indices.tolist()]
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
