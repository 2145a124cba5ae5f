"""Checkpoints: written whole or not at all, verified before use.

A checkpoint is a folder `step-<global step>/` of
    model.safetensors, ema.safetensors   weights and buffers under the published names
    optimizer.pt                         the optimiser's state dict, readable with torch.load(weights_only=True)
    meta.json                            progress, config, metrics, versions; size and CRC-32 of each file above, and
                                         its own CRC-32
It is written under a temporary name, flushed to disk, then renamed. No generator state is stored: every random draw of
a run is a function of (seed, step, rank), so progress alone resumes it exactly.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tl_fast.models import weights
from tl_fast.models.weights import WeightsError
from tl_fast.system.atomic import sync
from tl_fast.system.crc import crc32

FORMAT = "tl_fast checkpoint 2"
MODEL, EMA, OPTIMIZER, META = "model.safetensors", "ema.safetensors", "optimizer.pt", "meta.json"
_PREFIX, _TEMPORARY, _REPLACED = "step-", ".tmp-", ".tmp-old-"
_OF_A_RUN = ("config.yaml", "run.json", "run.lock")  # what lies in a run's folder before its first checkpoint
_DIGITS = 10  # of the step in a name, so that names sort as steps do


class CheckpointError(WeightsError):
    """A checkpoint that cannot be used; names the file and what is wrong with it."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in host memory of its own: training may go on while it is written.

    model, ema: weights and buffers by name, contiguous. optimizer: an optimiser's state dict. meta: JSON, at least
    `global_step`, `epoch`, `step_in_epoch` (where to continue), `config`, `metrics`.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    meta: dict[str, Any]


def snapshot(*, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, meta: dict[str, Any]) -> Snapshot:
    """Copy what a checkpoint is to hold; waits for the device. Raises TypeError for a `meta` that is not JSON."""
    state = optimizer.state_dict()
    moments = {
        index: {name: _on_host(value) for name, value in values.items()} for index, values in state["state"].items()
    }
    # safetensors holds no strides (channels-last).
    weights, averages = (
        {name: _on_host(value, torch.contiguous_format) for name, value in module.state_dict().items()}
        for module in (model, ema)
    )
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # copies into pinned memory do not make the host wait
    return Snapshot(
        weights,
        averages,
        copy.deepcopy({**state, "state": {}}) | {"state": moments},
        json.loads(json.dumps(meta)),  # as it will be read: tuples as lists
    )


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Write `folder/step-<global_step>` atomically and return its path.

    An existing checkpoint of the same step is replaced. A failure leaves earlier checkpoints as they were; raises
    OSError naming the folder when it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    final = path_of(folder, snapshot.meta["global_step"])
    temporary, replaced = folder / f"{_TEMPORARY}{final.name}", folder / f"{_REPLACED}{final.name}"
    temporary.mkdir()
    try:
        safetensors.torch.save_file(snapshot.model, temporary / MODEL)
        safetensors.torch.save_file(snapshot.ema, temporary / EMA)
        torch.save(snapshot.optimizer, temporary / OPTIMIZER)
        files = {
            name: {"bytes": (temporary / name).stat().st_size, "crc32": _crc32(temporary / name)}
            for name in (MODEL, EMA, OPTIMIZER)
        }
        content = {"format": FORMAT, **snapshot.meta, "files": files}
        (temporary / META).write_text(json.dumps(content | {"crc32": _meta_crc32(content)}, indent=1))
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if final.exists():
            os.rename(final, replaced)
        os.rename(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not final.exists():
            os.rename(replaced, final)
        # safetensors and torch wrap the system's error in their own.
        if isinstance(error, (OSError, SafetensorError, RuntimeError)):
            raise OSError(
                getattr(error, "errno", None) or errno.EIO,
                f"cannot write checkpoint {final}: {error}. Earlier checkpoints are kept: "
                "when there is room to write, continue with --resume auto",
            ) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    sync(folder)
    return final


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies, or would."""
    return folder / f"{_PREFIX}{step:0{_DIGITS}d}"


def recover(folder: Path) -> None:
    """Clear up after a writer that was killed: delete the checkpoint that it had half written, and restore the one that
    it was about to replace.

    Only for the process that writes to the folder, of which there is one a run.
    """
    for replaced in folder.glob(f"{_REPLACED}{_PREFIX}*"):
        final = folder / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            os.rename(replaced, final)
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)  # NFS keeps files that somebody reads


def verify(path: Path) -> dict[str, Any]:
    """Check that a checkpoint is ours and whole; its meta. Raises CheckpointError naming the file that is missing, torn
    or foreign."""
    meta = read_meta(path)
    _check_sizes(path, meta)
    for name, expected in meta["files"].items():
        if _crc32(path / name) != expected["crc32"]:
            raise CheckpointError(f"{path / name} does not have the CRC-32 that was written: it is damaged")
    return meta


def _check_sizes(path: Path, meta: dict[str, Any]) -> None:
    for name, expected in meta["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint is incomplete")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {expected['bytes']}: it is torn")


def read_meta(path: Path) -> dict[str, Any]:
    """A checkpoint's meta.json. Raises CheckpointError for what is not a checkpoint of ours, or changed since it was
    written."""
    try:
        meta = json.loads((path / META).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of tl_fast (no readable {META}: {error})") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        written = meta.get("format") if isinstance(meta, dict) else meta
        raise CheckpointError(f"{path / META} is of format {written!r}, expected {FORMAT!r}")
    if meta.pop("crc32", None) != _meta_crc32(meta):
        raise CheckpointError(f"{path / META} does not have the CRC-32 that was written: it is damaged or was edited")
    return meta


def checkpoints(folder: Path, last: Path | None = None) -> list[Path]:
    """The checkpoints of a run's `checkpoints/` folder, oldest first, unverified; those of later steps than `last` left
    out."""
    paths = sorted(folder.glob(f"{_PREFIX}{'[0-9]' * _DIGITS}"))
    return [path for path in paths if last is None or path.name <= last.name]


def latest(folder: Path) -> Path | None:
    """The newest intact checkpoint; None when there is none at all. Warns of newer broken ones by name.

    Raises CheckpointError when there are checkpoints and all are broken: starting afresh would then silently lose a
    run.
    """
    broken: list[CheckpointError] = []
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            broken.append(error)
            continue
        for error in broken:
            warnings.warn(f"falling back to {path}: {error}", stacklevel=2)
        return path
    if broken:
        raise CheckpointError(
            f"no intact checkpoint in {folder}: {'; '.join(map(str, broken))}. Remove them to start afresh"
        )
    return None


def find(path: Path) -> Path:
    """The checkpoint folder or weights file that a user's path means: of a run's folder its newest intact checkpoint,
    else the path itself.

    Raises CheckpointError naming the path where there is nothing, for a run without an intact checkpoint, and for any
    other folder. Files are not opened, and a checkpoint's own folder is not verified: `restore` and `read_weights` do
    that.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not path.is_dir() or path.name.startswith(_PREFIX) or (path / META).exists():
        return path
    folder = path / "checkpoints"
    if not folder.is_dir() and not any((path / name).exists() for name in _OF_A_RUN):
        raise CheckpointError(
            f"{path} is neither a run's folder, nor a checkpoint's ({_PREFIX}0000000100, say), nor a weights file"
        )
    newest = latest(folder)
    if newest is None:
        raise CheckpointError(f"{path} is the folder of a run that has not saved a checkpoint yet")
    return newest


def score(meta: dict[str, Any]) -> float:
    """What makes a checkpoint the best: the largest of the metrics that its `score_metrics` names, -1 if not validated.
    In classification these are the top-1 of EMA and raw weights, also in earlier versions, which do not name them."""
    metrics = meta.get("metrics", {})
    names = meta.get("score_metrics", ("val_top1_ema", "val_top1_raw"))
    return max(-1.0, *(metrics.get(name, -1.0) for name in names))


def best(folder: Path, last: Path | None = None) -> Path | None:
    """The checkpoint up to `last` with the highest score (the later of equals), None when none was validated.

    Damaged ones do not count, as far as their files' sizes show it: reading gigabytes after every save would cost more
    than it finds.
    """
    scored = []
    for path in checkpoints(folder, last):
        # A run must not end for a broken one; `latest` names it to whoever wants to use it.
        with contextlib.suppress(CheckpointError):
            meta = read_meta(path)
            _check_sizes(path, meta)
            scored.append((score(meta), path))
    top = max(scored, default=(-1.0, None))
    return top[1] if top[0] >= 0 else None


def prune(newest: Path, keep: int) -> None:
    """Delete all checkpoints of a run but `newest`, which it has just saved, the `keep` - 1 before it, and the best
    one.

    Those of later steps go as well: they are what the run fell back from, and counted among the last they would push
    out intact ones.
    """
    folder = newest.parent
    kept = {*checkpoints(folder, newest)[-keep:], best(folder, newest)}
    for path in sorted(set(checkpoints(folder)) - kept):
        doomed = folder / f"{_TEMPORARY}{path.name}"
        os.rename(path, doomed)  # a kill during the deletion must not leave a torn checkpoint under its real name
        shutil.rmtree(doomed, ignore_errors=True)  # what stays is taken at the next start


def restore(path: Path, *, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint into model, EMA and optimiser, strictly, after verifying it; its meta. Raises
    CheckpointError."""
    meta = verify(path)
    try:
        model.load_state_dict(safetensors.torch.load_file(path / MODEL))
        ema.load_state_dict(safetensors.torch.load_file(path / EMA))
        load_optimizer(optimizer, torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True))
    except (RuntimeError, ValueError) as error:  # torch's words for names, shapes or parameter groups that differ
        raise CheckpointError(f"{path} does not fit the configured model: {error}") from error
    return meta


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state dict. Fused kernels walk memory: moments of channels-last weights must lie as the
    weights do here."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


def read_weights(path: Path, use_ema: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a checkpoint's folder or a weights file (`models.weights.read_file`); remarks on what was
    chosen. Raises WeightsError, of which CheckpointError is one, naming the file.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not path.is_dir():
        return weights.read_file(path, use_ema)
    verify(path)
    return safetensors.torch.load_file(path / (EMA if use_ema else MODEL)), []


def load_weights(model: nn.Module, path: Path, use_ema: bool = True) -> list[str]:
    """Load weights of any origin (`read_weights`) into a model (`models.weights.fit`); remarks for the user."""
    state, remarks = read_weights(path, use_ema)
    config = read_meta(path)["config"] if path.is_dir() else {}
    trained_size = config.get("img_size", config.get("crop_size"))  # a segmentation run has the latter
    return remarks + weights.fit(model, state, path, trained_size)


def _on_host(tensor: Tensor, layout: torch.memory_format = torch.preserve_format) -> Tensor:
    """A copy in host memory, pinned where the tensor is a GPU's; torch keeps pinned memory for the next copy."""
    host = torch.empty_like(tensor, device="cpu", memory_format=layout, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def _meta_crc32(meta: dict[str, Any]) -> int:
    """CRC-32 of the content, whatever its spacing."""
    return crc32(json.dumps(meta, sort_keys=True).encode(), 0)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = crc32(block, crc)
    return crc
