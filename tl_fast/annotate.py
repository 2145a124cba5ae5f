"""Label maps of a data set, by a machine annotator.

    python -m tl_fast.annotate IMAGES OUT --model efficientnet-lite0 [--img-size 288]   the annotator's own classes
    python -m tl_fast.annotate IMAGES OUT --model NAME --classes auto           of them, those of the data set (wnids)
    python -m tl_fast.annotate IMAGES OUT --model NAME --fit-head             a linear probe for the data set's classes
    python -m tl_fast.annotate IMAGES OUT --checkpoint runs/x                   a model of ours, by its token head
    torchrun --nproc_per_node 8 -m tl_fast.annotate IMAGES OUT --model NAME     the parts shared by 8 processes

IMAGES: what conversion takes (a folder of class folders, ImageNet's tars as downloaded, WebDataset or parquet shards),
betons, or a flat folder of images. The same command run again does what is missing; a store made in another way, or of
images that have changed since, is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_fast.sources.open import add_source_options
from tl_fast.sources.rejects import add_reject_options
from tl_fast.system.mistakes import in_a_sentence, one_speaks_for_its_node
from tl_fast.system.sides import read_sides

PROG = "python -m tl_fast.annotate"


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="folder, tars, parquet files or betons")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the label maps; continued where it exists")
    group = parser.add_argument_group("the images")
    add_source_options(group)
    group.add_argument(
        "--exif",
        choices=("ignore", "apply"),
        help="ignore: annotate images as they lie in the file (default); apply: turned as "
        "their EXIF orientation says. Convert with the same",
    )
    add_reject_options(group)
    group = parser.add_argument_group("the annotator")
    group.add_argument(
        "--model", help="efficientnet-lite0|1|2 (bundled), or any timm name; not needed with a run's --checkpoint"
    )
    group.add_argument(
        "--checkpoint",
        type=Path,
        help="weights: a run's folder (its newest checkpoint), a checkpoint's folder, or a weights file; a model "
        "trained with token labels annotates with its token head; default: the model's own",
    )
    group.add_argument("--num-classes", type=int, help="classes of the checkpoint's head; default: as the head says")
    group.add_argument(
        "--img-size",
        type=read_sides,
        metavar="PIXELS",
        help="side, or [height,width], that the full image is squashed to; default: the model's",
    )
    group.add_argument(
        "--classes",
        nargs="?",
        const="auto",
        metavar="auto|FILE",
        help="keep the logits of the data set's classes: auto, the "
        "default (their names are ImageNet wnids), or a JSON file {class name: class index or wnid}",
    )
    group.add_argument(
        "--fit-head",
        action="store_true",
        help="fit a linear probe for the data set's classes on IMAGES, apply it to the cells",
    )
    group.add_argument("--eval-images", type=Path, help="held-out images of the same classes, to test the probe on")
    group.add_argument("--topk", type=int, default=5, help="classes stored per cell (default 5, at most all)")
    group = parser.add_argument_group("the run")
    group.add_argument("--batch-size", type=int, help="images per step and process; default: 64 on GPUs, 2 on the CPU")
    group.add_argument("--workers", type=int, help="decoding threads per process; default: its share of the cores")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.add_argument(
        "--dtype",
        default="auto",
        metavar="auto|float32|float16|bfloat16",
        help="of the features; auto: bfloat16 on GPUs, else float32",
    )
    group.add_argument(
        "--timeout-minutes",
        type=float,
        default=180,
        help="how long a process waits for the others' shares (default 180)",
    )
    group.add_argument("--overwrite", action="store_true", help="start afresh where a store exists")
    group.add_argument("--traceback", action="store_true", help="show where in the code a mistake was met")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> dict[str, Any]:
    """The command line; returns the manifest. Mistakes end it with one sentence: exit code 2 for what argparse refuses,
    else 1. prog: what messages call the command.
    """
    parser = build_parser(prog)
    with one_speaks_for_its_node():
        options = vars(parser.parse_args(arguments))
    with in_a_sentence(parser.prog, options.pop("traceback")):
        # Imported when the command line is in order: it takes seconds.
        from tl_fast.annotation.run import AnnotateConfig, annotate

        return annotate(AnnotateConfig(**options))


if __name__ == "__main__":
    main()
