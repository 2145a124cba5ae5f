"""Run the tests that need a GPU, or the kernels under compute-sanitizer, and write what came of it as a row.

    python benchmarks/gpu_tests.py tests-kernels|tests-loader|tests-training|sanitizer

A row's figure is the seconds it took; passed, failed, errors and skipped count tests, for the sanitizer errors alone.
Ends with the status of what ran. Rows go to benchmarks/results/gpu/rows.jsonl.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from gpu_rows import need_gpu, parser, write_row
from rows import ROOT

TIMED_OUT = 124
GROUPS = {
    "tests-kernels": ["kernels/test_cuda.py"],
    "tests-loader": ["pipeline/test_gpu_loader.py"],
}  # tests-training: all others that are marked gpu
NEEDED = {"tests-training": ("jsonargparse", "timm")}  # by the files' imports; tests skip themselves for the rest


def files(stage: str) -> list[str]:
    """The test files of a stage, from the repository's root."""
    tests = ROOT / "tests"
    marked = [
        str(path.relative_to(tests)) for path in sorted(tests.rglob("test_*.py")) if "mark.gpu" in path.read_text()
    ]
    named = [name for names in GROUPS.values() for name in names]
    return [f"tests/{name}" for name in GROUPS.get(stage) or [name for name in marked if name not in named]]


def run(command: list[str], limit: float) -> tuple[int, str]:
    """The command's status, TIMED_OUT after `limit` seconds, and what it printed, which is shown as it comes."""
    process = subprocess.Popen(
        ["timeout", "--kill-after=5", str(limit), *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def outcomes(report: Path) -> tuple[dict[str, int], Counter[str]]:
    """How many tests of a JUnit report ended how, and the reasons of those that were skipped."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    counts = {
        name: sum(case.find(tag) is not None for case in cases)
        for name, tag in (("failed", "failure"), ("errors", "error"), ("skipped", "skipped"))
    }
    reasons = Counter(case.find("skipped").get("message", "") for case in cases if case.find("skipped") is not None)
    return {"passed": len(cases) - sum(counts.values()), **counts}, reasons


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("stage", choices=[*GROUPS, "tests-training", "sanitizer"])
    options.add_argument("--limit", type=float, default=450, help="seconds")
    arguments = options.parse_args()
    need_gpu()
    begin = time.perf_counter()
    if arguments.stage == "sanitizer":
        if not shutil.which("compute-sanitizer"):
            print("skipped: compute-sanitizer is not installed")
            return
        # Errors of the API are not the kernels': torch and numba try calls to see what the driver can do.
        command = [
            "compute-sanitizer",
            "--tool",
            "memcheck",
            "--report-api-errors",
            "no",
            "--error-exitcode",
            "9",
            sys.executable,
            str(ROOT / "benchmarks" / "gpu_kernels.py"),
            "--small",
        ]
        status, printed = run(command, arguments.limit)
        if "Device not supported" in printed:
            print("skipped: compute-sanitizer does not support this device")
            return
        said = re.search(r"ERROR SUMMARY: (\d+)", printed)
        facts = {"errors": int(said[1]) if said else None}
    else:
        missing = [
            name
            for name in ("pytest", "pytest_timeout", *NEEDED.get(arguments.stage, ()))
            if importlib.util.find_spec(name) is None
        ]
        if missing:
            print(f"skipped: {', '.join(missing)} not installed")
            return
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-m",
                "gpu",
                f"--junitxml={report}",
                *files(arguments.stage),
            ]
            status, _ = run(command, arguments.limit)
            facts, reasons = outcomes(report) if report.exists() else ({"passed": None}, Counter())
        for reason, count in reasons.items():
            print(f"{count} skipped: {reason}")
    write_row(
        arguments.results,
        "tests",
        arguments.stage,
        [time.perf_counter() - begin],
        "s",
        status=status,
        timed_out=status == TIMED_OUT,
        **facts,
    )
    sys.exit(status)


if __name__ == "__main__":
    main()
