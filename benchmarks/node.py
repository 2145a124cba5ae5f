"""How many hours, and at a price how much money, does each recipe take on one node of 8 GPUs and on N, and which part
limits?

    python benchmarks/node.py                              (rates measured on a GPU, where train.jsonl has them)
    python benchmarks/node.py --rate lvvit_s:224=9200 --price 2.5 --nodes 1 2 4
    python benchmarks/node.py --mfu 0.36 --peak 989
    python benchmarks/node.py --recipes recipes/published/*.yaml

A model of arithmetic, not a measurement: every assumption is printed with the result. Images/s of one GPU come from
--rate, else from the newest row of benchmarks/train.py on a GPU (fed before synthetic, our compiled step), else from
counted FLOPs and an assumed --mfu.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rows import ROOT
from train import RESULTS, flops

from tl_fast.models.build import build_model
from tl_fast.training.config import TrainConfig, parse_config

IMAGES = 1_281_167  # ImageNet-1k's training set
GPUS = 8  # of a node


@dataclass(frozen=True)
class Machine:
    """What a node can do; bandwidths in GB/s."""

    link: float  # of one GPU to the others of its node, all-reduce bus bandwidth
    network: float  # of one GPU's share of the network cards
    overlap: float  # share of the backward pass that hides the all-reduce
    cores: int
    per_core: float  # images/s that the loader makes on one core
    storage: float  # read, of a node
    image_kb: float


def reduced(parameters: int, nodes: int) -> tuple[float, float, float]:
    """GB of an all-reduce: the float32 gradients, and what each GPU sends of them in its node and among nodes.

    Two levels: within a node, and each GPU's eighth among nodes, each as a ring, which moves 2 (n - 1) / n times the
    bytes.
    """
    size = 4 * parameters / 1e9
    return size, 2 * (GPUS - 1) / GPUS * size, 2 * (nodes - 1) / nodes * size / GPUS


def parts(config: TrainConfig, rate: float, parameters: int, nodes: int, machine: Machine) -> dict[str, float]:
    """Seconds of one optimiser step: `compute`, the all-reduce that the backward pass does not hide, `loader` and
    `storage` (side by side)."""
    per_gpu = config.batch_size / (nodes * GPUS)
    compute = per_gpu / rate
    _, inside, outside = reduced(parameters, nodes)
    reduce = inside / machine.link + outside / machine.network
    hidden = machine.overlap * 2 / 3 * compute  # two thirds of a step's FLOPs are the backward pass's
    per_node = config.batch_size / nodes
    return {
        "compute": compute,
        "all-reduce": max(0.0, reduce - hidden),
        "loader": per_node / (machine.cores * machine.per_core),
        "storage": per_node * machine.image_kb / 1e6 / machine.storage,
    }


def seconds(step: dict[str, float]) -> float:
    """Of a step: the GPUs' part, or the loader's or the storage's where one of these takes longer."""
    return max(step["compute"] + step["all-reduce"], step["loader"], step["storage"])


def limit(step: dict[str, float]) -> str:
    """The part that a step waits for."""
    gpu = step["compute"] + step["all-reduce"]
    slowest = max(("loader", "storage"), key=step.__getitem__)
    return slowest if step[slowest] > gpu else max(("compute", "all-reduce"), key=step.__getitem__)


def measured(results: Path) -> dict[tuple[str, int], tuple[float, str]]:
    """(model, size) -> images/s of one GPU and where they are from: the newest rows of our compiled step, fed ones
    first."""
    rates: dict[tuple[str, int], tuple[float, str]] = {}
    if results.exists():
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        for contender in ("tl_fast, compiled", "tl_fast, compiled, fed from a beton"):
            for row in rows:
                if row["contender"] == contender and "CPU" not in row["device"]:
                    fed = "fed" if "fed" in contender else "synthetic"
                    source = f"measured, {row['device']}, batch {row['batch']}, {fed}, {row['date']}"
                    rates[row["model"], row["size"]] = row["median"], source
    return rates


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; `arguments` instead of sys.argv's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", type=Path, nargs="+", default=sorted((ROOT / "recipes").glob("*_[0-9]*.yaml")))
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rate", nargs="+", default=[], metavar="MODEL:SIZE=IMAGES/S", help="of one GPU")
    parser.add_argument(
        "--mfu", type=float, default=0.36, help="assumed where nothing was measured; 0.36 is the goal of 9,200 images/s"
    )
    parser.add_argument(
        "--peak", type=float, default=989, help="TFLOP/s of one GPU that --mfu is a share of (H100, dense bfloat16)"
    )
    parser.add_argument("--price", type=float, help="of one GPU and hour")
    parser.add_argument("--link", type=float, default=350, help="GB/s, all-reduce bus bandwidth within a node")
    parser.add_argument("--network", type=float, default=40, help="GB/s, one GPU's share of the network")
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.0,
        help="share of the backward pass that hides the all-reduce; 0, the worst case: not measured on GPUs",
    )
    parser.add_argument("--cores", type=int, default=112, help="of a node, for its loaders")
    parser.add_argument(
        "--loader",
        type=float,
        default=740,
        help="images/s of a loader on one core; full recipe on original files: 1,481 on 2 threads",
    )
    parser.add_argument("--storage", type=float, default=10, help="GB/s, reading a node's betons (page cache: more)")
    parser.add_argument("--image-kb", type=float, default=110, help="mean size of a sample in the beton")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    machine = Machine(
        options.link, options.network, options.overlap, options.cores, options.loader, options.storage, options.image_kb
    )
    rates = measured(options.results)
    for text in options.rate:
        try:
            key, value = text.split("=")
            rates[key.split(":")[0], int(key.split(":")[1])] = float(value), "given by --rate"
        except (ValueError, IndexError):
            parser.error(f"--rate {text!r}: expected MODEL:SIZE=IMAGES/S such as lvvit_s:224=9200")

    print(
        f"{'recipe':21} {'GPUs':>5} {'images/s':>10} {'hours':>7} {'cost':>9}  limit        "
        "of a step: compute / all-reduce / loader / storage, ms"
    )
    sources, messages = {}, []
    for path in options.recipes:
        name = f"published/{path.stem}" if path.parent.name == "published" else path.stem
        config = parse_config(["--config", str(path)])
        key = config.model, config.img_size
        if key not in rates:
            guess = options.mfu * options.peak * 1e12 / flops(*key, 1000)
            rates[key] = guess, f"NOT MEASURED: {options.mfu:.0%} of {options.peak:g} TFLOP/s"
        rate = rates[key][0]
        sources[name] = f"{rate:,.0f} images/s of one GPU at whatever batch it gets: {rates[key][1]}"
        with torch.device("meta"):
            model = build_model(config.model, img_size=config.img_size, num_classes=1000)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        size, inside, _ = reduced(parameters, 1)
        among = (
            f", {reduced(parameters, nodes)[2] * 1e3:,.1f} MB among {nodes} nodes"
            for nodes in options.nodes
            if nodes > 1
        )
        messages.append(
            f"{name}: {size * 1e3:,.1f} MB of gradients a step, of which each GPU sends {inside * 1e3:,.1f} MB"
            f" within its node{''.join(among)}"
        )
        for nodes in options.nodes:
            if config.batch_size % (nodes * GPUS):
                print(f"{name:21} {nodes * GPUS:5}  batch_size {config.batch_size} does not divide")
                continue
            step = parts(config, rate, parameters, nodes, machine)
            hours = config.total_epochs * (IMAGES // config.batch_size) * seconds(step) / 3600
            cost = f"{hours * nodes * GPUS * options.price:,.0f}" if options.price else "-"
            print(
                f"{name:21} {nodes * GPUS:5} {config.batch_size / seconds(step):10,.0f} {hours:7.2f} {cost:>9} "
                f" {limit(step):12} " + " / ".join(f"{1e3 * value:.2f}" for value in step.values())
            )
    print("\nAssumed:")
    for name, source in sources.items():
        print(f"- {name}: {source}")
    for message in messages:
        print(f"- {message}")
    print(
        f"- {IMAGES:,} images an epoch, the recipe's epochs and cooldown; of a fine-tuned one without the run that it"
        " starts from; no validation, checkpoints, start-up or restarts"
    )
    print(
        f"- float32 gradients; rings of {machine.link:g} GB/s in a node and {machine.network:g} GB/s a GPU between"
        f" nodes; the backward pass hides {machine.overlap:.0%} of its length; batch-norm statistics stay local"
    )
    print(
        f"- loaders: {machine.per_core:g} images/s a core (measured on 2 hyperthreads, CPU decode, 224 px),"
        f" {machine.cores} cores a node, perfectly parallel; storage {machine.storage:g} GB/s a node,"
        f" {machine.image_kb:g} KB an image"
    )


if __name__ == "__main__":
    main()
