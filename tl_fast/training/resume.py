"""Where a run starts: anew, or where a checkpoint left it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tl_fast.beton.samples import Samples
from tl_fast.system.mistakes import InputError, share
from tl_fast.system.ranks import Ranks
from tl_fast.training import checkpoint
from tl_fast.training.learner import Learner
from tl_fast.training.progress import Progress
from tl_fast.training.record import began_here
from tl_fast.training.run_config import RunConfig

_FIXED_FACTS = ("order_groups", "steps_per_epoch")  # as config's `fixed_on_resume`


def choose(config: RunConfig, ranks: Ranks) -> Path | None:
    """The checkpoint that `config.resume` asks to continue from, None to start afresh; the main rank alone looks, so
    that all take the same.

    When torchrun starts its ranks again (--max-restarts, a node that joins or leaves), they continue the run that they
    began, whatever `resume` says. Raises CheckpointError on every rank when none is intact, and when output_dir holds
    checkpoints that the run would not continue.
    """
    # Ranks of a node that has just joined count no restarts, and one of them may now be the main one.
    restarts = max(ranks.gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
    return ranks.on_main(_choose, config, restarts)


def resume(
    chosen: Path | None,
    config: RunConfig,
    ranks: Ranks,
    facts: dict[str, Any],
    learner: Learner,
) -> Progress:
    """Load the chosen checkpoint, if any, into the learner on every rank; where to continue.

    Rank 0 alone reads the files, and passes on what it has read: the others need not see output_dir. On every rank
    raises CheckpointError for a broken checkpoint, and when a field in the config's `fixed_on_resume` or one of these
    `facts` differs from what it was trained with: "steps_per_epoch", "order_groups" (`BatchLoader.groups`), "data"
    (see identify). InputError when the ranks do not have the same data.
    """
    first, *others = ranks.gather(facts["data"])
    for rank, other in enumerate(others, 1):
        if not _same_data(first, other):
            raise share(
                InputError(
                    f"the ranks have different data: rank 0 {_words(first)}, rank {rank} "
                    f"{_words(other)}; give every node the same files"
                )
            )
    if chosen is None:
        return Progress()
    model, ema, optimizer = learner.model, learner.ema.module, learner.optimizer
    settings = [{name: group[name] for name in ("weight_decay", "betas", "eps")} for group in optimizer.param_groups]
    progress = ranks.on_main(_restore, chosen, config, facts, learner)
    ranks.fill_from_main([*model.state_dict().values(), *ema.state_dict().values()])
    _pass_on_moments(optimizer, ranks)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # what this run's config says, not what the checkpoint's optimiser had
    return progress


def _restore(chosen: Path, config: RunConfig, facts: dict[str, Any], learner: Learner) -> Progress:
    """Load a checkpoint that is of this run; where to continue. Raises CheckpointError."""
    meta = checkpoint.read_meta(chosen)
    free = {"order": "shuffled", "order_groups": 1}  # the order of samples before others could be chosen
    then = free | meta["config"] | {name: meta[name] for name in _FIXED_FACTS if name in meta}
    now = config.to_dict() | {name: facts[name] for name in _FIXED_FACTS}
    fixed = (*config.fixed_on_resume, *_FIXED_FACTS)
    different = [f"{name} {then.get(name)!r} -> {now[name]!r}" for name in fixed if then.get(name) != now[name]]
    if "data" in meta and not _same_data(meta["data"], facts["data"]):  # checkpoints of earlier versions do not say
        different.append(f"train_data {_words(meta['data'])} -> {_words(facts['data'])}")
    if different:
        raise checkpoint.CheckpointError(
            f"{chosen} is of another run: {', '.join(different)}. Restore these, choose another output_dir, or "
            "start from its weights with --init_weights"
        )
    checkpoint.restore(chosen, model=learner.model, ema=learner.ema.module, optimizer=learner.optimizer)
    return Progress(**{entry.name: meta[entry.name] for entry in dataclasses.fields(Progress)})


def _pass_on_moments(optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Give every rank the state of rank 0's optimiser."""
    state = optimizer.state_dict()
    outline = {
        index: {name: (value.shape, value.dtype) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    groups, outline = ranks.from_main((state["param_groups"], outline))
    if ranks.main:
        moments = state["state"]
    else:
        moments = {
            index: {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in values.items()}
            for index, values in outline.items()
        }
    ranks.fill_from_main(value for values in moments.values() for value in values.values())
    if not ranks.main:
        checkpoint.load_optimizer(optimizer, {"state": moments, "param_groups": groups})


def identify(samples: Samples) -> dict[str, Any]:
    """What tells one data set from another: number of `samples`, `digest` of their labels, sizes and CRC-32, and, for
    messages, the `files`.

    How the samples are called and in which files they lie does not matter, their order does. Reads the files' tables
    alone.
    """
    digest = hashlib.sha256(repr(samples.spec).encode())
    if samples.mask_spec is not None:  # the masks themselves are in the CRC-32
        digest.update(repr(samples.mask_spec).encode())
    for name in ("heights", "widths", "labels", "image_sizes", "label_map_sizes", "crcs"):
        for column in (getattr(reader, name) for reader in samples.readers):
            digest.update(b"" if column is None else np.ascontiguousarray(column, np.int64))
    return {"samples": len(samples), "digest": digest.hexdigest()[:16], "files": list(map(str, samples.paths))}


def _same_data(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (a["samples"], a["digest"]) == (b["samples"], b["digest"])


def _words(data: dict[str, Any]) -> str:
    return f"{data['samples']} samples with digest {data['digest']} ({', '.join(data['files'])})"


def _choose(config: RunConfig, restarts: int) -> Path | None:
    folder = Path(config.output_dir) / "checkpoints"
    if folder.is_dir():
        checkpoint.recover(folder)
    if config.resume == "auto" or (began_here(Path(config.output_dir), restarts) and checkpoint.checkpoints(folder)):
        return checkpoint.latest(folder)
    path = checkpoint.find(Path(config.resume)) if config.resume else None
    # A run that starts before them would be pruned against them, and a later --resume auto would take one of theirs.
    stale = [
        other
        for other in checkpoint.checkpoints(folder)
        if path is None or path.parent.resolve() != folder.resolve() or other.name > path.name
    ]
    if stale:
        raise checkpoint.CheckpointError(
            f"output_dir {config.output_dir} already holds {stale[-1]}: continue it with --resume auto, "
            "remove its later checkpoints, or choose another output_dir"
        )
    return path
