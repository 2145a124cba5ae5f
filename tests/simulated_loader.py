"""Run by tests/pipeline/test_gpu_loader.py with NUMBA_ENABLE_CUDASIM=1: `simulated_loader.py BETON MASKED PLANES
ALL_PLANES DAMAGED OUT.npz`, an epoch of every setting on the simulated device.

Arrays of setting s, batch b are stored as "s/b/field"; the words of errors that were asked for as "error/...".
"""

import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

RECTANGLE = {"image_size": (12, 20), "grid": (2, 3)}
SETTINGS = {
    "recipe": {"augment": {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "random", "erase": 0.5}, "seed": 3},
    "plain": {"seed": 1, "geometry": "published", "check": True},
    "bfloat16": {"seed": 1, "targets_dtype": "bfloat16"},
    "validation": {"train": False},
    "rectangle": {"augment": {"auto_augment": "rand-m9-mstd0.5-inc1", "erase": 0.5}, "seed": 2, **RECTANGLE},
    "validation, rectangle": {"train": False, **RECTANGLE},
}
SEGMENT_SETTINGS = {
    "segment": {"crop_size": (12, 20), "seed": 2},
    "segment, validation": {"train": False},
}
PLANES_SETTINGS = {
    "planes": {
        "augment": {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "random"},
        "seed": 4,
        "check": True,
    },
    "planes, validation": {"train": False, "check": True},
}
COMMON = {"batch_size": 3, "image_size": 16, "grid": 2, "threads": 1}


RESIDENT_SETTINGS = {
    "resident": {"augment": {"auto_augment": "rand-m9-mstd0.5-inc1"}, "seed": 5, "check": True, "batch_size": 4},
    "resident, rank 1 of 2": {"seed": 5, "order": "grouped", "batch_size": 2, "rank": 1, "world_size": 2},
    "resident, validation": {"train": False},
}


def run(beton: str, masked: str, planes: str, all_planes: str, device: str) -> dict[str, np.ndarray]:
    """beton: with label maps; masked: with masks; planes: with images that are planes and others that are JPEGs;
    all_planes: with planes alone. On a simulated device their batches are compared with resident ones."""
    from tl_fast.pipeline import Loader, SegmentLoader
    from tl_fast.plan.augment import Augment

    arrays = {}
    for path, settings in ((beton, SETTINGS), (planes, PLANES_SETTINGS), (all_planes, RESIDENT_SETTINGS)):
        for name, setting in settings.items():
            setting = setting | ({"augment": Augment(**setting["augment"])} if "augment" in setting else {})
            with Loader(path, device=device, **COMMON | setting) as loader:
                arrays |= epoch_of(loader, name)
            if settings is RESIDENT_SETTINGS and device != "cpu":
                with Loader(path, device=device, resident=True, **COMMON | setting) as loader:
                    assert loader.decode == "resident"
                    assert loader._plan == loader._planner.plan  # no file is read, so none is read ahead
                    for key, values in epoch_of(loader, name).items():
                        np.testing.assert_array_equal(values, arrays[key], f"resident, {key}")
    for name, setting in SEGMENT_SETTINGS.items():
        with SegmentLoader(masked, 3, device=device, threads=1, **setting) as loader:
            arrays |= epoch_of(loader, name)
    return arrays


def epoch_of(loader, name: str) -> dict[str, np.ndarray]:
    from tl_fast.pipeline.batch import Batch

    arrays = {}
    loader.set_epoch(1)
    for number, batch in enumerate(loader):
        for field in fields(Batch):
            if (value := getattr(batch, field.name)) is not None:
                half = value.dtype == torch.bfloat16  # numpy knows no such type
                arrays[f"{name}/{number}/{field.name}"] = (value.float() if half else value).numpy()
    return arrays


def main() -> None:
    from tl_fast.beton.layout import BetonError
    from tl_fast.kernels.cuda_device import SIMULATED
    from tl_fast.pipeline.loader import Loader

    assert SIMULATED, "NUMBA_ENABLE_CUDASIM=1 is needed"
    sys.setswitchinterval(1e-4)  # seconds, as tests/cuda_cases.py
    torch.set_num_threads(1)
    beton, masked, planes, all_planes, damaged, out = sys.argv[1:]
    arrays = run(beton, masked, planes, all_planes, "cuda")
    with Loader(damaged, device="cuda", **COMMON | {"batch_size": 2}) as loader:  # which leaves no sample out
        for name, use in (("epoch", lambda: list(loader)), ("batch", lambda: loader.batch(np.array([0, 1])))):
            try:
                use()
            except BetonError as error:
                arrays[f"error/{name}"] = np.array(str(error))
        loader.batch(np.array([0, 2]))
    np.savez(Path(out), **arrays)


if __name__ == "__main__":
    main()
