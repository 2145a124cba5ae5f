"""How many crops/s are resized to 224 px on one thread: by our kernel, from RGB and from planes, and by Pillow?

    python benchmarks/resample.py [--images FOLDER] [--rounds 7]

Random resized crops and flips of whole decoded images (`tl_fast.plan`'s draws), bilinear and bicubic. Pillow makes
`resize(box=...)` of the same crops, without the flips. Both results are compared before: ours are Pillow's to the bit.
"full recipe": the geometry of LV-ViT-S's recipe alone, in which some images are rotated and sheared; Pillow has no such
call. Appends one row a contender to benchmarks/results/resample.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from loaders import FULL, SIZE, find_images
from PIL import Image
from rows import ROOT, measure, write_rows

from tl_fast.jpeg.planes_loops import from_rgb
from tl_fast.kernels.geometry import cpu as geometry
from tl_fast.maths.ycbcr import PADDING, Pixels, pixels_of, planes_of
from tl_fast.plan import records
from tl_fast.plan.augment import Augment

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Images:
    """Decoded images, in every form that a contender reads."""

    def __init__(self, files: list[Path]):
        self.pillow, self.rgb, self.planes = [], [], []
        self._kept = []  # what the pixels lie in
        for file in files:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
            self.pillow.append(image)
            self.rgb.append(pixels_of(self._keep(np.asarray(image)), 0, 0))
            self.planes.append(planes_of(self._keep(from_rgb(np.asarray(image))), image.height, image.width))
        self.heights = np.array([image.height for image in self.pillow])
        self.widths = np.array([image.width for image in self.pillow])

    def _keep(self, array: np.ndarray) -> np.ndarray:
        memory = np.zeros(array.size + PADDING, np.uint8)
        memory[: array.size] = array.reshape(-1)
        self._kept.append(memory)
        return memory[: array.size].reshape(array.shape)

    def draw(self, number: int, augment: Augment) -> np.ndarray:
        return records.draw(0, number, np.arange(len(self.pillow)), self.heights, self.widths, augment)

    def ours(self, pixels: list[Pixels], augment: Augment) -> Callable[[int], int]:
        out, fill = np.empty((3, SIZE, SIZE), np.uint8), np.array(augment.fill, np.uint8)

        def run(number: int) -> int:
            for b, plan in enumerate(self.draw(number, augment)):
                show(pixels[b], plan, self.heights[b], self.widths[b], fill, out)
            return len(pixels)

        return run

    def pillows(self, augment: Augment) -> Callable[[int], int]:
        def run(number: int) -> int:
            for image, plan in zip(self.pillow, self.draw(number, augment), strict=True):
                resize(image, plan, RESAMPLING[augment.interpolation])
            return len(self.pillow)

        return run


def show(pixels: Pixels, plan: np.void, height: int, width: int, fill: np.ndarray, out: np.ndarray) -> None:
    crop = tuple(float(plan[name]) for name in ("top", "left", "height", "width"))
    geometry.show(pixels, int(height), int(width), crop, plan["affine"], int(plan["interpolation"]), fill, out)


def resize(image: Image.Image, plan: np.void, kind: Image.Resampling) -> Image.Image:
    left, top = int(plan["left"]), int(plan["top"])
    return image.resize((SIZE, SIZE), kind, box=(left, top, left + int(plan["width"]), top + int(plan["height"])))


def compare(images: Images, augment: Augment) -> None:
    """Raises SystemExit where a crop is not Pillow's, filtered along x first as by Pillow before version 13."""
    kind, out, fill = RESAMPLING[augment.interpolation], np.empty((3, SIZE, SIZE), np.uint8), np.zeros(3, np.uint8)
    for b, plan in enumerate(images.draw(0, augment)):
        show(images.rgb[b], plan, images.heights[b], images.widths[b], fill, out)
        left, top = int(plan["left"]), int(plan["top"])
        right, bottom, image = left + int(plan["width"]), top + int(plan["height"]), images.pillow[b]
        image = image.resize((SIZE, image.height), kind, box=(left, 0, right, image.height))
        theirs = np.asarray(image.resize((SIZE, SIZE), kind, box=(0, top, SIZE, bottom))).transpose(2, 0, 1)
        if not np.array_equal(out, theirs[:, :, ::-1] if plan["flip"] else theirs):
            raise SystemExit(f"{augment.interpolation}: image {b} is not Pillow's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=ROOT / "tests" / "photos", help="folder of JPEGs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "resample.jsonl")
    arguments = parser.parse_args()
    images, contenders = Images(find_images(arguments.images)), {}
    for kind in RESAMPLING:
        augment = Augment(interpolation=kind)
        compare(images, augment)
        contenders[f"tl_fast: crop + flip, {kind}"] = images.ours(images.rgb, augment)
        contenders[f"tl_fast: crop + flip, {kind}, from planes"] = images.ours(images.planes, augment)
        contenders[f"Pillow: crop, {kind}"] = images.pillows(augment)
    contenders["tl_fast: full recipe, geometry"] = images.ours(images.rgb, Augment(**FULL))
    rows = write_rows(
        arguments.results,
        "resample",
        measure(contenders, arguments.rounds),
        "crops/s",
        ("numba", "Pillow"),
        images=arguments.images.name,
        image_size=SIZE,
        threads=1,
    )
    medians = {row["contender"]: row["median"] for row in rows}
    for name, median in medians.items():
        print(f"{1e6 / median:6.0f} us a crop: {name}")
    for kind in RESAMPLING:
        ratio = medians[f"tl_fast: crop + flip, {kind}"] / medians[f"Pillow: crop, {kind}"]
        print(f"{ratio:6.2f} times: ours / Pillow's, {kind}")


if __name__ == "__main__":
    main()
