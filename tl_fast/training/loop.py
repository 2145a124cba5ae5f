"""The training loop: loaders, model, optimiser, steps, validation, checkpoints.

One step is a global batch of `batch_size` images. Everything random in it (order, crops, MixToken's box, drop path) is
a function of (seed, epoch, step) and, for drop path, the rank: a run continues from a checkpoint as if it had never
stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.utils import ModelEmaV3

from tl_fast.models.loss import TokenLabelLoss
from tl_fast.models.normalise import Normalise, resolved_dtype
from tl_fast.models.step import TrainStep, compiled
from tl_fast.pipeline.loader import Loader
from tl_fast.plan.records import mix_box
from tl_fast.system.mistakes import InputError
from tl_fast.system.ranks import Ranks, join
from tl_fast.training import checkpoint
from tl_fast.training.accuracy import accuracy, check_labels
from tl_fast.training.config import TrainConfig, save_config
from tl_fast.training.lock import sole_writer
from tl_fast.training.meter import Meter
from tl_fast.training.network import build_network
from tl_fast.training.nonfinite import NonFinite
from tl_fast.training.optimiser import build_optimizer, build_schedule
from tl_fast.training.record import complete_record, versions, write_record
from tl_fast.training.resume import choose, identify, resume
from tl_fast.training.runlog import RunLog
from tl_fast.training.stopping import Agreement, StopSignals

# What torch before 2.13 calls broadcast_buffers, and later ones warn of.
_DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_BUFFER_SYNC = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"


def train(config: TrainConfig) -> dict[str, Any]:
    """Run the training that `config` describes; every rank of a torchrun job calls it.

    Returns a summary: `steps`, `epochs` (finished), `loss` (mean of the last window logged), `val_top1_ema`,
    `val_top1_raw` (percent, last validation; None without val_data), `best_top1` (of the kept checkpoints' better
    weights), `images_per_second` (over all ranks, without validation), `data_wait` (share of that time), `skipped`
    (steps), `stopped` (number of the signal that ended it early, after a checkpoint; 0: none), `checkpoint`,
    `best_checkpoint`, `metrics` (paths).

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
        train_loader, val_loader = ranks.agree(make_loaders, config, ranks)
        for loader in filter(None, (train_loader, val_loader)):
            stack.callback(loader.close)
        config = dataclasses.replace(config, num_classes=config.num_classes or train_loader.num_classes)
        ranks.agree(check_data, config, train_loader, val_loader)
        ranks.on_main(stack.enter_context, sole_writer(Path(config.output_dir)))
        # Innermost, so that a failing process takes signals as any other while the rest is torn down.
        agreement = Agreement(ranks, stack.enter_context(StopSignals()), config.checkpoint_minutes)
        return _run(config, ranks, train_loader, val_loader, agreement)


def _run(
    config: TrainConfig, ranks: Ranks, train_loader: Loader, val_loader: Loader | None, agreement: Agreement
) -> dict[str, Any]:
    folder, device = Path(config.output_dir), ranks.device
    steps_per_epoch = len(train_loader) // config.accumulate
    end = min(config.total_epochs * steps_per_epoch, config.max_steps or math.inf)

    found = choose(config, ranks)
    torch.manual_seed(config.seed)
    model = ranks.agree(build_network, config)
    remarks = _load_initial(model, config, ranks) if config.init_weights and found is None else []
    if not config.token_label:
        silence_token_head(model)
    model.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)
    if config.compile_mode != "default" and device.type == "cpu":
        remarks.append(f"compile_mode {config.compile_mode} has no effect on the CPU")
    if config.sync_bn and ranks.world_size == 1:
        remarks.append("sync_bn has no effect on one rank, whose statistics are everybody's")
    elif config.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    criterion = TokenLabelLoss(config.cls_weight, config.dense_weight if config.token_label else 0.0)
    # With these two, timm's warm-up is min(decay, (1 + t) / (10 + t)) at step t, when told step t + 2.
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True, warmup_gamma=9, warmup_power=1)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, steps_per_epoch)
    data, running_on = identify(train_loader.samples), versions(ranks)
    progress = resume(found, config, ranks, steps_per_epoch, data, model=model, ema=ema.module, optimizer=optimizer)
    step, epoch, step_in_epoch, metrics = (
        progress[name] for name in ("global_step", "epoch", "step_in_epoch", "last_validation")
    )

    # What a step calls; validation, EMA and checkpoints use the bare model.
    network: nn.Module = TrainStep(model, criterion, Normalise(config.mean, config.std).to(device), config.dtype)
    if compiles(config, device):
        network = compiled(network, device, config.compile_mode)
    if ranks.world_size > 1:
        # Batch norm's statistics stay local during an epoch; average_buffers brings them together at its end. DDP goes
        # around the compiled
        # module: the other way round its own forward breaks the graph.
        network = DistributedDataParallel(
            network,
            gradient_as_bucket_view=True,
            static_graph=config.accumulate == 1,
            bucket_cap_mb=config.bucket_mb,
            **{_BUFFER_SYNC: False},
        )

    def resolved() -> dict[str, Any]:
        """What came of the config's "auto" and null."""
        return {
            "device": str(device),
            "world_size": ranks.world_size,
            "dtype": resolved_dtype(device, config.dtype),
            "compile": compiles(config, device),
            "threads": train_loader.threads,
            "decode": train_loader.decode,
        }

    def record_start() -> None:
        save_config(config, folder / "config.yaml")
        write_record(folder, config, step, running_on, resolved())

    ranks.on_main(record_start)

    guard = NonFinite(
        ranks, config.non_finite, config.max_skipped, folder, train_loader.samples.name, progress["skipped"]
    )
    meter = Meter(ranks, guard, config.batch_size, config.accumulate)
    saved, validated = (step, progress["validated"]) if step else (0, False)
    improved = False  # by the last validation, over all checkpoints

    def save(validated: bool) -> None:
        """Write the checkpoint of this moment, with the metrics if they are of these weights."""
        ranks.average_buffers(model, ema.module)
        if ranks.main:
            position = {
                "global_step": step,
                "epoch": epoch,
                "step_in_epoch": step_in_epoch,
                "steps_per_epoch": steps_per_epoch,
                "last_validation": metrics,
                "validated": validated,
                "skipped": guard.skipped,
                "data": data,
            }
            record = {
                "metrics": metrics if validated else {},
                "config": config.to_dict(),
                "class_names": train_loader.samples.class_names,
                "versions": running_on,
            }
            checkpoint.prune(
                checkpoint.save(
                    folder / "checkpoints", model=model, ema=ema.module, optimizer=optimizer, meta=position | record
                ),
                config.keep,
            )
        agreement.saved()

    with RunLog(folder, end, start_step=step, enabled=ranks.main) as log:
        for remark in remarks:
            log.message(remark)
        log.message(
            f"{config.model} at {config.img_size} px, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
            f" parameters; {len(train_loader.samples)} samples, {steps_per_epoch} steps an epoch; {ranks.world_size} x"
            f" {device.type}; from step {step} to {end}"
        )
        while True:
            # Between epochs, or where a run starts or ends: weights that are due are validated, and saved.
            whole = step_in_epoch == 0
            if step and not agreement.now():
                if (
                    val_loader is not None
                    and not validated
                    and (step == end or whole and epoch % config.eval_every == 0)
                ):
                    found = validate(model, ema.module, val_loader, ranks, config, agreement)
                    if not agreement.now():  # else the figures are of a part of the set
                        metrics, validated, saved = found, True, -1
                        improved = ranks.on_main(_is_best, folder / "checkpoints", step, metrics)
                        log.row(
                            "val",
                            step,
                            epoch,
                            metrics,
                            f"val top-1 {metrics['val_top1_ema']:.1f} % (EMA), {metrics['val_top1_raw']:.1f} % (raw)",
                        )
            if saved != step and (
                agreement.now()
                or step == end
                or whole
                and (epoch % config.checkpoint_every == 0 or validated and improved)
            ):
                save(validated)
                saved = step
            if step >= end or agreement.now():
                break
            train_loader.set_epoch(epoch, step_in_epoch * config.accumulate)
            set_train(model, config)
            meter.start()
            with contextlib.closing(iter(train_loader)) as batches:
                while step_in_epoch < steps_per_epoch and step < end and not agreement.stop:
                    seed_step(config.seed, step, ranks.rank)
                    schedule.step_update(step)
                    guard.keep(model)
                    box = None
                    if config.mix_token:
                        box = torch.from_numpy(mix_box(config.seed, epoch, step_in_epoch, config.grid)).to(
                            device, non_blocking=True
                        )
                    for micro in range(1, config.accumulate + 1):
                        batch = meter.fetch(batches)
                        images, labels = (
                            batch.images.to(device, non_blocking=True),
                            batch.labels.to(device, non_blocking=True),
                        )
                        truth = (
                            smoothed_one_hot(labels, config) if config.ground_truth or not config.token_label else None
                        )
                        targets = batch.targets.to(device, non_blocking=True) if config.token_label else truth
                        erased = (
                            (part.to(device, non_blocking=True) for part in (batch.erase, batch.noise))
                            if batch.erase is not None
                            else ()
                        )
                        with (
                            network.no_sync()
                            if ranks.world_size > 1 and micro < config.accumulate
                            else contextlib.nullcontext()
                        ):
                            loss, terms = network(images, targets, box, truth if config.ground_truth else None, *erased)
                            (loss / config.accumulate).backward()
                        meter.add_loss(loss.detach(), terms)
                    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
                    bad = meter.add_step(step, epoch, optimizer.param_groups[0]["lr"], norm)
                    if bad is not None:
                        guard.restore(model, bad)
                        optimizer.found_inf = bad  # what torch's GradScaler sets: the fused step then changes nothing
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    guard.update_unless(bad, ema.module, lambda step=step: ema.update(model, step=step + 2))
                    step, step_in_epoch, validated = step + 1, step_in_epoch + 1, False
                    log.advance(step, epoch)
                    meter.report(log)
                    if step % config.log_every == 0:
                        meter.close(step)
                    due = (
                        agreement.after_step()
                        or config.checkpoint_steps is not None
                        and step % config.checkpoint_steps == 0
                    )
                    if due and step_in_epoch < steps_per_epoch and step < end and not agreement.stop:
                        with meter.paused():
                            meter.check(log)
                            save(validated=False)
                            saved = step
            meter.close(step)
            meter.report(log)  # raises if a step was not finite, so poisoned weights get no further than here
            if step_in_epoch == steps_per_epoch:
                epoch, step_in_epoch = epoch + 1, 0
            ranks.average_buffers(model, ema.module)
        agreement.finish()
        if ranks.main and step > progress["global_step"]:
            complete_record(folder, resolved())  # the loader decides about decode='auto' with its first batch
        speed, data_wait = meter.speed()
        newest, best, best_top1 = ranks.from_main(
            _newest_and_best(folder / "checkpoints", step) if ranks.main else None
        )
        summary = {
            "steps": step,
            "epochs": epoch,
            "loss": meter.row.get("loss"),
            "val_top1_ema": metrics.get("val_top1_ema"),
            "val_top1_raw": metrics.get("val_top1_raw"),
            "best_top1": best_top1,
            "images_per_second": speed,
            "data_wait": data_wait,
            "skipped": guard.skipped,
            "stopped": agreement.stop,
            "checkpoint": newest,
            "best_checkpoint": best,
            "metrics": str(log.path),
        }
        if agreement.stop:
            log.message(
                f"{signal.Signals(agreement.stop).name}: stopped after step {step} of {end}; continue with --resume"
                " auto"
            )
        log.message(f"{'stopped' if agreement.stop else 'done'}: {summary}")
    return summary


def _load_initial(model: nn.Module, config: TrainConfig, ranks: Ranks) -> list[str]:
    """Load init_weights on rank 0, which passes them on: the others need not see the file. Remarks on what was
    adapted."""
    remarks = ranks.on_main(lambda: checkpoint.load_weights(model, checkpoint.find(Path(config.init_weights))))
    ranks.fill_from_main(model.state_dict().values())
    return remarks


def make_loaders(config: TrainConfig, ranks: Ranks) -> tuple[Loader, Loader | None]:
    """The training and validation loaders of this rank. Raises ValueError when settings do not fit the number or kind
    of ranks, FileNotFoundError."""
    per_rank, rest = divmod(config.batch_size, ranks.world_size * config.accumulate)
    if rest:
        raise InputError(
            f"batch_size {config.batch_size} must be a multiple of {ranks.world_size} ranks x accumulate "
            f"{config.accumulate}"
        )
    if per_rank == 1 and config.mix_token:
        raise InputError(
            f"mix_token mixes the images of a rank's pass, and batch_size {config.batch_size} over "
            f"{ranks.world_size} ranks x accumulate {config.accumulate} leaves one: raise batch_size, or "
            "set mix_token false"
        )
    if config.sync_bn and ranks.device.type != "cuda":
        raise InputError(
            f"sync_bn needs GPUs (torch's SyncBatchNorm has no CPU version): device is {ranks.device.type}"
        )
    if config.bucket_mb < 1 and ranks.world_size > 1 and compiles(config, ranks.device):
        raise InputError(
            f"bucket_mb {config.bucket_mb} is below 1, the size of the first bucket at which torch cuts "
            "a compiled step on several ranks: raise it, or set compile false"
        )
    common = dict(
        image_size=config.img_size,
        grid=config.grid,
        seed=config.seed,
        threads=config.threads,
        decode=config.decode,
        device=ranks.device,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    train_loader = Loader(
        config.train_data,
        per_rank,
        augment=config.augment,
        geometry=config.geometry,
        smoothing=config.smoothing,
        token_labels=config.token_label,
        **common,
    )
    val_loader = (
        Loader(config.val_data, per_rank, train=False, crop_pct=config.crop_pct, **common) if config.val_data else None
    )
    return train_loader, val_loader


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether the training step is compiled: by default on GPUs."""
    return device.type == "cuda" if config.compile is None else config.compile


def check_data(config: TrainConfig, train_loader: Loader, val_loader: Loader | None) -> None:
    """Refuse at the start what would fail, or silently mislead, later. Raises ValueError naming the file and the
    remedy."""
    files = ", ".join(map(str, train_loader.samples.paths))
    if config.token_label and train_loader.samples.spec is None:
        raise InputError(
            f"{files} has no label maps: convert with --label-maps DIR, or train on image labels alone "
            "with --token_label false"
        )
    check_labels(train_loader, config.num_classes)
    if len(train_loader) < config.accumulate:
        raise InputError(
            f"{files} has {len(train_loader.samples)} samples, less than one global batch of "
            f"{config.batch_size}: lower batch_size"
        )
    if val_loader is not None:
        check_labels(val_loader, config.num_classes)
        names, val_names = train_loader.samples.class_names, val_loader.samples.class_names
        if names and val_names and names != val_names:
            raise InputError(
                f"val_data has the classes {val_names[:5]}..., train_data {names[:5]}...: convert both "
                "with the same class list"
            )


def silence_token_head(model: nn.Module) -> None:
    """Zero and freeze the token head: untrained, its maximum would be noise in the eval logits (class + 0.5 * max over
    tokens)."""
    for parameter in model.aux_head.parameters():
        nn.init.zeros_(parameter)
        parameter.requires_grad_(False)


def set_train(model: nn.Module, config: TrainConfig) -> None:
    """Train mode, but with freeze_stem_bn batch norms stay in eval mode (their scale and shift still learn)."""
    model.train()
    if config.freeze_stem_bn:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch (drop path's source) for one step on one rank, so that no generator state has to survive a restart."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def smoothed_one_hot(labels: Tensor, config: TrainConfig) -> Tensor:
    """labels int64 [B] -> float32 [B,C]: one-hot * (1 - s) + s / C."""
    return F.one_hot(labels, config.num_classes) * (1 - config.smoothing) + config.smoothing / config.num_classes


def validate(
    model: nn.Module, ema: nn.Module, loader: Loader, ranks: Ranks, config: TrainConfig, agreement: Agreement
) -> dict[str, float]:
    """Accuracy of both sets of weights over all ranks: val_top1_raw, val_top5_raw, val_loss_raw, val_top1_ema, ...
    (percent, nats).

    Ends early, with figures of no meaning, when a signal arrives.
    """
    result = {}
    for name, module in (("raw", model), ("ema", ema)):
        values = accuracy(module, agreement.until_stopped(loader), ranks, config)
        result |= {f"val_{key}_{name}": values[key] for key in ("top1", "top5", "loss")}
    return result


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


def _is_best(folder: Path, step: int, metrics: dict[str, float]) -> bool:
    """Whether metrics just found are better than those of every checkpoint before this step; the others are what the
    run fell back from."""
    best = checkpoint.best(folder, checkpoint.path_of(folder, step - 1))
    return best is None or checkpoint.score({"metrics": metrics}) > checkpoint.score(checkpoint.read_meta(best))


def _newest_and_best(folder: Path, step: int) -> tuple[str | None, str | None, float | None]:
    """Paths of the newest and of the best checkpoint up to a step, and the best one's top-1; None for what there is
    not."""
    last = checkpoint.path_of(folder, step)
    newest, best = checkpoint.checkpoints(folder, last)[-1:], checkpoint.best(folder, last)
    return (
        str(newest[0]) if newest else None,
        str(best) if best else None,
        checkpoint.score(checkpoint.read_meta(best)) if best else None,
    )
