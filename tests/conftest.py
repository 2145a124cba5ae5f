"""Shared fixtures: the bundled golden answers and photos, and the optional shared data sets."""
from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

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


@pytest.fixture
def eager():
    """No torch.compile: torchvision's `roi_align` compiles itself for minutes where its C++ operators are missing."""
    with torch.compiler.set_stance("force_eager"):
        yield
