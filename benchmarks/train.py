"""How many images/s does a training step take in: ours, and the published style written in published_step.py?

    python benchmarks/train.py                    (lvvit_t at 224 px; on a GPU T, S, M, L at 224 and S at 384)
    python benchmarks/train.py --models lvvit_s:224 --batch 256 --beton train.beton
    python benchmarks/train.py --models swin_tiny_patch4_window7_224:224 convnext_tiny:224
    python benchmarks/train.py --table

--models takes any model that tl_fast/train.py trains. The published style is written for LV-ViT alone and left out for
others. Models that have no drop path need --drop-path 0. A model whose tokens do not divide the image into whole
patches trains without MixToken, as in tl_fast/train.py.

Every contender is a process of its own. On the CPU all take turns, a round of --steps steps at a time; on a GPU, whose
memory holds one, each makes all its rounds before the next one starts, and one that fails costs its own rows alone.
Synthetic batches lie on the device; --beton adds a contender that is fed by the loader, decoding, LV-ViT-S's whole
augmentation and targets included, on a GPU by the loader's half there. A further one has a synthetic batch, while a
thread takes the loader's batches as fast as they come and drops them: what it loses is disturbance; what the fed one
loses more than that is waiting. A step is what train.py does: normalise, erase,
forward, loss, backward, clipping, AdamW, moving average, a MixToken box of its own; the published one neither erases
nor clips, and reads its loss on the host. Weights are float32, on a GPU autocast to bfloat16, for all. Our processes
keep malloc's memory, as train.py does; the published style runs with and without that. Times of a step are split by the
clock, on a GPU by events; MFU is counted FLOPs (matrix products and convolutions, forward and backward) over the GPU's
peak for dense bfloat16, elsewhere over the rate of a 2048 x 2048 matrix product. Appends one row a contender to
benchmarks/results/train.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import published_step
from gpu_rows import mean_bytes
from rows import ROOT, write_rows
from timm.utils import ModelEmaV3
from torch.utils.flop_counter import FlopCounterMode

from tl_fast.models.build import build_model, token_grid
from tl_fast.models.loss import TokenLabelLoss
from tl_fast.models.lvvit import LVViT
from tl_fast.models.normalise import Normalise, autocast
from tl_fast.models.step import TrainStep, compiled
from tl_fast.pipeline.loader import Loader
from tl_fast.plan.augment import Augment
from tl_fast.plan.records import mix_box
from tl_fast.system.memory import reuse_memory
from tl_fast.system.mistakes import InputError
from tl_fast.training.config import TrainConfig
from tl_fast.training.loop import seed_step
from tl_fast.training.optimiser import build_optimizer

RESULTS = ROOT / "benchmarks" / "results" / "train.jsonl"
PHASES = ("data", "forward", "backward", "update")  # update: clipping, optimiser, moving average, reading the loss
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # dense bfloat16 FLOP/s, NVIDIA's data sheets
FED = "tl_fast, compiled, fed from a beton"
BESIDE = "tl_fast, compiled, beside a loader whose batches are dropped"
CPU_CONTENDERS = (
    "tl_fast, compiled",
    "tl_fast, eager",
    "published style, eager",
    "published style, compiled",
    "published style, eager, malloc keeps memory",
)
GPU_CONTENDERS = (
    "tl_fast, compiled",
    "tl_fast, compiled, CUDA graphs",
    "tl_fast, eager",
    "published style, eager",
    "published style, compiled",
)
RECIPE = Augment(interpolation="random", auto_augment="rand-m9-mstd0.5-inc1", erase=0.25)  # LV-ViT-S's
DENSE_WEIGHT, CLIP, DECAY = 0.5, 1.0, 0.99992
PACKAGES = ("torch", "timm", "numba", "numba-cuda", "nvidia-dali-cuda130", "numpy")


class Clock:
    """Seconds of a step's phases, added up over a round."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """One figure a phase; every step has made one mark more than there are phases. On a GPU after a
        synchronisation."""
        totals, per_step = [0.0] * len(PHASES), len(PHASES) + 1
        for start in range(0, len(self.marks), per_step):
            marks = self.marks[start : start + per_step]
            for phase, (a, b) in enumerate(itertools.pairwise(marks)):
                totals[phase] += a.elapsed_time(b) / 1e3 if self.device.type == "cuda" else b - a
        return totals


class Ours:
    """The step of tl_fast/train.py on one rank."""

    def __init__(self, model: nn.Module, name: str, options: argparse.Namespace, device: torch.device) -> None:
        config = TrainConfig(train_data="none", min_lr=0, warmup_lr=0)
        self.device, self.grid = device, model.grid_size
        self.model = model.to(
            device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format
        )
        step = TrainStep(self.model, TokenLabelLoss(1.0, DENSE_WEIGHT), Normalise(config.mean, config.std).to(device))
        mode = "reduce-overhead" if "CUDA graphs" in name else "default"
        self.network = compiled(step, device, mode) if "compiled" in name else step
        self.ema = ModelEmaV3(self.model, decay=DECAY)
        self.optimizer = build_optimizer(self.model, config)
        self.loss = torch.zeros((), device=device)

    def synthetic(self, options: argparse.Namespace) -> tuple[Tensor, ...]:
        targets = torch.rand(options.batch, 1 + math.prod(self.grid), options.classes, device=self.device).softmax(-1)
        images = torch.randint(
            256, (options.batch, 3, options.size, options.size), dtype=torch.uint8, device=self.device
        )
        boxes = torch.zeros(options.batch, 4, dtype=torch.int32, device=self.device)
        boxes[::4] = options.size // 3  # every fourth image, as the recipe erases
        return images, targets, boxes, torch.arange(options.batch, device=self.device)

    def step(self, number: int, clock: Clock, images: Tensor, targets: Tensor, *erased: Tensor) -> None:
        seed_step(0, number, 0)
        box = None
        if self.model.can_mix_tokens:
            box = torch.from_numpy(mix_box(0, 0, number, self.grid)).to(self.device, non_blocking=True)
        loss, _ = self.network(images, targets, box, None, *erased)
        clock.mark()
        loss.backward()
        clock.mark()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, step=number + 2)
        self.loss += loss.detach()


class Published:
    """The published step; timm normalises on the device, as here."""

    def __init__(self, model: LVViT, name: str, options: argparse.Namespace, device: torch.device) -> None:
        self.device, self.grid = device, model.grid_size
        self.model = published_step.PublishedLVViT(model, options.drop_path).train().to(device)
        config = TrainConfig(train_data="none")
        self.mean, self.std = (
            torch.tensor(rgb, device=device).mul(255).view(1, 3, 1, 1) for rgb in (config.mean, config.std)
        )
        self.network, self.criterion = self.model, published_step.token_label_loss
        if "compiled" in name:
            self.network, self.criterion = torch.compile(self.model), torch.compile(self.criterion)
        self.ema = published_step.ModelEma(self.model, DECAY)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, foreach=False, fused=False)

    def synthetic(self, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
        targets = torch.rand(options.batch, options.classes, 2 + math.prod(self.grid), device=self.device).softmax(1)
        return (
            torch.randint(256, (options.batch, 3, options.size, options.size), dtype=torch.uint8, device=self.device),
            targets,
        )

    def step(self, number: int, clock: Clock, images: Tensor, targets: Tensor) -> None:
        inputs = images.float().sub_(self.mean).div_(self.std)
        box = self.model.random_box(*self.grid)  # outside the network, so that compiling it stands a chance
        with autocast(self.device, "auto"):
            loss = self.criterion(self.network(inputs, box), targets, DENSE_WEIGHT)
        clock.mark()
        self.optimizer.zero_grad()
        loss.backward()
        clock.mark()
        self.optimizer.step()
        self.ema.update(self.model)
        loss.item()


def batches(loader: Loader) -> Iterator[tuple[Tensor, ...]]:
    """What a step takes of the loader's batches, without end; they lie on its device."""
    for epoch in itertools.count():
        loader.set_epoch(epoch, next_epoch=epoch + 1)
        for batch in loader:
            yield batch.images, batch.targets, batch.erase, batch.noise


class Dropped:
    """Takes a loader's batches in a thread, as fast as they come, and drops them.

    images: taken so far.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.images, self._error, self._stop = 0, None, threading.Event()
        # A stream of its own, so that the step's does not wait for the batches.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._take, args=(batches(loader),), daemon=True)
        self._thread.start()

    def _take(self, feed: Iterator[tuple[Tensor, ...]]) -> None:
        try:
            with torch.cuda.stream(self._stream), contextlib.closing(feed):
                while not self._stop.is_set():
                    self.images += len(next(feed)[0])
        except Exception as error:  # raised where the step runs
            self._error = error

    def check(self) -> None:
        """Raise what ended the thread."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def work(options: argparse.Namespace) -> None:
    """One contender's process: warms up, then answers every line on standard input with the figures of one round, as
    JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may come between
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
        if options.worker.startswith("tl_fast") or "keeps memory" in options.worker:
            reuse_memory()
    torch.manual_seed(0), np.random.seed(0)
    loader = feed = dropped = None
    if options.worker in (FED, BESIDE):
        loader = Loader(
            options.beton,
            options.batch,
            image_size=options.size,
            grid=token_grid(options.model, img_size=options.size),
            threads=options.loader_threads,
            device=device,
            augment=RECIPE,
        )
        options.classes = loader.num_classes
        if options.worker == FED:
            feed = batches(loader)
        else:
            dropped = Dropped(loader, device)
    model = build_model(
        options.model, img_size=options.size, num_classes=options.classes, drop_path=options.drop_path
    ).train()
    side = (Ours if options.worker.startswith("tl_fast") else Published)(model, options.worker, options, device)
    data = None if feed else side.synthetic(options)
    counters, number = torch._dynamo.utils.counters["stats"], 0
    graphs = 0

    def run(steps: int) -> dict:
        nonlocal number
        clock = Clock(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start, dropped_before = time.perf_counter(), dropped.images if dropped else 0
        for _ in range(steps):
            clock.mark()
            tensors = data or next(feed)
            clock.mark()
            side.step(number, clock, *tensors)
            clock.mark()
            number += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        figures = {"seconds": seconds, "phases": clock.seconds()}
        if dropped:
            dropped.check()
            figures["dropped"] = (dropped.images - dropped_before) / seconds
        return figures

    run(options.warm_up)
    graphs = counters["unique_graphs"]
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        figures = run(options.steps)
        figures["memory"] = (
            torch.cuda.max_memory_allocated()
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        figures["recompiled"] = counters["unique_graphs"] - graphs
        if loader is not None:
            figures["decode"] = loader.decode
        print(json.dumps(figures), file=answers, flush=True)
    if dropped is not None:
        dropped.close()
    if loader is not None:
        loader.close()


def flops(model: str, size: int, classes: int) -> int:
    """FLOPs (2 a multiply-add) of forward and backward pass of one image.

    LV-ViT's are counted on the published modules, which hide no product. Other models' are three times those of the
    forward pass: torch counts the gradients of depthwise convolutions as if they were dense.
    """
    with torch.device("meta"):
        network = build_model(model, img_size=size, num_classes=classes).train()
        images = torch.empty(2, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            if not isinstance(network, LVViT):
                network(images)
                return 3 * counter.get_total_flops() // 2
            cls_logits, token_logits, _ = published_step.PublishedLVViT(network, 0.0)(images, (0, 0, 1, 1))
            (cls_logits.sum() + token_logits.sum()).backward()
    return counter.get_total_flops() // 2


def peak(device: str) -> tuple[float, str]:
    """FLOP/s that the device could do, and where the figure is from."""
    if torch.cuda.is_available():
        for name, rate in PEAK.items():
            if name in device:
                return rate, "data sheet, dense bfloat16"
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(2048, 2048, device=kind, dtype=torch.bfloat16 if kind == "cuda" else torch.float32)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best, "measured: a 2048 x 2048 matrix product"


def cpu_name() -> str:
    """In parentheses after a space, where Linux tells it."""
    with contextlib.suppress(OSError):
        if model := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return f" ({model[1]})"
    return ""


class Contender:
    """A process that answers with the figures of a round whenever it is asked for one."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([*command, "--worker", name], **pipes)

    def __enter__(self) -> Contender:
        if self.process.stdout.readline() != "ready\n":
            self.__exit__()
            raise RuntimeError(f"{self.name} ended before its first round, with its error above")
        return self

    def round(self) -> dict:
        try:
            print("round", file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # there will be no answer
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended in a round, with its error above")
        return json.loads(answer)

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def measured(
    names: list[str], command: list[str], rounds: int, together: bool, failed: list[str]
) -> Iterator[dict[str, list[dict]]]:
    """Figures of all contenders' rounds, of all at once (taking turns) or, when not `together`, of one after the other.
    Those beside which one failed are left out; what happened is added to `failed`."""
    for group in [names] if together else [[name] for name in names]:
        with contextlib.ExitStack() as stack:
            try:
                workers = [stack.enter_context(Contender(name, command)) for name in group]
                turns = [[worker.round() for worker in workers] for _ in range(rounds)]
            except RuntimeError as error:
                failed.append(str(error))
                continue
        yield dict(zip(group, map(list, zip(*turns, strict=True)), strict=True))


def contenders_of(model: str, size: int, options: argparse.Namespace) -> list[str]:
    """The names of a model's contenders. Raises InputError for a model that takes no token labels or no drop path, and
    where no contender is left."""
    with torch.device("meta"):
        network = build_model(model, img_size=size, num_classes=options.classes, drop_path=options.drop_path)
    with_beton = [FED, BESIDE] if options.beton else []
    names = options.contenders or [*(GPU_CONTENDERS if torch.cuda.is_available() else CPU_CONTENDERS), *with_beton]
    if not isinstance(network, LVViT):
        names = [name for name in names if not name.startswith("published style")]
    if not names:
        raise InputError(f"model {model}: of the contenders asked for, the published style is written for LV-ViT alone")
    return names


def compare(model: str, size: int, options: argparse.Namespace) -> list[str]:
    """All contenders on one model; writes their rows and returns which failed. Raises InputError as `contenders_of`
    does."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    torch.set_num_threads(options.threads)
    names = contenders_of(model, size, options)
    facts = {"mean_bytes": mean_bytes(options.beton)} if options.beton else {}
    command = [sys.executable, __file__, "--model", model, "--size", str(size)]
    for flag in ("batch", "steps", "warm_up", "threads", "classes", "drop_path", "loader_threads", "beton"):
        if getattr(options, flag) is not None:
            command += [f"--{flag.replace('_', '-')}", str(getattr(options, flag))]
    top, source = peak(gpu or "")
    torch.cuda.empty_cache()  # of the matrices: the contenders need the memory
    per_image = flops(model, size, options.classes)
    device = f"1 x {gpu}" if gpu else f"{options.threads} threads of {os.cpu_count()} x CPU{cpu_name()}"
    images, begun = options.batch * options.steps, datetime.datetime.now().astimezone()
    rows: list[dict] = []
    failed: list[str] = []
    for rounds in measured(names, command, options.rounds, gpu is None, failed):
        rates = {name: [images / figures["seconds"] for figures in turns] for name, turns in rounds.items()}
        details = {}
        for name, turns in rounds.items():
            phases = [
                statistics.median(1e3 * figures["phases"][i] / options.steps for figures in turns)
                for i in range(len(PHASES))
            ]
            details[name] = {
                "ms": dict(zip(PHASES, (round(ms, 2) for ms in phases), strict=True)),
                "mfu": round(statistics.median(rates[name]) * per_image / top, 4),
                "memory_mb": turns[-1]["memory"] // 1_000_000,
                "recompiled": turns[-1]["recompiled"],
                **({"decode": turns[-1]["decode"], **facts} if "decode" in turns[-1] else {}),
                **({"dropped": round(statistics.median(t["dropped"] for t in turns))} if name == BESIDE else {}),
            }
        rows += write_rows(
            options.results,
            "train",
            rates,
            "images/s",
            PACKAGES,
            details=details,
            run=begun,
            model=model,
            size=size,
            batch=options.batch,
            classes=options.classes,
            gflop_per_image=round(per_image / 1e9, 2),
            peak_tflops=round(top / 1e12, 3),
            peak_source=source,
            device=device,
        )
        ours = next((row for row in rows if row["contender"] == "tl_fast, compiled"), rows[0])
        for row in rows[-len(rounds) :]:
            split = ", ".join(f"{phase} {ms:.1f}" for phase, ms in row["ms"].items())
            print(
                f"{ours['median'] / row['median']:6.2f} times: {ours['contender']} / {row['contender']}; ms {split};"
                f" MFU {row['mfu']:.1%}; {row['memory_mb']:,} MB; recompiled {row['recompiled']}"
                + (f"; {row['dropped']:,} images/s dropped" if "dropped" in row else ""),
                flush=True,
            )
    return failed


def table(results: Path) -> str:
    """The newest rows of every model and device as the Markdown that docs/benchmarks.md shows."""
    newest: dict[tuple, list[dict]] = {}
    for row in map(json.loads, results.read_text().splitlines()):
        key = row["device"], row["model"], row["size"]
        same = newest.get(key) and newest[key][0]["run"] == row["run"]
        newest[key] = [*newest[key], row] if same else [row]
    lines = [
        "| model, batch, device | step | images/s | ms: data / forward / backward / update | MFU | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for (device, model, size), rows in newest.items():
        for row in rows:
            phases = " / ".join(f"{row['ms'][phase]:,.0f}" for phase in PHASES)
            rate = f"{row['median']:,.1f} ({row['min']:,.1f}–{row['max']:,.1f})"
            lines.append(
                f"| {model} {size}, {row['batch']}, {device} | {row['contender']} | {rate} | {phases} "
                f"| {row['mfu']:.0%} | {row['memory_mb']:,} MB |"
            )
    return "\n".join(lines)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = ["lvvit_t:224", "lvvit_s:224", "lvvit_m:224", "lvvit_l:224", "lvvit_s:384"]
    parser.add_argument("--models", nargs="+", default=everything if gpu else everything[:1], metavar="NAME:SIZE")
    parser.add_argument("--batch", type=int, default=256 if gpu else 16, help="images a step; even")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--drop-path", type=float, default=0.1, metavar="RATE", help="0 for models that have none")
    parser.add_argument("--steps", type=int, default=30 if gpu else 2, help="steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--warm-up", type=int, default=12 if gpu else 3, help="steps before the first round, compilation among them"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a step on the CPU")
    parser.add_argument("--beton", help="with label maps; adds a contender that is fed from it")
    parser.add_argument("--loader-threads", type=int)
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table of docs/benchmarks.md, measure nothing")
    for flag, kind in (("--worker", str), ("--model", str), ("--size", int)):  # of the processes that this one starts
        parser.add_argument(flag, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(table(options.results))
    elif options.worker:
        work(options)
    else:
        failed = []
        for model, _, size in (name.rpartition(":") for name in options.models):
            try:
                failed += [f"{model} at {size} px: {reason}" for reason in compare(model, int(size), options)]
            except InputError as error:
                failed.append(str(error))
        if failed:
            raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
