"""The CUDA kernels compiled without a GPU: PTX, and what ptxas says of it. `python -m tests.kernel_figures` writes the table in
docs/kernels.md."""
from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

from numba import cuda, types
from numba.np import numpy_support

from tl_fast.kernels import cuda_colour, cuda_geometry, cuda_targets
from tl_fast.plan import PLAN

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
ARCHITECTURES = ((8, 0), (9, 0))
BEGIN, END = "<!-- figures: python -m tests.kernel_figures -->\n", "<!-- end of figures -->\n"


def _array(kind: types.Type) -> types.Array:
    return types.Array(kind, 1, "C")


def _targets(kind: str, bfloat16: bool) -> types.Type:
    number, whole = types.float32, types.int64
    source = {"arrays": (_array(types.uint16), _array(number)), "bytes": (_array(types.uint8), _array(whole), _array(number))}[kind]
    return types.void(types.Tuple(source), whole, whole, _array(number), *[whole] * 5, number, types.boolean, *[whole] * 3, types.boolean,
                      _array(types.uint16 if bfloat16 else number), _array(types.int32))  # fmt: skip


_BYTES, _PLANS = _array(types.uint8), _array(numpy_support.from_dtype(PLAN))
KERNELS = {
    "images: geometry": (
        cuda_geometry.SHOW, cuda_geometry.BOUNDS,
        types.void(_BYTES, _array(numpy_support.from_dtype(cuda_geometry.REGION)), _PLANS, *[types.uint8] * 3, *[types.int64] * 2, _BYTES),
    ),
    "images: colours": (
        cuda_colour.FINISH, cuda_colour.BOUNDS,
        types.void(_BYTES, _BYTES, _PLANS, *[types.int64] * 4, _array(types.uint16), _array(types.uint16)),
    ),
    **{f"targets: {kind}, {'bfloat16' if bfloat16 else 'float32'}": (kernel, cuda_targets.BOUNDS, _targets(kind, bfloat16))
       for (kind, bfloat16), kernel in cuda_targets.KERNELS.items()},
}  # fmt: skip
"""Name -> (kernel, launch bounds, types of its arguments as `tl_fast.kernels.cuda` passes them)."""


def ptx(name: str, architecture: tuple[int, int]) -> str:
    kernel, bounds, signature = KERNELS[name]
    device = mock.Mock(compute_capability=architecture)
    with mock.patch("numba.cuda.dispatcher.get_current_device", lambda: device):  # device functions are compiled for the GPU at hand
        text, _ = cuda.compile(kernel, signature, device=False, abi="numba", cc=architecture, launch_bounds=bounds)
    return text


def assemble(text: str, architecture: tuple[int, int], folder: Path) -> dict[str, int]:
    """ptxas's registers, static shared memory, stack frame and spilled bytes."""
    source = folder / "kernel.ptx"
    source.write_text(text)
    command = ["ptxas", f"-arch=sm_{architecture[0]}{architecture[1]}", "-v", str(source), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {"registers": r"Used (\d+) registers", "shared": r"(\d+) bytes smem", "stack": r"(\d+) bytes stack frame",
             "spilled": r"(\d+) bytes spill stores"}  # fmt: skip
    return {key: int(match[1]) if (match := re.search(pattern, report)) else 0 for key, pattern in found.items()}


def occupancy(registers: int, threads: int) -> int:
    """Blocks that a multiprocessor has registers for: 65,536, handed out by 8 a thread, at most 2,048 threads."""
    return min(65536 // (-(-registers // 8) * 8 * threads), 2048 // threads)


def table() -> list[tuple[str, str, int, int, int, int, int]]:
    """Rows of docs/kernels.md: (kernel, architecture, registers, static shared memory, stack, spilled, blocks)."""
    rows = re.findall(r"^\| ([^|]+?) \| (sm_\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", DOCUMENT.read_text(), re.M)
    return [(name, architecture, *map(int, figures)) for name, architecture, *figures in rows]


def main() -> None:
    import tempfile

    if not shutil.which("ptxas"):
        raise SystemExit("ptxas is not on PATH; it comes with the CUDA toolkit")
    lines = ["| kernel | for | registers | static shared memory, bytes | stack, bytes | spilled, bytes | blocks by registers |",
             "|---|---|---|---|---|---|---|"]
    for name, (_, bounds, _) in KERNELS.items():
        for architecture in ARCHITECTURES:
            with tempfile.TemporaryDirectory() as folder:
                figures = assemble(ptx(name, architecture), architecture, Path(folder))
            row = name, f"sm_{architecture[0]}{architecture[1]}", *figures.values(), occupancy(figures["registers"], bounds[0])
            lines.append(f"| {' | '.join(map(str, row))} |")
            print(lines[-1], flush=True)
    text = DOCUMENT.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    DOCUMENT.write_text(before + "\n".join(lines) + "\n" + after)


if __name__ == "__main__":
    main()
