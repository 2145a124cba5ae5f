"""Shared fixtures: the bundled golden answers and photos, and the optional shared data sets."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from needs import need_stock_ffcv, needs
from tiny_runs import SCATTERED, tiny_config, write_photos

from tl_fast.training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of known-right answers (see tests/golden/README.md)."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def photos() -> Path:
    """The 116 bundled photos, `{train,val}/{animal,fish,monument,tool}/*.jpg`."""
    return ROOT / "tests" / "photos"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Optional folder with larger data sets; `TLFAST_SHARED` or `shared/` beside the checkout. Skips when missing."""
    folder = Path(os.environ.get("TLFAST_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data folder at {folder}; set TLFAST_SHARED")
    return folder


@pytest.fixture(scope="session")
def to_beton() -> ModuleType:
    """converters/to_beton.py as a module: its `main` is the command."""
    spec = importlib.util.spec_from_file_location("to_beton", ROOT / "converters" / "to_beton.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["to_beton"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def stock_ffcv() -> None:
    """For tests against stock FFCV: skips them where it is not installed."""
    need_stock_ffcv()


@pytest.fixture(scope="session")
def turbojpeg() -> None:
    """For tests that pack progressive JPEGs: skips them where libturbojpeg cannot be loaded."""
    from tl_fast.convert.lossless import TurboJpegMissing, lossless_baseline

    try:
        with contextlib.suppress(ValueError):
            lossless_baseline(b"")
    except TurboJpegMissing as error:
        needs(str(error))


@pytest.fixture(scope="session")
def compiler() -> None:
    """For tests in which torch.compile generates code for the CPU: skips them where there is no C++ compiler."""
    name = os.environ.get("CXX", "g++")  # as torch does
    if shutil.which(name) is None:
        needs(f"torch.compile needs a C++ compiler, and there is no {name}: `sudo apt-get install -y g++`, or set CXX")


@pytest.fixture
def eager():
    """No torch.compile: torchvision's `roi_align` compiles itself for minutes where its C++ operators are missing."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def one_thread():
    """Sums in another order differ in the last bit; torchrun gives each rank one thread, so compare with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def betons(tmp_path_factory, photos) -> Path:
    """Folder of train.beton (with label maps), plain.beton (the same without) and val.beton."""
    folder = tmp_path_factory.mktemp("betons")
    write_photos(folder / "train.beton", photos / "train", maps=True)
    write_photos(folder / "plain.beton", photos / "train", maps=False)
    write_photos(folder / "val.beton", photos / "val", maps=False)
    return folder


@pytest.fixture
def tiny(betons, tmp_path):
    """Makes configs of a tiny model on the photos, running in a folder of this test."""

    def make(name: str = "run", **changes) -> TrainConfig:
        return tiny_config(betons, tmp_path / name, **changes)

    return make


@pytest.fixture
def scattered(tmp_path) -> Path:
    """The script; and folders node0 and node1 beside it."""
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
    script = tmp_path / "scattered.py"
    script.write_text(SCATTERED.format(root=str(ROOT), folder=str(tmp_path)))
    return script
