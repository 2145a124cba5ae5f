"""Runs of a tiny model on the bundled photos: what the tests of training share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import yaml
from small_betons import write

from tl_fast.labelmaps.format import MapSpec, pack
from tl_fast.training import checkpoint
from tl_fast.training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["animal", "fish", "monument", "tool"]
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "stem_width": 8}

# train.py on ranks that see different folders, as on two nodes: node0 and node1 in a folder. It stands where train.py
# does in the command.
SCATTERED = """
import os, sys
sys.path.insert(0, {root!r})
os.chdir(os.path.join({folder!r}, "node" + os.environ["RANK"]))
from tl_fast import train
train.main()
"""


def write_photos(path: Path, folder: Path, maps: bool) -> None:
    """A beton of the photos under `folder`, with label maps whose strongest class is the photo's own, more so in the
    middle."""
    spec = MapSpec(k=2, height=6, width=6, num_classes=len(CLASSES)) if maps else None
    photos = [photo for name in CLASSES for photo in sorted((folder / name).glob("*.jpg"))]
    labels = [CLASSES.index(photo.parent.name) for photo in photos]
    bump = 4 * np.outer(np.hanning(8)[1:-1], np.hanning(8)[1:-1])
    scores = np.stack([2 + bump, 1 - bump / 8]).astype(np.float32)
    records = []
    for label in labels if maps else ():
        classes = np.stack([np.full((6, 6), label), np.full((6, 6), (label + 1) % 4)]).astype(np.uint16)
        records.append(pack(classes, scores, spec))
    write(
        path,
        [photo.read_bytes() for photo in photos],
        records or None,
        spec,
        class_names=CLASSES,
        ids=[f"{photo.parent.name}/{photo.name}" for photo in photos],
        labels=labels,
        max_resolution=96,
    )


def tiny_config(betons: Path, output_dir: Path, **changes) -> TrainConfig:
    values = dict(
        train_data=str(betons / "train.beton"),
        output_dir=str(output_dir),
        model="lvvit_t",
        model_kwargs=TINY,
        img_size=64,
        drop_path=0.2,
        batch_size=16,
        epochs=3,
        cooldown_epochs=0,
        warmup_epochs=1,
        lr=1e-3,
        lr_base_batch=16,
        log_every=1,
        threads=1,
        device="cpu",
    )
    return TrainConfig(**{**values, **changes})


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, EMA and the optimiser's moments."""
    path = Path(path)
    tensors = {}
    for name in (checkpoint.MODEL, checkpoint.EMA):
        tensors |= {f"{name}:{key}": value for key, value in safetensors.torch.load_file(path / name).items()}
    state = torch.load(path / checkpoint.OPTIMIZER, weights_only=True)["state"]
    return tensors | {
        f"optimizer:{index}:{key}": value for index, moments in state.items() for key, value in moments.items()
    }


def torchrun(script: list[str], ranks: int, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        torchrun_command(script, ranks, *options),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=one_thread(),
    )


def torchrun_command(script: list[str], ranks: int, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *(options or ["--standalone"]),
        f"--nproc_per_node={ranks}",
        *script,
    ]


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def flags(config: TrainConfig, path: Path) -> list[str]:
    path.write_text(yaml.safe_dump(config.to_dict()))
    return ["--config", str(path)]
