"""The ways to decode JPEGs, by their names. Importing this is light: a configuration is checked with it."""

from __future__ import annotations

from tl_fast.system.mistakes import InputError

DECODES = ("auto", "cpu", "mixed", "hybrid")


def check_hybrid_share(share: float | None, decode: str) -> None:
    """Raise InputError where nvJPEG's share of the samples is no share, or has no effect with one of DECODES."""
    if share is not None and not (decode == "hybrid" and 0 <= share <= 1):
        raise InputError(f"hybrid_share must be in 0..1, with decode='hybrid' alone; got {share}, decode={decode!r}")
