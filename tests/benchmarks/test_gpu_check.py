"""benchmarks/gpu_check.sh where there is no GPU, and the rows that its benchmarks write."""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MEASURING = ("kernels", "profile", "training", "sweep", "loader", "decode")
STAGES = ("first", "tests-kernels", *MEASURING, "tests-training", "tests-loader", "sanitizer")


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
    commands = [
        "gpu_first",
        "gpu_kernels",
        "gpu_profile",
        "gpu_profile --sweep",
        "gpu_decode",
        "gpu_loader",
        "gpu_train",
        "gpu_tests sanitizer",
    ]
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
    first, *others = done.stdout.splitlines()
    assert first.startswith("gpu_first: python: ") and "skipped: no CUDA device" in others
    expected = [f"{command.split()[0]}: skipped: no CUDA device" for command in commands[1:]]
    assert others[-len(expected) :] == expected


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
    environment = os.environ | {"PY": str(stub), "OUT": str(tmp_path / "out"), "SWITCHES": "as it is,gelu tanh"}
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
    assert "gpu_train.py" in log and f"--results {tmp_path}/out/rows.jsonl --samples 64" in log
    assert (tmp_path / "out" / "sweep.log").read_text().endswith(" --sweep as it is gelu tanh\n")
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


def test_dropped_batches_are_counted_and_their_errors_passed_on(benchmark):
    train = benchmark("train")
    damaged = threading.Event()

    class Batches:
        def set_epoch(self, epoch, next_epoch):
            assert next_epoch == epoch + 1

        def __iter__(self):
            for _ in range(5):
                if damaged.is_set():
                    raise RuntimeError("sample 3 is damaged")
                yield SimpleNamespace(images=torch.zeros(3, 1), targets=None, erase=None, noise=None)

    dropped = train.Dropped(Batches(), torch.device("cpu"))
    while dropped.images < 30:
        dropped.check()
        time.sleep(0.001)
    damaged.set()
    dropped._thread.join(60)
    with pytest.raises(RuntimeError, match="sample 3 is damaged"):
        dropped.check()
    dropped.close()


@pytest.fixture
def summary(tmp_path):
    """A function: rows, each a dict, in a folder of each name -> what the summary says, by bar."""

    def summarise(**folders: list[dict]) -> dict[str, str]:
        for name, rows in folders.items():
            (tmp_path / name).mkdir()
            for number, row in enumerate(rows):
                common = {"p20": row["median"], "p80": row["median"], "device": "a GPU", "date": "2026-11-27T10:00:00Z"}
                with (tmp_path / name / f"{number % 2}.jsonl").open("a") as file:
                    file.write(json.dumps(common | row) + "\n")
        command = [sys.executable, ROOT / "benchmarks" / "gpu_rows.py", *(tmp_path / name for name in folders)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return {line.split(": ")[1]: line for line in done.stdout.splitlines() if line.startswith("bar:")}

    return summarise


SHARE = {"benchmark": "kernels", "contender": "token targets, float32: share of the copy", "unit": ""}
LOADER = {"benchmark": "loader", "contender": "crop + flip, auto", "unit": "images/s", "median": 9300}


def test_the_summary_compares_the_newest_rows_of_all_folders_with_the_bars(summary):
    images = {"benchmark": "kernels", "contender": "images, crop + flip", "unit": "ms", "median": 1.5}
    small = {"benchmark": "train", "contender": "tl_fast, compiled", "unit": "images/s", "size": 224}
    said = summary(
        newer=[SHARE | {"median": 0.5, "date": "2026-11-27T12:00:00+02:00"}, images],
        older=[SHARE | {"median": 0.75, "date": "2026-11-27T11:00:00+00:00"}, SHARE | {"median": 0.6}],
        training=[
            small | {"model": "lvvit_s", "median": 9300.5, "date": "2026-11-27", "run": "2026-11-27T10:00:00+00:00"},
            small | {"model": "lvvit_s", "median": 9100.0, "date": "2026-11-26"},
            small | {"model": "lvvit_t", "median": 20000},
        ],
    )
    assert "0.75, met on a GPU" in said["targets, share of copy bandwidth"]
    assert "NOT met" in said["256 images, crop + flip"] and "not measured" in said["loader, crop + flip"]
    assert "9300.5, met" in said["training LV-ViT-S at 224 px"]


@pytest.mark.parametrize(
    "size, expected",
    [
        (None, "not stated: measured on images of unknown size"),
        (59_999, "not stated: measured on images of 59,999 bytes on average, and 60,000 or more are needed"),
        (60_000, "9300, met on a GPU"),
    ],
)
def test_bars_of_decoding_are_stated_from_original_images_alone(summary, size, expected):
    fed = {"benchmark": "train", "contender": "tl_fast, compiled, fed from a beton", "unit": "images/s"}
    columns = {} if size is None else {"mean_bytes": size}
    said = summary(rows=[LOADER | columns, fed | columns | {"model": "lvvit_s", "size": 224, "median": 9300}])
    assert expected in said["loader, crop + flip"] and expected in said["training LV-ViT-S at 224 px, fed"]


FIRST = f"""
import sys
for name in ("nvidia.dali", "ffcv", "jsonargparse", "pyarrow", "simplejpeg"):
    sys.modules[name] = None
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
import torch
import gpu_first
"""


def run_first(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", FIRST + code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_first_stages_kernel_equals_its_twin_in_the_simulator():
    """Without DALI, ffcv and jsonargparse, as the next one."""
    printed = run_first("print(gpu_first.kernel_differs_by(torch.device('cpu')))", NUMBA_ENABLE_CUDASIM="1")
    assert float(printed.split()[-1]) < 1e-5


@pytest.mark.slow
def test_the_first_stages_compiled_step_equals_the_eager_one():
    difference, seconds = run_first("print(*gpu_first.step_differs_by(torch.device('cpu')))").split()[-2:]
    assert float(difference) < 1e-3 and float(seconds) > 0


def test_the_first_stage_finds_libnvvm(benchmark, monkeypatch, tmp_path):
    first = benchmark("gpu_first")
    (tmp_path / "nvvm" / "lib64").mkdir(parents=True)
    library = tmp_path / "nvvm" / "lib64" / "libnvvm.so.4"
    library.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert first.libnvvm() == str(library)
    library.unlink()
    assert first.libnvvm() != str(library)


def test_gpu_check_finds_the_toolkit(tmp_path):
    """By nvcc, where CUDA_HOME is not set or has no libNVVM."""
    toolkit = tmp_path / "toolkit"
    (toolkit / "nvvm" / "lib64").mkdir(parents=True)
    (toolkit / "bin").mkdir()
    nvcc, python = toolkit / "bin" / "nvcc", tmp_path / "python"
    nvcc.touch()
    python.write_text('#!/bin/sh\necho "CUDA_HOME=$CUDA_HOME"\n')
    nvcc.chmod(0o755)
    python.chmod(0o755)
    for home in ("", str(tmp_path)):
        environment = os.environ | {"PY": str(python), "OUT": str(tmp_path / "out"), "STAGES": "first"}
        environment |= {"PATH": f"{toolkit / 'bin'}:{os.environ['PATH']}", "CUDA_HOME": home}
        done = subprocess.run(
            [ROOT / "benchmarks" / "gpu_check.sh"], env=environment, capture_output=True, text=True, timeout=60
        )
        assert f"CUDA_HOME={toolkit}\n" in done.stdout, done.stdout
