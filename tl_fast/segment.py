"""Semantic segmentation: training from a beton with masks, and evaluation of a checkpoint.

    torchrun --nproc_per_node 8 tl_fast/segment.py --config recipes/segment_lvvit_s_ade20k.yaml [--field value ...]
    python tl_fast/segment.py --train_data camvid.beton --model lvvit_t       (one process, no torchrun)
    python tl_fast/segment.py --evaluate val.beton --checkpoint runs/segment [--flip] [--csv classes.csv] ...

`--evaluate --help` lists the options of evaluation. Under torchrun the ranks share the set; every sample counts exactly
once. Mistakes and signals end training as they end `train.py`, mistakes end evaluation as they end `evaluate.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_fast.system.mistakes import in_a_sentence, one_speaks_for_its_node
from tl_fast.system.sides import read_sides
from tl_fast.training.evaluation_options import add_machine, add_weights
from tl_fast.training.read_config import parse_command
from tl_fast.training.segment_config import SegmentConfig

PROG = "segment.py"
DESCRIPTION = """Train UPerNet on a vision transformer, from .beton files with masks. With --evaluate it evaluates a
checkpoint instead; --evaluate --help lists the options of that."""


def build_evaluation_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="mIoU, mean accuracy and pixel accuracy of a segmentation run's checkpoint on a beton."
    )
    parser.add_argument("--evaluate", nargs="*", metavar="DATA", help="the beton(s) with masks, paths or globs")
    add_weights(parser, "a run's folder (its newest checkpoint) or a checkpoint's folder")
    look = parser.add_argument_group("how images are looked at; by default as in the run's validation")
    look.add_argument("--mode", choices=("slide", "whole"), help="windows that overlap, or the whole image at once")
    look.add_argument("--crop", type=read_sides, metavar="PIXELS", help="side of a window, or [height,width]")
    look.add_argument(
        "--stride",
        type=read_sides,
        metavar="PIXELS",
        help="from window to window, or [down,right]; default: two thirds of the crop",
    )
    look.add_argument(
        "--base-size",
        type=int,
        nargs=2,
        metavar=("LONG", "SHORT"),
        help="sides that every image is first resized to fit, its aspect kept",
    )
    look.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], help="factors of the image's size to average over; default: 1"
    )
    look.add_argument("--flip", action="store_true", help="average over the mirrored image too")
    outputs = parser.add_argument_group("what is written")
    outputs.add_argument("--csv", type=Path, metavar="FILE", help="a table of classes: IoU, accuracy, pixels")
    outputs.add_argument(
        "--save-predictions", type=Path, metavar="DIR", help="one palette PNG of classes a sample, under its id"
    )
    outputs.add_argument(
        "--overlays", action="store_true", help="the classes' colours over the images, in DIR/overlays"
    )
    add_machine(parser, 8, "windows")
    return parser


def evaluate(arguments: Sequence[str], prog: str = PROG) -> dict[str, Any]:
    """A command line with --evaluate: prints the scores on the main rank and returns `evaluate_segmentation`'s dict."""
    parser = build_evaluation_parser(prog)
    with one_speaks_for_its_node():
        options = parser.parse_args(arguments)
        if not options.evaluate:
            parser.error("--evaluate needs at least one beton")
    with in_a_sentence(prog, options.traceback):
        # Imported when the command line is in order: it takes seconds.
        from tl_fast.training.segmentation_evaluation import Look, Outputs, evaluate_segmentation, in_words

        base_size = tuple(options.base_size) if options.base_size else None
        scales = tuple(options.scales)
        result = evaluate_segmentation(
            options.evaluate,
            options.checkpoint,
            use_ema=options.use_ema,
            look=Look(options.mode, options.crop, options.stride, base_size, scales, options.flip),
            outputs=Outputs(options.csv, options.save_predictions, options.overlays),
            batch_size=options.batch_size,
            threads=options.threads,
            device=options.device,
            dtype=options.dtype,
        )
    if int(os.environ.get("RANK", 0)) == 0:
        print(in_words(result))
    return result


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> dict[str, Any] | None:
    """The command line; see read_config.parse_command for training and `evaluate`. prog: what messages call the
    command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--evaluate" in words:
        return evaluate(words, prog)
    with one_speaks_for_its_node():
        config, show_traceback = parse_command(SegmentConfig, words, prog, DESCRIPTION)
    from tl_fast.training.process import run  # when the command line is in order: it takes seconds

    run(config, prog, show_traceback)
    return None


if __name__ == "__main__":
    main()
