"""The bundled photos, annotated and packed by the project's own commands: what the demo starts from, and what a
recipe's crops are shown on."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "demo"
PHOTOS = ROOT / "tests" / "photos"


def run(*command: str | Path) -> float:
    """Run one of our commands from the repository's root -> wall time in seconds. SystemExit names the command that
    failed."""
    words = [str(word) for word in command]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    start = time.perf_counter()
    status = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    if status:
        raise SystemExit(f"demo: `python {shlex.join(words)}` ended with exit code {status}; its messages are above")
    return time.perf_counter() - start


def annotate_and_pack(folder: Path) -> dict[str, float]:
    """Annotate the bundled photos and pack them into `folder`: `label_maps/`, `train.beton`, `val.beton` -> wall time
    in seconds by stage.

    Replaces an earlier demo's; SystemExit where the folder holds something else.
    """
    if not PHOTOS.is_dir():
        raise SystemExit(f"demo: the bundled photos are missing at {PHOTOS}; run it from a clone of the repository")
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / ".tl_fast-demo"  # without it what lies in the folder is not ours to replace
    if not marker.exists() and any(folder.iterdir()):
        raise SystemExit(f"demo: {folder} is not empty and not an earlier demo's folder; give another one with --out")
    marker.touch()
    maps, train, val = (folder / name for name in ("label_maps", "train.beton", "val.beton"))
    shutil.rmtree(maps, ignore_errors=True)
    for old in (train, val):
        old.unlink(missing_ok=True)
    seconds = {}
    head = ("--model", "efficientnet-lite0", "--fit-head", "--eval-images", PHOTOS / "val")
    seconds["annotate"] = run("-m", "tl_fast.annotate", PHOTOS / "train", maps, *head)
    seconds["pack"] = run("converters/to_beton.py", PHOTOS / "train", train, "--label-maps", maps)
    seconds["pack"] += run("converters/to_beton.py", PHOTOS / "val", val)
    return seconds
