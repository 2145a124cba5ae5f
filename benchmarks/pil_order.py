"""How far are our augmented images from timm's, with identical drawn parameters?

    python benchmarks/pil_order.py [--images tests/photos] [--draws 1]

timm crops and resizes, mirrors, then applies each drawn operation to the small image. tl_fast composes crop, mirror and
geometry into one affine of the stored image and applies the colours afterwards. One line for whole recipes, and one for
every operation alone after a drawn
crop, at magnitudes of the recipe: the mean absolute difference in levels over all pixels, and over those that are image
in both; and how much of the output is fill in both, in timm's alone, in ours alone. Writes nothing. Half a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from rows import ROOT
from timm.data import auto_augment

from tl_fast.kernels import cpu
from tl_fast.maths import scalar
from tl_fast.maths.ycbcr import pixels_of
from tl_fast.plan import records as plan
from tl_fast.plan.rand_augment import OPS

SIZE = 224
FILL = (124, 116, 104)
RESAMPLING = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
THEIRS = {
    "AutoContrast": auto_augment.auto_contrast,
    "Equalize": auto_augment.equalize,
    "Invert": auto_augment.invert,
    "Rotate": auto_augment.rotate,
    "Posterize": auto_augment.posterize,
    "Solarize": auto_augment.solarize,
    "SolarizeAdd": auto_augment.solarize_add,
    "Color": auto_augment.color,
    "Contrast": auto_augment.contrast,
    "Brightness": auto_augment.brightness,
    "Sharpness": auto_augment.sharpness,
    "ShearX": auto_augment.shear_x,
    "ShearY": auto_augment.shear_y,
    "TranslateX": auto_augment.translate_x_rel,
    "TranslateY": auto_augment.translate_y_rel,
}
GEOMETRIC = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}
RECIPES = {
    "crop and flip": "",
    "rand-m9-mstd0.5-inc1": "rand-m9-mstd0.5-inc1",
    "rand-n3-m9-mstd0.5-inc1": "rand-n3-m9-mstd0.5-inc1",
}


def timms(
    image: Image.Image, record: np.void, operations: list[tuple[str, float]], fill: tuple[int, int, int]
) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3] in timm's order."""
    resample = RESAMPLING[record["interpolation"]]
    top, left, height, width = (int(record[name]) for name in ("top", "left", "height", "width"))
    image = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), resample)
    if record["flip"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, argument in operations:
        if name == "Posterize":
            image = (
                THEIRS[name](image, int(argument)) if argument >= 1 else image.point(lambda _: 0)
            )  # Pillow 13 refuses 0 bits
        elif name in ("AutoContrast", "Equalize", "Invert"):
            image = THEIRS[name](image)
        else:
            value = int(argument) if name.startswith("Solarize") else argument
            image = THEIRS[name](image, value, fillcolor=fill, resample=resample)
    return np.asarray(image)


def ours(image: Image.Image, record: np.void, fill: tuple[int, int, int]) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3] of the whole decoded image."""
    out = np.empty((3, SIZE, SIZE), np.uint8)
    pixels = np.asarray(image)
    cpu.augment(pixels_of(pixels, 0, 0), image.height, image.width, record, np.array(fill, np.uint8), out)
    return out.transpose(1, 2, 0)


def with_operation(record: np.void, op: int, argument: float) -> np.void:
    """The record's crop, flip and interpolation with one operation."""
    record = record.copy()
    record["ops"], record["arguments"] = scalar.NO_OP, 0
    record["ops"][0], record["arguments"][0] = op, argument
    width, height = float(record["width"]), float(record["height"])
    affine = scalar.compose(
        *((-1.0, 0.0, 1.0) if record["flip"] else (1.0, 0.0, 0.0)), 0.0, 1.0, 0.0, op, argument, 1.0
    )
    record["affine"] = np.array(affine) * ([width] * 3 + [height] * 3)
    record["affine"][[2, 5]] += record["left"], record["top"]
    return record


def compare(pairs: list[tuple[Image.Image, np.void]]) -> tuple[float, ...]:
    """Means over the pairs: difference of all pixels, of those that are image in both; shares filled in both, in
    timm's, in ours alone."""
    totals = []
    for image, record in pairs:
        operations = [(OPS[op], float(a)) for op, a in zip(record["ops"], record["arguments"], strict=True) if op >= 0]
        difference = np.abs(timms(image, record, operations, FILL).astype(int) - ours(image, record, FILL)).mean(axis=2)
        # White images on black ground show what is fill.
        white, blank = Image.new("RGB", image.size, (255, 255, 255)), record.copy()
        blank["ops"] = scalar.NO_OP
        theirs_filled = timms(white, record, [o for o in operations if o[0] in GEOMETRIC], (0, 0, 0))[..., 0] < 128
        ours_filled = ours(white, blank, (0, 0, 0))[..., 0] < 128
        both = ~theirs_filled & ~ours_filled
        totals.append(
            [
                difference.sum(),
                difference[both].sum(),
                both.sum(),
                (theirs_filled & ours_filled).sum(),
                (theirs_filled & ~ours_filled).sum(),
                (ours_filled & ~theirs_filled).sum(),
            ]
        )
    all_, image_only, shown, *filled = np.sum(totals, axis=0)
    pixels = len(pairs) * SIZE**2
    return all_ / pixels, image_only / shown, *(part / pixels for part in filled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=ROOT / "tests" / "photos", help="folder of photos")
    parser.add_argument("--draws", type=int, default=1, help="drawn crops and parameters a photo")
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"no JPEG in {arguments.images}; name a folder of photos with --images")
    images = [Image.open(path).convert("RGB") for path in files]
    heights, widths = np.array([(image.height, image.width) for image in images]).T

    def drawn(text: str) -> list[tuple[Image.Image, np.void]]:
        augment = plan.Augment(interpolation="random", auto_augment=text, fill=FILL)
        return [
            pair
            for epoch in range(arguments.draws)
            for pair in zip(images, plan.draw(0, epoch, np.arange(len(images)), heights, widths, augment), strict=True)
        ]

    print(f"{len(images)} photos x {arguments.draws} draws, {SIZE} px\n")
    print(f"{'':26}{'difference, levels':>22}{'fill, % of pixels':>34}")
    print(f"{'':26}{'all':>10}{'image in both':>16}{'both':>10}{'timm only':>12}{'ours only':>12}")
    levels = np.random.default_rng(0).normal(9, 0.5, len(images) * arguments.draws).clip(0, 10)
    rows = {name: drawn(text) for name, text in RECIPES.items()}
    for op, name in enumerate(OPS):
        rows[name] = [
            (image, with_operation(record, op, scalar.level_argument(op, levels[n], True, n % 2 == 0)))
            for n, (image, record) in enumerate(drawn(""))
        ]
    for name, pairs in rows.items():
        everything, image_only, both, theirs, ours_alone = compare(pairs)
        print(
            f"{name:26}{everything:10.2f}{image_only:16.2f}"
            f"{100 * both:10.2f}{100 * theirs:12.2f}{100 * ours_alone:12.2f}"
        )


if __name__ == "__main__":
    main()
