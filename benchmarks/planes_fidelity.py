"""How far is training and evaluating from YUV 4:2:0 planes from doing so with the original JPEGs?

    python benchmarks/planes_fidelity.py [--images tests/photos] [--draws 4]
    python benchmarks/planes_fidelity.py --table

Planes are stored at short sides of 224, 256 and 320 pixels and at full size. "Crops": the same drawn crop and flip,
bilinear, 224 px, from both; a crop of planes covers the same share of the image. In levels: the mean difference over
all pixels, the mean of the worst crop, the worst pixel; "identical": images whose crops do not differ, as those of
4:2:0 and greyscale JPEGs at full size. "Logits": efficientnet-lite0's, pretrained on ImageNet, of the
centre crop that it is evaluated with (224 px, crop_pct 0.875, bicubic): mean and largest difference, each divided by
the standard deviation of the original's logits over all images and classes, and how often the top class is the same.
Appends one row a short side to benchmarks/results/planes_fidelity.jsonl. --table prints the newest rows as
docs/benchmarks.md has them, and measures nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch

import tl_fast.system.torchvision_shim  # noqa: F401  before timm

# isort: split
from rows import ROOT, commit, newest_runs

from tl_fast.annotation.weights import build_annotator
from tl_fast.beton.samples import Samples
from tl_fast.convert.encode import Sample
from tl_fast.convert.write import write_beton
from tl_fast.kernels import cpu
from tl_fast.kernels.geometry.cpu import needed
from tl_fast.pipeline.decode import Decoder
from tl_fast.pipeline.loader import Loader
from tl_fast.plan.augment import Augment
from tl_fast.plan.records import draw
from tl_fast.system.versions import version

SIZE, CROP_PCT, NETWORK = 224, 0.875, "efficientnet-lite0"
SHORT_SIDES = 224, 256, 320, None  # None: full size
RESULTS = ROOT / "benchmarks" / "results" / "planes_fidelity.jsonl"


def scaled(plans: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The plans for images of other sizes: crops of the same shares, in the whole pixels around them.

    old, new: int64 [B, 2], heights and widths.
    """
    ratio, result = new / old, plans.copy()
    result["affine"] = (plans["affine"] * ratio[:, [1, 1, 1, 0, 0, 0]]).astype(np.float32)
    for axis, (start, length) in enumerate((("top", "height"), ("left", "width"))):
        first = np.floor(plans[start] * ratio[:, axis])
        behind = np.ceil((plans[start] + plans[length]) * ratio[:, axis])
        result[start], result[length] = first, np.minimum(behind, new[:, axis]) - first
    return result


def crops(samples: Samples, plans: np.ndarray) -> np.ndarray:
    """The images that the plans show, one a sample: uint8 [n, 3, SIZE, SIZE]."""
    heights, widths = samples.heights, samples.widths
    starts, stops = needed(plans, heights, widths, SIZE)
    out, fill = np.empty((len(plans), 3, SIZE, SIZE), np.uint8), np.zeros(3, np.uint8)
    decoder = Decoder(samples, 1)
    for i, plan in enumerate(plans):
        pixels = decoder.pixels(i, starts[i], stops[i] - starts[i])
        cpu.augment(pixels, heights[i], widths[i], plan, fill, out[i])
    decoder.close()
    return out


def crop_differences(originals: Samples, planes: Samples, draws: int) -> dict[str, float]:
    """In levels."""
    old, new = (np.stack([samples.heights, samples.widths], axis=1) for samples in (originals, planes))
    means, worst = [], 0  # means: [draws, n]
    for epoch in range(draws):
        plans = draw(0, epoch, np.arange(len(old)), *old.T, Augment())
        pair = crops(originals, plans), crops(planes, scaled(plans, old, new))
        differences = np.abs(np.subtract(*pair, dtype=np.int16))
        means.append(differences.mean(axis=(1, 2, 3)))
        worst = max(worst, int(differences.max()))
    return {
        "identical": int((np.max(means, axis=0) == 0).sum()),
        "crop_mean": round(float(np.mean(means)), 3),
        "crop_mean_of_worst": round(float(np.max(means)), 2),
        "crop_worst_pixel": worst,
    }


def logits(beton: Path, network: torch.nn.Module) -> np.ndarray:
    """float32 [n, C] of the centre crops of all samples, in the file's order."""
    augment = Augment(interpolation="bicubic")
    loader = Loader(beton, 16, train=False, image_size=SIZE, crop_pct=CROP_PCT, augment=augment, threads=1)
    with torch.inference_mode():
        return np.concatenate([network((batch.images / 255 - 0.5) / 0.5).numpy() for batch in loader])


def measure(images: Path, draws: int) -> list[dict]:
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"no .jpg or .jpeg below {images}; name another folder with --images")
    network = build_annotator(NETWORK).network.eval()
    rows = []
    with tempfile.TemporaryDirectory() as folder:

        def build(name: str, **options: object) -> Path:
            path = Path(folder) / f"{name}.beton"
            inputs = [Sample(str(i), 0, file.read_bytes, origin=str(file)) for i, file in enumerate(files)]
            write_beton(path, inputs, class_names=["all"], **options)
            return path

        original = build("original")
        expected = logits(original, network)
        for short_side in SHORT_SIDES:
            beton = build(f"planes {short_side}", store="yuv420", short_side=short_side)
            samples, found = Samples(beton), logits(beton, network)
            differences = np.abs(found - expected) / expected.std()
            rows.append(
                {
                    "short_side": short_side,
                    "mean_bytes": round(float(samples.readers[0].image_sizes.mean())),
                    **crop_differences(Samples(original), samples, draws),
                    "logits_mean": round(float(differences.mean()), 4),
                    "logits_largest": round(float(differences.max()), 3),
                    "same_top_class": round(float((found.argmax(1) == expected.argmax(1)).mean()), 4),
                }
            )
    now = datetime.datetime.now().astimezone()
    facts = {
        "samples": len(files),
        "draws": draws,
        "image_size": SIZE,
        "network": NETWORK,
        "device": f"{os.cpu_count()} x {platform.machine()} CPU",
        "versions": {name: version(name) for name in ("torch", "timm", "numba", "Pillow")},
        "commit": commit(),
        "date": now.date().isoformat(),
        "run": now.isoformat(timespec="seconds"),
    }
    return [{"benchmark": "planes_fidelity", "images": images.name, **row, **facts} for row in rows]


def table(runs: dict[str, list[dict]]) -> str:
    """The newest run of every data set as a markdown table."""
    lines = [
        "| images | short side | KB an image | identical"
        " | crops: mean, worst crop, worst pixel | logits: mean, largest | same top |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (row for rows in runs.values() for row in rows):
        lines.append(
            f"| {row['samples']} of {row['images']} | {row['short_side'] or 'full size'} |"
            f" {row['mean_bytes'] / 1000:.0f} | {row['identical']} |"
            f" {row['crop_mean']:.2f}, {row['crop_mean_of_worst']:.1f},"
            f" {row['crop_worst_pixel']} | {row['logits_mean']:.3f}, {row['logits_largest']:.2f} |"
            f" {row['same_top_class']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=ROOT / "tests" / "photos", help="folder of JPEGs")
    parser.add_argument("--draws", type=int, default=4, help="crops of each image")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table of docs/benchmarks.md")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(1)
        rows = measure(arguments.images, arguments.draws)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with arguments.results.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(newest_runs(arguments.results)))


if __name__ == "__main__":
    main()
