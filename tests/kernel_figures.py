"""The CUDA kernels compiled without a GPU: PTX, and what ptxas says of it. `python -m tests.kernel_figures` writes the
table in docs/kernels.md."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

from numba import cuda, types

from tl_fast.kernels.cuda_launch import KERNELS

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
# sm_90a is what an H100 or H200 runs; its code runs nowhere else.
ARCHITECTURES = ((8, 0), (9, 0), (9, 0, "a"))
BEGIN, END = "<!-- figures: python -m tests.kernel_figures -->\n", "<!-- end of figures -->\n"


def target(architecture: tuple) -> str:
    """What ptxas calls it: sm_80."""
    return "sm_" + "".join(map(str, architecture))


def ptx(name: str, architecture: tuple) -> str:
    kernel = KERNELS[name]
    signature = types.void(*kernel.arguments)
    device = mock.Mock(compute_capability=architecture)
    options = {"device": False, "abi": "numba", "cc": architecture, "launch_bounds": kernel.bounds}
    # Device functions are compiled for the GPU at hand.
    with mock.patch("numba.cuda.dispatcher.get_current_device", lambda: device):
        text, _ = cuda.compile(kernel.function, signature, **options)
    return text


def assemble(text: str, architecture: tuple, folder: Path) -> dict[str, int]:
    """ptxas's registers, static shared memory, stack frame and spilled bytes."""
    source, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(text)
    command = ["ptxas", f"-arch={target(architecture)}", "-v", source, "-o", binary]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    patterns = {
        "registers": r"Used (\d+) registers",
        "shared": r"(\d+) bytes smem",
        "stack": r"(\d+) bytes stack frame",
        "spilled": r"(\d+) bytes spill stores",
    }
    return {key: int(match[1]) if (match := re.search(pattern, report)) else 0 for key, pattern in patterns.items()}


def occupancy(registers: int, threads: int) -> int:
    """Blocks that a multiprocessor has registers for: 65,536, handed out by 8 a thread, at most 2,048 threads."""
    return min(65536 // (-(-registers // 8) * 8 * threads), 2048 // threads)


def table() -> list[tuple[str, str, int, int, int, int, int]]:
    """Rows of docs/kernels.md: (kernel, architecture, registers, static shared memory, stack, spilled, blocks)."""
    pattern = r"^\| ([^|]+?) \| (sm_\d+a?) " + r"\| (\d+) " * 5 + r"\|$"
    rows = re.findall(pattern, DOCUMENT.read_text(), re.M)
    return [(name, architecture, *map(int, figures)) for name, architecture, *figures in rows]


def main() -> None:
    import tempfile

    if not shutil.which("ptxas"):
        raise SystemExit("ptxas is not on PATH; it comes with the CUDA toolkit")
    columns = "kernel", "for", "registers", "static shared memory, bytes", "stack, bytes", "spilled, bytes"
    lines = [f"| {' | '.join(columns)} | blocks by registers |", "|---|---|---|---|---|---|---|"]
    for name, kernel in KERNELS.items():
        for architecture in ARCHITECTURES:
            with tempfile.TemporaryDirectory() as folder:
                figures = assemble(ptx(name, architecture), architecture, Path(folder))
            blocks = occupancy(figures["registers"], kernel.bounds[0])
            row = name, target(architecture), *figures.values(), blocks
            lines.append(f"| {' | '.join(map(str, row))} |")
            print(lines[-1], flush=True)
    text = DOCUMENT.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    DOCUMENT.write_text(before + "\n".join(lines) + "\n" + after)


if __name__ == "__main__":
    main()
