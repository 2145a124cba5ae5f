"""Which share of a training run lies outside its steps, when an epoch's steps take 17 seconds?

    python benchmarks/outside_steps.py [--images FOLDER] [--epoch-seconds 17] [--rounds 5]

The real training loop runs on the CPU with LV-ViT-S: its 26 M weights, their moving average and AdamW's moments go to
disk after every epoch. A step sleeps in place of forward and backward pass. Two threads decode 16 images a batch, so
they do what 16 threads of a GPU's rank do for 128. The validation set is an eighth of the 6,250 images that one of 8
ranks has of ImageNet's 50,000; its forward pass keeps a simulated device busy for eight times as many, while the host
goes on as it does with a GPU. --forward is one image through one model: 36 us is a third of a step at 9,200 images/s.
The order of ImageNet's 1,281,167 training samples is drawn.

Outside steps is the time from the end of an epoch's last step to the arrival of the next epoch's first batch. Ends of
epochs take turns: "before" decodes the validation set for each of two passes, waits until the checkpoint is on disk,
and draws the order when the epoch starts; "now" is the loop as it is. (Before, validation was not compiled either; here
its forward pass is as long in both.) "Slower steps" is what the steps of the epoch that follows, in which "now" writes
the checkpoint, took beyond their median.
Rows go to benchmarks/results/outside_steps.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from loaders import CLASSES, build, find_images
from rows import ROOT, write_rows
from torch import Tensor, nn

from tl_fast.pipeline import planner
from tl_fast.system.memory import reuse_memory
from tl_fast.training import accuracy as evaluation
from tl_fast.training import classification, loop
from tl_fast.training.checkpoint_writer import CheckpointWriter
from tl_fast.training.config import TrainConfig
from tl_fast.training.meter import Meter

BATCH, STEPS = 16, 68  # images a step, steps an epoch
SCALE = 8  # images of a GPU's rank that one image here stands for: 16 threads there, 2 here
VALIDATION = 50_000 // 8 // SCALE
IMAGENET = 1_281_167
PARTS = ("validation", "checkpoint", "order and first batch")
PACKAGES = ("torch", "safetensors", "numpy")


class SimulatedStep(nn.Module):
    """A step that sleeps. The first one gives every weight a gradient, so that all have moments; later ones the
    first."""

    def __init__(self, model: nn.Module, seconds: float) -> None:
        super().__init__()
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.seconds, self.differentiated = seconds, self.weights

    def forward(self, *_: Tensor | None) -> tuple[Tensor, Tensor]:
        time.sleep(self.seconds)
        loss = 0 * torch.stack([weight.sum() for weight in self.differentiated]).sum()
        self.differentiated = self.weights[:1]
        return loss, torch.zeros(2)


class SimulatedDevice:
    """Computes one thing after the other while the host goes on."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def begin(self, seconds: float) -> None:
        self._free_at = max(self._free_at, time.perf_counter()) + seconds

    def wait(self) -> None:
        time.sleep(max(self._free_at - time.perf_counter(), 0))


class Ends:
    """Watches the ends of a run's epochs, and makes every other one as it was before.

    outside: of every end, its parts in seconds by name, and `all` of the time. steps: of every epoch, the seconds of
    its steps.
    """

    def __init__(self) -> None:
        self.outside: list[dict[str, float]] = []
        self.steps: list[list[float]] = []
        self._parts: dict[str, float] = {}
        self._clock = time.perf_counter()

    def as_before(self, epoch: int) -> bool:
        """Whether the end at which `epoch` begins is as it was before."""
        return epoch % 2 == 0

    @property
    def next_epoch(self) -> int:
        """The epoch that begins next, or that is under way and has had no batch."""
        return len(self.steps)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - start

    def epoch_has_begun(self) -> None:
        now = time.perf_counter()
        if self.steps:
            self.outside.append({**self._parts, "all": now - self._clock})
        self._parts, self._clock = {}, now
        self.steps.append([])

    def step_has_ended(self) -> None:
        now = time.perf_counter()
        self.steps[-1].append(now - self._clock)
        self._clock = now

    def watch(self, step_seconds: float, forward_seconds: float) -> None:
        """Simulate steps and validation's forward pass, and take the times of a run's parts."""
        fetch, end_step, save = Meter.fetch, Meter.end_step, CheckpointWriter.save
        validate, is_best, epoch_order = classification.validate, loop._is_best, planner.epoch_order

        def fetched(meter: Meter):
            if self.steps and len(self.steps[-1]) < STEPS:
                return fetch(meter)
            with self.part("order and first batch"):
                if self.as_before(self.next_epoch):
                    epoch_order(0, 0, IMAGENET)
                batch = fetch(meter)
            self.epoch_has_begun()
            return batch

        def ordered(seed: int, epoch: int, count: int):
            if not self.as_before(epoch):
                epoch_order(seed, epoch, IMAGENET)
            return epoch_order(seed, epoch, count)

        def stepped(meter: Meter) -> None:
            end_step(meter)
            self.step_has_ended()

        def saved(writer: CheckpointWriter, **state) -> None:
            with self.part("checkpoint"):
                save(writer, **state)
                if self.as_before(self.next_epoch):
                    writer.wait()

        def compared(*arguments) -> bool:
            with self.part("checkpoint"):
                return is_best(*arguments)

        def validated(raw, averaged, batches, ranks, agreement) -> dict[str, float]:
            with self.part("validation"):
                if not self.as_before(self.next_epoch):
                    metrics = validate(raw, averaged, batches, ranks, agreement)
                    device.wait()
                    return metrics
                batches.loader.set_epoch(0)
                for classifier in (raw, averaged):
                    evaluation.accuracy([classifier], agreement.until_stopped(batches.loader), ranks)
                    device.wait()
                return {"val_top1_raw": 0.0, "val_top1_ema": 0.0}

        def classified(_: evaluation.Classifier, images: Tensor) -> Tensor:
            device.begin(forward_seconds * len(images))
            return torch.zeros(len(images), CLASSES)

        device = SimulatedDevice()
        Meter.fetch, Meter.end_step, CheckpointWriter.save = fetched, stepped, saved
        classification.validate, loop._is_best, planner.epoch_order = validated, compared, ordered
        classification.build_step = lambda model, *_: SimulatedStep(model, step_seconds)
        evaluation.Classifier.__call__ = classified


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=Path, default=ROOT / "tests" / "photos", help="folder of JPEGs (default: the bundled photos)"
    )
    parser.add_argument("--epoch-seconds", type=float, default=17.0, help="of an epoch's steps together")
    parser.add_argument("--forward", type=float, default=36.0, help="us an image of validation's forward pass")
    parser.add_argument("--rounds", type=int, default=5, help="ends of epochs of each kind")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "outside_steps.jsonl")
    arguments = parser.parse_args()
    files = find_images(arguments.images)
    reuse_memory()
    ends = Ends()
    ends.watch(arguments.epoch_seconds / STEPS, 1e-6 * arguments.forward * SCALE)
    with tempfile.TemporaryDirectory() as folder:
        train, val = Path(folder) / "train.beton", Path(folder) / "val.beton"
        for beton, count in ((train, BATCH * STEPS), (val, VALIDATION)):
            build(beton, [files[i % len(files)] for i in range(count)])
        config = TrainConfig(
            train_data=str(train),
            val_data=str(val),
            output_dir=str(Path(folder) / "run"),
            model="lvvit_s",
            batch_size=BATCH,
            epochs=2 * arguments.rounds + 2,  # the first end is not counted, and the last epoch has none
            cooldown_epochs=0,
            warmup_epochs=0,
            threads=2,
            device="cpu",
        )
        loop.train(config)
    report(ends, arguments)


def report(ends: Ends, arguments: argparse.Namespace) -> None:
    """Write the rows of all ends but the first."""
    shares: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    for epoch in range(2, len(ends.steps)):
        outside, following = ends.outside[epoch - 1], ends.steps[epoch]
        name = "before" if ends.as_before(epoch) else "now"
        shares.setdefault(name, []).append(100 * outside["all"] / (outside["all"] + sum(following)))
        slower = sum(following) - len(following) * statistics.median(following)
        values = {part: outside.get(part, 0.0) for part in PARTS}
        values |= {"other": outside["all"] - sum(values.values()), "slower steps": slower}
        for part, seconds in values.items():
            parts.setdefault(f"{name}: {part}", []).append(1e3 * seconds)
    facts = dict(
        images=arguments.images.name,
        epoch_seconds=arguments.epoch_seconds,
        forward_us=arguments.forward,
        run=datetime.datetime.now().astimezone(),
    )
    write_rows(arguments.results, "outside_steps", shares, "% outside steps", PACKAGES, **facts)
    write_rows(arguments.results, "outside_steps", parts, "ms", PACKAGES, **facts)


if __name__ == "__main__":
    main()
