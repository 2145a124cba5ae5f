"""Fixtures of the tests of conversion."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def jpegs(photos: Path) -> list[bytes]:
    """The bytes of the bundled photos."""
    return [file.read_bytes() for file in sorted(photos.rglob("*.jpg"))]
