"""Conversions and published label maps: what the tests of conversion and annotation share."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from tl_fast.sources.source import Source

SHAPE = (5, 6, 6)


def random_map(rng: np.random.Generator, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes and scores [k, H, W]; scores that float16 holds."""
    cells = SHAPE[1] * SHAPE[2]
    classes = np.stack([rng.choice(num_classes, min(5, num_classes), replace=False) for _ in range(cells)], axis=1)
    scores = rng.uniform(-2, 12, classes.shape).astype(np.float16).astype(np.float32)
    return classes.reshape(-1, *SHAPE[1:]), scores.reshape(-1, *SHAPE[1:])


def published(folder: Source, out: Path, seed: int = 0) -> Path:
    """The label maps as published: OUT/<wnid>/<stem>.pt, float16 [2, k, H, W]."""
    rng = np.random.default_rng(seed)
    for sample_id in folder.ids:
        file = (out / sample_id).with_suffix(".pt")
        file.parent.mkdir(parents=True, exist_ok=True)
        classes, scores = random_map(rng, len(folder.class_names))
        torch.save(torch.from_numpy(np.stack([scores, classes.astype(np.float32)])).half(), file)
    return out


def run(to_beton: ModuleType, *arguments: object) -> int:
    return to_beton.main([str(argument) for argument in arguments])
