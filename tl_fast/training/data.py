"""The data of a run: its loaders, and what does not fit of data and settings."""

from __future__ import annotations

from tl_fast.pipeline.loader import Loader
from tl_fast.system.mistakes import InputError
from tl_fast.system.ranks import Ranks
from tl_fast.training.accuracy import check_labels
from tl_fast.training.config import TrainConfig
from tl_fast.training.network import compiles, grid_of


def make_loaders(config: TrainConfig, ranks: Ranks) -> tuple[Loader, Loader | None]:
    """The training and validation loaders of this rank. Raises ValueError when settings do not fit the number or kind
    of ranks, FileNotFoundError."""
    per_rank, rest = divmod(config.batch_size, ranks.world_size * config.accumulate)
    if rest:
        raise InputError(
            f"batch_size {config.batch_size} must be a multiple of {ranks.world_size} ranks x accumulate "
            f"{config.accumulate}"
        )
    if per_rank == 1 and (config.mix_token or config.mixing):
        name, off = ("mix_token", "mix_token false") if config.mix_token else ("mixup or cutmix", "both 0")
        raise InputError(
            f"{name} mixes the images of a rank's pass, and batch_size {config.batch_size} over "
            f"{ranks.world_size} ranks x accumulate {config.accumulate} leaves one: raise batch_size, or "
            f"set {off}"
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
        grid=grid_of(config),
        seed=config.seed,
        threads=config.threads,
        decode=config.decode,
        hybrid_share=config.hybrid_share,
        device=ranks.device,
        rank=ranks.rank,
        world_size=ranks.world_size,
        on_rank_0=ranks.on_main,
    )
    train_loader = Loader(
        config.train_data,
        per_rank,
        augment=config.augment,
        geometry=config.geometry,
        smoothing=config.smoothing,
        targets_dtype=config.targets_dtype,
        token_labels=config.token_label,
        **common,
    )
    val_loader = (
        Loader(config.val_data, per_rank, train=False, crop_pct=config.crop_pct, **common) if config.val_data else None
    )
    return train_loader, val_loader


def check_data(config: TrainConfig, train_loader: Loader, val_loader: Loader | None) -> None:
    """Raises ValueError, naming the file and the remedy, for what would fail, or silently mislead, later."""
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
