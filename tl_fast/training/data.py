"""The data of a run, whatever it trains for: how its loaders are made, and what does not fit of data and settings."""

from __future__ import annotations

from typing import Any

from tl_fast.pipeline.batch_loader import BatchLoader
from tl_fast.system.mistakes import InputError
from tl_fast.system.ranks import Ranks
from tl_fast.training.network import compiles
from tl_fast.training.run_config import RunConfig


def images_a_pass(config: RunConfig, ranks: Ranks) -> int:
    """Images of one forward pass of one rank. Raises InputError when settings do not fit the number or kind of
    ranks."""
    per_rank, rest = divmod(config.batch_size, ranks.world_size * config.accumulate)
    if rest:
        raise InputError(
            f"batch_size {config.batch_size} must be a multiple of {ranks.world_size} ranks x accumulate "
            f"{config.accumulate}"
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
    return per_rank


def loader_options(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """Arguments of every loader of a run."""
    return dict(
        seed=config.seed,
        threads=config.threads,
        decode=config.decode,
        hybrid_share=config.hybrid_share,
        device=ranks.device,
        rank=ranks.rank,
        world_size=ranks.world_size,
        on_rank_0=ranks.on_main,
    )


def check_size(config: RunConfig, train_loader: BatchLoader) -> None:
    """Raises InputError for data of less than one global batch."""
    if len(train_loader) < config.accumulate:
        raise InputError(
            f"{', '.join(map(str, train_loader.samples.paths))} has {len(train_loader.samples)} samples, less than one "
            f"global batch of {config.batch_size}: lower batch_size"
        )


def check_names(names: list[str], val_names: list[str]) -> None:
    """Raises InputError where validation's classes are called otherwise."""
    if names and val_names and names != val_names:
        raise InputError(
            f"val_data has the classes {val_names[:5]}..., train_data {names[:5]}...: convert both "
            "with the same class list"
        )
