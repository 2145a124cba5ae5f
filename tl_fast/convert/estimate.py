"""What a conversion will take: bytes on the disk, and time."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np

from tl_fast.beton.layout import ALLOCATION, BYTES, IMAGE, LABEL_MAP, PLANES, BetonError
from tl_fast.convert.data_file import Encoded
from tl_fast.convert.encode import encode, stored_as_planes
from tl_fast.convert.options import EncodeOptions
from tl_fast.convert.selection import Conversion
from tl_fast.sources.rejects import reason_of

BUDGET_TRIES, CHOICE_TRIES = 256, 64
MARGIN = 1.02  # of the space that is asked for: holes at page ends, and the estimate itself


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a conversion will do, judged by `tried` samples.

    actions: how many of the tried got which; problems: those of them that would be rejected, and why. size: bytes of
    the file. seconds: on one core.
    """

    tried: int
    actions: Counter[str]
    problems: list[str]
    size: int
    seconds: float


def estimate(conversion: Conversion, options: EncodeOptions, tries: int = 32) -> Estimate:
    """Convert `tries` samples, evenly spread, to nowhere, and scale by the sizes of the inputs."""
    spec = None if conversion.maps is None else conversion.maps.spec
    masks = None if conversion.masks is None else conversion.masks.spec
    tried = np.unique(np.linspace(0, len(conversion) - 1, tries).astype(int)).tolist()
    actions: Counter[str] = Counter()
    jpegs_read, jpegs_written, planes_sizes, mask_sizes = 0, 0, [], []
    problems, started = [], time.perf_counter()
    for number in sorted(tried, key=conversion.indices.__getitem__):
        # What was decoded beside earlier samples would stay in memory during the conversion.
        conversion.source.release(but_for=int(conversion.indices[number]))
        sample = conversion[number]
        result = encode(sample, spec, masks, options)
        if isinstance(result, Encoded):
            actions[result.image.action] += 1
            actions["stripped"] += result.image.stripped > 0
            actions["rotated"] += result.image.rotated
            size = sum(map(len, result.image.parts))
            if result.image.mode == PLANES:
                actions["stored as planes"] += 1
                planes_sizes.append(size)
            else:
                jpegs_read += int(conversion.source.sizes[conversion.indices[number]])
                jpegs_written += size
            mask_sizes += [len(result.payloads[-1][0])] if masks is not None else []
        else:
            problems.append(f"{sample.name}: {reason_of(result)}")
    seconds = (time.perf_counter() - started) / len(tried) * len(conversion)
    conversion.source.release()
    as_planes = np.array([stored_as_planes(conversion.as_planes(i), options) for i in range(len(conversion))])
    images = int(conversion.source.sizes[conversion.indices[~as_planes]].sum())
    images *= jpegs_written / jpegs_read if jpegs_read else 1
    images += int(as_planes.sum()) * (sum(planes_sizes) / len(planes_sizes) if planes_sizes else 0)
    payloads = 0 if spec is None else spec.dtype.itemsize + LABEL_MAP.itemsize + ALLOCATION.itemsize
    if masks is not None:
        payloads += sum(mask_sizes) / max(len(mask_sizes), 1) + BYTES.itemsize + ALLOCATION.itemsize
    ids = sum(len(conversion.source.ids[i]) for i in conversion.indices.tolist())
    tables = len(conversion) * (payloads + IMAGE.itemsize + ALLOCATION.itemsize + 16 + 4) + ids
    return Estimate(len(tried), actions, problems, int(images + tables), seconds)


def choices(conversion: Conversion, options: EncodeOptions) -> dict[str, int]:
    """What the file would take, in bytes, by how the images were stored, judged by CHOICE_TRIES samples."""
    jpegs, planes = options.as_jpegs(), options.as_planes()
    ways = {
        "JPEGs": (jpegs, None),
        "JPEGs, short side 256": (jpegs, 256),
        "planes, short side 256": (planes, 256),
        "planes": (planes, None),
    }
    return {
        name: estimate(conversion, dataclasses.replace(way, short_side=short_side), CHOICE_TRIES).size
        for name, (way, short_side) in ways.items()
    }


def planes_within(budget: float, conversion: Conversion, options: EncodeOptions) -> int:
    """How many of the samples may be planes, the others JPEGs, so that the file takes `budget` bytes at most.

    Judged by BUDGET_TRIES samples, each encoded both ways; so the same for the same inputs and options. Raises
    BetonError where JPEGs alone take more.
    """
    ways = (options.as_jpegs(), options.as_planes())
    jpegs, planes = (MARGIN * estimate(conversion, way, BUDGET_TRIES).size for way in ways)
    if jpegs > budget:
        raise BetonError(
            f"--budget-gb {options.budget_gb:g}: as JPEGs alone the file takes about {jpegs / 1e9:,.3g} of"
            f" {budget / 1e9:,.3g} GB; give more, or shrink the images with --short-side"
        )
    return len(conversion) if planes <= budget else int(len(conversion) * (budget - jpegs) / (planes - jpegs))


def free_space(path: Path) -> int:
    """Bytes that can be written beside `path`, whose folders may not exist yet."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_space(path: Path, size: int, done: int = 0) -> None:
    """Raises BetonError unless a file of `size` bytes fits; `done`: bytes of it that an earlier run left."""
    needed, free = int(size * MARGIN) - done, free_space(path)
    if needed > free:
        raise BetonError(
            f"{path}: needs about {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free; free some, choose another"
            " folder, limit --short-side, or give --no-space-check if you know better"
        )
