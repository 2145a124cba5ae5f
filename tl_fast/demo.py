"""The whole path on the bundled photos: `make demo`, or `python -m tl_fast.demo [--no-token-label | --fine-tune]
[--seed N]`.

It runs the project's own commands one after the other and prints each: also the shortest answer to "what do I type".
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tl_fast.pictures.bundled_photos import FOLDER, PHOTOS, annotate_and_pack, run
from tl_fast.system.mistakes import in_a_sentence

BARS = " ▁▂▃▄▅▆▇█"


def sparkline(values: list[float]) -> str:
    """One character a value, the lowest blank and the highest full."""
    low, high = min(values), max(values)
    return "".join(BARS[round((value - low) / (high - low or 1) * (len(BARS) - 1))] for value in values)


def demo(folder: Path, *, token_label: bool = True, seed: int = 0, options: list[str] | None = None) -> dict:
    """Annotate, pack, train, evaluate and draw the photos into `folder` -> figures, also in its `report.json`. Replaces
    an earlier demo's files.

    `options` are passed on to train.py.
    """
    # Imported here, because they take seconds.
    import numpy as np

    from tl_fast.beton.reader import BetonReader
    from tl_fast.training.accuracy import evaluate, in_words
    from tl_fast.training.runlog import read_rows

    folder = folder.resolve()
    train, val, run_dir, picture = (folder / name for name in ("train.beton", "val.beton", "train", "picture.png"))
    seconds = annotate_and_pack(folder)
    shutil.rmtree(run_dir, ignore_errors=True)
    picture.unlink(missing_ok=True)
    data = ["--train_data", train, "--val_data", val, "--output_dir", run_dir]
    settings = ["--seed", str(seed), "--token_label", str(token_label).lower(), *(options or [])]
    seconds["train"] = run("tl_fast/train.py", "--config", "recipes/demo_photos.yaml", *data, *settings)
    print(f"\n$ python -m tl_fast.evaluate {val} --checkpoint {run_dir}", flush=True)
    result = evaluate(str(val), run_dir)
    print(in_words(result))
    seconds["show"] = run("-m", "tl_fast.show", train, "--out", picture)

    with BetonReader(val) as reader:
        counts = np.bincount(reader.labels)
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "train"]
    speeds = [row["images_per_second"] for row in rows]
    figures = {
        "top1": result["top1"],
        "majority": 100 * float(counts.max() / counts.sum()),
        "images_per_second": float(np.median(speeds)),
        "data_wait": float(np.median([row["data_wait"] for row in rows])),
        "loss": [row["loss"] for row in rows],
        "steps": [row["step"] for row in rows],
        "seconds": seconds,
        "seed": seed,
        "token_label": token_label,
        "picture": str(picture),
        "folder": str(folder),
    }
    (folder / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "report.md").write_text(report(figures))
    return figures


def fine_tune_demo(folder: Path, *, seed: int = 0, options: list[str] | None = None) -> dict:
    """Train 20 steps with token labels at 96 px on four classes, fine-tune 20 steps at 128 px on the image labels of
    three of them, evaluate -> accuracy in percent. Replaces an earlier demo's files in `folder`.

    `options` are passed on to both trainings.
    """
    from tl_fast.training.accuracy import evaluate, in_words

    folder = folder.resolve()
    annotate_and_pack(folder)
    pretrained, fine_tuned, photos = (folder / name for name in ("pretrained", "fine_tuned", "three_classes"))
    for old in (pretrained, fine_tuned, photos):
        shutil.rmtree(old, ignore_errors=True)
    for part in ("train", "val"):
        (photos / part).mkdir(parents=True)
        for name in ("animal", "fish", "tool"):
            (photos / part / name).symlink_to(PHOTOS / part / name)
        run("converters/to_beton.py", photos / part, folder / f"three_{part}.beton", "--overwrite")

    common = ["--config", "recipes/demo_photos.yaml", "--seed", str(seed), "--max_steps", "20", *(options or [])]
    data = ["--train_data", folder / "train.beton", "--val_data", folder / "val.beton"]
    run("tl_fast/train.py", *common, *data, "--img_size", "96", "--output_dir", pretrained)
    data = ["--train_data", folder / "three_train.beton", "--val_data", folder / "three_val.beton"]
    start = ["--init_weights", pretrained, "--img_size", "128", "--output_dir", fine_tuned]
    labels = ["--token_label", "false", "--mix_token", "false", "--mixup", "0.8", "--cutmix", "1.0"]
    run("tl_fast/train.py", *common, *data, *start, *labels, "--layer_decay", "0.75")
    val = folder / "three_val.beton"
    print(f"\n$ python -m tl_fast.evaluate {val} --checkpoint {fine_tuned}", flush=True)
    result = evaluate(str(val), fine_tuned)
    print(in_words(result))
    return {"top1": result["top1"], "samples": result["samples"], "folder": str(folder)}


def report(figures: dict) -> str:
    """The figures as a page of Markdown."""
    folder = figures["folder"]
    loss = figures["loss"]
    stages = "".join(f"| {name} | {seconds:.1f} s |\n" for name, seconds in figures["seconds"].items())
    curve = "".join(f"| {step} | {value:.4f} |\n" for step, value in zip(figures["steps"], loss, strict=True))
    labels = "token labels" if figures["token_label"] else "image labels alone"
    return f"""# tl_fast demo

LV-ViT-T on the 116 bundled photos with {labels}, seed {figures["seed"]}.

- validation top-1 (EMA weights): {figures["top1"]:.1f} %
- always guessing the largest class: {figures["majority"]:.1f} %
- training: {figures["images_per_second"]:.0f} images/s (median of the log's windows); waiting for data
  {figures["data_wait"]:.1%} of the time
- loss: {loss[0]:.3f} -> {loss[-1]:.3f}  `{sparkline(loss)}`

| stage | wall time |
|---|---|
{stages}
Files in {folder}: `label_maps/` (annotation), `train.beton`, `val.beton`, `train/` (checkpoints, metrics.jsonl,
tensorboard), `picture.png` (images with their labels).

| step | loss |
|---|---|
{curve}"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tl_fast.demo") -> None:
    """The command line; options that it does not know are train.py's."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--no-token-label", dest="token_label", action="store_false", help="the control: train on image labels alone"
    )
    kind.add_argument(
        "--fine-tune",
        action="store_true",
        help="train 20 steps at 96 px, then fine-tune at 128 px for other classes; takes --model, too",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for all results (default: runs/demo)")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a mistake was met")
    chosen, options = parser.parse_known_args(arguments)
    with in_a_sentence("demo", chosen.traceback):
        if chosen.fine_tune:
            figures = fine_tune_demo(chosen.out, seed=chosen.seed, options=options)
            print(f"\ndemo: top-1 {figures['top1']:.1f} % after fine-tuning, files in {figures['folder']}")
            return
        figures = demo(chosen.out, token_label=chosen.token_label, seed=chosen.seed, options=options)
    loss = figures["loss"]
    print(f"\nreport: {chosen.out / 'report.md'}\nloss: {loss[0]:.3f} -> {loss[-1]:.3f}  {sparkline(loss)}")
    print(
        f"demo: val top-1 {figures['top1']:.1f} % (majority {figures['majority']:.1f} %),"
        f" {figures['images_per_second']:.0f} images/s, picture at {figures['picture']}"
    )


if __name__ == "__main__":
    main()
