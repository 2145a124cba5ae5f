"""benchmarks/gpu_check.sh where there is no GPU, and the rows that its benchmarks write."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("tests-kernels", "tests-loader", "tests-training", "sanitizer", "kernels", "decode", "loader", "training")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_every_stage_is_skipped_with_its_reason(tmp_path):
    environment = os.environ | {"PY": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_check.sh"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        assert f"{stage}: skipped: no CUDA device" in done.stdout.splitlines()
    assert "not measured" in done.stdout and "met" not in done.stdout.split()  # no bar is said to be met
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_a_benchmark_says_so():
    """All of them in one process, which imports torch once."""
    commands = ["gpu_kernels", "gpu_decode", "gpu_loader", "gpu_train", "gpu_tests sanitizer"]
    script = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
for command in {commands}:
    name, *arguments = command.split()
    sys.argv = [name, *arguments]
    print(name, end=": ", flush=True)
    try:
        runpy.run_module(name, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (name, end.code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{command.split()[0]}: skipped: no CUDA device" for command in commands]


def test_a_python_without_torch_is_an_error_not_a_missing_gpu(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    environment = os.environ | {"PY": str(broken), "OUT": str(tmp_path)}
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_check.sh"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "set PY" in done.stderr


def test_a_failing_stage_does_not_stop_the_next_and_reasons_are_shown(tmp_path):
    """A python in whose place a script stands: kernels crash, the loader leaves one part out, the decoder all."""
    stub = tmp_path / "python"
    stub.write_text("""#!/bin/sh
case "$*" in
    *gpu_kernels.py*) echo "Traceback"; exit 7;;
    *gpu_decode.py*) echo "skipped: no data";;
    *gpu_loader.py*)
        echo "row"
        for what in "crop + flip" recipe; do echo "$what, mixed: skipped: DALI is not here"; done;;
    *) echo "ran $*";;
esac
""")
    stub.chmod(0o755)
    environment = os.environ | {"PY": str(stub), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_check.sh", "--samples", "64"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines()[-len(STAGES) :])
    assert tuple(said) == STAGES
    assert said["kernels"].startswith("FAILED with status 7") and "kernels.log" in said["kernels"]
    assert said["decode"].endswith("; skipped: no data") and said["loader"].endswith(" s; skipped: DALI is not here")
    assert (
        all(said[name].startswith("ran, ") for name in STAGES if name != "kernels")
        and "skipped" not in said["training"]
    )
    log = (tmp_path / "out" / "training.log").read_text()
    assert "gpu_train.py" in log and f"--results {tmp_path}/out/train.jsonl --samples 64" in log
    assert f"gpu_rows.py {tmp_path}/out" in done.stdout  # the summary, after all of them


@pytest.fixture
def benchmark(monkeypatch):
    """A function: a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_rows_of_the_tests_count_and_keep_reasons(benchmark, tmp_path):
    (tmp_path / "test_some.py").write_text("""
import pytest
def test_good(): pass
def test_bad(): assert False
@pytest.fixture
def broken(): raise RuntimeError
def test_broken(broken): pass
@pytest.mark.parametrize("n", range(3))
def test_absent(n): pytest.skip("no such device")
""")
    gpu_tests = benchmark("gpu_tests")
    report = tmp_path / "report.xml"
    status, printed = gpu_tests.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--junitxml={report}", str(tmp_path)], 60
    )
    assert status == 1 and "1 failed, 1 passed, 3 skipped, 1 error" in printed
    assert gpu_tests.outcomes(report) == ({"passed": 1, "failed": 1, "errors": 1, "skipped": 3}, {"no such device": 3})
    assert gpu_tests.run(["sleep", "30"], 0.2) == (gpu_tests.TIMED_OUT, "")
    every = [name for stage in (*gpu_tests.GROUPS, "tests-training") for name in gpu_tests.files(stage)]
    assert sorted(every) == sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "@pytest.mark.gpu" in path.read_text()
    )


def test_whether_dali_decodes_at_all_is_asked_of_its_decoder_alone(benchmark, monkeypatch):
    rows = benchmark("gpu_rows")
    assert rows.without_nvjpeg("cpu") is None
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        assert rows.without_nvjpeg()
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert "nvidia.dali" in rows.without_nvjpeg("cpu")


def test_rows_name_a_commit_where_git_is_missing(benchmark, monkeypatch):
    rows = benchmark("rows")
    assert rows.commit() != "unknown"
    monkeypatch.setenv("PATH", "")
    assert rows.commit() == "unknown"
    monkeypatch.setenv("TLFAST_COMMIT", "abc1234")
    assert rows.commit() == "abc1234"
    assert rows.version("no-such-package") is None and rows.version("torch")


@pytest.mark.parametrize("together", [True, False])
def test_training_contenders_fail_alone_where_they_run_alone(benchmark, tmp_path, together):
    """One after the other, no two processes are there at once, and one that ends early costs its own rows alone."""
    train = benchmark("train")
    script = f"""
import json, pathlib, sys
name, alive = sys.argv[-1], pathlib.Path({str(tmp_path)!r})
(alive / name).touch()
print("ready", flush=True)
for line in sys.stdin:
    if name == "bad":
        sys.exit(3)
    print(json.dumps([name, sorted(path.name for path in alive.iterdir())]), flush=True)
(alive / name).unlink()
"""
    failed: list[str] = []
    found: dict[str, list] = {}
    for figures in train.measured(["a", "bad", "b"], [sys.executable, "-c", script], 2, together, failed):
        found |= figures
    assert len(failed) == 1 and failed[0].startswith("bad ended in a round")
    (tmp_path / "bad").unlink()
    if together:
        assert not found
    else:
        assert found == {"a": [["a", ["a"]]] * 2, "b": [["b", ["b", "bad"]]] * 2}


def test_the_summary_compares_the_newest_rows_with_the_bars(benchmark, tmp_path):
    def row(benchmark: str, contender: str, median: float, unit: str) -> str:
        values = {
            "benchmark": benchmark,
            "contender": contender,
            "median": median,
            "p20": median,
            "p80": median,
            "unit": unit,
            "device": "a GPU",
        }
        return json.dumps(values) + "\n"

    share = "token targets, float32: share of the copy"
    (tmp_path / "kernels.jsonl").write_text(
        row("kernels", share, 0.5, "")
        + row("kernels", share, 0.75, "")
        + row("kernels", "images, crop + flip", 1.5, "ms")
    )
    (tmp_path / "loader.jsonl").write_text(row("loader", "crop + flip, auto", 9000, "images/s"))
    rates = {"lvvit_s": [9300.5], "lvvit_t": [20000.0]}
    for model, values in rates.items():
        benchmark("rows").write_rows(
            tmp_path / "train.jsonl",
            "train",
            {"tl_fast, compiled": values},
            "images/s",
            ("torch",),
            model=model,
            size=224,
            device="a GPU",
        )
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_rows.py", tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    bars = [line for line in done.stdout.splitlines() if line.startswith("bar:")]
    said = {line.split(": ")[1]: line for line in bars}
    assert "0.75, met on a GPU" in said["targets, share of copy bandwidth"]
    assert "NOT met" in said["256 images, crop + flip"] and "NOT met" in said["loader, crop + flip"]
    assert "not measured" in said["loader, full recipe"]
    assert "9300.5, met" in said["training LV-ViT-S at 224 px"] and "tl_fast, compiled, lvvit_t, 224" in done.stdout
