"""Does token labeling make backbones that segment better? CamVid, from three initialisations, at a size for CPUs.

    python benchmarks/segment_evidence.py --imagenette DIR --camvid DIR [--out runs/evidence] [--at-once 2]
    python benchmarks/segment_evidence.py --table

DIR: Imagenette's folder with train/ and val/, and CamVid's with train/ and val/ of images/ and masks/ of 11 classes and
void. Imagenette is annotated by efficientnet-lite0. A small LV-ViT is trained on it twice, with token labels and on
image labels alone, all else equal. UPerNet is then trained on CamVid from random weights, and from the backbone of
either run, with every one of SEEDS. Each run is evaluated once, at its end. All of it takes two cores an hour and a
quarter, with one thread a run and two runs side by side (--at-once).

--out keeps all files. What is there is not made again: a stopped benchmark goes on. Writes a row a run to
benchmarks/results/segment_evidence.jsonl, in place of those before, the IoU of every class as segment_evidence.png
beside it, and OUT/sheet.png: images, masks, and what each initialisation predicted. --table prints the rows as
docs/segmentation.md has them, and measures nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rows import ROOT, circumstances

from tl_fast.pictures.mask_sheet import show_masks
from tl_fast.training.segmentation_evaluation import Outputs, evaluate_segmentation

RESULTS = ROOT / "benchmarks" / "results" / "segment_evidence.jsonl"
SEEDS = 0, 1, 2
SCORES = {"miou": "mIoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy"}

# Initialisation -> whether its Imagenette run has token labels; None: no such run.
INITIALISATIONS = {"random weights": None, "image labels": False, "token labels": True}

# An LV-ViT of 8 blocks with 192 channels, 3.4 M parameters; with UPerNet 4.6 M.
NETWORK = {
    "model": "lvvit_t",
    "model_kwargs": '{"embed_dim": 192, "depth": 8, "num_heads": 3, "stem_width": 32}',
    "drop_path": 0,
    "device": "cpu",
    "threads": 1,
    "keep": 1,
    "resume": "auto",
}
PRETRAINING = {
    "img_size": 96,
    "scale": "[0.25, 1.0]",
    "interpolation": "bilinear",
    "auto_augment": "null",
    "erase": 0,
    "batch_size": 64,
    "epochs": 20,
    "cooldown_epochs": 0,
    "warmup_epochs": 2,
    "lr": 1e-3,
    "lr_base_batch": 64,
    "ema_decay": 0.998,
    "eval_every": 5,
}
SEGMENTATION = {
    "base_size": "[240, 180]",
    "crop_size": 128,
    "decoder_channels": 64,
    "aux_channels": 64,
    "batch_size": 16,
    "steps": 600,
    "warmup_steps": 50,
    "lr": 5e-4,
    "eval_steps": 200,
    "checkpoint_steps": 200,
}


def run(command: str, *arguments: object, log: Path) -> None:
    """Run `tl-fast COMMAND`, on one thread of PyTorch's, its output in `log`. CalledProcessError where it fails."""
    with log.open("w") as file:
        words = [sys.executable, "-m", "tl_fast.command", command, *map(str, arguments)]
        subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file, check=True)


def pack(arguments: argparse.Namespace) -> None:
    out, maps = arguments.out, arguments.out / "maps"
    if not (out / "imagenette_train.beton").exists():
        options = ["--model", "efficientnet-lite0", "--classes", "auto"]
        run("annotate", arguments.imagenette / "train", maps, *options, log=out / "annotate.log")
    for part in ("train", "val"):
        camvid = arguments.camvid / part
        for name, images, options in (
            ("imagenette", arguments.imagenette / part, ["--label-maps", maps] if part == "train" else []),
            ("camvid", camvid / "images", ["--masks", camvid / "masks", "--mask-classes", "camvid"]),
        ):
            beton = out / f"{name}_{part}.beton"
            if not beton.exists():
                run("convert", images, beton, *options, log=out / f"pack_{name}_{part}.log")


def train(folder: Path, command: str, data: str, settings: dict[str, object]) -> None:
    """Train on a data set packed beside the run's folder, or go on with it."""
    out = folder.parent
    settings = {
        "train_data": out / f"{data}_train.beton",
        "val_data": out / f"{data}_val.beton",
        "output_dir": folder,
        **NETWORK,
        **settings,
    }
    words = [word for field, value in settings.items() for word in (f"--{field}", value)]
    run(command, *words, log=folder.with_suffix(".log"))


def pretraining_folder(out: Path, initialisation: str) -> Path:
    return out / f"pretrain_{initialisation.replace(' ', '_')}"


def segmentation_folder(out: Path, initialisation: str, seed: int) -> Path:
    return out / f"segment_{initialisation.replace(' ', '_')}_{seed}"


def pretrain(out: Path, initialisation: str) -> None:
    settings = PRETRAINING | {"token_label": str(INITIALISATIONS[initialisation]).lower()}
    train(pretraining_folder(out, initialisation), "train", "imagenette", settings)


def segment(out: Path, initialisation: str, seed: int) -> None:
    settings = SEGMENTATION | {"seed": seed}
    if INITIALISATIONS[initialisation] is not None:
        settings["init_weights"] = pretraining_folder(out, initialisation)
    train(segmentation_folder(out, initialisation, seed), "segment", "camvid", settings)


def evaluate(out: Path, initialisation: str, seed: int) -> dict:
    """The row of a trained run."""
    folder = segmentation_folder(out, initialisation, seed)
    table, predictions = folder.with_suffix(".csv"), predictions_of(out, initialisation, seed)
    result = evaluate_segmentation(
        str(out / "camvid_val.beton"), folder, outputs=Outputs(table, predictions), device="cpu"
    )
    top1 = None
    if INITIALISATIONS[initialisation] is not None:
        lines = (pretraining_folder(out, initialisation) / "metrics.jsonl").read_text().splitlines()
        top1 = json.loads(lines[-1])["val_top1_ema"]
    with table.open() as file:
        ious = {row["name"]: float(row["iou"]) for row in csv.DictReader(file)}
    return {
        "benchmark": "segment_evidence",
        "initialisation": initialisation,
        "seed": seed,
        **{score: round(result[score], 3) for score in SCORES},
        "iou": ious,
        "imagenette_top1": top1,
        "network": NETWORK,
        "pretraining": PRETRAINING,
        "segmentation": SEGMENTATION,
        **circumstances(("torch", "timm", "segmentation-models-pytorch")),
    }


def predictions_of(out: Path, initialisation: str, seed: int) -> Path:
    """Where a run's predictions go; the folder's name is that of its column in the sheet."""
    return out / "predictions" / str(seed) / initialisation


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def of_initialisation(rows: list[dict], initialisation: str) -> list[dict]:
    return [row for row in rows if row["initialisation"] == initialisation]


def table(rows: list[dict]) -> str:
    """Mean and standard deviation over the seeds, in percent, a line an initialisation."""
    lines = [["backbone from", "Imagenette top-1", *SCORES.values()]]
    for initialisation in INITIALISATIONS:
        mine = of_initialisation(rows, initialisation)
        top1 = mine[0]["imagenette_top1"]
        scores = [spread([row[score] for row in mine]) for score in SCORES]
        lines.append([initialisation, "" if top1 is None else f"{top1:.1f}", *scores])
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def draw_classes(rows: list[dict], path: Path) -> None:
    """Bars of every class's IoU, the mean over the seeds, with every seed's as a dot."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    classes = list(rows[0]["iou"])
    places, width = np.arange(len(classes)), 0.8 / len(INITIALISATIONS)
    for i, (initialisation, colour) in enumerate(zip(INITIALISATIONS, ("#999999", "#56b4e9", "#0072b2"), strict=True)):
        ious = np.array([list(row["iou"].values()) for row in of_initialisation(rows, initialisation)])
        at = places + (i - 1) * width
        axes.bar(at, ious.mean(axis=0), width, color=colour, label=initialisation)
        axes.plot(np.tile(at, len(ious)), ious.ravel(), ".", color="black", markersize=3)
    axes.set_xticks(places, classes, rotation=30, ha="right")
    axes.set_ylabel("IoU, %")
    axes.set_title(f"UPerNet on CamVid val, {len(SEEDS)} seeds a bar")
    axes.legend(title="backbone from", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path, pil_kwargs={"optimize": True})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagenette", type=Path, metavar="DIR")
    parser.add_argument("--camvid", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "evidence")
    parser.add_argument("--at-once", type=int, default=2, help="trainings side by side")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for line in arguments.results.read_text().splitlines()]))
        return
    if arguments.imagenette is None or arguments.camvid is None:
        parser.error("--imagenette and --camvid are needed")
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    pack(arguments)
    runs = [(initialisation, seed) for seed in SEEDS for initialisation in INITIALISATIONS]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        pretrained = [name for name, token_label in INITIALISATIONS.items() if token_label is not None]
        list(pool.map(lambda name: pretrain(out, name), pretrained))
        list(pool.map(lambda one: segment(out, *one), runs))
    rows = [evaluate(out, *one) for one in runs]
    arguments.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_classes(rows, arguments.results.with_suffix(".png"))
    columns = [predictions_of(out, initialisation, SEEDS[0]) for initialisation in INITIALISATIONS]
    print(show_masks(out / "camvid_val.beton", out / "sheet.png", predictions=columns))
    print(table(rows))


if __name__ == "__main__":
    main()
