"""What a machine may lack: tests skip for it, or fail where continuous integration requires it."""

from __future__ import annotations

import importlib.util
import os

import pytest


def needs(missing: str) -> None:
    """Skip the test for the reason `missing`; with TLFAST_REQUIRE_INTEROP set, as on CI, fail it."""
    if os.environ.get("TLFAST_REQUIRE_INTEROP"):
        pytest.fail(f"{missing} (an error, since TLFAST_REQUIRE_INTEROP is set)", pytrace=False)
    pytest.skip(missing)


def need_stock_ffcv() -> None:
    """Return if stock FFCV (extra `interop`) is installed."""
    missing = [name for name in ("ffcv", "cv2", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        remedy = "`bash .ci/setup --interop` adds it or says what it lacks"
        needs(f"stock FFCV is not set up (no {', '.join(missing)}): {remedy}")
