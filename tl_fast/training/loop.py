"""The training loop: steps, validation, checkpoints.

One step is a global batch of `batch_size` images. Everything random in it (order, crops, MixToken's box, mixup, drop
path) is a function of (seed, epoch, step) and, for drop path, the rank: a run continues from a checkpoint as if it had
never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tl_fast.models.normalise import resolved_dtype
from tl_fast.pipeline.batch_loader import BatchLoader
from tl_fast.system.ranks import Ranks, join
from tl_fast.training import checkpoint
from tl_fast.training.checkpoint_writer import CheckpointWriter
from tl_fast.training.classification import Classification
from tl_fast.training.config import TrainConfig
from tl_fast.training.learner import Learner, build_learner
from tl_fast.training.lock import sole_writer
from tl_fast.training.meter import Meter
from tl_fast.training.network import compiles
from tl_fast.training.nonfinite import NonFinite
from tl_fast.training.optimiser import highest_lr
from tl_fast.training.progress import Progress
from tl_fast.training.read_config import save_config
from tl_fast.training.record import complete_record, versions, write_record
from tl_fast.training.resume import choose, identify, resume
from tl_fast.training.run_config import RunConfig
from tl_fast.training.runlog import RunLog
from tl_fast.training.segment_config import SegmentConfig
from tl_fast.training.segment_task import Segmentation
from tl_fast.training.stopping import Agreement, StopSignals
from tl_fast.training.task import Task

_TASKS: dict[type[RunConfig], type[Task]] = {TrainConfig: Classification, SegmentConfig: Segmentation}


def train(config: RunConfig) -> dict[str, Any]:
    """Run the training that `config` describes; every rank of a torchrun job calls it.

    Returns a summary: `steps`, `epochs` (finished), `loss` (mean of the last window logged), `val_top1_ema`,
    `val_top1_raw` (percent, last validation; None without val_data), `best_top1` (of the kept checkpoints' better
    weights; these three are `val_miou_ema`, `val_miou_raw` and `best_miou` in segmentation), `images_per_second` (over
    all ranks, without validation), `data_wait` (share of that time), `skipped` (steps), `stopped` (number of the signal
    that ended it early, after a checkpoint; 0: none), `checkpoint`, `best_checkpoint`, `metrics` (paths).

    Raises InputError (a ValueError) for data or options that do not fit one another, FileNotFoundError for missing
    data, CheckpointError for a checkpoint that cannot be resumed: what any rank meets before the first step, all raise.
    Later NonFiniteError (see nonfinite), DecodeError naming a damaged sample, OSError when a checkpoint cannot be
    written.
    """
    with contextlib.ExitStack() as stack:
        if config.deterministic:
            stack.enter_context(deterministic())
            if config.decode == "auto":  # which measures, and nvJPEG's pixels differ from the CPU's
                config = dataclasses.replace(config, decode="cpu")
        ranks = stack.enter_context(join(config.device, config.timeout_minutes))
        task = _TASKS[type(config)](config, ranks)
        stack.callback(task.close)
        task.open()
        ranks.on_main(stack.enter_context, sole_writer(Path(config.output_dir)))
        # Left before the lock is: it waits for the checkpoint being written.
        writer = stack.enter_context(CheckpointWriter(Path(config.output_dir) / "checkpoints", config.keep))
        # Innermost, so that a failing process takes signals as any other while the rest is torn down.
        agreement = Agreement(ranks, stack.enter_context(StopSignals()), config.checkpoint_minutes)
        return _run(task, writer, agreement)


def _run(task: Task, writer: CheckpointWriter, agreement: Agreement) -> dict[str, Any]:
    """`train` on a task whose data are open. `progress` alone says how far the run is; the other names of the set-up
    keep their values, but for `saved_step`, the step of the newest checkpoint."""
    # Set-up
    config, ranks, train_loader = task.config, task.ranks, task.train_loader
    folder = Path(config.output_dir)
    steps_per_epoch = len(train_loader) // config.accumulate
    milestones = config.milestones(steps_per_epoch)
    end = milestones.end
    chosen = choose(config, ranks)
    learner, remarks = build_learner(task, steps_per_epoch, load_init_weights=chosen is None)
    model, ema, optimizer = learner.model, learner.ema, learner.optimizer

    # Resume
    samples = train_loader.samples
    facts = {  # what a checkpoint tells besides its progress
        "steps_per_epoch": steps_per_epoch,
        "order_groups": train_loader.groups,
        "data": identify(samples),
        "config": config.to_dict(),
        "task": task.name,
        "class_names": task.class_names,
        "score_metrics": task.score_metrics,
        "versions": versions(ranks),
    }
    progress = resume(chosen, config, ranks, facts, learner)
    begun = saved_step = progress.global_step
    # What a step calls; validation, moving average and checkpoints use the bare model.
    network = task.build_step(model)
    task.prepare_validation(model, ema.module)
    ranks.on_main(_record_start, config, begun, facts["versions"], _resolved(config, ranks, train_loader))
    guard = NonFinite(ranks, config.non_finite, config.max_skipped, folder, samples.name, progress.skipped)

    with RunLog(folder, end, start_step=begun, enabled=ranks.main) as log:
        meter = Meter(ranks, guard, log, config, task.loss_terms)
        for remark in remarks:
            log.message(remark)
        log.message(
            f"{task.network_in_words}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
            f" parameters; {len(samples)} samples, {steps_per_epoch} steps an epoch; {ranks.world_size} x"
            f" {ranks.device.type}; from step {begun} to {end}"
        )
        while True:
            # At a pause, or where a run starts: validate and save what is due
            unsaved, improved = saved_step != progress.global_step, False
            if progress.global_step and not agreement.now():
                if task.val_loader is not None and milestones.validation_is_due(progress):
                    metrics = task.validate(agreement)
                    if not agreement.now():  # else the metrics are of a part of the set
                        progress.last_validation, progress.validated, unsaved = metrics, True, True
                        improved = ranks.on_main(_is_best, writer, progress.global_step, metrics, task.score_metrics)
                        log.row("val", progress.global_step, progress.epoch, metrics, task.in_words(metrics))
            if unsaved and (agreement.now() or milestones.checkpoint_is_due(progress, improved)):
                _save(writer, ranks, learner, progress, guard, facts)
                agreement.saved()
                saved_step = progress.global_step
            if progress.global_step >= end or agreement.now():
                break

            # Epoch, or what comes of it before the next pause
            pause, end_of_epoch = milestones.pause(progress), milestones.end_of_epoch(progress)
            goes_on = pause == end_of_epoch < end
            train_loader.set_epoch(
                progress.epoch,
                start_step=progress.step_in_epoch * config.accumulate,
                stop_step=steps_per_epoch * config.accumulate,
                next_epoch=progress.epoch + 1 if goes_on else None,
            )
            task.set_train(model)
            with meter.epoch(train_loader):
                while progress.global_step < pause and not agreement.stop:
                    # Step
                    step = progress.global_step
                    seed_step(config.seed, step, ranks.rank)
                    learner.schedule.step_update(step)
                    guard.keep(model)
                    drawn = task.draw(progress, model)
                    for number in range(1, config.accumulate + 1):
                        arguments = task.arguments(meter.fetch(), drawn)
                        last = number == config.accumulate
                        with contextlib.nullcontext() if last or ranks.world_size == 1 else network.no_sync():
                            loss, terms = network(*arguments)
                            (loss / config.accumulate).backward()
                        meter.add_loss(loss.detach(), terms)
                    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
                    bad = meter.add_step(step, progress.epoch, highest_lr(optimizer), norm)
                    if bad is not None:
                        guard.restore(model, bad)
                        optimizer.found_inf = bad  # what torch's GradScaler sets: the fused step then changes nothing
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    guard.update_unless(bad, ema.module, lambda step=step: ema.update(model, step=step + 2))
                    progress.end_step()
                    log.advance(progress.global_step, progress.epoch)
                    meter.end_step()

                    # Save before the pause
                    writer.check()
                    due = agreement.after_step() or milestones.checkpoint_is_due_between(progress)
                    if due and progress.global_step < pause and not agreement.stop:
                        with meter.saving():
                            _save(writer, ranks, learner, progress, guard, facts)
                            agreement.saved()
                        saved_step = progress.global_step
            if progress.step_in_epoch == steps_per_epoch:
                progress.end_epoch()
            ranks.average_buffers(model, ema.module)

        # End
        agreement.finish()
        ranks.on_main(writer.wait)
        if ranks.main and progress.global_step > begun:
            # The loader decides about decode "auto" in the first steps.
            complete_record(folder, _resolved(config, ranks, train_loader))
        summary = _summary(folder, task, progress, meter, guard, agreement.stop)
        if agreement.stop:
            name = signal.Signals(agreement.stop).name
            log.message(f"{name}: stopped after step {progress.global_step} of {end}; continue with --resume auto")
        log.message(f"{'stopped' if agreement.stop else 'done'}: {summary}")
    return summary


def _resolved(config: RunConfig, ranks: Ranks, train_loader: BatchLoader) -> dict[str, Any]:
    """What came of the config's "auto" and null."""
    return {
        "device": str(ranks.device),
        "world_size": ranks.world_size,
        "dtype": resolved_dtype(ranks.device, config.dtype),
        "compile": compiles(config, ranks.device),
        "threads": train_loader.threads,
        "decode": train_loader.decode,
        "hybrid_share": train_loader.hybrid_share,
    }


def _record_start(config: RunConfig, step: int, running_on: dict[str, str | None], resolved: dict[str, Any]) -> None:
    folder = Path(config.output_dir)
    save_config(config, folder / "config.yaml")
    write_record(folder, config, step, running_on, resolved)


def _save(
    writer: CheckpointWriter,
    ranks: Ranks,
    learner: Learner,
    progress: Progress,
    guard: NonFinite,
    facts: dict[str, Any],
) -> None:
    """Begin to write the checkpoint of this moment, with metrics if they are of these weights. Every rank calls it.
    facts: what meta.json holds besides progress."""
    model, ema = learner.model, learner.ema.module
    ranks.average_buffers(model, ema)
    if not ranks.main:
        return
    metrics = progress.last_validation if progress.validated else {}
    meta = {**dataclasses.asdict(progress), "skipped": guard.skipped, "metrics": metrics, **facts}
    writer.save(model=model, ema=ema, optimizer=learner.optimizer, meta=meta)


def _summary(
    folder: Path, task: Task, progress: Progress, meter: Meter, guard: NonFinite, stopped: int
) -> dict[str, Any]:
    """What `train` returns; every rank calls it."""
    ranks = task.ranks
    speed, data_wait = meter.speed()
    step = progress.global_step
    kept = _newest_and_best(folder / "checkpoints", step) if ranks.main else None
    newest, best, best_score = ranks.from_main(kept)
    return {
        "steps": step,
        "epochs": progress.epoch,
        "loss": meter.row.get("loss"),
        **task.summary(progress.last_validation, best_score),
        "images_per_second": speed,
        "data_wait": data_wait,
        "skipped": guard.skipped,
        "stopped": stopped,
        "checkpoint": newest,
        "best_checkpoint": best,
        "metrics": str(meter.log.path),
    }


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch (drop path's source) for one step on one rank, so that no generator state has to survive a restart."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Inside, torch uses operations with repeatable results only, and raises RuntimeError for one that has none."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[1:]


def _is_best(writer: CheckpointWriter, step: int, metrics: dict[str, float], score_metrics: tuple[str, ...]) -> bool:
    """Whether metrics just found are better than those of every checkpoint before this step; the others are what the
    run fell back from. Waits for the one being written."""
    writer.wait()
    best = checkpoint.best(writer.folder, checkpoint.path_of(writer.folder, step - 1))
    score = checkpoint.score({"metrics": metrics, "score_metrics": score_metrics})
    return best is None or score > checkpoint.score(checkpoint.read_meta(best))


def _newest_and_best(folder: Path, step: int) -> tuple[str | None, str | None, float | None]:
    """Paths of the newest and of the best checkpoint up to a step, and the best one's score; None for what there is
    not."""
    last = checkpoint.path_of(folder, step)
    newest, best = checkpoint.checkpoints(folder, last)[-1:], checkpoint.best(folder, last)
    return (
        str(newest[0]) if newest else None,
        str(best) if best else None,
        checkpoint.score(checkpoint.read_meta(best)) if best else None,
    )
