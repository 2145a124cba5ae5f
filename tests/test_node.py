"""benchmarks/node.py's hours and limits against sums done by hand."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = 310 * (1_281_167 // 1024)  # of lvvit_s_224: 300 epochs and 10 of cooldown at a global batch of 1,024
GRADIENTS = 26.15e6 * 4 / 1e9  # GB


def node(*arguments: str) -> tuple[list[list[str]], str]:
    """Words of the table's lines of lvvit_s_224, and everything printed."""
    command = [sys.executable, "benchmarks/node.py", "--recipes", "recipes/lvvit_s_224.yaml", *arguments]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    return [line.split() for line in out.splitlines() if line.startswith("lvvit_s_224")], out


def test_hours_cost_and_limit_of_each_part():
    fast = ["--rate", "lvvit_s:224=2000", "--cores", "1000", "--loader", "1000", "--storage", "1000"]
    (one, two), out = node(*fast, "--nodes", "1", "2", "--price", "3", "--link", "100", "--network", "10")
    for words, nodes in ((one, 1), (two, 2)):
        reduce = 2 * 7 / 8 * GRADIENTS / 100 + 2 * (nodes - 1) / nodes * GRADIENTS / 8 / 10
        hours = STEPS * (1024 / (8 * nodes) / 2000 + reduce) / 3600
        assert words[1] == str(8 * nodes) and words[5] == "compute"
        assert float(words[3]) == pytest.approx(hours, abs=0.006)
        assert float(words[4].replace(",", "")) == pytest.approx(hours * 8 * nodes * 3, abs=0.6)
    assert "given by --rate" in out and "no validation" in out


@pytest.mark.parametrize("slow, limit, step", [
    (("--loader", "10", "--cores", "16"), "loader", 1024 / 160), (("--storage", "0.01", "--image-kb", "100"), "storage", 1024 * 1e-4 / 0.01),
    (("--link", "0.1"), "all-reduce", 1024 / 8 / 9000 + 2 * 7 / 8 * GRADIENTS / 0.1),
])
def test_the_slowest_part_sets_the_pace(slow, limit, step):
    (words,), _ = node("--nodes", "1", "--rate", "lvvit_s:224=9000", *slow)
    assert words[5] == limit and float(words[3]) == pytest.approx(STEPS * step / 3600, rel=2e-3)


def test_an_estimate_says_that_it_is_one(tmp_path):
    assert "NOT MEASURED: 36% of 989 TFLOP/s" in node("--nodes", "1", "--results", str(tmp_path / "none.jsonl"))[1]
