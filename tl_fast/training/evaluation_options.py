"""The command-line options that the evaluations of all tasks have in common."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_weights(parser: argparse.ArgumentParser, kinds: str) -> None:
    """`--checkpoint`, of the `kinds` that the command takes, and whether its moving average counts (`use_ema`)."""
    parser.add_argument("--checkpoint", type=Path, required=True, help=kinds)
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--ema", dest="use_ema", action="store_true", default=True, help="the weights' moving average (default)"
    )
    weights.add_argument("--raw", dest="use_ema", action="store_false", help="the weights themselves")


def add_machine(parser: argparse.ArgumentParser, batch_size: int, unit: str) -> None:
    """How and where it is computed; batch_size: the default, of the `unit` that goes through the network."""
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"{unit} per step and rank")
    parser.add_argument("--threads", type=int, help="loader threads per rank")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a mistake was met")
