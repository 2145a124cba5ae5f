"""benchmarks/gpu_check.sh where there is no GPU, and the rows that its benchmarks write."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tests", "sanitizer", "kernels", "decode", "loader", "training")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_every_stage_is_skipped_with_its_reason(tmp_path):
    environment = os.environ | {"PY": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run([ROOT / "benchmarks" / "gpu_check.sh"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        assert f"{stage}: skipped: no CUDA device" in done.stdout.splitlines()
    assert "not measured" in done.stdout and "met" not in done.stdout.split()  # no bar is said to be met
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("name", ["gpu_kernels", "gpu_decode", "gpu_loader"])
def test_without_a_gpu_a_benchmark_says_so(name):
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / f"{name}.py"], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0 and done.stdout.strip() == "skipped: no CUDA device", done.stderr


def test_a_python_without_torch_is_an_error_not_a_missing_gpu(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    environment = os.environ | {"PY": str(broken), "OUT": str(tmp_path)}
    done = subprocess.run([ROOT / "benchmarks" / "gpu_check.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "set PY" in done.stderr


def test_the_summary_compares_the_newest_rows_with_the_bars(tmp_path):
    def row(benchmark: str, contender: str, median: float, unit: str) -> str:
        values = {"benchmark": benchmark, "contender": contender, "median": median, "p20": median, "p80": median, "unit": unit, "device": "a GPU"}
        return json.dumps(values) + "\n"

    share = "token targets, float32: share of the copy"
    (tmp_path / "kernels.jsonl").write_text(row("kernels", share, 0.5, "") + row("kernels", share, 0.75, "") + row("kernels", "images, crop + flip", 1.5, "ms"))
    (tmp_path / "loader.jsonl").write_text(row("loader", "crop + flip, auto", 9000, "images/s"))
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu_rows.py", tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    bars = [line for line in done.stdout.splitlines() if line.startswith("bar:")]
    said = {line.split(": ")[1]: line for line in bars}
    assert "0.75, met on a GPU" in said["targets, share of copy bandwidth"]
    assert "NOT met" in said["256 images, crop + flip"] and "NOT met" in said["loader, crop + flip"]
    assert "not measured" in said["loader, full recipe"]
