"""Small betons for tests: images in memory, label maps drawn or given, names by number."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tl_fast.convert.encode import Sample
from tl_fast.convert.write import write_beton
from tl_fast.labelmaps.format import MapSpec, pack
from tl_fast.masks.format import MaskSpec


def random_maps(count: int, spec: MapSpec, seed: int = 0) -> list[np.void]:
    """`count` packed label maps: in every cell k different classes, drawn evenly, with scores from 0 to 9."""
    rng, records = np.random.default_rng(seed), []
    for _ in range(count):
        classes = np.argsort(rng.random((spec.num_classes, spec.height, spec.width)), axis=0)[: spec.k]
        records.append(pack(classes.astype(np.uint16), rng.uniform(0, 9, classes.shape).astype(np.float32), spec))
    return records


def polygon_mask(height: int, width: int, num_classes: int, regions: int = 6, seed: int = 0) -> np.ndarray:
    """A mask, uint8 [H, W]: polygons over one another on a ground, the last one of 255, unlabelled."""
    rng = np.random.default_rng(seed)
    image = Image.new("L", (width, height), int(rng.integers(num_classes)))
    for region in range(regions):
        corners = int(rng.integers(3, 20))
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
        radii = rng.uniform(0.1, 0.4) * min(height, width) * rng.uniform(0.6, 1.2, corners)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None] + rng.uniform(0, (width, height))
        fill = 255 if region == regions - 1 else int(rng.integers(num_classes))
        ImageDraw.Draw(image).polygon([tuple(point) for point in points.tolist()], fill=fill)
    return np.array(image)


def write(
    path: Path,
    images: Sequence[bytes],
    records: Sequence[np.void] | None = None,
    spec: MapSpec | None = None,
    *,
    class_names: list[str] | None = None,
    ids: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    as_planes: Sequence[bool | None] | None = None,
    **options,
) -> Path:
    """Write a beton of encoded images and return its path; skips the test where simplejpeg is not installed.

    records: a packed label map an image; drawn by `random_maps` where there is a `spec` alone. class_names: `class 0`
    and so on, as many as the spec has, or 4. ids: `image-0.jpg` and so on. labels: the classes in turn. as_planes:
    which images become YUV 4:2:0 planes. `options` are `write_beton`'s.
    """
    pytest.importorskip("simplejpeg", reason="simplejpeg, which writing a beton needs, is not installed")
    class_names = class_names or [f"class {c}" for c in range(spec.num_classes if spec else 4)]
    ids = ids or [f"image-{i}.jpg" for i in range(len(images))]
    labels = labels or [i % len(class_names) for i in range(len(images))]
    if spec is not None:
        records = records or random_maps(len(images), spec)
    maps = [None] * len(images) if records is None else [lambda record=record: record for record in records]
    samples = [
        Sample(source_id, label, lambda image=image: image, label_map, as_planes=planes)
        for source_id, label, image, label_map, planes in zip(
            ids, labels, images, maps, as_planes or [None] * len(images), strict=True
        )
    ]
    write_beton(path, samples, class_names=class_names, spec=spec, **options)
    return path


def masked_samples(
    count: int, sizes: Sequence[tuple[int, int]] = ((96, 128),), num_classes: int = 5, seed: int = 0
) -> list[tuple[bytes, np.ndarray]]:
    """`count` JPEGs with their masks, uint8 [H, W]: polygons of one colour a class, 255 and black unlabelled.

    sizes: (height, width), taken in turn.
    """
    palette = np.random.default_rng(seed).integers(40, 256, (256, 3)).astype(np.uint8)
    palette[255] = 0
    samples = []
    for i in range(count):
        mask = polygon_mask(*sizes[i % len(sizes)], num_classes, seed=seed + i)
        Image.fromarray(palette[mask]).save(buffer := io.BytesIO(), "JPEG", quality=95, subsampling=0)
        samples.append((buffer.getvalue(), mask))
    return samples


def masked_beton(
    path: Path,
    count: int = 8,
    sizes: Sequence[tuple[int, int]] = ((96, 128),),
    num_classes: int = 5,
    seed: int = 0,
    spec: MapSpec | None = None,
    **options,
) -> list[np.ndarray]:
    """Write a beton of `masked_samples` and return their masks; skips the test where simplejpeg is not installed.

    spec: of label maps, which the beton then has too. `options` are `write_beton`'s.
    """
    pytest.importorskip("simplejpeg", reason="simplejpeg, which writing a beton needs, is not installed")
    drawn = masked_samples(count, sizes, num_classes, seed)
    maps = [None] * count if spec is None else [lambda r=r: r for r in random_maps(count, spec)]
    samples = [
        Sample(f"image-{i}.jpg", 0, lambda image=image: image, maps[i], mask=lambda mask=mask: mask)
        for i, (image, mask) in enumerate(drawn)
    ]
    masks = MaskSpec(num_classes, class_names=tuple(f"class {c}" for c in range(num_classes)))
    class_names = [f"class {c}" for c in range(spec.num_classes if spec else 1)]
    write_beton(path, samples, class_names=class_names, spec=spec, masks=masks, **options)
    return [mask for _, mask in drawn]
